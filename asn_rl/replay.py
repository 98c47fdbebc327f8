"""Recover trajectories for text that was sampled elsewhere, by teacher-forced passes of the base model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asn_rl.errors import DataError
from asn_rl.observing import checked_entries, checked_needs, history_entry, layer_entry
from asn_rl.ops.context import context_vector
from asn_rl.ops.history import History, empty_history, remember
from asn_rl.ops.sketch import build_sketch, points_of
from asn_rl.placement import place
from asn_rl.protocols import LogitsBackend, Policy, Scored
from asn_rl.rollout import RolloutConfig, captured_layers, checked_probs, concatenate, encoded_prompts
from asn_rl.stopping import before_stop, has_ended
from asn_rl.types import PER_COMPLETION, Observation, PolicyOutput, Prompt, Trajectories


@dataclass(frozen=True)
class Mismatch:
    """How far the log-probs that were recorded elsewhere are from the replayed ones, nats a token."""

    mean_absolute: float
    largest: float
    tokens: int


@torch.no_grad()
def replay(
    policy: Policy,
    backend: LogitsBackend,
    prompts: Sequence[Prompt],
    completion_ids: Sequence[Sequence[int]],
    config: RolloutConfig,
    *,
    sample: Sequence[int] | None = None,
    logprobs: Sequence[Sequence[float]] | None = None,
    conditions: Tensor | None = None,
    prompt_ids: Sequence[Sequence[int]] | None = None,
    capture: Collection[str] = (),
) -> tuple[Trajectories, Mismatch | None]:
    """Trajectories of given completions under `policy`, which need not have sampled them.

    Args:
        prompts, completion_ids: one entry a completion; ids as they were sampled, never re-tokenised text.
        sample: index of each completion within its group; default 0.
        logprobs: log-probs recorded where the text was sampled. They are kept as the behaviour log-probs, and the
            mismatch to the replayed ones is reported.
        conditions: (B, n) what the policy is conditioned on.
        prompt_ids: token ids of the prompts, which are then not encoded again; default: the backend encodes them.
        capture: optional observation entries to record beside those the policy needs, for another policy to read.

    Raises:
        DataError: no completions, an empty one, one over the token budget, a token that the base model gives no
            probability, a prompt that is empty or leaves no room in the context, or lists of different lengths.
    """
    _check_lengths(prompts, completion_ids, sample, logprobs, conditions, prompt_ids)
    place(policy, backend.device)
    ids = [_checked_completion(backend, p, row, config) for p, row in zip(prompts, completion_ids, strict=True)]
    if prompt_ids is None:
        encoded = encoded_prompts(backend, prompts, config.max_new_tokens)
    else:
        encoded = [_checked_prompt(backend, p, row, config) for p, row in zip(prompts, prompt_ids, strict=True)]
    needs = checked_entries("capture", capture) | checked_needs(policy)
    hidden = bool(needs & {"hidden", "prompt_embedding"})
    parts: dict[int, Trajectories] = {}
    layers = captured_layers(needs, config)
    for scored in backend.score_many(encoded, ids, hidden=hidden, layers=layers):
        i = scored.index
        row = _Row(prompts[i], encoded[i], ids[i], 0 if sample is None else sample[i], _row(conditions, i))
        parts[i] = _replay_one(policy, backend, row, scored, config, needs)
    parts_in_order = [parts[i] for i in range(len(prompts))]
    trajectories = concatenate(parts_in_order)
    if logprobs is None:
        return replace(trajectories, recorded=False), None
    recorded = torch.tensor([value for row in logprobs for value in row], dtype=torch.float32)
    gap = (recorded - trajectories.behaviour_logprobs).abs()
    mismatch = Mismatch(gap.mean().item(), gap.max().item(), len(gap))
    return trajectories.with_logprobs(recorded), mismatch


def _check_lengths(
    prompts: Sequence[Prompt],
    completion_ids: Sequence[Sequence[int]],
    sample: Sequence[int] | None,
    logprobs: Sequence[Sequence[float]] | None,
    conditions: Tensor | None,
    prompt_ids: Sequence[Sequence[int]] | None,
) -> None:
    if not prompts:
        raise DataError("there are no completions to replay; check where they come from")
    columns = {
        "completion_ids": completion_ids, "sample": sample, "logprobs": logprobs, "conditions": conditions,
        "prompt_ids": prompt_ids,
    }  # fmt: skip
    for name, column in columns.items():
        if column is not None and len(column) != len(prompts):
            raise DataError(f"{name} has {len(column)} entries for {len(prompts)} prompts; give one a completion")
    for i, (ids, row) in enumerate(zip(completion_ids, logprobs or (), strict=False)):
        if len(ids) != len(row):
            raise DataError(f"completion {i} has {len(ids)} tokens and {len(row)} recorded log-probs; give one a token")


@dataclass(frozen=True)
class _Row:
    """One completion to be replayed."""

    prompt: Prompt
    prompt_ids: Sequence[int]
    ids: list[int]
    sample: int
    condition: Tensor | None


def _checked_completion(backend: LogitsBackend, prompt: Prompt, ids: Sequence[int], config: RolloutConfig) -> list[int]:
    if not 0 < len(ids) <= config.max_new_tokens:
        raise DataError(
            f"a completion of prompt {prompt.id!r} has {len(ids)} tokens; it must have between 1 and "
            f"max_new_tokens={config.max_new_tokens}"
        )
    _check_vocabulary(backend, ids, f"a completion of prompt {prompt.id!r}", "sampled from another model or tokenizer")
    return list(ids)


def _checked_prompt(backend: LogitsBackend, prompt: Prompt, ids: Sequence[int], config: RolloutConfig) -> list[int]:
    room = backend.max_context - config.max_new_tokens
    if not 0 < len(ids) <= room:
        raise DataError(
            f"prompt {prompt.id!r} has {len(ids)} tokens; with max_new_tokens={config.max_new_tokens} it must have "
            f"between 1 and {room}, so that prompt and completion fit into the base model's context"
        )
    _check_vocabulary(backend, ids, f"prompt {prompt.id!r}", "encoded by another tokenizer")
    return list(ids)


def _check_vocabulary(backend: LogitsBackend, ids: Sequence[int], where: str, guess: str) -> None:
    unknown = next((token for token in ids if not 0 <= token < backend.vocab_size), None)
    if unknown is not None:
        raise DataError(
            f"token {unknown} in {where} is outside the base model's vocabulary of {backend.vocab_size}; was it "
            f"{guess}?"
        )


def _replay_one(
    policy: Policy,
    backend: LogitsBackend,
    row: _Row,
    scored: Scored,
    config: RolloutConfig,
    needs: frozenset[str],
) -> Trajectories:
    device, ids = backend.device, row.ids
    logits, hidden = scored.logits, scored.hidden
    tokens = torch.tensor(ids, device=device).unsqueeze(-1)
    history = histories(ids, config.tracked, device) if "history" in needs else None
    sketch, point_map = build_sketch(logits, config.size, None if history is None else history.tokens)
    seen = (logits, sketch, point_map)
    points = points_of(logits, tokens, point_map)
    if (points < 0).any():
        t = int((points < 0).flatten().nonzero()[0])
        raise DataError(
            f"token {ids[t]} at position {t} of a completion of prompt {row.prompt.id!r} has no probability under the "
            "base model; was it sampled from another model or tokenizer?"
        )
    base = (logits.gather(-1, tokens).float() - point_map.log_normalizer).squeeze(-1)
    position = torch.arange(len(ids), device=device)
    before = torch.cat([base.new_zeros(1), -base[:-1]])
    context = context_vector(sketch, position, config.max_new_tokens - position, before, before.cumsum(0))
    embedding = hidden[:1] if hidden is not None and "prompt_embedding" in needs else None
    own_hidden = hidden if "hidden" in needs else None
    condition = None if row.condition is None else row.condition.unsqueeze(0).to(device)
    last_point = torch.cat([points.new_full((1,), -1), points[:-1, 0]]) if "last_point" in needs else None
    history_now = None if history is None else history_entry(*seen, history, position.unsqueeze(-1))
    layer_now = None if scored.layer_logits is None else layer_entry(*seen, scored.layer_logits)
    obs = Observation(sketch, context, own_hidden, embedding, condition, last_point, history_now, layer_now)
    spread = {name: _spread(getattr(obs, name), len(ids)) for name in PER_COMPLETION}
    output = _run_policy(policy, replace(obs, **spread), device)
    inner = base - sketch.log_mass.gather(-1, points).squeeze(-1)
    return Trajectories(
        prompts=[row.prompt],
        sample=[row.sample],
        prompt_ids=[row.prompt_ids],
        completion_ids=[ids],
        completions=[before_stop(backend.decode(ids), config.stop)],
        terminated=torch.tensor([has_ended(backend, ids, config.stop)]),
        observations=obs.to("cpu"),
        points=points.squeeze(-1).cpu(),
        behaviour_logprobs=(output.gather(-1, points).squeeze(-1) + inner).cpu(),
        base_logprobs=base.cpu(),
    )


def _run_policy(policy: Policy, obs: Observation, device: torch.device) -> Tensor:
    """(T, N) log-probs along one completion; step by step where the policy carries state."""
    state = policy.initial_state(1, device)
    if state is None:
        logprobs = policy(obs).logprobs
        checked_probs(policy, logprobs)
        return logprobs
    rows = []
    for t in range(len(obs.context)):
        output: PolicyOutput = policy(obs.index(slice(t, t + 1)), state)
        state = output.state
        checked_probs(policy, output.logprobs)
        rows.append(output.logprobs)
    return torch.cat(rows)


def histories(ids: Sequence[int], bound: int, device: torch.device) -> History:
    """(T, P) tables of one completion: what was known before each of its tokens."""
    now = empty_history(1, bound, device)
    tables = []
    for t, token in enumerate(ids):
        tables.append(now)
        now = remember(now, torch.tensor([token], device=device), t)
    return History(*(torch.cat([getattr(table, name) for table in tables]) for name in ("tokens", "count", "last")))


def _spread(row: Tensor | None, length: int) -> Tensor | None:
    return None if row is None else row.expand(length, -1)


def _row(conditions: Tensor | None, i: int) -> Tensor | None:
    return None if conditions is None else conditions[i]
