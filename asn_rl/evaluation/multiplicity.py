"""Many arms compared on the same prompts at once, so that the best of them may be picked and still be believed.

Each comparison is a column of paired differences. The bootstrap resamples prompts, the same ones for every column, and
so knows how far the comparisons go together: arms that are nearly alike cost nearly nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.statistics import Interval, Resampling, split_by_stratum

_BATCH = 1_000_000
"""draws held at a time"""
_NO_SPREAD = 1e-12
"""share of a column's variance up to which that of a resample is rounding"""
_SPENT = 0.1
"""share of 1 - level that resamples without spread may use up"""


@dataclass(frozen=True)
class Comparisons:
    """m comparisons that hold together; lists of m."""

    intervals: tuple[Interval, ...]
    """simultaneous: with the probability `level` all of them cover. Bounds are infinite, and p-values 1, where the
    spread cannot be estimated: the arms differ on too few prompts (fewer than about 8 for 20 comparisons at 95 %)"""
    p_values: tuple[float, ...]
    """of each difference being zero, alone"""
    holm: tuple[float, ...]
    """the same, adjusted for m comparisons whatever their dependence"""
    step_down: tuple[float, ...]
    """the same, adjusted by the joint resamples: never far above `holm`, smaller where comparisons go together"""


def compare_all(differences: np.ndarray, strata: Sequence[str], how: Resampling | None = None) -> Comparisons:
    """Simultaneous intervals and adjusted p-values of m mean differences: the studentised bootstrap of the largest
    |t| (max-t), and its step-down (Romano & Wolf 2005, Econometrica 73(4), algorithms 4.1 and 4.2).

    To pick the best of a grid on these prompts, pass each arm minus the baseline: the interval of whichever is picked
    holds. To show that a policy beats every arm of a grid, pass the policy minus each arm and ask of the lowest bound.

    A prompt is the unit (average samples and training seeds first), and every stratum weighs the same. Tails as in
    `promotion`: the level is held approximately, better with more prompts.

    Args:
        differences: (P, m) paired differences by prompt; NaN: masked.
        strata: P labels.

    Raises:
        InvalidValue: a stratum in which a column has fewer than two prompts that count.
    """
    how = how or Resampling()
    columns = _Columns.of(differences, strata)
    means, errors = columns.means(), columns.errors()
    drawn = np.concatenate(list(columns.resampled(how)))  # (resamples, m) |t| around the observed means
    # Left out before the largest is taken, and never claimed: one such column would make all intervals infinite. What
    # infinite t remain in the others spend a tenth of 1 - level at most.
    unknown = (errors == 0) | (np.isinf(drawn).mean(0) > _SPENT * (1 - how.level) / len(means))
    drawn[:, unknown], errors[unknown] = 0.0, 0.0
    t = _ratio(means, errors)
    critical = np.quantile(drawn.max(1), how.level, method="higher")
    margin = np.where(errors > 0, critical * errors, np.inf)
    p_values = _exceeded(drawn, np.abs(t))
    return Comparisons(
        intervals=tuple(Interval(*map(float, row)) for row in zip(means, means - margin, means + margin, strict=True)),
        p_values=tuple(p_values.tolist()),
        holm=tuple(holm(p_values).tolist()),
        step_down=tuple(_step_down(drawn, np.abs(t)).tolist()),
    )


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """(m,) adjusted p-values (Holm 1979, Scand. J. Statist. 6(2)): reject those up to alpha, and the chance of any
    false rejection is at most alpha, whatever the dependence.

    Raises:
        InvalidValue: none, or a p-value outside [0, 1].
    """
    values = np.asarray(p_values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not ((values >= 0) & (values <= 1)).all():
        raise InvalidValue("p_values", values.tolist(), "a list of numbers in [0, 1], at least one")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return adjusted


def _step_down(drawn: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Each |t| against the largest of those that are not larger than it, from the largest on; never falling."""
    order = np.argsort(-t, kind="stable")
    largest = np.maximum.accumulate(drawn[:, order[::-1]], axis=1)[:, ::-1]
    adjusted = np.empty_like(t)
    adjusted[order] = np.maximum.accumulate(_exceeded(largest, t[order]))
    return adjusted


def _exceeded(drawn: np.ndarray, t: np.ndarray) -> np.ndarray:
    """(m,) p-values: share of the resamples, with the observed one among them, that reach |t|. A NaN, a difference
    without spread, is never significant."""
    reached = (drawn >= t).sum(0)
    return np.where(np.isnan(t), 1.0, (1 + reached) / (1 + len(drawn)))


def _ratio(shift: np.ndarray, error: np.ndarray) -> np.ndarray:
    """t; NaN where the error is 0."""
    return np.divide(shift, error, out=np.full_like(shift, np.nan), where=error > 0)


@dataclass(frozen=True)
class _Columns:
    """Differences by stratum, centred, so that squares do not cancel."""

    parts: list[np.ndarray]
    """(n, m) of each stratum, less `centres`; 0 where masked"""
    counted: list[np.ndarray]
    """(n, m) 1 where not masked"""
    centres: list[np.ndarray]
    """(m,)"""

    @classmethod
    def of(cls, differences: np.ndarray, strata: Sequence[str]) -> _Columns:
        if differences.ndim != 2 or differences.shape[1] == 0:
            raise InvalidValue("shape of the differences", differences.shape, "(prompts, comparisons)")
        rows = split_by_stratum(np.arange(len(differences), dtype=np.float64), strata)
        parts, counted, centres = [], [], []
        for label, which in rows.items():
            part = differences[which.astype(int)]
            known = ~np.isnan(part)
            if known.sum(0).min() < 2:
                advice = "one prompt says nothing of the spread; add prompts, leave the arm out, or merge strata"
                raise InvalidValue(f"prompts of stratum {label!r}", int(known.sum(0).min()), ">= 2", advice)
            lowest, highest = np.nanmin(part, 0), np.nanmax(part, 0)
            centre = np.where(lowest == highest, lowest, np.nansum(part, 0) / known.sum(0))  # equal: exactly 0 is left
            parts.append(np.where(known, part - centre, 0.0))
            counted.append(known.astype(np.float64))
            centres.append(centre)
        return cls(parts, counted, centres)

    def means(self) -> np.ndarray:
        return np.mean(self.centres, 0)

    def errors(self) -> np.ndarray:
        """(m,) standard errors of the means over strata."""
        pairs = zip(self.parts, self.counted, strict=True)
        return np.sqrt(sum((part**2).sum(0) / (n.sum(0) - 1) / n.sum(0) for part, n in pairs)) / len(self.parts)

    def resampled(self, how: Resampling) -> Iterator[np.ndarray]:
        """(b, m) |t| of resamples, a batch of them at a time. A resample without spread has an infinite t, or 0 if its
        mean is the observed one."""
        generator = np.random.default_rng(how.seed)
        step = max(1, _BATCH // max(map(len, self.parts)))
        for done in range(0, how.resamples, step):
            size = min(step, how.resamples - done)
            shift, square = np.zeros((2, size, self.parts[0].shape[1]))
            for part, counted in zip(self.parts, self.counted, strict=True):
                moved, error = _means_and_squares(_multiplicities(size, len(part), generator), part, counted)
                shift, square = shift + moved, square + error
            infinite = np.where(shift != 0, np.inf, 0.0)
            yield np.divide(np.abs(shift), np.sqrt(square), out=infinite, where=square > 0)


def _multiplicities(size: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """(size, count) how often each prompt is drawn in each resample."""
    drawn = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
    return np.bincount(drawn.reshape(-1), minlength=size * count).reshape(size, count).astype(np.float64)


def _means_and_squares(times: np.ndarray, part: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(b, m) means of centred columns in resamples, and the squares of their standard errors. A resample in which a
    column has no two prompts that count knows neither: inf and 0."""
    n = times @ counted
    enough = n > 1
    mean = np.divide(times @ part, n, out=np.full_like(n, np.inf), where=enough)
    spread = np.divide(times @ part**2, n, out=np.zeros_like(n), where=enough) - np.where(enough, mean, 0.0) ** 2
    spread[spread <= _NO_SPREAD * (part**2).mean(0)] = 0.0
    return mean, np.divide(spread, n - 1, out=np.zeros_like(n), where=enough)
