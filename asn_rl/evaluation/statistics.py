"""Intervals for means over prompts. A prompt is the unit: its samples are not independent of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asn_rl.errors import InvalidValue


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap percentile interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap(
    values: np.ndarray, strata: Sequence[str], *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over strata of the mean over prompts, with a percentile interval (Efron & Tibshirani 1993, chapter 13).

    For a paired comparison, pass the differences of two policies on the same prompts.

    Args:
        values: (P,) one number a prompt.
        strata: P labels; every stratum (a task) weighs the same, and prompts are resampled within theirs.
    """
    if not 0 < level < 1:
        raise InvalidValue("level", level, "in (0, 1)")
    if len(values) == 0 or len(values) != len(strata):
        raise InvalidValue("values", len(values), f"one for each of the {len(strata)} strata labels, at least one")
    generator = np.random.default_rng(seed)
    labels = np.asarray(strata)
    parts = [values[labels == label] for label in sorted(set(strata))]
    draws = sum(part[generator.integers(len(part), size=(resamples, len(part)))].mean(1) for part in parts) / len(parts)
    mean = float(np.mean([part.mean() for part in parts]))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def stratified_mean(values: np.ndarray, strata: Sequence[str]) -> float:
    """Mean over strata of the mean over prompts."""
    labels = np.asarray(strata)
    return float(np.mean([values[labels == label].mean() for label in sorted(set(strata))]))


def split_half_oracle(rewards: np.ndarray, strata: Sequence[str]) -> tuple[float, float]:
    """What choosing the best arm of each prompt would gain: the headroom for adaptation by prompt.

    Arms are chosen on one half of the samples and scored on the other, and the other way round, so that the winner's
    curse does not count as headroom.

    Args:
        rewards: (A, P, n) rewards of n samples of P prompts under A arms; NaN is masked.

    Returns:
        The oracle's mean, and that of the best single arm chosen and scored in the same way.
    """
    halves = [np.nanmean(rewards[:, :, i::2], -1) for i in range(2)]  # (A, P) each
    oracle, static = [], []
    for chosen_on, scored_on in (halves, halves[::-1]):
        best = np.nanargmax(chosen_on, 0)
        oracle.append(stratified_mean(scored_on[best, np.arange(scored_on.shape[1])], strata))
        single = int(np.argmax([stratified_mean(arm, strata) for arm in chosen_on]))
        static.append(stratified_mean(scored_on[single], strata))
    return float(np.mean(oracle)), float(np.mean(static))
