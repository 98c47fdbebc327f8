"""Observation space of the decoding environments: point features and a context vector, all with finite bounds."""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from asn_rl.ops.context import CONTEXT
from asn_rl.ops.sketch import Sketch
from asn_rl.types import Observation


@dataclass(frozen=True)
class PointFeature:
    name: str
    unit: str
    low: float
    high: float


POINT_FEATURES = (
    PointFeature("logprob", "nats, base log-probability of a token of the point", -100.0, 0.0),
    PointFeature("gap", "nats below the most probable token", 0.0, 100.0),
    PointFeature("mass_above", "base probability of all points before this one", 0.0, 1.0),
    PointFeature("log_rank", "log(1 + tokens in the points before this one)", 0.0, 20.0),
    PointFeature("log_count", "log of the number of tokens in the point", 0.0, 20.0),
    PointFeature("nonempty", "1: the point holds tokens; 0: empty, and so are its other features", 0.0, 1.0),
)


def observation_space(points: int) -> gym.spaces.Dict:
    """`Dict(points: Box(N, F), context: Box(C,))` of N points, fp32, bounds as in `POINT_FEATURES` and `CONTEXT`."""
    return gym.spaces.Dict(
        {"points": _box(POINT_FEATURES, (points, len(POINT_FEATURES))), "context": _box(CONTEXT, (len(CONTEXT),))}
    )


def action_space(points: int) -> Discrete:
    """`Discrete(N)`: the index of a point."""
    return Discrete(points)


def point_features(sketch: Sketch) -> Tensor:
    """(..., N, F) fp32 features of every point, entries as in `POINT_FEATURES`; rows of zeros where it is empty."""
    mask = sketch.mask
    logprobs = torch.where(mask, sketch.logprobs, 0.0)
    peak = sketch.logprobs.amax(-1, keepdim=True)
    mass = sketch.log_mass.exp()
    count = torch.where(mask, sketch.log_count.exp(), 0.0)
    entries = (
        logprobs,
        peak - logprobs,
        mass.cumsum(-1) - mass,
        torch.log1p(count.cumsum(-1) - count),
        sketch.log_count,
        torch.ones_like(mass),
    )
    low, high = (torch.tensor([getattr(f, end) for f in POINT_FEATURES], device=mass.device) for end in ("low", "high"))
    features = torch.minimum(torch.maximum(torch.stack(entries, -1), low), high)
    return torch.where(mask.unsqueeze(-1), features, 0.0)


def resolve_points(actions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Replace actions on empty points.

    Args:
        actions: (B,) int64 points.
        mask: (B, N) bool, True where the point holds tokens.

    Returns:
        (B,) the action itself where its point holds tokens, else the nearest point before it (of higher
        probability) that does, else the nearest after it; and (B,) bool, True where it was replaced.
    """
    points = torch.arange(mask.shape[-1], device=mask.device)
    wanted = actions.unsqueeze(-1)
    before = torch.where(mask & (points <= wanted), points, -1).amax(-1)
    after = torch.where(mask & (points > wanted), points, mask.shape[-1]).amin(-1)
    resolved = torch.where(before >= 0, before, after)
    return resolved, resolved != actions


def as_dict(obs: Observation) -> dict[str, Tensor]:
    """An observation as the environments return it: `points` (..., N, F) and `context` (..., C)."""
    return {"points": point_features(obs.sketch), "context": obs.context}


def _box(entries: tuple, shape: tuple[int, ...]) -> Box:
    low, high = (np.array([getattr(entry, end) for entry in entries], dtype=np.float32) for end in ("low", "high"))
    return Box(np.broadcast_to(low, shape).copy(), np.broadcast_to(high, shape).copy(), dtype=np.float32)
