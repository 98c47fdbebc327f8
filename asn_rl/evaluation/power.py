"""What a comparison of two arms on the same prompts can show, known before anything is generated.

An arm answers prompt i rightly with probability p_i, which spreads over prompts; its S samples are draws from p_i. The
variance of a score, v = p (1 - p) at the mean rate p, then has a part `between` prompts and a rest within them, and
over prompts the rates of the two arms have a `correlation`. The difference of the two arms' means of a prompt has the
variance

    between (v + w) - 2 correlation between sqrt(v w) + (1 - between) (v + w) / S

with v of the one arm and w of the other (a one-way random effects model, as in Miller 2024, arXiv:2411.00640). Scores
in [0, 1] that are graded spread less than 0/1 scores of the same mean, so that what is said here holds for them too.
The mean difference over prompts is taken as normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from asn_rl.errors import InvalidValue, check_at_least
from asn_rl.evaluation.statistics import masked_mean

_STEPS = 1000
"""effects that are tried before the answer is refined"""


@dataclass(frozen=True)
class PairedDesign:
    """How two arms will be compared. The defaults of `between` and `correlation` are the worst case where the arms do
    not prefer opposite prompts: more samples of a prompt and pairing count for nothing. Take them from a pilot, or from
    another run on the same benchmark (`pilot`), to be told less pessimistic figures."""

    samples: int = 1
    """completions of each prompt under each arm"""
    between: float = 1.0
    """share of a score's variance that lies between prompts, in [0, 1]"""
    correlation: float = 0.0
    """of the two arms' rates over prompts, in [-1, 1]"""
    level: float = 0.95
    """of the two-sided interval that must exclude zero"""
    power: float = 0.8
    """chance that it does"""
    comparisons: int = 1
    """arms that are compared with the baseline at the same time (Bonferroni)"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "samples", "comparisons")
        for name, low in (("between", 0), ("correlation", -1)):
            if not low <= getattr(self, name) <= 1:
                raise InvalidValue(name, getattr(self, name), f"in [{low}, 1]")
        for name in ("level", "power"):
            if not 0.5 <= getattr(self, name) < 1:
                raise InvalidValue(name, getattr(self, name), "in [0.5, 1)")

    @property
    def quantile(self) -> float:
        """Standard errors by which an effect must exceed zero to be shown with the chance `power`."""
        normal = NormalDist()
        return normal.inv_cdf(1 - (1 - self.level) / (2 * self.comparisons)) + normal.inv_cdf(self.power)

    def variance(self, base_rate: float, effect: float) -> float:
        """Of one prompt's difference, where the baseline's mean is `base_rate` and the other arm's is higher by
        `effect`."""
        v, w = base_rate * (1 - base_rate), (base_rate + effect) * max(0.0, 1 - base_rate - effect)
        shared = 2 * self.correlation * self.between * math.sqrt(v * w)
        return (self.between + (1 - self.between) / self.samples) * (v + w) - shared


def minimum_detectable_effect(prompts: int, base_rate: float, design: PairedDesign | None = None) -> float:
    """Smallest gain over the baseline that the comparison shows with the chance `power`, in units of the score.

    `promotion.minimum_detectable_effect` says the same from differences that were measured.

    Args:
        prompts: that will be compared on.
        base_rate: mean score of the baseline, in [0, 1].

    Returns:
        inf where not even a perfect arm would be told from the baseline.

    Raises:
        InvalidValue: no prompts, or a base rate outside [0, 1].
    """
    design = design or PairedDesign()
    _check(prompts, base_rate)
    most = 1 - base_rate

    def shown(effect: float) -> bool:
        return effect >= design.quantile * math.sqrt(max(0.0, design.variance(base_rate, effect)) / prompts)

    if most == 0 or not shown(most):
        return math.inf
    # Arms that correlate almost perfectly may show a small gain and not a larger one, which correlates less. From the
    # top, so that every gain above the answer is shown.
    step = next((i for i in range(_STEPS, -1, -1) if not shown(most * i / _STEPS)), None)
    if step is None:
        return 0.0
    low, high = most * step / _STEPS, most * (step + 1) / _STEPS
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


def prompts_needed(effect: float, base_rate: float, design: PairedDesign | None = None) -> int:
    """Fewest prompts on which a gain of `effect` over the baseline is shown with the chance `power`.

    Raises:
        InvalidValue: a base rate outside [0, 1], or an effect outside (0, 1 - base_rate].
    """
    design = design or PairedDesign()
    _check(1, base_rate)
    if not 0 < effect <= 1 - base_rate:
        raise InvalidValue("effect", effect, f"in (0, {1 - base_rate:g}], what the base rate leaves")
    return max(1, math.ceil(max(0.0, design.variance(base_rate, effect)) * (design.quantile / effect) ** 2))


def forecast(prompts: int, base_rate: float, design: PairedDesign | None = None) -> dict[str, Any]:
    """The minimum detectable effect before a run, for a JSON file: `effect` (None: nothing can be shown), `base_rate`,
    `prompts`, and a `sentence` that says what it assumes."""
    design = design or PairedDesign()
    effect = minimum_detectable_effect(prompts, base_rate, design)
    possible = math.isfinite(effect)
    return {
        "effect": effect if possible else None,
        "base_rate": base_rate,
        "prompts": prompts,
        "sentence": (f"A gain of {effect:.3f} or more" if possible else "Not even a perfect arm's gain")
        + f" over a base rate of {base_rate:.3f} is shown {100 * design.power:g} times in 100 on {prompts} prompts "
        + f"({_assumptions(design)})"
        + ("." if possible else "; take more prompts."),
    }


def measured_forecast(
    prompts: int, base: float, differences: np.ndarray, design: PairedDesign
) -> dict[str, Any] | None:
    """As `forecast`, for a metric that is no rate: from how differences to the baseline spread over a pilot's prompts.

    Args:
        prompts: that will be compared on.
        base: the baseline's mean.
        differences: (P, A) of other arms to the baseline on the pilot's prompts; NaN: masked. The arm whose
            differences spread most counts.

    Returns:
        None where no arm's differences vary over prompts, so that nothing is known of the spread.

    Raises:
        InvalidValue: no prompts.
    """
    _check(prompts, 0.0)
    columns = [column[~np.isnan(column)] for column in differences.T]
    spreads = [np.std(known, ddof=1) for known in columns if len(known) >= 2 and known.min() < known.max()]
    spread = float(max(spreads, default=0.0))
    if spread == 0:
        return None
    effect = design.quantile * spread / math.sqrt(prompts)
    among = f"{design.comparisons} arms compared at once, " if design.comparisons > 1 else ""
    return {
        "effect": effect,
        "base_rate": base,
        "prompts": prompts,
        "sentence": f"A gain of {effect:.3g} or more over {base:.3g} is shown {100 * design.power:g} times in 100 on "
        f"{prompts} prompts ({among}level {design.level:g}; differences spread by {spread:.3g} over the prompts of the "
        "selection split).",
    }


def _assumptions(design: PairedDesign) -> str:
    among = f"{design.comparisons} arms compared at once, " if design.comparisons > 1 else ""
    level = f"{among}level {design.level:g}; "
    if design.between == 1 and design.correlation == 0:
        return level + "at worst: pairing and more samples of a prompt gain nothing"
    return (
        level + f"{design.samples} samples a prompt, {design.between:.0%} of the variance between prompts, correlation "
        f"of {design.correlation:.2f} between the arms"
    )


def pilot(scores: np.ndarray) -> tuple[float, float]:
    """`between` and `correlation` of two arms that were run on some prompts: analysis of variance, means over the arms.

    Estimates outside their range, which small pilots give, count as its nearest end; where nothing lies between
    prompts the correlation counts as 0.

    Args:
        scores: (P, 2, S) scores of independent samples; NaN: masked.

    Raises:
        InvalidValue: not two arms, or fewer than two prompts with two samples or more under both.
    """
    if scores.ndim != 3 or scores.shape[1] != 2:
        raise InvalidValue("shape of the scores", scores.shape, "(prompts, 2, samples)")
    counts = (~np.isnan(scores)).sum(-1)
    kept = (counts >= 2).all(-1)
    if kept.sum() < 2:
        raise InvalidValue("prompts with two samples under both arms", int(kept.sum()), ">= 2")
    scores, counts = scores[kept], counts[kept]
    means = masked_mean(scores)
    within = np.nansum((scores - means[..., None]) ** 2, -1) / (counts - 1)  # (P, 2)
    rates = means.var(0, ddof=1) - (within / counts).mean(0)  # (2,) variance of the rates
    total = rates + within.mean(0)
    if not (total > 0).any():
        raise InvalidValue("scores", "all equal", "scores that vary", "a pilot without variance says nothing")
    between = float(np.clip(rates.sum() / total.sum(), 0, 1))
    if not (rates > 0).all():
        return between, 0.0
    covariance = np.cov(means.T)[0, 1]
    return between, float(np.clip(covariance / math.sqrt(rates.prod()), -1, 1))


def _check(prompts: int, base_rate: float) -> None:
    if prompts < 1:
        raise InvalidValue("prompts", prompts, ">= 1")
    if not 0 <= base_rate <= 1:
        raise InvalidValue("base_rate", base_rate, "in [0, 1]")
