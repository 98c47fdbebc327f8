"""Several training seeds, and what an interval allows to say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.seeds import over_seeds, seed_report
from asn_rl.evaluation.statistics import Interval, Resampling, bootstrap
from asn_rl.evaluation.verdict import BETTER, NO_CLAIM, WORSE, claim, verdict

NAN = math.nan
HOW = Resampling(2000)


def crossed(spread: float, seeds: int, generator: np.random.Generator, prompts: int = 200) -> np.ndarray:
    """(P, K) differences whose seeds differ by `spread`, each prompt by 0.5 and each cell by 0.3."""
    return (
        generator.normal(0, spread, seeds)
        + generator.normal(0, 0.5, (prompts, 1))
        + generator.normal(0, 0.3, (prompts, seeds))
    )


def test_the_interval_over_seeds_and_prompts_has_both_variances():
    values = crossed(0.2, 8, np.random.default_rng(0))
    found = seed_report(values, ["a"] * 200, HOW)
    assert found.interval == bootstrap(values.mean(1), ["a"] * 200, resamples=2000)
    assert found.by_seed == pytest.approx(values.mean(0))
    assert found.spread == pytest.approx(np.std(values.mean(0), ddof=1))
    # The pigeonhole bootstrap: plug-in variances of rows and columns, and of the cells once more.
    rows, columns = values.mean(1).var() / 200, values.mean(0).var() / 8
    cells = (values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()).var() / (200 * 8)
    width = 2 * 1.96 * math.sqrt(rows + columns + cells)
    assert found.crossed.high - found.crossed.low == pytest.approx(width, rel=0.06)
    assert found.crossed.mean == found.interval.mean


def test_seeds_that_agree_add_nothing():
    values = np.repeat(np.random.default_rng(1).normal(0, 1, (150, 1)), 3, axis=1)
    found = seed_report(values, ["a"] * 150, HOW)
    assert found.spread == pytest.approx(0, abs=1e-12)
    width = found.interval.high - found.interval.low
    assert found.crossed.high - found.crossed.low == pytest.approx(width, rel=0.08)


def test_one_lucky_seed_is_no_method():
    values = crossed(0.0, 3, np.random.default_rng(2)) + np.array([0.0, 0.0, 0.6])
    found = seed_report(values, ["a"] * 200, HOW)
    assert verdict(found.interval) == BETTER
    assert verdict(found.crossed) == NO_CLAIM


def test_strata_weigh_the_same_and_a_prompt_that_a_seed_masks_counts_for_none():
    values = np.array([[1.0, 3.0], [NAN, 50.0], [3.0, 5.0], [10.0, 20.0]])
    strata = ["many"] * 3 + ["few"]
    found = seed_report(values, strata, HOW)
    assert found.by_seed == (6.0, 12.0)
    assert found.crossed.mean == found.interval.mean == 9.0
    np.testing.assert_array_equal(over_seeds(values), [2.0, NAN, 4.0, 15.0])
    assert found.as_dict()["by_seed"] == [6.0, 12.0]


def test_one_seed_is_refused():
    with pytest.raises(InvalidValue, match=r"training seeds >= 2.*one seed says nothing of the others"):
        seed_report(np.ones((4, 1)), ["a"] * 4)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((0.01, 0.2), BETTER),
        ((-0.2, -0.01), WORSE),
        ((-0.1, 0.2), NO_CLAIM),
        ((0.0, 0.2), NO_CLAIM),
        ((0.1, 0.1), NO_CLAIM),
        ((-math.inf, math.inf), NO_CLAIM),
    ],
)
def test_a_difference_counts_only_when_its_interval_excludes_zero(bounds: tuple[float, float], words: str):
    assert verdict(Interval(0.1, *bounds)) == words


def test_the_sentence_says_no_more_than_the_verdict():
    assert claim("rl", "greedy", Interval(0.1, 0.05, 0.15)) == (
        "rl is better than greedy: difference +0.100 [+0.050, +0.150], 95 % interval."
    )
    assert claim("rl", "greedy", Interval(0.1, -0.05, 0.25), 0.9) == (
        "No difference between rl and greedy can be claimed: difference +0.100 [-0.050, +0.250], 90 % interval."
    )
    for interval in (Interval(NAN, 0, 1), Interval(0, NAN, NAN), Interval(0, 1, -1)):
        with pytest.raises(InvalidValue, match="a mean with low <= high"):
            verdict(interval)
