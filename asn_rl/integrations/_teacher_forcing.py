"""Padded batches of token ids, what a policy sees along their completions, and what it says of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asn_rl.integrations._policy_lm_types import CUT, PolicyLMOutput
from asn_rl.ops.logprobs import entropy, expectation
from asn_rl.ops.sketch import build_sketch, expand
from asn_rl.placement import device_of
from asn_rl.protocols import LogitsBackend, Policy, TrainablePolicy
from asn_rl.replay import histories, replay
from asn_rl.rollout import RolloutConfig
from asn_rl.types import Observation, PolicyOutput, Prompt, State, Trajectories
from asn_rl.unroll import unroll

IGNORED = -100
"""label of tokens that are not scored, in transformers and TRL"""


@dataclass(frozen=True)
class Texts:
    """The texts of a padded batch that have a completion: B' of B rows, S completion tokens in all."""

    prompts: list[list[int]]
    completions: list[list[int]]
    where: tuple[Tensor, Tensor]
    """(S,) rows and (S,) columns of the completion tokens, row by row"""
    scored: Tensor
    """(B, T) bool, True at completion tokens that are labelled"""

    def spread(self, values: Tensor, *, back: int = 0) -> Tensor:
        """(B, T, ...) with (S, ...) values at the completion tokens, or so many columns before them; 0 elsewhere."""
        rows, columns = (index.to(values.device) for index in self.where)
        return values.new_zeros(*self.scored.shape, *values.shape[1:]).index_put((rows, columns - back), values)


def texts(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Texts:
    """Where completions begin and end.

    Args:
        input_ids: (B, T) padded on either side.
        attention_mask: (B, T) 0 at padding; None: there is none.
        labels: (B, T), a completion begins at its first label; rows without any have none. None: all but the first
            token of each row is completion.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    labelled = real & ((real.cumsum(1) > 1) if labels is None else labels != IGNORED)
    completion = real & (labelled.cumsum(1) > 0)
    used = completion.any(1).nonzero().squeeze(-1).tolist()
    return Texts(
        [input_ids[row][real[row] & ~completion[row]].tolist() for row in used],
        [input_ids[row][completion[row]].tolist() for row in used],
        completion.nonzero(as_tuple=True),  # type: ignore[arg-type]
        labelled,
    )


def teacher_forced(policy: Policy, backend: LogitsBackend, found: Texts, config: RolloutConfig) -> Trajectories:
    """What the policy sees along the completions, token for token as a rollout shows it; no policy is run.

    Raises:
        DataError: a text without a prompt, a completion over the token budget, or a token without base probability.
    """
    prompts = [Prompt(str(i), "") for i in range(len(found.prompts))]
    return replay(_Onlooker(policy), backend, prompts, found.completions, config, prompt_ids=found.prompts)[0]


def score_texts(
    policy: TrainablePolicy, backend: LogitsBackend, found: Texts, config: RolloutConfig, *, logits: bool
) -> PolicyLMOutput:
    """What the policy says of a batch, differentiable in its parameters.

    Args:
        logits: also the log-probs of the whole vocabulary.
    """
    shape = found.scored.shape
    if not found.prompts:  # all completions of a batch may be masked; the gradient is then zero, not missing
        nothing = 0.0 * torch.cat([p.flatten() for p in policy.parameters()]).sum()
        zeros = nothing.expand(shape)[:, 1:]
        return PolicyLMOutput(nothing, nothing.expand(*shape, backend.vocab_size) if logits else None, zeros, zeros)
    seen = teacher_forced(policy, backend, found, config).to(device_of(policy))
    output = unroll(policy, seen, torch.arange(len(seen.points), device=seen.points.device)).logprobs
    sketch, point = seen.observations.sketch, seen.points.unsqueeze(-1)
    # Inside a point the policy keeps the base model's proportions: log-prob and entropy over V follow from points.
    chosen = (output - sketch.log_mass).gather(-1, point).squeeze(-1) + seen.base_logprobs
    spread = entropy(output) + expectation(output, sketch.inner_entropy)
    scored = found.scored.to(output.device)[:, 1:]
    log_probs = torch.where(scored, found.spread(chosen.clamp_min(CUT))[:, 1:], 0.0)
    weights = None
    if logits:
        shift = torch.where(sketch.mask, output - sketch.log_mass, 0.0)
        weights = found.spread(_log_weights(policy, backend, found, shift, config).clamp_min(CUT), back=1)
    return PolicyLMOutput(
        -log_probs.sum() / scored.sum().clamp_min(1),
        weights,
        log_probs,
        torch.where(scored, found.spread(spread)[:, 1:], 0.0),
    )


def _log_weights(policy: Policy, backend: LogitsBackend, found: Texts, shift: Tensor, config: RolloutConfig) -> Tensor:
    """(S, V) log-probs over the vocabulary at each completion token, for a policy's shifts (S, N) of the points."""
    parts = shift.to(backend.device).split([len(ids) for ids in found.completions])
    expanded = [shift] * len(parts)
    for part in backend.score_many(found.prompts, found.completions):
        i = part.index
        tracked = "history" in policy.needs
        own = histories(found.completions[i], config.tracked, backend.device).tokens if tracked else None
        expanded[i] = expand(part.logits, build_sketch(part.logits, config.size, own)[1], parts[i])
    return torch.cat(expanded)


class _Onlooker:
    """Asks for what a policy reads, and answers as the base model."""

    def __init__(self, policy: Policy) -> None:
        self.needs = policy.needs

    def initial_state(self, batch_size: int, device: torch.device) -> State | None:
        return None

    def __call__(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        return PolicyOutput(obs.sketch.log_mass)
