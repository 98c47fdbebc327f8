"""The range of contexts that a policy has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from asn_rl.errors import DataError, InvalidValue
from asn_rl.ops.context import CONTEXT
from asn_rl.types import Trajectories


def context_limits(trajectories: Trajectories, cut: float = 0.001, margin: float = 0.05) -> dict[str, list[float]]:
    """The range of contexts that a policy was trained on: quantiles of every entry, widened a little.

    At most a share 2 * cut of the given tokens lies outside by any one entry.

    Args:
        trajectories: what it was trained on, or a sample of it.
        cut: share of tokens left out at either end of each entry, in [0, 0.5).
        margin: what is added at either end, as a share of the distance between the quantiles, and at least that share
            of a hundredth of the documented range.

    Returns:
        {context entry: [low, high]}, within the documented range.

    Raises:
        InvalidValue: `cut` or `margin` out of range.
        DataError: no tokens.
    """
    if not 0 <= cut < 0.5:
        raise InvalidValue("cut", cut, "in [0, 0.5)")
    if not margin >= 0:
        raise InvalidValue("margin", margin, ">= 0")
    context = trajectories.observations.context.double()
    if not len(context):
        raise DataError("the trajectories hold no tokens; a range of contexts needs some")
    ordered, skipped = context.sort(0).values, int(cut * len(context))
    limits = {}
    for i, entry in enumerate(CONTEXT):
        low, high = float(ordered[skipped, i]), float(ordered[-1 - skipped, i])
        extra = margin * max(high - low, 0.01 * (entry.high - entry.low))
        limits[entry.name] = [max(entry.low, low - extra), min(entry.high, high + extra)]
    return limits


def outside_share(trajectories: Trajectories, limits: Mapping[str, Sequence[float]]) -> float:
    """Share of the tokens whose context leaves the limits by any entry."""
    bounds = torch.tensor([limits.get(entry.name, [-torch.inf, torch.inf]) for entry in CONTEXT], dtype=torch.float64)
    context = trajectories.observations.context.double()
    inside = ((context >= bounds[:, 0]) & (context <= bounds[:, 1])).all(-1)
    return 1 - inside.double().mean().item()
