"""From scores to totals, ratings of heuristics, targets and a ranking of candidates: pure functions over dense arrays.

P prompts, A heuristics, S seeds; a cell is one candidate. NaN means masked, and what is masked is never filled in: a
candidate is compared on the labels that it has, and comes after all that lack fewer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.statistics import Interval, bootstrap, masked_mean

Cell = tuple[int, int, int]
"""indices of prompt, heuristic and seed"""

_NORMAL = 1.4826
"""standard deviations of a normal distribution that one median absolute deviation is worth"""
_DECILES = 2.5631
"""standard deviations of a normal distribution between its first and its last decile"""


@dataclass(frozen=True)
class Scaled:
    """Scores of one labeller, minus `centre`, over `scale`."""

    values: np.ndarray
    """NaN where the scores are"""
    how: Literal["mad", "std", "constant", "none"]
    centre: float
    scale: float


def robust_scale(scores: np.ndarray) -> Scaled:
    """Distance to the median in units of 1.4826 median absolute deviations, over all cells (Huber 1981, section 5.1).

    Where nearly half of the scores are equal that deviation is next to nothing, and one labeller would drown all
    others: a unit is at least half of what the distance between the first and the last decile makes it. Where more than
    half are equal (verifiers: 0 or 1) it is 0; then distance to the mean in standard deviations. Where all scores are
    equal: zeros.
    """
    known = scores[~np.isnan(scores)]
    if known.size == 0 or known.min() == known.max():
        centre = float(known[0]) if known.size else 0.0
        return Scaled(np.where(np.isnan(scores), np.nan, 0.0), "constant", centre, 0.0)
    centre = float(np.median(known))
    scale = _NORMAL * float(np.median(np.abs(known - centre)))
    if scale > 0:
        low, high = np.quantile(known, (0.1, 0.9))
        scale = max(scale, float(high - low) / _DECILES / 2)
        return Scaled((scores - centre) / scale, "mad", centre, scale)
    centre, scale = float(known.mean()), float(known.std())
    return Scaled((scores - centre) / scale, "std", centre, scale)


def total_score(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """(P, A, S) weighted mean sum(w z) / sum(|w|) over the labellers that apply; NaN where none does.

    Candidates of a prompt that have the same labels share the denominator, so that every weight acts wherever its label
    varies within the prompt. Those that lack one are not comparable by this number alone: see `lacking`.
    """
    weighted = sum(np.where(np.isnan(part), 0.0, weights[name] * part) for name, part in scores.items())
    applies = sum(abs(weights[name]) * ~np.isnan(part) for name, part in scores.items())
    return np.divide(weighted, applies, out=np.full(np.shape(applies), np.nan), where=np.asarray(applies) > 0)


def lacking(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """(P, A, S) how many labels with a weight a candidate lacks that another candidate of its prompt has.

    A candidate may not win by a mask: one that lacks a label is ranked after all that lack fewer, and does not count
    when heuristics are rated.
    """
    known = [~np.isnan(part) for name, part in scores.items() if weights[name] != 0]
    return np.sum([part.any((1, 2), keepdims=True) & ~part for part in known], axis=0)


def heuristic_ratings(total: np.ndarray, strata: Sequence[str], shrinkage: float) -> np.ndarray:
    """(P, A) mean total of each heuristic on each prompt, shrunk towards what its stratum says of the heuristic.

    The prior is the prompt's own level (mean over its heuristics) plus the heuristic's mean distance to that level in
    the stratum; n samples weigh n / (n + shrinkage) against it. So a heuristic that is masked on a hard prompt gains
    nothing there. An infinite shrinkage leaves one order of heuristics a stratum.

    Args:
        total: (P, A, S) totals of comparable candidates.
        strata: P labels.

    Returns:
        NaN for a heuristic without any total in the stratum.
    """
    means, count = masked_mean(total), (~np.isnan(total)).sum(-1)
    level = masked_mean(means)
    prior = np.full(means.shape, np.nan)
    for rows in _rows(strata).values():
        distance = masked_mean((means[rows] - level[rows, None]).T)
        base = np.where(np.isnan(level[rows]), masked_mean(level[rows]), level[rows])
        prior[rows] = base[:, None] + distance
    weight = count / np.maximum(count + shrinkage, 1)
    return np.where(count > 0, weight * means + (1 - weight) * prior, prior)


def best_heuristic(ratings: np.ndarray) -> np.ndarray:
    """(P,) index of the heuristic with the highest rating; of equals the first."""
    return np.where(np.isnan(ratings), -np.inf, ratings).argmax(-1)


def soft_targets(ratings: np.ndarray, temperature: float) -> np.ndarray:
    """(P, A) softmax(ratings / temperature); 0 for a heuristic without a rating.

    Raises:
        InvalidValue: temperature not above 0, or a prompt without any rating.
    """
    if not temperature > 0:
        raise InvalidValue("temperature", temperature, "> 0")
    known = np.where(np.isnan(ratings), -np.inf, ratings)
    top = known.max(-1, keepdims=True)
    if np.isneginf(top).any():
        raise InvalidValue("ratings", "only NaN", "at least one number a prompt", "no labeller applies there")
    weights = np.exp((known - top) / temperature)
    return weights / weights.sum(-1, keepdims=True)


def best_single(total: np.ndarray, strata: Sequence[str]) -> int:
    """Index of the heuristic with the highest mean distance to the level of its prompts, strata weighing the same."""
    means = masked_mean(total)
    distance = means - masked_mean(means)[:, None]
    by_stratum = np.stack([masked_mean(distance[rows].T) for rows in _rows(strata).values()], -1)
    return int(best_heuristic(masked_mean(by_stratum)))


def gains(chosen_on: np.ndarray, scored_on: np.ndarray, strata: Sequence[str], shrinkage: float) -> np.ndarray:
    """(P,) mean total under the heuristic chosen for each prompt, minus that under the best single one; (P, A, S) in.

    With the same totals twice this is the naive gain, which the winner's curse inflates.
    """
    prompts, means = np.arange(len(strata)), masked_mean(scored_on)
    chosen = best_heuristic(heuristic_ratings(chosen_on, strata, shrinkage))
    return means[prompts, chosen] - means[:, best_single(chosen_on, strata)]


def cross_fitted_gains(total: np.ndarray, strata: Sequence[str], shrinkage: float) -> np.ndarray:
    """(P,) `gains`, chosen on every second seed and scored on the others, and the other way round; then the mean.

    Raises:
        InvalidValue: fewer than two seeds.
    """
    if total.shape[-1] < 2:
        raise InvalidValue("seeds", total.shape[-1], ">= 2", "one half chooses, the other one scores")
    first, second = total[..., ::2], total[..., 1::2]
    folds = [gains(first, second, strata, shrinkage), gains(second, first, strata, shrinkage)]
    return masked_mean(np.stack(folds, -1))


@dataclass(frozen=True)
class Gain:
    """What choosing a heuristic gains over the best single one; None: no prompt has a total on both halves."""

    cross_fitted: Interval | None
    naive: Interval | None
    """chosen and scored on the same seeds: too high by the winner's curse, shown for its size"""


def cross_fitted_gain(
    total: np.ndarray, strata: Sequence[str], shrinkage: float, *, resamples: int = 1000, level: float = 0.95
) -> Gain:
    """The gain of choosing by `heuristic_ratings`, with bootstrap intervals over prompts; (P, A, S) totals.

    Raises:
        InvalidValue: fewer than two seeds.
    """
    honest, naive = cross_fitted_gains(total, strata, shrinkage), gains(total, total, strata, shrinkage)
    options = {"resamples": resamples, "level": level}
    return Gain(interval(honest, strata, **options), interval(naive, strata, **options))


def interval(
    values: np.ndarray, strata: Sequence[str], *, resamples: int = 1000, level: float = 0.95
) -> Interval | None:
    """`statistics.bootstrap` over the strata that have a value; None: none has."""
    labels = np.asarray(strata)
    keep = np.isin(labels, labels[~np.isnan(values)])
    if not keep.any():
        return None
    return bootstrap(values[keep], labels[keep].tolist(), resamples=resamples, level=level)


def top_candidates(
    total: np.ndarray, lacks: np.ndarray, ratings: np.ndarray, digest: np.ndarray, k: int
) -> list[list[Cell]]:
    """The k best candidates of each prompt, best first; fewer where a prompt has fewer different ones with a total.

    Order: fewer lacking labels, higher total, higher rating of the heuristic on the prompt, earlier heuristic, earlier
    seed. Candidates of the same text count once, as the first of them in this order.

    Args:
        total, lacks, digest: (P, A, S); cells with equal digests hold equal texts.
        ratings: (P, A).
    """
    seeds = total.shape[2]
    return [
        [(i, cell // seeds, cell % seeds) for cell in _ranked(total[i], lacks[i], ratings[i], digest[i])[:k]]
        for i in range(len(total))
    ]


def _ranked(total: np.ndarray, lacks: np.ndarray, ratings: np.ndarray, digest: np.ndarray) -> list[int]:
    """Flat indices of one prompt's different candidates, best first."""
    known = np.flatnonzero(~np.isnan(total))
    rating = np.where(np.isnan(ratings), -np.inf, ratings)[known // total.shape[1]]
    order = known[np.lexsort((known, -rating, -total.ravel()[known], lacks.ravel()[known]))]
    first = np.unique(digest.ravel()[order], return_index=True)[1]
    return order[np.sort(first)].tolist()


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of the ranks of two arrays over the cells that both know, ties at their mean rank (Spearman 1904).

    NaN with fewer than two such cells, or where one array is constant on them.
    """
    both = ~(np.isnan(x) | np.isnan(y))
    if both.sum() < 2:
        return math.nan
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x[both]), _ranks(y[both])))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, which, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[which]


def _rows(strata: Sequence[str]) -> dict[str, np.ndarray]:
    """The prompts of each stratum."""
    labels = np.asarray(strata)
    return {label: np.flatnonzero(labels == label) for label in sorted(set(strata))}
