"""One wording for what an interval of a difference allows to say. Pages, tables and sentences all take it from here."""

from __future__ import annotations

import math

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.statistics import Interval

BETTER, WORSE, NO_CLAIM = "better", "worse", "no difference can be claimed"


def verdict(interval: Interval) -> str:
    """`better`, `worse` or `no difference can be claimed`: a difference counts only when its interval excludes zero.

    A bound that is zero does not exclude it. Nor does an interval without width (differences that are all equal show no
    spread to judge them by) or one with infinite bounds.

    Raises:
        InvalidValue: NaN, or bounds in the wrong order.
    """
    low, high = interval.low, interval.high
    if math.isnan(interval.mean) or not low <= high:
        raise InvalidValue("interval", interval, "a mean with low <= high", "mask what has no value before")
    if low == high or low <= 0 <= high:
        return NO_CLAIM
    return BETTER if low > 0 else WORSE


def signed(interval: Interval) -> str:
    """`+0.031 [+0.010, +0.052]`."""
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def claim(subject: str, baseline: str, interval: Interval, level: float = 0.95) -> str:
    """The verdict as a sentence: the difference is `subject` minus `baseline`, in scores of which more is better."""
    numbers = f"difference {signed(interval)}, {100 * level:g} % interval"
    found = verdict(interval)
    if found == NO_CLAIM:
        return f"No difference between {subject} and {baseline} can be claimed: {numbers}."
    return f"{subject} is {found} than {baseline}: {numbers}."
