"""Intervals for means over prompts. A prompt is the unit: its samples are not independent of each other.

NaN is masked everywhere: a prompt without a value counts in no mean and is never resampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from asn_rl.errors import InvalidValue, check_at_least

_BATCH = 1_000_000
"""draws held at a time"""


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap percentile interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: prompts are resampled within their stratum, each with all of its samples."""

    resamples: int = 10_000
    """bootstrap resamples of the prompts"""
    level: float = 0.95
    """coverage of the intervals"""
    seed: int = 0
    """keys the resamples"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "resamples")
        if not 0 < self.level < 1:
            raise InvalidValue("level", self.level, "in (0, 1)")


def as_interval(plain: Mapping[str, float | None]) -> Interval:
    """Of a difference; None is an infinite bound."""
    mean, low, high = plain["mean"], plain["low"], plain["high"]
    assert mean is not None
    return Interval(mean, -math.inf if low is None else low, math.inf if high is None else high)


def as_plain(interval: Interval) -> dict[str, float | None]:
    """mean, low, high; an infinite bound is None, which JSON has."""
    return {name: finite_or_none(value) for name, value in vars(interval).items()}


def finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def bootstrap(
    values: np.ndarray, strata: Sequence[str], *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over strata of the mean over prompts, with a percentile interval (Efron & Tibshirani 1993, chapter 13).

    For a paired comparison, pass the differences of two policies on the same prompts.

    Args:
        values: (P,) one number a prompt; NaN: masked.
        strata: P labels; every stratum (a task) weighs the same, and prompts are resampled within theirs.

    Raises:
        InvalidValue: lists of different lengths, or a stratum without a value.
    """
    if not 0 < level < 1:
        raise InvalidValue("level", level, "in (0, 1)")
    generator = np.random.default_rng(seed)
    parts = list(split_by_stratum(values, strata).values())
    draws = sum(_resampled_means(part, resamples, generator) for part in parts) / len(parts)
    mean = float(np.mean([part.mean() for part in parts]))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def _resampled_means(part: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """(resamples,) means of draws with replacement; a batch of them at a time, about 16 MiB."""
    step = max(1, _BATCH // len(part))
    sizes = [(min(step, resamples - done), len(part)) for done in range(0, resamples, step)]
    return np.concatenate([part[generator.integers(len(part), size=size)].mean(1) for size in sizes])


def stratified_mean(values: np.ndarray, strata: Sequence[str]) -> float:
    """Mean over strata of the mean over prompts; NaN: masked."""
    return float(np.mean([part.mean() for part in split_by_stratum(values, strata).values()]))


def split_by_stratum(values: np.ndarray, strata: Sequence[str]) -> dict[str, np.ndarray]:
    """The values of each stratum that are not NaN."""
    if len(values) == 0 or len(values) != len(strata):
        raise InvalidValue("values", len(values), f"one for each of the {len(strata)} strata labels, at least one")
    labels = np.asarray(strata)
    parts = {label: values[(labels == label) & ~np.isnan(values)] for label in sorted(set(strata))}
    for label, part in parts.items():
        if len(part) == 0:
            raise InvalidValue(f"values of stratum {label!r}", "only NaN", "at least one number", "all are masked")
    return parts


def masked_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    counted = (~np.isnan(values)).sum(-1)
    return np.where(counted > 0, np.nansum(values, -1) / np.maximum(counted, 1), np.nan)


def split_half_oracle(rewards: np.ndarray, strata: Sequence[str]) -> tuple[float, float]:
    """What choosing the best arm of each prompt would gain: the headroom for adaptation by prompt.

    Arms are chosen on one half of the samples and scored on the other, and the other way round, so that the winner's
    curse does not count as headroom.

    Args:
        rewards: (A, P, n) rewards of n samples of P prompts under A arms; NaN is masked.

    Returns:
        The oracle's mean, and that of the best single arm chosen and scored in the same way.

    Raises:
        InvalidValue: fewer than two samples a prompt, or a stratum without a value.
    """
    oracle, static, _ = split_half_choices(rewards, strata)
    return stratified_mean(oracle, strata), stratified_mean(static, strata)


def split_half_choices(rewards: np.ndarray, strata: Sequence[str]) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """What `split_half_oracle` averages, prompt by prompt; arguments and errors are the same.

    Of arms that a half finds equally good on a prompt, that half's better one over all prompts is chosen, so that the
    order of the arms says nothing.

    Returns:
        (P,) rewards of the oracle and of the best single arm, means over both directions (a masked one counts in
        neither), and the single arm that each half chose.
    """
    if rewards.shape[-1] < 2:
        raise InvalidValue("samples a prompt", rewards.shape[-1], ">= 2", "one half chooses, the other one scores")
    halves = [masked_mean(rewards[:, :, i::2]) for i in range(2)]  # (A, P) each
    oracle, static, singles = [], [], []
    for chosen_on, scored_on in (halves, halves[::-1]):
        overall = np.argsort([-stratified_mean(arm, strata) for arm in chosen_on], kind="stable")
        known = np.where(np.isnan(chosen_on), -np.inf, chosen_on)
        best = overall[known[overall].argmax(0)]
        oracle.append(scored_on[best, np.arange(len(best))])
        static.append(scored_on[overall[0]])
        singles.append(int(overall[0]))
    return masked_mean(np.stack(oracle, 1)), masked_mean(np.stack(static, 1)), (singles[0], singles[1])
