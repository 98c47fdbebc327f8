"""A real SGLang server with our policies: the embedded base model in float32, on the CPU.

The server prefills prompts in chunks and withdraws requests every few steps, as it does under load.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from engine_servers import MODEL, Running
from local_server import wait_until

from asn_policies import OrderStatisticsNetwork, Pipeline, RecurrentPolicy, TokenFeatureNetwork
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.servers import ServersConfig
from asn_rl.checkpoint import save_policy
from asn_rl.replay import replay
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.serving.client import Served, SGLangClient
from asn_rl.serving.sglang import PROCESSOR
from asn_rl.types import Prompt

BOUND = 1e-3
"""nats between a served and a replayed log-prob in float32"""
GREEDY = Pipeline([{"name": "greedy"}])
PROMPTS = ["What is the capital of France?", "Name an animal.", "Write a long poem about the sea and its storms."]
TOKENS = 8


def randomised(policy: Any, seed: int, scale: float = 0.1) -> Any:
    """Far from the base model, but not so far that it tells apart what float32 rounds differently."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return policy


POLICIES = {
    "greedy": GREEDY,
    "learned": randomised(OrderStatisticsNetwork(), 0),
    "recurrent": randomised(RecurrentPolicy(), 1, 0.03),
    "history": randomised(TokenFeatureNetwork(), 2),
    "min_p": Pipeline([{"name": "min_p", "params": {"min_p": 0.1}}]),
}


@pytest.fixture(scope="module")
def running(smollm: HFBackend, sglang_server: Running) -> Running:
    """The server, with policies it can serve and two that it cannot."""
    metadata = {"base_model": MODEL, "fingerprint": smollm.fingerprint}
    for name, policy in POLICIES.items():
        save_policy(sglang_server.policies / name, policy, **metadata)
    broken = randomised(OrderStatisticsNetwork(), 3)
    torch.nn.init.constant_(next(broken.parameters()), torch.nan)
    save_policy(sglang_server.policies / "broken", broken, **metadata)
    save_policy(sglang_server.policies / "foreign", GREEDY, base_model="another", fingerprint="0" * 16)
    return sglang_server


@pytest.fixture
def client(running: Running) -> Iterator[SGLangClient]:
    with SGLangClient(ServersConfig((running.url,), concurrency=64, retries=0)) as client:
        yield client
    assert httpx.get(running.url + "/health", timeout=30).is_success  # whatever happened, it lives


def send(client: SGLangClient, bodies: Sequence[dict[str, Any]]) -> list[Any]:
    """Answers, or failures, to requests that are under way at the same time."""
    answers = dict(client.pool.post(client.path, bodies, dict))
    return [answers[i] for i in range(len(bodies))]


def as_served(client: SGLangClient, answer: Any) -> Served:
    return client._served(client._read(answer) if isinstance(answer, dict) else answer)


def served(client: SGLangClient, asked: Sequence[tuple[list[int], str | None]], tokens: int = TOKENS) -> list[Served]:
    """One completion of each (prompt, policy), all in one batch."""
    answers = send(client, [client.payload(ids, policy, tokens, None, []) for ids, policy in asked])
    return [as_served(client, answer) for answer in answers]


def gap(backend: HFBackend, name: str, text: str, answers: Sequence[Served], tokens: int = TOKENS) -> float:
    """Largest distance between served log-probs and those of a replay."""
    assert [answer.failed for answer in answers] == [None] * len(answers)
    ids, logprobs = [answer.completion_ids for answer in answers], [answer.logprobs for answer in answers]
    prompts = [Prompt(text, text)] * len(answers)
    policy = POLICIES.get(name, Pipeline([]))
    _, mismatch = replay(policy, backend, prompts, ids, RolloutConfig(tokens), logprobs=logprobs)
    assert mismatch is not None
    return mismatch.largest


def test_policies_side_by_side_give_the_log_probs_of_a_replay(client: SGLangClient, smollm: HFBackend) -> None:
    """Requests with policies of every kind and without one, in one batch that is withdrawn and prefilled in chunks."""
    names = [*POLICIES, None]
    asked = [(smollm.encode(text), name) for text in PROMPTS for name in names]
    answers = send(client, [client.payload(ids, name, TOKENS, 0, []) for ids, name in asked])
    assert max(answer["meta_info"]["num_retractions"] for answer in answers) > 0
    completions = [as_served(client, answer) for answer in answers]
    gaps = {
        (text, name): gap(smollm, str(name), text, [completions[i * len(names) + j]])
        for i, text in enumerate(PROMPTS)
        for j, name in enumerate(names)
    }
    assert max(gaps.values()) < BOUND, gaps


def test_greedy_tokens_are_those_of_a_rollout(client: SGLangClient, smollm: HFBackend) -> None:
    here = rollout(GREEDY, smollm, [Prompt(text, text) for text in PROMPTS], RolloutConfig(24))
    there = client.complete([smollm.encode(text) for text in PROMPTS], policy="greedy", max_new_tokens=24)
    assert [answer.completion_ids for answer in there] == [list(ids) for ids in here.completion_ids]
    assert [answer.finish_reason == "stop" for answer in there] == here.terminated.tolist()
    assert {value for answer in there for value in answer.logprobs} == {0.0}


def test_completions_of_one_prompt(client: SGLangClient, smollm: HFBackend, running: Running) -> None:
    """By our client, and by SGLang's own `n`, which prefills the prompt in a request without tokens."""
    ids = smollm.encode(PROMPTS[1])
    ours = client.complete([ids], policy="learned", max_new_tokens=TOKENS, num_generations=3, seeds=[7])
    body = client.payload(ids, "learned", TOKENS, None, [])
    body["sampling_params"]["n"] = 3
    theirs = httpx.post(running.url + "/generate", json=body, timeout=60).json()
    answers = ours + [as_served(client, answer) for answer in theirs]
    assert len(answers) == 6
    assert gap(smollm, "learned", PROMPTS[1], answers) < BOUND


def test_what_fails_fails_alone(client: SGLangClient, smollm: HFBackend, running: Running) -> None:
    """A policy that is unknown, that yields NaN, and that was made for another base model, among others."""
    ids = smollm.encode(PROMPTS[0])
    names = ["learned", "unknown", None, "broken", "foreign", "../policies/learned"]
    good, unknown, plain, broken, foreign, path = served(client, [(ids, name) for name in names])
    assert "unknown policy 'unknown'. Known: broken" in (unknown.failed or "")
    assert "InvalidPolicyOutput" in (broken.failed or "")
    assert "trained on base model 'another'" in (foreign.failed or "")
    assert "unknown policy '../policies/learned'" in (path.failed or "")
    assert unknown.completion_ids == broken.completion_ids == foreign.completion_ids == path.completion_ids == []
    assert gap(smollm, "learned", PROMPTS[0], [good]) < BOUND
    assert gap(smollm, "", PROMPTS[0], [plain]) < BOUND
    status = client.health()[running.url]
    assert status["policies"]["broken"]["failed"] == 1
    assert status["policies"]["foreign"]["refused_loads"] == 1
    assert status["policies"]["learned"]["failed"] == 0
    assert {failure["policy"] for failure in status["failures"]} == set(names) - {"learned", None}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"temperature": 0.7, "top_p": 0.9}, "temperature=0.7, top_p=0.9"),
        ({"temperature": 0}, "top_k=1"),
        ({"min_p": 0.1, "top_k": 5}, "top_k=5, min_p=0.1"),
        ({"repetition_penalty": 1.2, "presence_penalty": 0.5}, "presence_penalty=0.5, repetition_penalty=1.2"),
        ({"custom_params": {"asn_policy": ["greedy"]}}, "asn_policy"),
        ({"custom_params": {"asn_policy": "greedy", "asn_budget": 2}}, "asn_budget"),
        ({"custom_params": {"asn_budget": 20}}, "asn_policy"),
    ],
)
def test_what_contradicts_the_policy_is_refused_by_name(running: Running, asked: dict[str, Any], named: str) -> None:
    sampling = {"max_new_tokens": 4, "custom_params": {"asn_policy": "greedy"}} | asked
    body = {"text": "Hello", "sampling_params": sampling, "custom_logit_processor": PROCESSOR}
    answer = httpx.post(running.url + "/generate", json=body, timeout=30)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]


class Smuggled:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_request_carries_code(client: SGLangClient, running: Running, tmp_path: Path) -> None:
    path = tmp_path / "touched"
    code = pickle.dumps(Smuggled(path))
    pickle.loads(code)
    path.unlink()  # the pickle would do it
    strings = [json.dumps({"callable": code.hex()}), json.dumps({"callable": code.hex(), "asn_policy": "greedy"})]
    strings += [json.dumps({"callable": "00"}), "no json", "[]"]
    sampling = {"sampling_params": {"max_new_tokens": 2, "custom_params": {"asn_policy": "greedy"}}}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    for string in strings:
        bodies = [("/generate", sampling | {"text": "a"}), ("/generate", sampling | {"text": ["a", "b"]})]
        bodies += [
            ("/generate", sampling | {"text": "a", "return_sampling_mask": True}),
            ("/v1/chat/completions", chat),
        ]
        for where, body in bodies:
            answer = httpx.post(running.url + where, json=body | {"custom_logit_processor": string}, timeout=30)
            assert (answer.status_code, path.exists()) == (400, False)


def test_arguments_survive_a_router_and_the_policy_sees_its_budget(client: SGLangClient, smollm: HFBackend) -> None:
    """SGLang's router drops custom_params; a request cut short by the client still has the budget of its policy."""
    ids, routed = smollm.encode(PROMPTS[1]), SGLangClient(client.config, router=True)
    body = routed.payload(ids, "learned", TOKENS, None, [])
    assert "custom_params" not in body["sampling_params"]
    short = client.payload(ids, "learned", 40, None, [])
    short["sampling_params"]["max_new_tokens"] = TOKENS
    first, second = (as_served(client, answer) for answer in send(client, [body, short]))
    assert gap(smollm, "learned", PROMPTS[1], [first]) < BOUND
    assert gap(smollm, "learned", PROMPTS[1], [second], tokens=40) < BOUND
    assert gap(smollm, "learned", PROMPTS[1], [second]) > BOUND


def test_a_new_version_is_served_while_old_requests_finish_on_theirs(
    client: SGLangClient, running: Running, smollm: HFBackend
) -> None:
    folder, ids = running.policies / "changing", smollm.encode(PROMPTS[1])
    metadata = {"base_model": MODEL, "fingerprint": smollm.fingerprint}
    save_policy(folder, GREEDY, **metadata)
    long = client.payload(ids, "changing", 64, None, [])
    long["sampling_params"]["ignore_eos"] = True

    def loads() -> int:
        return client.health()[running.url]["policies"].get("changing", {}).get("loads", 0)

    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(send, client, [long])
        wait_until(lambda: loads() == 1, 60)
        save_policy(folder, POLICIES["learned"], **metadata)
        (new,) = client.complete([ids], policy="changing", max_new_tokens=TOKENS)
        assert not old.done()
        (folder / "model.safetensors").write_bytes(b"half")  # a damaged third version: the second stays
        (third,) = client.complete([ids], policy="changing", max_new_tokens=TOKENS)
    finished = as_served(client, old.result()[0])
    assert finished.logprobs == [0.0] * 64
    assert gap(smollm, "learned", PROMPTS[1], [new, third]) < BOUND
    counts = client.health()[running.url]["policies"]["changing"]
    assert (counts["loads"], counts["refused_loads"], counts["failed"]) == (2, 1, 0)
