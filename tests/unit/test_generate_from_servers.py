"""Candidates from servers: over HTTP, in vLLM's format, from a toy base model behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from local_server import LocalServer, Reply

from asn_policies import Pipeline
from asn_rl.backends.server_generation import ServerGenerator
from asn_rl.backends.servers import ServersConfig
from asn_rl.backends.toy import ToyBackend
from asn_rl.config import from_dict, to_dict
from asn_rl.errors import BackendError
from asn_rl.job import Job, JobConfig, generate, verify
from asn_rl.job.config import GenerationServers
from asn_rl.labelling import generate as generating
from asn_rl.labelling.grid import Grid
from asn_rl.labelling.store import CandidateStore, read_candidates
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.serving.client import derived_seed
from asn_rl.types import Prompt

TOY = ToyBackend.random(32, seed=0)
PROMPTS = [Prompt(f"p{i}", f"w{i} w2") for i in range(1, 5)]
STEPS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"name": "greedy"}],
    "base": [],
    "cold": [{"name": "temperature", "params": {"temperature": 0.5}}],
}
SERVED = {0.0: "greedy", 1.0: "base", 0.5: "cold"}
GRID = Grid(tuple(p.id for p in PROMPTS), tuple(STEPS), (3, 4, 5))
CONFIG = RolloutConfig(max_new_tokens=6)
SEEDS = {derived_seed(seed, p.id): seed for p in PROMPTS for seed in (*GRID.seeds, 1000, 1001)}
"""a cell's seed by that of its request"""


def vllm(payload: dict[str, Any]) -> Reply:
    """What vLLM answers, with the toy's tokens."""
    policy = Pipeline(STEPS[SERVED[payload["temperature"]]])
    text = " ".join(TOY.words[token] for token in payload["prompt"])
    prompt = next(prompt for prompt in PROMPTS if prompt.content == text)
    run = rollout(policy, TOY, [prompt], RolloutConfig(payload["max_tokens"]), seed=SEEDS[payload["seed"]])
    reason = "stop" if run.terminated[0] else "length"
    choice = {"text": run.completions[0], "token_ids": run.completion_ids[0], "finish_reason": reason}
    return 200, {"choices": [choice | {"logprobs": None}]}


def candidates_of(folder: Path, *servers: LocalServer) -> tuple[int, generating.FromServers]:
    pool = ServersConfig(tuple(s.url for s in servers), concurrency=2, retries=2, backoff_s=0.01, no_server_s=0.5)
    codec = {"encode": TOY.encode, "decode": TOY.decode, "eos_token_ids": TOY.eos_token_ids}
    with ServerGenerator(pool, "vllm", **codec) as generator:
        by_id = {prompt.id: prompt for prompt in PROMPTS}
        source = generating.FromServers(generator, STEPS, {}, by_id, CONFIG.max_new_tokens, ["greedy"])
        return generating.generate(CandidateStore(GRID, folder), source, folder), source


def assert_whole(folder: Path) -> None:
    store = CandidateStore(GRID, folder)
    assert store.present.all()
    assert store.copies == 0
    for i, prompt in enumerate(PROMPTS):
        for candidate in read_candidates(store.locations(i)):
            seed = GRID.seeds[0] if candidate.heuristic == "greedy" else candidate.seed
            alone = rollout(Pipeline(STEPS[candidate.heuristic]), TOY, [prompt], CONFIG, seed=seed)
            assert candidate.completion_ids == alone.completion_ids[0]


def test_every_cell_comes_once_also_when_a_server_dies(tmp_path: Path) -> None:
    def mortal(payload: dict[str, Any]) -> Reply:
        if len(first.payloads) == 4:
            first.die()
        return vllm(payload)

    with LocalServer(mortal) as first, LocalServer(vllm) as second:
        left_out, _ = candidates_of(tmp_path, first, second)
    assert left_out == 0
    assert_whole(tmp_path)


def test_what_a_server_refuses_is_left_out_counted_and_had_the_next_time(tmp_path: Path) -> None:
    def picky(payload: dict[str, Any]) -> Reply:
        return (400, {"error": "no hot prompts"}) if SEEDS[payload["seed"]] == 4 else vllm(payload)

    with LocalServer(picky) as server:
        left_out, source = candidates_of(tmp_path, server)
    assert left_out == 8  # two sampled heuristics, four prompts
    assert source.failures == {"status": 8}
    assert "status 400" in source.examples["status"]
    assert "no hot prompts" in source.examples["status"]
    with LocalServer(vllm) as server:
        assert candidates_of(tmp_path, server)[0] == 0
        assert {SEEDS[payload["seed"]] for payload in server.payloads} == {4}
    assert_whole(tmp_path)


def test_failures_are_counted_by_reason_whatever_the_server_says(tmp_path: Path) -> None:
    """A text that no file can hold is one of them, and takes nothing else with it."""

    def broken(payload: dict[str, Any]) -> Reply:
        if SEEDS[payload["seed"]] == 4:
            return 400, {"error": f"request {len(server.payloads)}"}
        status, answer = vllm(payload)
        return status, answer if SEEDS[payload["seed"]] == 5 else {
            "choices": [answer["choices"][0] | {"text": "\ud800"}]
        }

    with LocalServer(broken) as server:
        left_out, source = candidates_of(tmp_path, server)
    assert source.failures == {"status": 8, "malformed": left_out - 8}
    assert source.examples.keys() == source.failures.keys()
    assert "surrogates" in source.examples["malformed"]
    assert CandidateStore(GRID, tmp_path).present.sum() == GRID.size - left_out == 8
    with LocalServer(vllm) as server:
        assert candidates_of(tmp_path, server)[0] == 0
    assert_whole(tmp_path)


def test_a_job_generates_from_servers_and_names_what_is_missing(tmp_path: Path) -> None:
    rows = "".join(f'{{"id": "{p.id}", "prompt": "{p.content}", "split": "{s}"}}\n'
                   for p, s in zip(PROMPTS, ["train", "train", "selection", "test"], strict=True))  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text(rows)

    def job(server: LocalServer) -> Job:
        pool = ServersConfig((server.url,), retries=0, backoff_s=0.01, no_server_s=0.2)
        config = from_dict(JobConfig, {
            "backend": {"kind": "toy", "model": "random:32:0"},
            "data": {"source": "jsonl", "arguments": {"path": str(tmp_path / "prompts.jsonl")}},
            "rewards": [{"function": "length_budget", "arguments": {"budget": 3}}],
            "rollout": {"max_new_tokens": 6},
            "heuristics": [{"name": name, "processors": steps} for name, steps in STEPS.items()],
            "generate": {"num_generations": 2, "servers": to_dict(GenerationServers(pool, "vllm"))},
        })  # fmt: skip
        return Job(config, tmp_path / f"run-{server.port}")

    with LocalServer(vllm) as server:
        whole = job(server)
        generate(whole)
        assert all(part.ok for part in verify(whole).values())
    with LocalServer(lambda payload: (422, {"error": "never"})) as server:
        refused = job(server)
        with pytest.raises(BackendError, match="6 of 6 cells could not be generated") as error:
            generate(refused)
        assert "(6 cells: status, such as" in str(error.value)
        assert 'status 422: {"error": "never"})' in str(error.value)
        assert len(verify(refused)["selection"].missing) == 6


def test_servers_that_render_prompts_themselves_need_no_base_model_here(tmp_path: Path) -> None:
    def chat(payload: dict[str, Any]) -> Reply:
        choice = {"message": {"content": payload["messages"][0]["content"]}, "finish_reason": "stop"}
        return 200, {"choices": [choice]}

    rows = [
        f'{{"prompt": "{p.content}", "split": "{s}"}}' for p, s in zip(PROMPTS, ("train", "selection"), strict=False)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    with LocalServer(chat) as server:
        servers = {"kind": "openai", "model": "m", "pool": {"urls": [server.url]}}
        config = from_dict(JobConfig, {
            "backend": {"model": "nobody/has-this-model"},
            "data": {"source": "jsonl", "arguments": {"path": str(tmp_path / "prompts.jsonl")}},
            "rewards": [{"function": "length_budget", "arguments": {"budget": 3}}],
            "heuristics": [{"name": "base", "processors": []}],
            "generate": {"num_generations": 2, "servers": servers},
        })  # fmt: skip
        generate(Job(config, tmp_path / "run"))
        assert len(server.payloads) == 4
