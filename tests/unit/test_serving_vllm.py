"""Our logits processor under vLLM's own classes: the V1 runner's batch, and a context like the V2 runner's.

Runs where vLLM is installed: ASN_RL_VLLM_PYTHON -m pytest tests/unit/test_serving_vllm.py
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessors, validate_logits_processors_parameters
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    LogitsProcRequestState,
    build_custom_logits_processors_params_validator,
)
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from asn_policies import Pipeline, RecurrentPolicy
from asn_rl.checkpoint import save_policy
from asn_rl.ops.sketch import SketchSize
from asn_rl.serving import PolicyDecoder, Row
from asn_rl.serving.host import process_host
from asn_rl.serving.settings import ServingSettings
from asn_rl.serving.vllm import PolicyLogitsProcessor

NAME = "asn_rl.serving.vllm:PolicyLogitsProcessor"
VOCAB, EOS, BUDGET = 32, 31, 12
PROMPT = [1, 2, 3]
SKETCH = {"head": 6, "tail": 4}


def recurrent() -> RecurrentPolicy:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        policy = RecurrentPolicy()
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


POLICIES: dict[str, Any] = {
    "recurrent": recurrent(),
    "repetition": Pipeline([{"name": "repetition_penalty", "params": {"penalty": 1.5}}]),
}


@pytest.fixture(autouse=True)
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "policies").mkdir()
    for name, policy in POLICIES.items():
        save_policy(tmp_path / "policies" / name, policy, fingerprint="base", sketch=SKETCH)
    save_policy(tmp_path / "policies" / "foreign", POLICIES["recurrent"], fingerprint="another", sketch=SKETCH)
    settings = ServingSettings(tmp_path / "policies", tmp_path / "status", fingerprint="base")
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    process_host.cache_clear()
    yield
    process_host.cache_clear()


@pytest.fixture
def table() -> Tensor:
    return 2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))


def params(policy: str | None, **changes: Any) -> SamplingParams:
    made = SamplingParams(temperature=1.0, max_tokens=BUDGET, stop_token_ids=[EOS], **changes)
    made.extra_args = None if policy is None else {"asn_policy": policy, "asn_request": uuid.uuid4().hex}
    return made


class Oracle:
    """Each request decoded by itself."""

    def __init__(self) -> None:
        self.decoders: dict[str, PolicyDecoder] = {}

    def check(self, key: str, policy: str | None, logits: Tensor, tokens: list[int], got: Tensor) -> None:
        if policy is None:
            assert torch.equal(got, logits)
            return
        decoder = self.decoders.setdefault(key, PolicyDecoder(POLICIES[policy], size=SketchSize(**SKETCH)))
        torch.testing.assert_close(got, decoder(logits[None], [Row(0, list(tokens), BUDGET)])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_v1_rows_follow_their_requests(table: Tensor, asynchronous: bool) -> None:
    """Requests join, end, are preempted and come back while vLLM's batch moves their rows about."""
    torch.manual_seed(0)
    processor = PolicyLogitsProcessor(VllmConfig(), torch.device("cpu"), False)
    batch = _batch(6, processor)
    draw, oracle = random.Random(int(asynchronous)), Oracle()
    live: dict[str, tuple[str | None, CachedRequestState]] = {}
    preempted: list[str] = []
    comebacks = 0
    for step in range(80):
        for key in [key for key, (_, state) in live.items() if _is_over(state.output_token_ids)]:
            batch.remove_request(key)
            del live[key]
        if step % 7 == 3 and len(batch.req_id_to_index) > 1:
            preempted.append(draw.choice(sorted(batch.req_id_to_index)))
            batch.remove_request(preempted[-1])
        elif preempted and draw.random() < 0.5:
            key = preempted.pop(0)
            if asynchronous:  # then it returns with another list
                live[key][1].output_token_ids = list(live[key][1].output_token_ids)
            batch.add_request(live[key][1])
            comebacks += bool(live[key][1].output_token_ids)
        while len(batch.req_id_to_index) + len(preempted) < 6 and draw.random() < 0.6:
            key, policy = f"r{step}-{len(live)}", draw.choice(["recurrent", "repetition", None])
            given = params(policy)
            PolicyLogitsProcessor.validate_params(given)
            state = CachedRequestState(key, PROMPT, [], given, None, ([0],), 0, [])
            live[key] = (policy, state)
            batch.add_request(state)
        batch.condense()
        count = len(batch.req_id_to_index)
        if count > 2 and draw.random() < 0.4:
            batch.swap_states(0, count - 1)
        batch.refresh_metadata()
        states = [live[str(key)] for key in batch.req_ids]
        last = [state.output_token_ids[-1] if state.output_token_ids else PROMPT[-1] for _, state in states]
        logits = table[torch.tensor(last, dtype=torch.long)]
        got = processor.apply(logits.clone())
        for i, (policy, state) in enumerate(states):
            oracle.check(state.req_id, policy, logits[i], state.output_token_ids, got[i])
            state.output_token_ids.append(int(torch.multinomial(got[i].softmax(-1), 1)))
    assert comebacks > 2
    assert not process_host().status.failures
    assert len(oracle.decoders) > 10


def _batch(rows: int, *processors: PolicyLogitsProcessor) -> InputBatch:
    return InputBatch(rows, 64, 64, torch.device("cpu"), VOCAB, [16], [4], LogitsProcessors(processors))


def _is_over(tokens: list[int]) -> bool:
    return tokens[-1:] == [EOS] or len(tokens) == BUDGET


@pytest.mark.parametrize("seed", range(6))
def test_v2_rows_follow_their_slots(table: Tensor, seed: int) -> None:
    """Slots are reused, rows change places, long prompts get rows before they are read, and one is preempted."""
    slots = 4
    states = _states(slots)
    processor = PolicyLogitsProcessor(VllmConfig(), states)
    oracle, draw = Oracle(), random.Random(seed)
    torch.manual_seed(seed)
    live: dict[int, tuple[str, str | None, list[int], SamplingParams]] = {}
    for step in range(60):
        for slot in [slot for slot, (_, _, tokens, _) in live.items() if _is_over(tokens)]:
            del live[slot]
        if step == 20:  # preempted: it joins again, in another slot where one is free, as a new request with tokens
            key, policy, tokens, given = live.pop(sorted(live)[0])
            free = [slot for slot in range(slots) if slot not in live][-1]
            _join(states, free, tokens)
            assert processor.add_request(free, given) == (policy is not None)
            live[free] = (key, policy, tokens, given)
        for slot in [slot for slot in range(slots) if slot not in live and draw.random() < 0.5]:
            given = params(policy := draw.choice(["recurrent", "repetition", None]))
            PolicyLogitsProcessor.validate_params(given)
            _join(states, slot, [])
            assert processor.add_request(slot, given) == (policy is not None)
            live[slot] = (f"{slot}-{step}", policy, [], given)
            partial = _context({slot: []}, [slot])
            partial.seq_lens_upper_bound_np[0] = len(PROMPT) - 1
            raw = torch.randn(1, VOCAB)
            assert torch.equal(processor.apply(raw.clone(), partial), raw)  # half of its prompt is read
        order = draw.sample(sorted(live), len(live))
        if not order:
            continue
        context = _context({slot: tokens for slot, (_, _, tokens, _) in live.items()}, order)
        logits = table[context.input_ids]
        got = processor.apply(logits.clone(), context)
        for i, slot in enumerate(order):
            key, policy, tokens, _ = live[slot]
            oracle.check(key, policy, logits[i], tokens, got[i])
            tokens.append(int(torch.multinomial(got[i].softmax(-1), 1)))
            states.all_token_ids.gpu[slot, len(PROMPT) + len(tokens) - 1] = tokens[-1]
    assert not process_host().status.failures
    assert len(oracle.decoders) > 8


@pytest.mark.parametrize("slot", [0, 2])
def test_v2_a_preempted_request_comes_back_in_any_slot(table: Tensor, slot: int) -> None:
    """Nobody takes its former slot meanwhile, and a completion of the same request, further on, keeps its own."""
    states = _states(4)
    processor, oracle, given = PolicyLogitsProcessor(VllmConfig(), states), Oracle(), params("recurrent")
    texts: dict[str, list[int]] = {"preempted": [], "sibling": [8]}
    where = {"preempted": 0, "sibling": 1}
    for key, tokens in texts.items():
        _join(states, where[key], [])
        assert processor.add_request(where[key], given)
        if tokens:  # one step ahead
            _step(processor, oracle, table, {key: where[key]}, {key: []})
    for step in range(5):
        if step == 3:
            where["preempted"] = slot
            _join(states, slot, texts["preempted"])
            assert processor.add_request(slot, given)
        _step(processor, oracle, table, where, texts)
        for key, tokens in texts.items():
            tokens.append(7 + step)
            states.all_token_ids.gpu[where[key], len(PROMPT) + len(tokens) - 1] = tokens[-1]
    assert not process_host().status.failures


def _step(
    processor: PolicyLogitsProcessor,
    oracle: Oracle,
    table: Tensor,
    where: dict[str, int],
    texts: dict[str, list[int]],
) -> None:
    """One batch of requests with the recurrent policy, each compared with itself alone."""
    context = _context({where[key]: texts[key] for key in where}, list(where.values()))
    logits = table[context.input_ids]
    got = processor.apply(logits.clone(), context)
    for i, key in enumerate(where):
        oracle.check(key, "recurrent", logits[i], texts[key], got[i])


def _states(slots: int) -> Any:
    return LogitsProcRequestState(
        device=torch.device("cpu"), max_num_reqs=slots, vocab_size=VOCAB,
        all_token_ids=SimpleNamespace(gpu=torch.zeros(slots, 64, dtype=torch.int32)),  # type: ignore[arg-type]
        prompt_len=SimpleNamespace(np=np.zeros(slots, dtype=np.int32)),  # type: ignore[arg-type]
        prefill_len=SimpleNamespace(np=np.zeros(slots, dtype=np.int32)),  # type: ignore[arg-type]
        total_len=SimpleNamespace(),  # type: ignore[arg-type]
    )  # fmt: skip


def _join(states: Any, slot: int, tokens: list[int]) -> None:
    ids = [*PROMPT, *tokens]
    states.prompt_len.np[slot], states.prefill_len.np[slot] = len(PROMPT), len(ids)
    states.all_token_ids.gpu[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)


def _context(tokens: dict[int, list[int]], order: list[int]) -> LogitsContext:
    rows = torch.tensor(order)
    texts = [[*PROMPT, *tokens[slot]] for slot in order]
    return LogitsContext(
        expanded_idx_mapping=rows, idx_mapping=rows, idx_mapping_np=np.array(order),
        expanded_local_pos=torch.zeros_like(rows), input_ids=torch.tensor([text[-1] for text in texts]),
        pos=torch.tensor([len(text) - 1 for text in texts]),
        seq_lens_upper_bound_np=np.array([len(text) for text in texts]),
    )  # fmt: skip


def test_placeholders_instead_of_tokens_fail_loudly(table: Tensor) -> None:
    processor = PolicyLogitsProcessor(VllmConfig(), torch.device("cpu"), False)
    batch = _batch(2, processor)
    state = CachedRequestState("a", PROMPT, [], params("recurrent"), None, ([0],), 0, [])
    batch.add_request(state)
    batch.refresh_metadata()
    processor.apply(table[:1].clone())
    state.output_token_ids.append(-1)
    assert torch.equal(processor.apply(table[:1].clone()), table[:1])
    assert "placeholders" in process_host().status.failures[0]["reason"]


def test_an_error_of_ours_leaves_the_engine_alive_and_is_reported(
    table: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = PolicyLogitsProcessor(VllmConfig(), torch.device("cpu"), False)
    batch = _batch(2, processor)
    batch.add_request(CachedRequestState("a", PROMPT, [], params("recurrent"), None, ([0],), 0, []))
    batch.refresh_metadata()
    monkeypatch.setattr(process_host(), "settings", None)  # whatever: a host that raises
    monkeypatch.setattr(type(process_host()), "__call__", lambda *_: 1 / 0)
    assert torch.equal(processor.apply(table[:1].clone()), table[:1])
    (failure,) = process_host().status.failures
    assert "ZeroDivisionError" in failure["reason"]
    assert failure["transient"]


def test_with_both_entry_point_and_flag_a_policy_acts_once(table: Tensor) -> None:
    config = VllmConfig()
    first, second = (PolicyLogitsProcessor(config, torch.device("cpu"), False) for _ in range(2))
    batch = _batch(2, first, second)
    batch.add_request(CachedRequestState("a", PROMPT, [], params("recurrent"), None, ([0],), 0, []))
    batch.refresh_metadata()
    once = first.apply(table[:1].clone())
    assert torch.equal(second.apply(once.clone()), once)
    assert not torch.equal(once, table[:1])


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_bad_requests_are_refused_where_vllm_validates(runner: str) -> None:
    """Both runners' validators find our class by its name and turn its errors into answers."""

    def validate(given: SamplingParams) -> None:
        if runner == "v1":
            validate_logits_processors_parameters([NAME], given)
        else:
            build_custom_logits_processors_params_validator([NAME])(given)

    validate(params(None, top_p=0.5))
    with pytest.raises(VLLMValidationError, match="no process of this engine serves policies"):
        validate(params("recurrent"))
    process_host()
    validate(params("recurrent"))
    for given, reason in (
        (params("recurent"), "Did you mean 'recurrent'"),
        (params("../policies/recurrent"), "unknown policy"),
        (params("foreign"), "fingerprint another"),
        (params("recurrent", top_p=0.9), "top_p must be 1.0 beside a policy"),
        (params("recurrent", repetition_penalty=1.1), "repetition_penalty"),
    ):
        with pytest.raises(VLLMValidationError, match=reason):
            validate(given)


def test_speculative_decoding_is_refused_in_v2() -> None:
    from asn_rl.errors import ConfigError

    class Speculative:
        speculative_config = "draft"

    with pytest.raises(ConfigError, match="speculative"):
        PolicyLogitsProcessor(Speculative(), _states(2))


def test_without_settings_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch, table: Tensor) -> None:
    """The package may be installed beside a vLLM that serves no policies."""
    monkeypatch.delenv("ASN_RL_POLICIES")
    processor = PolicyLogitsProcessor(VllmConfig(), torch.device("cpu"), False)
    processor.update_state(None)
    assert torch.equal(processor.apply(table.clone()), table)
    with pytest.raises(ValueError, match="ASN_RL_POLICIES"):
        PolicyLogitsProcessor.validate_params(params("recurrent"))
