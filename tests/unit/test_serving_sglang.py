"""What stands between SGLang and the policies, without SGLang: `tests/contracts/test_sglang.py` has the real server."""

from __future__ import annotations

import gc
import json
import pickle
import sys
import weakref
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asn_policies import OrderStatisticsNetwork, Pipeline
from asn_rl.backends.embedded import resolve_model
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.checkpoint import save_policy
from asn_rl.errors import ConfigError, InvalidValue
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.serving import _sglang_cpu, sglang, sglang_server
from asn_rl.serving.host import PolicyHost
from asn_rl.serving.settings import ServingSettings, settings_from_environment
from asn_rl.serving.sglang import PROCESSOR, EngineRequests, PolicyProcessor, admit, arguments_of, processor_with
from asn_rl.types import Prompt

CONFIG = RolloutConfig(6)


class Request:
    """Of SGLang's `Req`, what a processor reads and writes."""

    def __init__(self, rid: str, chunks: int = 0, tokens: int = 6, **sampling: Any) -> None:
        self.rid, self.output_ids, self.inflight_middle_chunks = rid, array("q"), chunks
        self.sampling_params = SimpleNamespace(max_new_tokens=tokens, **sampling)
        self.to_finish: Any = None
        self.ended = False

    def finished(self) -> bool:
        return self.ended

    def parameters(self, policy: str | None = "learned", **more: Any) -> dict[str, Any]:
        return {"asn_policy": policy, "__req__": weakref.proxy(self)} | more


@pytest.fixture
def requests(toy: ToyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineRequests:
    torch.manual_seed(0)
    learned = OrderStatisticsNetwork()
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_policy(tmp_path / "policies" / "learned", learned, fingerprint=toy.fingerprint)
    save_policy(tmp_path / "policies" / "greedy", Pipeline([{"name": "greedy"}]), fingerprint=toy.fingerprint)
    abort = SimpleNamespace(FINISH_ABORT=lambda reason, status, kind: (reason, int(status), kind))
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_batch", abort)  # type: ignore[arg-type]
    return EngineRequests(PolicyHost(ServingSettings(tmp_path / "policies", tmp_path / "status", toy.fingerprint)))


def test_a_request_gets_the_log_probs_of_a_rollout_whatever_its_rows_neighbours(
    requests: EngineRequests, toy: ToyBackend, tmp_path: Path
) -> None:
    """Beside it: a prompt in the middle of its prefill, the request for a common prefix, one of unknown origin."""
    drawn = rollout(_learned(tmp_path), toy, [Prompt("0", "w3")], CONFIG)
    ids, last = list(drawn.completion_ids[0]), drawn.prompt_ids[0][-1]
    subject, chunk, prefix, greedy = Request("a"), Request("b", chunks=1), Request("c", tokens=0), Request("d")
    parameters = [chunk.parameters(), subject.parameters(), None, prefix.parameters(), greedy.parameters("greedy")]
    for token, expected in zip(ids, drawn.behaviour_logprobs.tolist(), strict=True):
        logits = toy.table[[last] * len(parameters)]
        weights = requests(logits.clone(), parameters)
        assert weights[1].log_softmax(-1)[token].item() == pytest.approx(expected, abs=2e-5)
        assert torch.equal(weights[[0, 3]], logits[[0, 3]])
        assert weights[2].softmax(-1).tolist() == [1.0] + [0.0] * (toy.vocab_size - 1)  # cannot be ended: it shows
        subject.output_ids.append(token)
        greedy.output_ids.append(int(weights[4].argmax()))
        last = token
    assert requests.host.requests == ["a", "d"]


def _learned(tmp_path: Path) -> Any:
    return OrderStatisticsNetwork.from_pretrained(tmp_path / "policies" / "learned")


def test_ended_requests_are_forgotten_and_withdrawn_ones_are_not(requests: EngineRequests, toy: ToyBackend) -> None:
    subjects = [Request(name) for name in "abc"]
    requests(toy.table[:3].clone(), [subject.parameters() for subject in subjects])
    for subject in subjects:
        subject.output_ids.append(1)
    subjects[1].ended = True
    requests(toy.table[:1].clone(), [subjects[0].parameters()])
    assert requests.host.requests == ["a", "c"]
    subjects[0].output_ids.append(2)
    dropped = subjects.pop(0)
    del dropped
    gc.collect()
    requests(toy.table[:1].clone(), [subjects[-1].parameters()])  # it comes back with the token it had
    assert requests.host.requests == ["c"]
    assert subjects[-1].to_finish is None


def test_requests_join_in_waves(requests: EngineRequests, toy: ToyBackend) -> None:
    """Each is prefilled by itself, then decoded with those before."""
    subjects: list[Request] = []
    for wave in (2, 30, 70):
        new = [Request(f"{wave}/{i}") for i in range(wave)]
        subjects += new
        for batch in (new, subjects):
            requests(toy.table[[3] * len(batch)], [subject.parameters() for subject in batch])
            for subject in batch:
                subject.output_ids.append(1)
    assert [subject.to_finish for subject in subjects] == [None] * 102


def test_the_plugin_acts_where_policies_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASN_RL_POLICIES", raising=False)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.tokenizer_manager", None)  # type: ignore[arg-type]
    sglang.plugin()
    monkeypatch.setenv("ASN_RL_POLICIES", "somewhere")
    with pytest.raises(ImportError):
        sglang.plugin()


def test_requests_that_cannot_be_served_are_ended_and_no_others(requests: EngineRequests, toy: ToyBackend) -> None:
    good, unknown, other, nameless = Request("a"), Request("b"), Request("c", temperature=0.7, top_k=3), Request("d")
    logits = toy.table[:4].clone()
    logits[0, 5] = torch.nan
    nan = Request("e")
    requests(logits[:1], [nan.parameters()])
    requests(
        toy.table[:4].clone(),
        [good.parameters(), unknown.parameters("nope"), other.parameters(), nameless.parameters(None)],
    )
    assert good.to_finish is None
    assert unknown.to_finish[0].startswith("unknown policy 'nope'. Known: greedy, learned.")
    assert unknown.to_finish[1] == 422
    assert "temperature=0.7, top_k=3 beside its policy" in other.to_finish[0]
    assert "unknown policy" in nameless.to_finish[0]
    assert "InvalidLogits" in nan.to_finish[0]


@pytest.mark.parametrize("beside", [[], [None]])
def test_rows_that_fail_can_be_drawn_from(requests: EngineRequests, toy: ToyBackend, beside: list[None]) -> None:
    """SGLang does so before it ends the request: NaN would reach its sampler."""
    good, nan, unknown, other = Request("a"), Request("b"), Request("c"), Request("d", temperature=0.7)
    parameters = [good.parameters(), nan.parameters(), unknown.parameters("nope"), other.parameters(), *beside]
    logits = toy.table[: len(parameters)].clone()
    logits[1] = torch.nan
    weights = requests(logits, parameters)
    assert "InvalidLogits" in nan.to_finish[0]
    assert weights.isnan().sum() == 0
    assert weights.softmax(-1)[1:].tolist() == [[1.0] + [0.0] * (toy.vocab_size - 1)] * (len(parameters) - 1)
    assert (weights[0] > -torch.inf).sum() > 1


def test_a_request_whose_place_is_lost_may_be_sent_again(requests: EngineRequests, toy: ToyBackend) -> None:
    subject = Request("a")
    subject.output_ids.append(3)  # its first token was drawn elsewhere
    requests(toy.table[:1].clone(), [subject.parameters()])
    assert subject.to_finish[1] == 503
    assert "start it again" in subject.to_finish[0]


def test_a_processor_never_raises(monkeypatch: pytest.MonkeyPatch, toy: ToyBackend) -> None:
    """Without an environment, and even where a request cannot be ended, nothing passes for plain sampling."""
    sglang._process_requests.cache_clear()
    monkeypatch.delenv("ASN_RL_POLICIES", raising=False)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_batch", None)  # type: ignore[arg-type]
    subject = Request("a")
    for parameters in ([subject.parameters()] * 2, [None, None], None):
        weights = PolicyProcessor()(toy.table[:2].clone(), parameters)
        assert weights.argmax(-1).tolist() == [0, 0]
        assert (weights > -torch.inf).sum().item() == 2


def test_the_string_is_the_class_by_reference() -> None:
    code = bytes.fromhex(json.loads(PROCESSOR)["callable"])
    assert len(code) < 60
    assert pickle.loads(code) is PolicyProcessor
    assert sglang._known_class(PROCESSOR) is PolicyProcessor


@given(st.one_of(st.text(), st.none(), st.dictionaries(st.text(), st.text()).map(json.dumps), st.binary()))
def test_no_other_string_is_ours(string: Any) -> None:
    assert arguments_of(string) is None
    assert sglang._known_class(string) is sglang.RefusedProcessor


@given(st.dictionaries(st.text().filter(lambda key: key != "callable"), st.integers() | st.text()))
def test_arguments_travel_in_the_string(arguments: dict[str, Any]) -> None:
    assert arguments_of(processor_with(arguments)) == arguments


def request(processor: Any = None, **sampling: Any) -> SimpleNamespace:
    return SimpleNamespace(custom_logit_processor=processor, sampling_params=sampling)


def test_every_way_to_name_a_policy_is_brought_into_one_form() -> None:
    arguments = {"asn_policy": "math", "asn_budget": 9}
    for made in (
        request(custom_params=arguments, max_new_tokens=9),
        request(PROCESSOR, custom_params=arguments, max_new_tokens=9),
        request(processor_with(arguments), max_new_tokens=9),
    ):
        admit(made)
        assert made.custom_logit_processor == PROCESSOR
        assert made.sampling_params == {"custom_params": arguments, "max_new_tokens": 9}


def test_requests_without_a_policy_are_left_alone() -> None:
    for sampling in ({}, {"custom_params": {"thinking_budget": 3}, "temperature": 0.2}):
        made = request(**sampling)
        admit(made)
        assert vars(made) == vars(request(**sampling))
    admit(SimpleNamespace())  # an embedding request


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (request('{"callable": "80049"}', custom_params={"asn_policy": "math"}), "custom_logit_processor"),
        (request([PROCESSOR]), "custom_logit_processor"),
        (request(PROCESSOR), "asn_policy"),
        (request(PROCESSOR, custom_params="math"), "asn_policy"),
        (request(custom_params={"asn_policy": 3}), "asn_policy"),
        (request(custom_params={"asn_policy": "math", "asn_budget": 8}, max_new_tokens=9), "asn_budget"),
        (request(custom_params={"asn_policy": "math", "asn_budget": True}), "asn_budget"),
        (request(custom_params={"asn_policy": "math", "asn_budget": 0}, max_new_tokens=0), "asn_budget"),
    ],
)
def test_requests_that_make_no_sense_are_refused_by_name(made: Any, named: str) -> None:
    with pytest.raises(InvalidValue, match=named):
        admit(made)


def test_stand_ins_can_be_imported_and_not_called() -> None:
    kernels = _sglang_cpu._kernels()
    assert callable(kernels.some_kernel)
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.some_kernel is not installed.*torch_native"):
        kernels.some_kernel(1)
    assert not hasattr(kernels, "__path__")


def test_the_launcher_starts_plain_sglang_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm: HFBackend
) -> None:
    folder = resolve_model("smollm2-135m-instruct")
    for name in ("ASN_RL_POLICIES", "ASN_RL_STATUS", "ASN_RL_FINGERPRINT", "ASN_RL_TRACKED"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("SYNC_TOKEN_IDS_ACROSS_TP", "false")
    given = ["--model", folder, "--policies", str(tmp_path), "--device", "cuda", "--status", str(tmp_path)]
    (tmp_path / "status-1.json").write_text("an earlier server's")
    command = sglang_server.prepare(*sglang_server._options([*given, "--", "--tp-size", "2"]))
    assert command[:2] == ["--model-path", folder]
    assert command[-4:] == ["--enable-custom-logit-processor", "--disable-overlap-schedule", "--tp-size", "2"]
    assert "--attention-backend" not in command
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert settings_from_environment().policies == tmp_path
    assert settings_from_environment().fingerprint == smollm.fingerprint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        (["--model", "m/m", "--policies", "nowhere", "--any-base-model", "--device", "cuda"], InvalidValue, "policies"),
        (["--model", "m/m", "--policies", ".", "--", "--speculative-algorithm", "NGRAM"], ConfigError, "speculative"),
    ],
)
def test_a_launch_that_makes_no_sense_is_refused(given: list[str], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        sglang_server.prepare(*sglang_server._options(given))
