"""What a policy sees beside sketch and context, captured only when it asks for it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from asn_rl.errors import InvalidValue
from asn_rl.ops.history import History, history_features
from asn_rl.ops.sketch import PointMap, Sketch, points_of, token_points
from asn_rl.protocols import Policy
from asn_rl.types import OPTIONAL_INPUTS


def checked_needs(policy: Policy) -> frozenset[str]:
    """Optional entries that a policy reads.

    Raises:
        InvalidValue: there are no such entries.
    """
    return checked_entries("policy.needs", policy.needs)


def checked_entries(what: str, names: Collection[str]) -> frozenset[str]:
    if set(names) - OPTIONAL_INPUTS:
        raise InvalidValue(what, sorted(names), f"a subset of {sorted(OPTIONAL_INPUTS)}")
    return frozenset(names)


def history_entry(logits: Tensor, sketch: Sketch, point_map: PointMap, history: History, step: int | Tensor) -> Tensor:
    """(B, N, 2) `Observation.history` of a sketch in which the known tokens have points of their own."""
    points = points_of(logits, history.tokens.clamp_min(0), point_map)
    return history_features(history, points, step, sketch.log_mass.shape[-1])


def layer_entry(logits: Tensor, sketch: Sketch, point_map: PointMap, layer_logits: Tensor) -> Tensor:
    """(B, N, L) `Observation.layer_logprobs`: log of the mean probability that earlier layers give a point's tokens.

    Args:
        layer_logits: (B, L, V) of the earlier layers.
    """
    where = token_points(logits, point_map).unsqueeze(1).expand_as(layer_logits)
    probs = torch.where(where >= 0, layer_logits.float().softmax(-1), 0.0)
    mass = probs.new_zeros(*probs.shape[:2], sketch.log_mass.shape[-1]).scatter_add_(-1, where.clamp_min(0), probs)
    floor = torch.finfo(torch.float32).tiny  # a layer may give nothing where the last one gives something
    return torch.where(sketch.mask.unsqueeze(1), mass.clamp_min(floor).log() - sketch.log_count.unsqueeze(1), 0.0).mT
