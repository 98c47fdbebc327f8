"""Policies under an engine: versions, failures that stay with their request, and reports of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from local_server import wait_until
from torch import Tensor

from asn_policies import OrderStatisticsNetwork, Pipeline, RecurrentPolicy
from asn_rl.backends.toy import ToyBackend
from asn_rl.checkpoint import CONFIG, WEIGHTS, save_policy
from asn_rl.errors import ConfigError, InvalidValue, ServingError, UnknownName
from asn_rl.ops.sketch import SketchSize
from asn_rl.serving import PolicyDecoder, Row
from asn_rl.serving.host import Failure, PolicyHost, ServedRequest, check_policy_name, policy_names
from asn_rl.serving.settings import ServingSettings, settings_from_environment
from asn_rl.serving.status import is_reporting, read_status
from asn_rl.types import Observation, PolicyOutput

SKETCH = {"head": 6, "tail": 4}
SIZE = SketchSize(**SKETCH)
BUDGET = 8


class Picky(OrderStatisticsNetwork):
    """A policy with a fault: it cannot answer where the base model is almost certain."""

    def forward(self, obs: Observation, state: Any = None) -> PolicyOutput:
        if (obs.sketch.log_mass.amax(-1) > -0.01).any():
            raise ZeroDivisionError("too certain for me")
        return super().forward(obs, state)


def randomised(make: Callable[[], Any], seed: int) -> Any:
    """The same policy for the same seed."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        policy = make()
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


def put(folder: Path, name: str, policy: Any, fingerprint: str | None = "this base") -> Any:
    save_policy(folder / name, policy, base_model="a model", fingerprint=fingerprint, sketch=SKETCH)
    return policy


@pytest.fixture
def settings(tmp_path: Path) -> ServingSettings:
    (tmp_path / "policies").mkdir()
    put(tmp_path / "policies", "first", randomised(RecurrentPolicy, 1))
    return ServingSettings(tmp_path / "policies", tmp_path / "status", fingerprint="this base", tracked=3)


@pytest.fixture
def logits() -> Tensor:
    return ToyBackend.random(vocab=32, seed=0).table


def call(host: PolicyHost, logits: Tensor, requests: list[ServedRequest]) -> tuple[Tensor, list[Failure]]:
    return host(logits.clone(), requests)  # it may overwrite them


def request(key: str, tokens: list[int], policy: str = "first") -> ServedRequest:
    return ServedRequest(key, tokens, BUDGET, policy)


def oracle(policy: Any, logits: Tensor, rows: list[list[int]]) -> Tensor:
    """Weights after each row's last token, decoded from the beginning by a decoder of its own."""
    out = []
    for i, tokens in enumerate(rows):
        decoder = PolicyDecoder(policy, size=SIZE, tracked=3)
        for t in range(len(tokens) + 1):
            weights = decoder(logits[i : i + 1], [Row("k", tokens[:t], BUDGET)])
        out.append(weights)
    return torch.cat(out)


def test_a_request_ends_on_the_version_it_began_with(settings: ServingSettings, logits: Tensor) -> None:
    host, old = PolicyHost(settings), randomised(RecurrentPolicy, 1)
    call(host, logits[:1], [request("a", [])])
    new = put(settings.policies, "first", randomised(RecurrentPolicy, 2))
    call(host, logits[:2], [request("a", [3]), request("b", [])])
    got, failures = call(host, logits[:2], [request("a", [3, 4]), request("b", [5])])
    assert failures == []
    torch.testing.assert_close(got[:1], oracle(old, logits[:1], [[3, 4]]))
    torch.testing.assert_close(got[1:], oracle(new, logits[1:2], [[5]]))
    held = {id(version) for version in host._requests.values()}
    assert len(held) == 2
    host.forget(["a", "never seen"])
    assert host.requests == ["b"]
    call(host, logits[:1], [request("b", [])])  # a key may begin anew
    counts = read_status(settings.status)["policies"]["first"]
    assert {name: counts[name] for name in ("loads", "failed", "refused_loads")} == {
        "loads": 2,
        "failed": 0,
        "refused_loads": 0,
    }


def test_an_unknown_policy_leaves_the_other_rows_right(settings: ServingSettings, logits: Tensor) -> None:
    host = PolicyHost(settings)
    put(settings.policies, "second", Pipeline([{"name": "greedy"}]))
    rows = [request("a", []), request("b", [], "frist"), request("c", [], "second"), request("d", [], "../policies")]
    got, failures = call(host, logits[:4], rows)
    assert [(failure.key, failure.policy) for failure in failures] == [("b", "frist"), ("d", "../policies")]
    assert "Did you mean 'first'?" in failures[0].reason
    assert torch.equal(got[[1, 3]], logits[[1, 3]])
    torch.testing.assert_close(got[:1], oracle(randomised(RecurrentPolicy, 1), logits[:1], [[]]))
    assert (got[2] > -torch.inf).sum() == 1
    assert call(host, logits[:1], [request("b", [7], "frist")])[1] == failures[:1]  # to its end, and counted once
    assert read_status(settings.status)["policies"]["frist"]["failed"] == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_logits_of_one_row_are_that_rows_failure(settings: ServingSettings, logits: Tensor, bad: float) -> None:
    host, policy = PolicyHost(settings), randomised(RecurrentPolicy, 1)
    call(host, logits[:3], [request(key, []) for key in "abc"])
    broken = logits[:3].clone()
    broken[1] = bad
    got, failures = call(host, broken, [request(key, [2]) for key in "abc"])
    assert [failure.key for failure in failures] == ["b"]
    assert failures[0].reason.startswith("InvalidLogits")
    torch.testing.assert_close(got[[0, 2]], oracle(policy, logits[[0, 2]], [[2], [2]]))
    torch.testing.assert_close(got[1], broken[1], equal_nan=True)
    got, failures = call(host, logits[:3], [request(key, [2, 9]) for key in "abc"])
    assert [failure.key for failure in failures] == ["b"]
    torch.testing.assert_close(got[[0, 2]], oracle(policy, logits[[0, 2]], [[2, 9], [2, 9]]))


def test_a_policy_that_raises_fails_only_where_it_does(
    settings: ServingSettings, logits: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    put(settings.policies, "picky", randomised(Picky, 3))
    table = logits[:3].clone()
    table[2, 5] += 100
    host = PolicyHost(settings)
    got, failures = call(host, table, [request("a", [], "picky"), request("b", []), request("c", [], "picky")])
    assert failures == [Failure("c", "picky", "ZeroDivisionError: too certain for me")]
    torch.testing.assert_close(got[:1], oracle(randomised(Picky, 3), table[:1], [[]]))
    torch.testing.assert_close(got[1:2], oracle(randomised(RecurrentPolicy, 1), table[1:2], [[]]))
    assert torch.equal(got[2], table[2])
    assert "gets plain sampling: ZeroDivisionError" in caplog.text
    status = read_status(settings.status)
    assert [(entry["key"], entry["policy"]) for entry in status["failures"]] == [("c", "picky")]


def test_a_request_that_was_not_followed_fails(settings: ServingSettings, logits: Tensor) -> None:
    host = PolicyHost(settings)
    rows = [ServedRequest("a", [4], BUDGET, "first"), ServedRequest("b", [], 0, "first")]
    _, failures = call(host, logits[:2], rows)
    assert [failure.key for failure in failures] == ["a", "b"]
    assert "not seen from its first token" in failures[0].reason
    assert "budget" in failures[1].reason
    assert [failure.transient for failure in failures] == [True, False]


@pytest.mark.parametrize("tokens", [[], [3], [3, 4, 5]])
def test_a_request_that_lost_its_place_may_be_sent_again(
    settings: ServingSettings, logits: Tensor, tokens: list[int]
) -> None:
    """It is shown with the tokens it had, as vLLM does when it recomputes one in chunks, or with a token too many."""
    host = PolicyHost(settings)
    for seen in ([], [3]):
        call(host, logits[:1], [request("a", seen)])
    _, failures = call(host, logits[:1], [request("a", tokens)])
    assert [failure.transient for failure in failures] == ([] if not tokens else [True])
    assert [entry["transient"] for entry in read_status(settings.status)["failures"]] == [True] * len(failures)


def test_half_a_file_leaves_the_version_before_in_use(settings: ServingSettings, logits: Tensor) -> None:
    host, weights = PolicyHost(settings), settings.policies / "first" / WEIGHTS
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    for key in "ab":
        got, failures = call(host, logits[:1], [request(key, [])])
        assert failures == []
    torch.testing.assert_close(got, oracle(randomised(RecurrentPolicy, 1), logits[:1], [[]]))
    counts = read_status(settings.status)["policies"]["first"]
    assert (counts["refused_loads"], counts["loads"]) == (1, 1)
    assert "damaged" in counts["error"]
    weights.write_bytes(good)
    call(host, logits[:1], [request("c", [])])
    assert host.status.policies["first"]["loads"] == 2

    weights.write_bytes(b"")
    (settings.policies / "first" / CONFIG).unlink()
    assert call(host, logits[:1], [request("d", [])])[1] == []  # between removal and replacement
    fresh = PolicyHost(settings)
    assert "unknown policy 'first'" in call(fresh, logits[:1], [request("a", [])])[1][0].reason


def test_a_policy_of_another_base_model_is_refused_unless_told_otherwise(
    settings: ServingSettings, logits: Tensor
) -> None:
    put(settings.policies, "foreign", OrderStatisticsNetwork(), fingerprint="another base")
    put(settings.policies, "any", OrderStatisticsNetwork(), fingerprint=None)
    _, failures = call(PolicyHost(settings), logits[:2], [request("a", [], "foreign"), request("b", [], "any")])
    assert [failure.key for failure in failures] == ["a"]
    assert "fingerprint another base" in failures[0].reason
    unchecked = PolicyHost(ServingSettings(settings.policies, settings.status))
    assert call(unchecked, logits[:1], [request("a", [], "foreign")])[1] == []


def test_a_policy_that_engines_cannot_serve_is_refused_with_its_reason(
    settings: ServingSettings, logits: Tensor
) -> None:
    put(settings.policies, "hidden", OrderStatisticsNetwork(inputs=["prompt_embedding"], hidden_size=8))
    config = settings.policies / "evil" / CONFIG
    config.parent.mkdir()
    config.write_text(json.dumps({"policy": "os:system", "arguments": {"command": "true"}, "format_version": 1}))
    (config.parent / WEIGHTS).write_bytes(b"")
    _, failures = call(PolicyHost(settings), logits[:2], [request("a", [], "hidden"), request("b", [], "evil")])
    assert "hand logits and tokens" in failures[0].reason
    assert "not an nn.Module class" in failures[1].reason


def test_names_are_folders_of_the_folder_and_nothing_else(settings: ServingSettings) -> None:
    put(settings.policies, ".first-unfinished", OrderStatisticsNetwork())
    assert policy_names(settings.policies) == ["first"]
    for name in ("", ".", "..", "../policies/first", ".first-unfinished", str(settings.policies / "first"), "nope"):
        with pytest.raises(UnknownName):
            check_policy_name(settings.policies, name)


def test_settings_go_through_the_environment(settings: ServingSettings, tmp_path: Path) -> None:
    assert settings_from_environment(settings.environment()) == settings
    with pytest.raises(ConfigError, match="ASN_RL_POLICIES"):
        settings_from_environment({})
    with pytest.raises(ConfigError, match="ASN_RL_TRACKED"):
        settings_from_environment(settings.environment() | {"ASN_RL_TRACKED": "-3"})
    with pytest.raises(InvalidValue, match="existing folder"):
        ServingSettings(tmp_path / "nowhere", tmp_path)


def test_the_status_of_several_processes_is_summed(settings: ServingSettings, logits: Tensor) -> None:
    host = PolicyHost(settings)
    call(host, logits[:2], [request("a", []), request("b", [], "nope")])
    own = host.status.path
    wait_until(lambda: read_status(settings.status)["policies"].get("first", {}).get("tokens") == 1)
    assert own.name == f"status-{os.getpid()}.json"
    assert is_reporting(settings.status)
    assert not is_reporting(settings.policies)
    own.with_name("status-1.json").write_text(own.read_text())
    status = read_status(settings.status)
    assert status["processes"] == 2
    assert status["policies"]["first"] == {"requests": 2, "tokens": 2, "failed": 0, "loads": 2, "refused_loads": 0}
    assert [entry["key"] for entry in status["failures"]] == ["b", "b"]
    own.with_name("status-1.json").write_text("{")
    with pytest.raises(ServingError, match="damaged"):
        read_status(settings.status)
