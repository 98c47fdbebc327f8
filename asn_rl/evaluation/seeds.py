"""A policy that was trained with several seeds: is it the method that is better, or one lucky run of it?

Every seed is evaluated on the same prompts, so that prompts and seeds are crossed. Averaging over seeds within a prompt
and resampling prompts says how these K policies do on other prompts; resampling seeds as well says how other policies
that are trained in this way would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.statistics import Interval, Resampling, as_plain, bootstrap, split_by_stratum, stratified_mean


@dataclass(frozen=True)
class SeedReport:
    """A mean over prompts and training seeds."""

    interval: Interval
    """over prompts, for these seeds: the policies at hand"""
    crossed: Interval
    """over prompts and seeds: the method. K seeds show (K - 1) / K of the variance between seeds, so that with three
    it is still on the narrow side"""
    by_seed: tuple[float, ...]
    """mean of each seed"""
    spread: float
    """standard deviation of the seeds' means, with K - 1"""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "interval": as_plain(self.interval),
            "crossed": as_plain(self.crossed),
            "by_seed": list(self.by_seed),
            "spread": self.spread,
        }


def over_seeds(values: np.ndarray) -> np.ndarray:
    """(P,) means over the seeds of a prompt: what stands for the method wherever one number a prompt is wanted.

    A prompt that some seed masks is masked, so that all prompts weigh the seeds alike.

    Args:
        values: (P, K) one number a prompt and training seed; NaN: masked.
    """
    return values.mean(-1)


def seed_report(values: np.ndarray, strata: Sequence[str], how: Resampling | None = None) -> SeedReport:
    """The mean of several training seeds with intervals for these seeds and for others.

    For a comparison, pass differences to the baseline on the same prompts, one column a seed. `crossed` is the
    pigeonhole bootstrap (Owen 2007, Ann. Appl. Stat. 1(2), arXiv:0712.1111): seeds and prompts are resampled
    independently of each other, and prompts within their stratum.

    Args:
        values: (P, K) means over samples, one column a training seed; NaN: masked.
        strata: P labels.

    Raises:
        InvalidValue: fewer than two seeds, or a stratum without a prompt that all seeds have.
    """
    how = how or Resampling()
    if values.ndim != 2 or values.shape[1] < 2:
        advice = "one seed says nothing of the others; train with more"
        raise InvalidValue("shape of the values", values.shape, "(prompts, training seeds >= 2)", advice)
    means = over_seeds(values)
    whole = np.where(np.isnan(means)[:, None], np.nan, values)
    by_seed = tuple(stratified_mean(column, strata) for column in whole.T)
    return SeedReport(
        interval=bootstrap(means, strata, resamples=how.resamples, level=how.level, seed=how.seed),
        crossed=_crossed(whole, strata, how),
        by_seed=by_seed,
        spread=float(np.std(by_seed, ddof=1)),
    )


def _crossed(values: np.ndarray, strata: Sequence[str], how: Resampling) -> Interval:
    rows = split_by_stratum(np.where(np.isnan(values[:, 0]), np.nan, np.arange(len(values))), strata)
    parts = [values[which.astype(int)] for which in rows.values()]
    generator = np.random.default_rng(how.seed)
    seeds = values.shape[1]
    draws = np.empty(how.resamples)
    for draw in range(how.resamples):
        weights = np.bincount(generator.integers(seeds, size=seeds), minlength=seeds) / seeds
        drawn = [part[generator.integers(len(part), size=len(part))].mean(0) for part in parts]
        draws[draw] = np.mean(drawn, 0) @ weights
    low, high = np.quantile(draws, [(1 - how.level) / 2, (1 + how.level) / 2])
    return Interval(float(np.mean([part.mean() for part in parts])), float(low), float(high))
