"""The pool in front of real inference servers: two processes of `transformers serve` with the embedded base model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from local_server import unused_port

from asn_policies import Pipeline
from asn_rl.backends.embedded import resolve_model
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.server_generation import GenerationRequest, ServerCompletion, ServerGenerator
from asn_rl.backends.servers import RequestFailure, ServerPool, ServersConfig
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt

MODEL = "smollm2-135m-instruct"
GREEDY = [{"name": "greedy"}]
PROMPTS = ["What is the capital of France?", "Name an animal.", "What is 3 + 4?"]
TOKENS = 14
"""not 12: an end-of-sequence token that fills the budget is reported as a truncation"""
SAMPLING = {"do_sample": True, "top_k": 0, "eos_token_id": 2, "pad_token_id": 2}
"""what the model's own generation_config.json leaves out; without it the server decodes greedily"""


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[bytes]
    url: str


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Running]]:
    """Two servers that are ready. They end with the module, killed or not."""
    with ExitStack() as stack:
        started = [_start(stack, tmp_path_factory.mktemp("serve") / "log.txt") for _ in range(2)]
        for server in started:
            with ServerPool(ServersConfig((server.url,))) as pool:
                pool.check(wait_s=120)
        yield started


def _start(stack: ExitStack, log: Path) -> Running:
    port = unused_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", resolve_model(MODEL)]
    command += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    out = stack.enter_context(log.open("wb"))
    process = stack.enter_context(subprocess.Popen(command, stdout=out, stderr=out, env=environment))
    stack.callback(process.kill)  # runs before the process is waited for
    return Running(process, f"http://127.0.0.1:{port}")


def generator(*servers: Running, extra: dict[str, Any] | None = None, **settings: Any) -> ServerGenerator:
    config = ServersConfig(tuple(server.url for server in servers), **{"concurrency": 2, "backoff_s": 0.05} | settings)
    return ServerGenerator(config, "openai", model=resolve_model(MODEL), extra=extra)


@pytest.fixture(scope="module")
def in_process(smollm: HFBackend) -> dict[str, tuple[str, bool]]:
    """Greedy text of each prompt and whether it ended by itself, decoded here."""
    prompts = [Prompt(text, text) for text in PROMPTS]
    done = rollout(Pipeline(GREEDY), smollm, prompts, RolloutConfig(max_new_tokens=TOKENS))
    return {
        text: (completion, bool(terminated))
        for text, completion, terminated in zip(PROMPTS, done.completions, done.terminated, strict=True)
    }


def test_greedy_text_is_that_of_the_backend_here(
    running: list[Running], in_process: dict[str, tuple[str, bool]]
) -> None:
    with generator(*running) as subject:
        found = dict(subject.generate(GenerationRequest(prompt, GREEDY, 0, TOKENS) for prompt in PROMPTS))
    for i, prompt in enumerate(PROMPTS):
        text, terminated = in_process[prompt]
        assert found[i] == ServerCompletion(text, None, terminated, None)


def test_the_seed_decides_what_is_sampled(running: list[Running]) -> None:
    """One request at a time: this server's random state is that of its process."""
    processors = [{"name": "temperature", "params": {"temperature": 1.2}}, {"name": "top_p", "params": {"top_p": 0.95}}]
    seeds = [1, 2, 1]
    with generator(running[0], extra={"generation_config": json.dumps(SAMPLING)}, concurrency=1) as subject:
        requests = (GenerationRequest("Tell me a story.", processors, seed, 8) for seed in seeds)
        found = dict(subject.generate(requests))
    texts = [completion.text for _, completion in sorted(found.items()) if isinstance(completion, ServerCompletion)]
    assert texts[0] == texts[2]
    assert len(set(texts)) == 2


def test_work_of_a_killed_server_moves_and_the_death_of_the_last_is_named(
    running: list[Running], in_process: dict[str, tuple[str, bool]]
) -> None:
    first, second = running
    prompts = PROMPTS * 2
    requests = [GenerationRequest(prompt, GREEDY, i, TOKENS) for i, prompt in enumerate(prompts)]
    with generator(*running, no_server_s=0.5) as subject:
        answers = []
        for answer in subject.generate(requests):
            answers.append(answer)
            if len(answers) == 1:
                first.process.send_signal(signal.SIGKILL)
        assert sorted(index for index, _ in answers) == list(range(len(prompts)))
        for index, completion in answers:
            assert isinstance(completion, ServerCompletion)
            assert (completion.text, completion.terminated) == in_process[prompts[index]]
        stats = subject.pool.stats()
        assert sum(entry["answered"] for entry in stats.values()) == len(prompts)
        assert stats[first.url]["retried"] >= 1

        left = []
        for answer in subject.generate(requests):
            left.append(answer)
            if len(left) == 1:
                second.process.send_signal(signal.SIGKILL)
        assert sorted(index for index, _ in left) == list(range(len(prompts)))
        reasons = {completion.reason for _, completion in left if isinstance(completion, RequestFailure)}
        assert "no_server" in reasons
        assert reasons <= {"no_server", "refused"}
        assert not any(entry["alive"] for entry in subject.pool.stats().values())
