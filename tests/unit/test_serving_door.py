"""What stands before vLLM: checks of a request's arguments, reports over HTTP, the client and the launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from local_server import LocalServer, Reply

from asn_policies import OrderStatisticsNetwork
from asn_rl.backends.servers import ServersConfig
from asn_rl.checkpoint import save_policy
from asn_rl.errors import AsnError
from asn_rl.serving.arguments import Arguments, check_params
from asn_rl.serving.reports import PolicyReports
from asn_rl.serving.settings import STATUS_PATH, ServingSettings
from asn_rl.serving.status import Failure, StatusFile
from asn_rl.serving.vllm_client import VLLMClient
from asn_rl.serving.vllm_server import command, cpu_environment, main

NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 16, "repetition_penalty": 1.0}


def params(extra: dict[str, Any] | None, **changes: Any) -> Any:
    return SimpleNamespace(**(NEUTRAL | changes), extra_args=extra)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServingSettings:
    save_policy(tmp_path / "policies" / "math", OrderStatisticsNetwork(), fingerprint="base")
    save_policy(tmp_path / "policies" / "foreign", OrderStatisticsNetwork(), fingerprint="another")
    settings = ServingSettings(tmp_path / "policies", tmp_path / "status", fingerprint="base")
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    return settings


@pytest.fixture
def status(settings: ServingSettings) -> StatusFile:
    return StatusFile(settings.status)


@pytest.mark.usefixtures("status")
def test_a_request_with_a_policy_gets_a_budget() -> None:
    given = params({"asn_policy": "math", "asn_request": "a"})
    check_params(given)
    assert Arguments.of(given) == Arguments("math", 16, "a")
    named = params({"asn_policy": "math", "asn_budget": 64, "asn_request": "mine"})
    check_params(named)
    assert Arguments.of(named) == Arguments("math", 64, "mine")
    plain = params(None, temperature=0.3)
    check_params(plain)
    assert Arguments.of(plain) is None


@pytest.mark.usefixtures("status")
@pytest.mark.parametrize(
    ("extra", "changes", "reason"),
    [
        ({"asn_policy": "math", "asn_request": None}, {}, "asn_request is missing.*reports.PolicyReports"),
        ({"asn_policy": "maths"}, {}, "Did you mean 'math'"),
        ({"asn_policy": "../policies/math"}, {}, "unknown policy"),
        ({"asn_policy": ["math"]}, {}, "unknown policy"),
        ({"asn_policy": "foreign"}, {}, "fingerprint another"),
        ({"asn_polciy": "math"}, {}, "Did you mean 'asn_policy'"),
        ({"asn_budget": 3}, {}, "without asn_policy"),
        ({"asn_policy": "math", "asn_budget": 15}, {}, "asn_budget must be a whole number >= max_tokens"),
        ({"asn_policy": "math", "asn_budget": True}, {}, "asn_budget"),
        ({"asn_policy": "math"}, {"temperature": 0.0}, "temperature must be 1.0 beside a policy"),
        ({"asn_policy": "math"}, {"top_k": 50}, "top_k"),
        ({"asn_policy": "math"}, {"thinking_token_budget": 9}, "thinking_token_budget"),
    ],
)
def test_what_a_policy_cannot_serve_is_refused_as_a_value_error(
    extra: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    named = {"asn_request": "a"} | extra if "asn_policy" in extra else extra
    with pytest.raises(ValueError, match=reason) as caught:
        check_params(params({name: value for name, value in named.items() if value is not None}, **changes))
    assert isinstance(caught.value, AsnError)


@pytest.mark.usefixtures("settings")
def test_an_engine_that_serves_no_policies_refuses_them() -> None:
    with pytest.raises(ValueError, match="no process of this engine serves policies"):
        check_params(params({"asn_policy": "math", "asn_request": "a"}))


@pytest.fixture
def api(status: StatusFile) -> Iterator[TestClient]:
    """An API server whose engine fails the policy `broken`, and once those that begin with `lost`."""
    app = FastAPI()
    app.add_middleware(PolicyReports)
    lost: list[str] = []

    @app.post("/v1/completions", response_model=None)
    @app.post("/inference", response_model=None)
    def complete(body: dict[str, Any]) -> dict[str, str] | StreamingResponse:
        own = body.get("vllm_xargs") or {}
        key, policy = f"{own.get('asn_request')}#7", own.get("asn_policy", "")
        if policy == "broken":
            status.failed(Failure(key, "broken", "it is broken"))
        if policy.startswith("lost") and policy not in lost:
            lost.append(policy)
            status.failed(Failure(key, policy, "its row was lost", transient=True))
        if body.get("stream"):
            return StreamingResponse(iter(["data: pl\n\n", "data: ain\n\n"]), media_type="text/event-stream")
        return {"text": "plain", **body.get("echo", {})}

    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/completions", "/inference"])
@pytest.mark.parametrize("name", [{}, {"asn_request": "a"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_policy_is_an_error_and_no_completion(
    api: TestClient, path: str, name: dict[str, str], stream: bool
) -> None:
    """Whether the request has a name or none, and nothing of a stream comes before the error."""
    failed = api.post(path, json={"stream": stream, "vllm_xargs": {"asn_policy": "broken"} | name})
    assert failed.status_code == 422
    assert failed.json()["error"]["message"] == "the policy failed: it is broken"
    fine = api.post(path, json={"stream": stream, "vllm_xargs": {"asn_policy": "math"} | name})
    assert (fine.status_code, fine.text) == (200, "data: pl\n\ndata: ain\n\n" if stream else '{"text":"plain"}')
    (failure,) = api.get(STATUS_PATH).json()["failures"]
    assert (failure["key"].startswith("a."), failure["policy"]) == (bool(name), "broken")


def test_requests_without_a_policy_pass_as_they_are(api: TestClient) -> None:
    for body in ({}, {"vllm_xargs": None}, {"vllm_xargs": {"other": 1}}, {"use_beam_search": True}):
        assert api.post("/v1/completions", json=body | {"echo": body}).json() == {"text": "plain"} | body
    for raw in (b"{", b"[" * 100_000):
        assert api.post("/v1/completions", content=raw).status_code >= 400  # the server's own answer


def test_a_request_that_was_lost_is_answered_so_that_it_is_sent_again(api: TestClient) -> None:
    body = {"vllm_xargs": {"asn_policy": "lost", "asn_request": "a"}}
    assert [api.post("/v1/completions", json=body).status_code for _ in range(2)] == [503, 200]


@pytest.mark.parametrize("field", ["background", "use_beam_search"])
def test_a_request_whose_failure_would_not_be_seen_is_refused(api: TestClient, field: str) -> None:
    answer = api.post("/v1/completions", json={field: True, "vllm_xargs": {"asn_policy": "math"}})
    assert answer.status_code == 400
    assert f"{field} must be left out beside a policy, got True" in answer.json()["error"]["message"]


def test_the_client_sends_tokens_and_gets_tokens() -> None:
    def respond(payload: dict[str, Any]) -> Reply:
        if payload["prompt"] == [9]:
            return 422, {"error": {"message": "the policy failed: it is broken"}}
        logprobs = {"token_logprobs": [-0.5, -0.25]}
        choice = {"text": "ab", "token_ids": [4, 2], "finish_reason": "stop", "logprobs": logprobs}
        return 200, {"choices": [choice]}

    with LocalServer(respond) as server, VLLMClient(ServersConfig((server.url,))) as client:
        answers = client.complete([[5, 6], [9]], policy="math", max_new_tokens=8, num_generations=2, seeds=[1, 2])
        client.complete([[5]], policy=None, max_new_tokens=8)
    assert [answer.completion_ids for answer in answers] == [[4, 2], [4, 2], [], []]
    assert answers[0].logprobs == [-0.5, -0.25]
    assert "it is broken" in str(answers[2].failed)
    sent = [payload for payload in server.payloads if "vllm_xargs" in payload]
    assert len({payload["seed"] for payload in sent}) == 4
    assert sent[0]["vllm_xargs"] == {"asn_policy": "math", "asn_budget": 8}
    assert sent[0]["max_tokens"] == 8
    assert {name: sent[0][name] for name in ("temperature", "top_p", "top_k", "logprobs")} == {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "logprobs": 0,
    }  # fmt: skip
    (plain,) = [payload for payload in server.payloads if "vllm_xargs" not in payload]
    assert "seed" not in plain


def test_only_cpus_get_settings_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu, on_cpu = (command("model", "127.0.0.1", 8000, cpu=cpu, extra=["--max-model-len", "9"]) for cpu in (0, 1))
    assert [word for word in on_cpu if word not in on_gpu] == ["--enforce-eager", "--no-enable-chunked-prefill"]
    assert on_gpu[-2:] == ["--max-model-len", "9"]
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "8")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    found = cpu_environment(2, 1)
    assert "VLLM_CPU_KVCACHE_SPACE" not in found  # the user's own
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == str(min(os.sched_getaffinity(0)))


def test_the_launcher_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "smollm2-135m-instruct", "--policies", str(tmp_path / "none")]) == 1
    assert "existing folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "asn_policy" in capsys.readouterr().out
    assert "vllm" not in sys.modules
