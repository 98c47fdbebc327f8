"""The context vector: what a policy knows about the generation beside the sketch, with fixed entries and units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from asn_rl.errors import InvalidValue
from asn_rl.ops.sketch import Sketch


@dataclass(frozen=True)
class ContextEntry:
    name: str
    unit: str
    low: float
    high: float


CONTEXT = (
    ContextEntry("position", "log2(1 + tokens generated)", 0.0, 24.0),
    ContextEntry("tokens_left", "log2(1 + tokens left of the budget)", 0.0, 24.0),
    ContextEntry("entropy", "nats, base model, over the vocabulary", 0.0, 20.0),
    ContextEntry("varentropy", "nats^2, variance of the surprise", 0.0, 400.0),
    ContextEntry("max_logprob", "nats, most probable token", -20.0, 0.0),
    ContextEntry("effective_support", "nats, -log sum p^2 over the vocabulary", 0.0, 20.0),
    ContextEntry("last_surprise", "nats, -log p_base of the previous token; 0 at the start", 0.0, 100.0),
    ContextEntry("mean_surprise", "nats, mean of the surprises so far; 0 at the start", 0.0, 100.0),
)
CONTEXT_SIZE = len(CONTEXT)


def mean_surprise(sketch: Sketch) -> Tensor:
    """(..., N) expected -log p of a base-model draw from each point, nats; exact. 0 where empty."""
    return torch.where(sketch.mask, sketch.inner_entropy - sketch.log_mass, 0.0)


def entropy(sketch: Sketch) -> Tensor:
    """(...) entropy of the base distribution over the vocabulary, nats; exact."""
    return (sketch.log_mass.exp() * mean_surprise(sketch)).sum(-1)


def varentropy(sketch: Sketch) -> Tensor:
    """(...) variance of the surprise, nats^2; takes the surprise inside a point as constant."""
    mass, surprise = sketch.log_mass.exp(), mean_surprise(sketch)
    # A point of mass 0 may have a surprise beyond fp32: a token that was banned by a huge negative logit.
    deviation = torch.where(mass > 0, surprise - entropy(sketch).unsqueeze(-1), 0.0)
    return (mass * deviation.square()).sum(-1)


def collision_entropy(sketch: Sketch) -> Tensor:
    """(...) Renyi entropy of order two, -log sum_i p_i^2, nats; takes p as constant inside a point."""
    doubled = torch.where(sketch.mask, 2 * sketch.log_mass - sketch.log_count, -math.inf)
    return -torch.logsumexp(doubled, -1)


def context_vector(
    sketch: Sketch, position: Tensor, tokens_left: Tensor, last_surprise: Tensor, surprise_sum: Tensor
) -> Tensor:
    """(..., C) fp32 context, entries as in `CONTEXT`, clamped to their documented bounds.

    Args:
        position, tokens_left: (...) tokens generated so far, tokens the budget still allows.
        last_surprise, surprise_sum: (...) nats, base-model surprise of the last token, and of all so far.
    """
    position, tokens_left = position.float(), tokens_left.float()
    entries = (
        torch.log2(1 + position),
        torch.log2(1 + tokens_left),
        entropy(sketch),
        varentropy(sketch),
        sketch.logprobs.amax(-1),
        collision_entropy(sketch),
        last_surprise.float(),
        surprise_sum.float() / position.clamp_min(1),
    )
    stacked = torch.stack(entries, -1)
    return stacked.clamp(*_bounds(stacked.device))


def check_context(context: Tensor) -> None:
    """Refuse contexts (..., C) that were not made by `context_vector`.

    Raises:
        InvalidValue: another number of entries, or one outside its documented range (NaN is), which is named.
    """
    if context.shape[-1:] != (CONTEXT_SIZE,):
        raise InvalidValue("context shape", tuple(context.shape), f"(..., {CONTEXT_SIZE}), entries as in CONTEXT")
    low, high = _bounds(context.device)
    wrong = (~((context >= low) & (context <= high))).reshape(-1, CONTEXT_SIZE).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        entry = CONTEXT[column]
        raise InvalidValue(
            f"context entry {entry.name!r}",
            float(context.reshape(-1, CONTEXT_SIZE)[row, column]),
            f"in [{entry.low:g}, {entry.high:g}], {entry.unit}",
            "make contexts with context_vector",
        )


def _bounds(device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor([entry.low for entry in CONTEXT], device=device),
        torch.tensor([entry.high for entry in CONTEXT], device=device),
    )
