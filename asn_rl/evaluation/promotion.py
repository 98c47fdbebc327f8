"""May a candidate take the incumbent's place? A one-sided test on prompts that neither was trained or chosen on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from asn_rl.errors import InvalidValue, check_at_least
from asn_rl.evaluation.statistics import masked_mean, split_by_stratum

Bound = Literal["studentized", "bernstein"]
Outcome = Literal["promoted", "kept", "not enough evidence"]
_DRAWS = 1_000_000
"""draws held at a time"""


@dataclass(frozen=True)
class PromotionConfig:
    """How a candidate policy is compared with the incumbent."""

    split: str = "test"
    """prompts that decide; none of them may have been trained or selected on"""
    num_generations: int = 8
    """completions of every prompt under either policy"""
    level: float = 0.95
    """confidence of the bound: a candidate that is no better is promoted in at most 1 - level of the cases"""
    bound: Bound = "studentized"
    """studentized: bootstrap-t by prompt, holds the level approximately; bernstein: holds it for any rewards within
    reward_range, and needs far more prompts"""
    reward_range: tuple[float, float] | None = None
    """least and greatest total reward there can be, for example [0, 1]; needed by bernstein"""
    power: float = 0.8
    """chance of promotion that the smallest detectable gain is stated for"""
    resamples: int = 4_000
    """bootstrap resamples of the prompts"""
    seed: int = 3000
    """keys the draws"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_generations")
        check_at_least(self, 100, "resamples")
        for name in ("level", "power"):
            if not 0.5 < getattr(self, name) < 1:
                raise InvalidValue(name, getattr(self, name), "in (0.5, 1)")
        if self.bound not in ("studentized", "bernstein"):
            raise InvalidValue("bound", self.bound, "'studentized' or 'bernstein'")
        if self.bound == "bernstein" and self.reward_range is None:
            raise InvalidValue("reward_range", None, "[least, greatest] reward", "the bound is on bounded rewards")
        if self.reward_range is not None and not self.reward_range[0] < self.reward_range[1]:
            raise InvalidValue("reward_range", list(self.reward_range), "[least, greatest] with least < greatest")


@dataclass(frozen=True)
class Decision:
    """What the comparison says; rewards are means over strata of means over prompts."""

    outcome: Outcome
    """kept: the candidate is worse beyond doubt; not enough evidence: neither better nor worse beyond doubt"""
    gain: float
    """candidate minus incumbent"""
    low: float
    """lower confidence bound of the gain; -inf where the spread of the differences cannot be estimated"""
    high: float
    """upper confidence bound, of the same one-sided level"""
    detectable: float
    """smallest gain that as many prompts with differences of this spread show with the chance `power`; NaN where the
    spread cannot be estimated"""
    prompts: int
    """that counted"""
    masked: int
    """left out, as one of the policies has no reward on them"""
    config: PromotionConfig

    @property
    def sentence(self) -> str:
        """The decision and its reason, in plain words."""
        seen = f"on {self.prompts} prompts the candidate's mean reward differs by {self.gain:+.4f} from the incumbent's"
        sure = f"{100 * self.config.level:g} % one-sided confidence"
        if self.outcome == "promoted":
            return f"Promoted: {seen}, and with {sure} the gain is above {self.low:.4f}."
        if self.outcome == "kept":
            return f"The incumbent is kept: {seen}, and with {sure} the gain is below {self.high:.4f}."
        if math.isinf(self.low):
            return (
                f"Not enough evidence, the incumbent stays: {seen}, by the same on almost every prompt, so that "
                "the spread of the differences cannot be estimated; take more prompts, or bound=bernstein."
            )
        return (
            f"Not enough evidence, the incumbent stays: {seen}, and with {sure} the gain is only known to be above "
            f"{self.low:.4f}; as many prompts show a gain of {self.detectable:.4f} or more "
            f"{100 * self.config.power:g} times in 100."
        )


def promotion_test(
    candidate_rewards: np.ndarray,
    incumbent_rewards: np.ndarray,
    strata: Sequence[str],
    config: PromotionConfig | None = None,
) -> Decision:
    """Compare two policies on the same prompts; every stratum weighs the same, and a prompt is the unit.

    The candidate is promoted only if the lower confidence bound of its gain is above zero. Coverage: `bernstein` holds
    the level for any number of prompts and any rewards within their range (Maurer & Pontil 2009, theorem 4, in every
    stratum). `studentized` is the bootstrap-t (Efron & Tibshirani 1993, chapter 12), whose
    one-sided error falls with 1 / prompts (Hall 1988), where that of percentile and t intervals falls with the square
    root and grows with skew; it has seen nothing of a rare disaster that none of the prompts met.

    The promise is for one comparison: prompts that decided before and are used again are no longer fresh.

    Args:
        candidate_rewards, incumbent_rewards: (P, S) rewards of S samples of P prompts; NaN: masked.
        strata: P labels.

    Raises:
        InvalidValue: shapes that differ, a stratum with fewer than two prompts that count, or a reward outside the
            declared range.
    """
    config = config or PromotionConfig()
    if candidate_rewards.shape != incumbent_rewards.shape or candidate_rewards.ndim != 2:
        shapes = (candidate_rewards.shape, incumbent_rewards.shape)
        raise InvalidValue("reward shapes", shapes, "(prompts, samples), twice the same", "compare on the same prompts")
    for rewards in (candidate_rewards, incumbent_rewards):
        _check_range(rewards, config)
    differences = masked_mean(candidate_rewards) - masked_mean(incumbent_rewards)
    parts = _parts(differences, strata)
    low, high = _bernstein(parts, config) if config.bound == "bernstein" else _studentized(parts, config)
    counted = sum(map(len, parts))
    return Decision(
        outcome="promoted" if low > 0 else "kept" if high < 0 else "not enough evidence",
        gain=_mean(parts),
        low=low,
        high=high,
        detectable=minimum_detectable_effect(differences, strata, config),
        prompts=counted,
        masked=len(differences) - counted,
        config=config,
    )


def minimum_detectable_effect(values: np.ndarray, strata: Sequence[str], config: PromotionConfig) -> float:
    """Smallest gain that is promoted with the chance `power`, by the normal approximation.

    Before the candidate has generated anything, pass the incumbent's mean rewards by prompt: the differences then count
    as spread like these are, which is so when the rewards of the two policies correlate by one half over the prompts.
    Afterwards, pass the differences.

    Args:
        values: (P,) numbers that spread as the differences do; NaN: masked.

    Returns:
        The gain, in units of the reward; NaN where the values do not vary and so forecast nothing.
    """
    parts = _parts(values, strata)
    error = _error(parts)
    if not _varies(parts):
        return math.nan
    normal = NormalDist()
    margin = normal.inv_cdf(config.level) * error
    if config.bound == "bernstein":
        margin = _bernstein_margin(parts, config)
    return margin + normal.inv_cdf(config.power) * error


def _parts(values: np.ndarray, strata: Sequence[str]) -> list[np.ndarray]:
    parts = split_by_stratum(values, strata)
    for label, part in parts.items():
        if len(part) < 2:
            advice = "one prompt says nothing of the spread; add prompts, or merge strata"
            raise InvalidValue(f"prompts of stratum {label!r}", len(part), ">= 2", advice)
    return list(parts.values())


def _mean(parts: Sequence[np.ndarray]) -> float:
    return float(np.mean([part.mean() for part in parts]))


def _error(parts: Sequence[np.ndarray]) -> float:
    """Standard error of the mean over strata."""
    return math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts)


def _varies(parts: Sequence[np.ndarray]) -> bool:
    return any(np.ptp(part) > 0 for part in parts)  # not the variance, which rounding makes positive


def _studentized(parts: Sequence[np.ndarray], config: PromotionConfig) -> tuple[float, float]:
    if not _varies(parts):
        return -math.inf, math.inf
    generator = np.random.default_rng(config.seed)
    means, squares = (sum(columns) for columns in zip(*(_resampled(p, config, generator) for p in parts), strict=True))
    mean, error = _mean(parts), _error(parts)
    shift = means / len(parts) - mean
    # A resample of equal values has no spread of its own: its t is infinite, with the sign of its shift.
    infinite = np.select([shift > 0, shift < 0], [np.inf, -np.inf], 0.0)
    t = np.divide(shift, np.sqrt(squares) / len(parts), out=infinite, where=squares > 0)
    above = np.quantile(t, config.level, method="higher")
    below = np.quantile(t, 1 - config.level, method="lower")
    if not error > 0:  # the spread is too small for its square
        return -math.inf, math.inf
    return float(mean - above * error), float(mean - below * error)


def _resampled(
    part: np.ndarray, config: PromotionConfig, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(resamples,) means of draws with replacement, and the squares of their standard errors."""
    count, step = len(part), max(1, _DRAWS // len(part))
    means, squares = [], []
    for done in range(0, config.resamples, step):
        drawn = part[generator.integers(count, size=(min(step, config.resamples - done), count))]
        means.append(drawn.mean(1))
        squares.append(np.where(np.ptp(drawn, 1) > 0, drawn.var(1, ddof=1) / count, 0.0))
    return np.concatenate(means), np.concatenate(squares)


def _bernstein(parts: Sequence[np.ndarray], config: PromotionConfig) -> tuple[float, float]:
    mean, margin = _mean(parts), _bernstein_margin(parts, config)
    return mean - margin, mean + margin


def _bernstein_margin(parts: Sequence[np.ndarray], config: PromotionConfig) -> float:
    """sqrt(2 V ln(2 / delta) / n) + 7 w ln(2 / delta) / (3 (n - 1)) in each stratum, w being the width of a difference;
    delta is shared out among the strata, whose bounds then hold together."""
    assert config.reward_range is not None
    width = 2 * (config.reward_range[1] - config.reward_range[0])
    log = math.log(2 * len(parts) / (1 - config.level))
    margins = [
        math.sqrt(2 * part.var(ddof=1) * log / len(part)) + 7 * width * log / (3 * (len(part) - 1)) for part in parts
    ]
    return float(np.mean(margins))


def _check_range(rewards: np.ndarray, config: PromotionConfig) -> None:
    if config.reward_range is None:
        return
    low, high = config.reward_range
    outside = rewards[(rewards < low) | (rewards > high)]
    if outside.size:
        raise InvalidValue("reward", float(outside.flat[0]), f"in [{low:g}, {high:g}]", "widen reward_range")
