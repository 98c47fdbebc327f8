"""Looking at an evaluation while it runs, as often as one likes, and stopping when the answer is known.

The interval holds at all times at once (a confidence sequence), so that stopping when it excludes zero is no cheating;
intervals made for a number of prompts that is fixed in advance do not allow that. Two things must hold: prompts come in
**random order** (shuffle the benchmark; in the order of its file easy ones may come first), and the order in which
prompts finish plays no part: wait for all of a chunk, or long completions come last. The mean that is covered is that
of the prompts that the benchmark was drawn from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from asn_rl.errors import InvalidValue

_MOST = 0.5
"""c of the paper: share of the capital that a bet may lose at most"""


@dataclass(frozen=True)
class StopDecision:
    """What may be said after the prompts so far."""

    outcome: Literal["better", "worse", "undecided"]
    """undecided: go on, or stop without an answer; it is no evidence that the arms are alike"""
    low: float
    high: float
    """of the mean difference, after the last prompt"""
    prompts: int
    """that counted"""
    decided_at: int | None
    """prompts after which the answer was known; None: undecided"""


def stop_decision(
    differences: np.ndarray, *, bounds: tuple[float, float] = (-1.0, 1.0), level: float = 0.95, points: int = 2001
) -> StopDecision:
    """Is an arm better or worse than the baseline? May be asked after every prompt.

    An arm that is no different is called better or worse in at most 1 - level of the evaluations, however often it is
    asked. For m arms at once pass 1 - (1 - level) / m (Bonferroni).

    Args: see `confidence_sequence`.
    """
    low, high = confidence_sequence(differences, bounds=bounds, level=level, points=points).T
    excluded = np.flatnonzero((low > 0) | (high < 0))
    if len(low) == 0:
        return StopDecision("undecided", *bounds, 0, None)
    if len(excluded) == 0:
        return StopDecision("undecided", float(low[-1]), float(high[-1]), len(low), None)
    first = excluded[0]
    outcome = "better" if low[first] > 0 else "worse"
    return StopDecision(outcome, float(low[-1]), float(high[-1]), len(low), int(first) + 1)


def confidence_sequence(
    differences: np.ndarray, *, bounds: tuple[float, float] = (-1.0, 1.0), level: float = 0.95, points: int = 2001
) -> np.ndarray:
    """(n, 2) lower and upper bounds of the mean after each of n prompts; all of them hold with the probability `level`.

    The hedged capital process of Waudby-Smith & Ramdas 2024 ("Estimating means of bounded random variables by betting",
    JRSS B 86(1), arXiv:2010.09686) with its predictable plug-in bets and even hedging: against every mean that could
    be, a gambler bets on the next difference with what was seen before; a mean against which he has made more than
    2 / (1 - level) out of 1 is excluded. His capital falls with the mean he bets on when betting that it is higher, so
    that what is left is an interval. It uses the variance, which is small where two arms often agree, and no assumption
    beyond the bounds.

    Args:
        differences: (N,) paired differences by prompt, in the random order in which prompts were drawn; NaN: masked,
            left out, so that n <= N rows come back.
        bounds: least and greatest difference there can be.
        points: means that are tried; bounds are rounded outwards to them.

    Raises:
        InvalidValue: a difference outside its bounds, or a level outside (0, 1).
    """
    low, high = bounds
    values = differences[~np.isnan(differences)].astype(np.float64)
    if not 0 < level < 1:
        raise InvalidValue("level", level, "in (0, 1)")
    if not low < high or points < 3:
        raise InvalidValue("bounds and points", (bounds, points), "least < greatest, and 3 points or more")
    outside = values[(values < low) | (values > high)]
    if len(outside):
        raise InvalidValue("difference", float(outside[0]), f"in [{low:g}, {high:g}]", "widen the bounds")
    x = (values - low) / (high - low)
    means = np.linspace(0, 1, points)
    threshold = math.log(2 / (1 - level))
    higher, lower = np.zeros(points), np.zeros(points)  # log capital of bets that the true mean is higher, lower
    with np.errstate(divide="ignore"):
        most_higher, most_lower = _MOST / means, _MOST / (1 - means)
    found = np.empty((len(x), 2))
    for t, (value, bet) in enumerate(zip(x, _bets(x, level), strict=True)):
        higher += np.log1p(np.minimum(bet, most_higher) * (value - means))
        lower += np.log1p(-np.minimum(bet, most_lower) * (value - means))
        # Capital falls with the mean, so that the last excluded point excludes all before it.
        below, above = np.flatnonzero(higher >= threshold), np.flatnonzero(lower >= threshold)
        found[t] = means[below[-1]] if len(below) else 0.0, means[above[0]] if len(above) else 1.0
    found = np.stack([np.maximum.accumulate(found[:, 0]), np.minimum.accumulate(found[:, 1])], 1)
    return low + (high - low) * found


def _bets(x: np.ndarray, level: float) -> np.ndarray:
    """(n,) bets, each from what was seen before: sqrt(2 log(2 / alpha) / (variance t log(1 + t))) with the regularised
    variance (1/4 + squares) / t of the values before t."""
    t = np.arange(1, len(x) + 1)
    centre = (0.5 + np.cumsum(x)) / (t + 1)
    variance = (0.25 + np.cumsum((x - centre) ** 2)) / (t + 1)
    before = np.concatenate([[0.25], variance])[: len(x)]
    return np.sqrt(2 * math.log(2 / (1 - level)) / (before * t * np.log1p(t)))
