"""The client of policy servers, in front of servers on this machine that answer well, badly or not at all."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from local_server import Break, LocalServer, Reply, unused_port

from asn_rl.backends.servers import ServersConfig
from asn_rl.errors import BackendError, DataError, InvalidValue
from asn_rl.serving.client import EngineClient, Served, SGLangClient, derived_seed
from asn_rl.serving.sglang import PROCESSOR, arguments_of

PROMPTS = [[1, 2, 3], [4, 5]]


def answer(payload: dict[str, Any]) -> Reply:
    """As SGLang does: the last prompt token once more, for every token it may have."""
    ids = [payload["input_ids"][-1]] * payload["sampling_params"]["max_new_tokens"]
    meta = {"finish_reason": {"type": "length"}, "output_token_logprobs": [[-0.5, token, None] for token in ids]}
    return 200, {"text": "", "output_ids": ids, "meta_info": meta}


@pytest.fixture
def started() -> Iterator[Callable[..., tuple[LocalServer, SGLangClient]]]:
    """A server that answers as told, and a client of it and of further addresses."""
    closing: list[Callable[[], None]] = []

    def start(
        respond: Callable[[dict[str, Any]], Reply] = answer, *others: str, router: bool = False
    ) -> tuple[LocalServer, SGLangClient]:
        server = LocalServer(respond)
        config = ServersConfig((server.url, *others), backoff_s=0.01, retries=2, no_server_s=0.2)
        client = SGLangClient(config, router=router)
        closing.extend([client.close, server.die])
        return server, client

    yield start
    for close in closing:
        close()


Start = Callable[..., tuple[LocalServer, SGLangClient]]


def test_tokens_go_in_and_come_out(started: Start) -> None:
    server, client = started()
    subject: EngineClient = client
    found = subject.complete(
        PROMPTS, policy="math", max_new_tokens=2, num_generations=3, seeds=[7, 8], stop_token_ids=[9, 0]
    )
    assert found == [Served([3, 3], [-0.5, -0.5], "length")] * 3 + [Served([5, 5], [-0.5, -0.5], "length")] * 3
    sent = [payload["sampling_params"] for payload in server.payloads]
    for payload, sampling in zip(server.payloads, sent, strict=True):
        assert (payload["custom_logit_processor"], payload["return_logprob"]) == (PROCESSOR, True)
        assert sampling["custom_params"] == {"asn_policy": "math", "asn_budget": 2}
        assert (sampling["temperature"], sampling["top_k"], sampling["stop_token_ids"]) == (1.0, -1, [0, 9])
    assert {sampling["sampling_seed"] for sampling in sent} == {
        derived_seed(seed, g) for seed in (7, 8) for g in range(3)
    }
    assert len({sampling["sampling_seed"] for sampling in sent}) == 6


def test_without_a_policy_the_base_model_is_asked_plainly(started: Start) -> None:
    server, client = started()
    client.complete(PROMPTS, policy=None, max_new_tokens=2)
    for payload in server.payloads:
        assert "custom_logit_processor" not in payload
        assert not payload["sampling_params"].keys() & {"custom_params", "sampling_seed"}


def test_behind_a_router_the_arguments_are_in_the_string(started: Start) -> None:
    server, client = started(answer, router=True)
    client.complete(PROMPTS[:1], policy="math", max_new_tokens=2)
    (payload,) = server.payloads
    assert arguments_of(payload["custom_logit_processor"]) == {"asn_policy": "math", "asn_budget": 2}
    assert "custom_params" not in payload["sampling_params"]


def whole(**changes: Any) -> dict[str, Any]:
    body = answer({"input_ids": [3], "sampling_params": {"max_new_tokens": 2}})[1]
    return {**body, "meta_info": body["meta_info"] | changes}


ABORTED = {"type": "abort", "message": "the policy failed"}


@pytest.mark.parametrize(
    ("reply", "named"),
    [
        ((422, {"message": "unknown policy 'x'. Known: math."}), "status: .*status 422.*unknown policy 'x'"),
        ((400, {"message": "temperature=0.7 beside its policy"}), "status: .*400.*temperature=0.7"),
        ((200, b"no json"), "malformed: "),
        ((200, [1]), "malformed: "),
        ((200, {}), "malformed: .*KeyError"),
        ((200, whole(finish_reason=ABORTED)), "malformed: .*'abort'"),
        ((200, whole(output_token_logprobs=[[-0.5, 3, None]])), "malformed: .*1 logprobs for 2 tokens"),
        ((200, whole(output_token_logprobs=None)), "malformed: .*log-probs"),
        ((200, whole(output_token_logprobs=[[float("nan"), 3, None]] * 2)), "malformed: .*log-probs are no finite"),
    ],
)
def test_what_is_no_completion_fails_and_the_others_do_not(started: Start, reply: Reply, named: str) -> None:
    _, client = started(lambda payload: reply if payload["input_ids"] == PROMPTS[1] else answer(payload))
    good, bad = client.complete(PROMPTS, policy="x", max_new_tokens=2)
    assert good.failed is None
    assert (bad.completion_ids, bad.logprobs, bad.finish_reason) == ([], [], None)
    assert re.match(named, bad.failed or "", re.DOTALL)


def test_a_completion_that_a_server_gave_up_on_is_made_again(started: Start) -> None:
    def give_up_once(payload: dict[str, Any]) -> Reply:
        return (200, whole(finish_reason=ABORTED)) if len(server.payloads) == 1 else answer(payload)

    server, client = started(give_up_once)
    (found,) = client.complete(PROMPTS[:1], policy="math", max_new_tokens=2)
    assert (found.failed, found.completion_ids) == (None, [3, 3])
    assert client.pool.stats()[server.url]["retried"] == 1


def test_the_work_of_a_dead_server_goes_to_the_others(started: Start) -> None:
    def die(payload: dict[str, Any]) -> Reply:
        if len(first.payloads) > 2:
            first.die()
            raise Break
        return answer(payload)

    second, _ = started()
    first, client = started(die, second.url)
    found = client.complete(PROMPTS * 10, policy="math", max_new_tokens=1)
    assert [served.completion_ids for served in found] == [[3], [5]] * 10
    assert [served.failed for served in found] == [None] * 20
    assert not client.pool.stats()[first.url]["alive"]


def test_no_server_is_an_error_that_says_what_to_do() -> None:
    with (
        SGLangClient(ServersConfig((f"http://127.0.0.1:{unused_port()}",))) as client,
        pytest.raises(BackendError, match="Start one, correct urls"),
    ):
        client.complete(PROMPTS, policy="math", max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompts", "changes", "error", "named"),
    [
        ([[1], []], {}, DataError, "prompt 1"),
        ([[1], "text"], {}, DataError, "encode texts first"),
        ([[-1]], {}, DataError, "prompt 0"),
        ([[1]], {"max_new_tokens": 0}, InvalidValue, "max_new_tokens"),
        ([[1]], {"num_generations": 0}, InvalidValue, "num_generations"),
        ([[1]], {"seeds": [1, 2]}, InvalidValue, "seeds"),
    ],
)
def test_what_makes_no_sense_is_not_sent(
    started: Start, prompts: Any, changes: dict[str, Any], error: type[Exception], named: str
) -> None:
    server, client = started()
    with pytest.raises(error, match=named):
        client.complete(prompts, **{"policy": "math", "max_new_tokens": 2} | changes)
    assert server.payloads == []


def test_no_prompts_are_no_requests(started: Start) -> None:
    _, client = started()
    assert client.complete([], policy="math", max_new_tokens=2) == []


class Status(BaseHTTPRequestHandler):
    """Of a server that tells counts to whoever has the key."""

    COUNTS: ClassVar = {"processes": 1, "policies": {"math": {"requests": 3, "failed": 1}}, "failures": []}

    def do_GET(self) -> None:
        known = (self.path, self.headers["Authorization"]) == ("/asn_rl/status", "Bearer secret")
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(self.COUNTS).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def test_health_tells_what_a_server_says_or_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "secret")
    with ThreadingHTTPServer(("127.0.0.1", 0), Status) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        good, dead = f"http://127.0.0.1:{server.server_port}", f"http://127.0.0.1:{unused_port()}"
        with SGLangClient(ServersConfig((good + "/", dead), api_key_env="KEY")) as client:
            found = client.health()
        with SGLangClient(ServersConfig((good,))) as client:
            refused = client.health()
        server.shutdown()
    assert found[good] == Status.COUNTS
    assert "ConnectError" in found[dead]["problem"]
    assert "status 404" in refused[good]["problem"]
