from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.power import (
    PairedDesign,
    forecast,
    measured_forecast,
    minimum_detectable_effect,
    pilot,
    prompts_needed,
)

NAN = math.nan
Z = 1.959964 + 0.841621
"""two-sided 95 %, power 80 %"""


def drawn(
    rates: tuple[float, float], design: PairedDesign, trials: int, prompts: int, generator: np.random.Generator
) -> np.ndarray:
    """(trials, prompts, 2) mean scores: the rates of an arm are spread as a Beta distribution with the intraclass
    correlation `between`, and a prompt has the same quantile of it for both arms with the probability `correlation`."""
    scale = (1 - design.between) / design.between
    quantiles = generator.random((trials, prompts, 2))
    shared = generator.random((trials, prompts)) < design.correlation
    quantiles[shared, 1] = quantiles[shared, 0]
    p = [beta.ppf(quantiles[..., i], rate * scale, (1 - rate) * scale) for i, rate in enumerate(rates)]
    return generator.binomial(design.samples, np.stack(p, -1)) / design.samples


@pytest.mark.parametrize(
    "design",
    [
        PairedDesign(samples=4, between=0.4, correlation=0.0),
        PairedDesign(samples=2, between=0.6, correlation=0.7, level=0.9, power=0.6),
    ],
)
def test_an_effect_of_the_minimum_size_is_shown_as_often_as_the_power_says(design: PairedDesign):
    generator, prompts, trials, base = np.random.default_rng(0), 150, 600, 0.4
    effect = minimum_detectable_effect(prompts, base, design)
    scores = drawn((base, base + effect), design, trials, prompts, generator)
    gaps = scores[..., 1] - scores[..., 0]
    t = gaps.mean(1) / (gaps.std(1, ddof=1) / math.sqrt(prompts))
    critical = {0.95: 1.96, 0.9: 1.645}[design.level]
    error = math.sqrt(design.power * (1 - design.power) / trials)
    assert (t > critical).mean() == pytest.approx(design.power, abs=3 * error + 0.015)


def test_the_worst_case_is_that_of_unpaired_single_answers():
    effect = minimum_detectable_effect(400, 0.3)
    variance = 0.3 * 0.7 + (0.3 + effect) * (0.7 - effect)
    assert effect == pytest.approx(Z * math.sqrt(variance / 400), abs=1e-6)
    assert minimum_detectable_effect(400, 0.3, PairedDesign(samples=64)) == effect


@settings(max_examples=60, deadline=None)
@example(prompts=30, base=0.37872647095777034, samples=1, between=0.0, correlation=0.0)  # 1 - base + base > 1
@given(
    prompts=st.integers(30, 3000),
    base=st.floats(0.05, 0.7),
    samples=st.integers(1, 16),
    between=st.floats(0, 1),
    correlation=st.floats(0, 0.9),
)
def test_the_inverse_and_the_worst_case_agree(
    prompts: int, base: float, samples: int, between: float, correlation: float
):
    design = PairedDesign(samples=samples, between=between, correlation=correlation)
    effect = minimum_detectable_effect(prompts, base, design)
    assert effect <= minimum_detectable_effect(prompts, base) + 1e-9
    if math.isfinite(effect):
        assert prompts_needed(effect, base, design) == pytest.approx(prompts, abs=1.01)


def test_more_arms_and_more_certainty_ask_for_more():
    effects = [
        minimum_detectable_effect(200, 0.3, PairedDesign(**options))
        for options in ({}, {"comparisons": 20}, {"comparisons": 20, "power": 0.9})
    ]
    assert effects == sorted(effects)
    assert effects[0] < effects[1] < effects[2]


def test_where_nothing_can_be_shown_it_says_so():
    assert math.isinf(minimum_detectable_effect(5, 0.95))
    found = forecast(5, 0.95)
    assert found["effect"] is None
    assert "Not even a perfect arm's gain" in found["sentence"]
    assert found["sentence"].endswith("take more prompts.")


def test_the_forecast_states_what_it_assumes():
    worst = forecast(400, 0.3, PairedDesign(comparisons=12))
    assert "on 400 prompts (12 arms compared at once, level 0.95; at worst: pairing" in worst["sentence"]
    assert f"A gain of {worst['effect']:.3f} or more over a base rate of 0.300 is shown 80 times" in worst["sentence"]
    design = PairedDesign(samples=4, between=0.4, correlation=0.7)
    assert (
        "4 samples a prompt, 40% of the variance between prompts, correlation of 0.70"
        in (forecast(400, 0.3, design)["sentence"])
    )


def test_a_measured_spread_promises_the_power_that_it_delivers():
    """Differences of any unit: a gain of the forecast size is found 80 times in 100, judged by a normal interval."""
    generator = np.random.default_rng(3)
    pilot_differences = generator.normal(0, [0.0, 2.0, 5.0], (4000, 3))
    pilot_differences[:7] = np.nan
    design = PairedDesign(comparisons=2)
    said = measured_forecast(90, 12.0, pilot_differences, design)
    assert said is not None
    assert said["effect"] == pytest.approx((2.2414 + 0.8416) * 5 / math.sqrt(90), rel=0.03)
    drawn = generator.normal(said["effect"], 5.0, (4000, 90))
    low = drawn.mean(1) - 2.2414 * drawn.std(1, ddof=1) / math.sqrt(90)
    assert (low > 0).mean() == pytest.approx(0.8, abs=0.03)
    assert "A gain of 1.6" in said["sentence"]
    assert "over 12 is shown 80 times in 100 on 90 prompts" in said["sentence"]
    assert "2 arms compared at once, level 0.95; differences spread by 4.9" in said["sentence"]


def test_where_arms_do_not_differ_nothing_is_known_of_the_spread():
    alike = np.array([[0.0, np.nan, 1.0], [0.0, np.nan, np.nan], [0.0, 3.0, np.nan]])
    assert measured_forecast(10, 0.5, alike, PairedDesign()) is None
    assert measured_forecast(10, 0.5, np.full((20, 1), 1 / 6), PairedDesign()) is None
    with pytest.raises(InvalidValue, match="prompts"):
        measured_forecast(0, 0.5, alike, PairedDesign())


def test_a_pilot_finds_the_shares_that_were_planted():
    design = PairedDesign(samples=1, between=0.5, correlation=0.6)
    generator = np.random.default_rng(1)
    means = drawn((0.4, 0.4), PairedDesign(1000, 0.5, 0.6), 1, 3000, generator)[0]  # nearly the rates themselves
    scores = generator.binomial(1, means[..., None], (3000, 2, 6)).astype(float)
    scores[generator.random(scores.shape) < 0.1] = NAN
    assert pilot(scores) == pytest.approx((design.between, design.correlation), abs=0.05)
    within = generator.binomial(1, 0.5, (2000, 2, 4)).astype(float)
    assert pilot(within)[0] == pytest.approx(0, abs=0.03)


def test_bad_input_is_refused():
    with pytest.raises(InvalidValue, match=r"base_rate must be in \[0, 1\], got 1.5"):
        minimum_detectable_effect(10, 1.5)
    with pytest.raises(InvalidValue, match="prompts must be >= 1, got 0"):
        minimum_detectable_effect(0, 0.5)
    with pytest.raises(InvalidValue, match=r"effect must be in \(0, 0.5\]"):
        prompts_needed(0.6, 0.5)
    with pytest.raises(InvalidValue, match=r"correlation must be in \[-1, 1\], got 2"):
        PairedDesign(correlation=2)
    with pytest.raises(InvalidValue, match="samples must be >= 1"):
        PairedDesign(samples=0)
    with pytest.raises(InvalidValue, match=r"shape of the scores must be \(prompts, 2, samples\)"):
        pilot(np.zeros((3, 3, 2)))
    with pytest.raises(InvalidValue, match="prompts with two samples under both arms must be >= 2, got 0"):
        pilot(np.zeros((3, 2, 1)))
    with pytest.raises(InvalidValue, match="a pilot without variance says nothing"):
        pilot(np.zeros((3, 2, 2)))
