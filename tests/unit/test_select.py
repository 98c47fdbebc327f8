"""Rating and selecting: closed forms, brute force, properties; then the stage on files."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asn_rl.errors import ConfigError, DataError, InvalidValue, UnknownName
from asn_rl.labelling.grid import Grid
from asn_rl.labelling.labels import Labels, label, read_labels
from asn_rl.labelling.rating import (
    best_heuristic,
    best_single,
    cross_fitted_gain,
    cross_fitted_gains,
    gains,
    heuristic_ratings,
    lacking,
    robust_scale,
    soft_targets,
    spearman,
    top_candidates,
    total_score,
)
from asn_rl.labelling.records import ShardWriter, candidate_record
from asn_rl.labelling.select import SelectConfig, select
from asn_rl.labelling.store import CandidateStore
from asn_rl.rewards.compose import RewardConfig
from asn_rl.types import Candidate, Prompt

NAN = math.nan
SHAPE = (3, 2, 4)
NUMBERS = st.floats(-100, 100, allow_subnormal=False)


def grids(shape: tuple[int, int, int] = SHAPE, masked: bool = True) -> st.SearchStrategy[np.ndarray]:
    """(P, A, S) scores, some of them masked."""
    elements = st.one_of(st.integers(-5, 5).map(float), NUMBERS)
    return hnp.arrays(np.float64, shape, elements=st.one_of(elements, st.just(NAN)) if masked else elements)


def one(prompts: int) -> list[str]:
    return ["all"] * prompts


def different(shape: tuple[int, ...]) -> np.ndarray:
    """Digests of texts that all differ."""
    return np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)


def top(total: np.ndarray, k: int, **changes: np.ndarray) -> list[list[tuple[int, int, int]]]:
    arguments: dict[str, Any] = {
        "lacks": np.zeros(total.shape, int), "ratings": np.zeros(total.shape[:2]), "digest": different(total.shape)
    } | changes  # fmt: skip
    return top_candidates(total, k=k, **arguments)


# Scales


def test_scores_are_measured_from_the_median_in_absolute_deviations():
    # Median 10.5, distances .5 .5 1.5 1.5 ... 8.5 8.5 9.5 89.5: their median is 5.
    scores = np.array([*range(1, 20), 100.0])
    found = robust_scale(scores[None, None])
    assert (found.how, found.centre) == ("mad", 10.5)
    assert found.values[0, 0] == pytest.approx((scores - 10.5) / (5 * 1.4826))


def test_a_unit_is_at_least_half_of_what_the_deciles_say():
    scores = np.array([0.0] * 10 + [1.0, 1.0, 1.0, *range(2, 10)])  # median 1, deviations mostly 1
    found = robust_scale(scores[None, None])
    assert found.scale == pytest.approx(max(1.4826, (7 - 0) / 2.5631 / 2))


def test_one_outlier_moves_the_others_little():
    values = np.random.default_rng(0).normal(5, 2, 1001)[None, None]
    spoilt = values.copy()
    spoilt[0, 0, 0] = -1e6
    assert robust_scale(spoilt).values[0, 0, 1:] == pytest.approx(robust_scale(values).values[0, 0, 1:], abs=0.05)
    assert robust_scale(values).scale == pytest.approx(2, rel=0.06), "a standard deviation, for normal scores"


def test_verdicts_fall_back_to_the_standard_deviation():
    found = robust_scale(np.array([[[1.0, 1.0, 1.0, 0.0]]]))
    assert (found.how, found.centre, found.scale) == ("std", 0.75, pytest.approx(math.sqrt(3) / 4))
    assert found.values[0, 0] == pytest.approx(np.array([0.25, 0.25, 0.25, -0.75]) / (math.sqrt(3) / 4))


@settings(deadline=None, max_examples=60)
@given(zeros=st.integers(0, 700), seed=st.integers(0, 99), shape=st.sampled_from([0.3, 1.0, 3.0]))
def test_many_equal_scores_do_not_make_the_others_huge(zeros: int, seed: int, shape: float):
    scores = np.random.default_rng(seed).random(1000) ** shape
    scores[:zeros] = 1e-16 * scores[:zeros] if seed % 2 else 0.0
    assert np.abs(robust_scale(scores[None, None]).values).max() < 25


@pytest.mark.parametrize("value", [0.0, 0.1, 7e5])
def test_equal_scores_say_nothing(value: float):
    found = robust_scale(np.array([[[value, NAN, value, value]]]))
    assert (found.how, found.centre) == ("constant", value)
    np.testing.assert_array_equal(found.values, [[[0, NAN, 0, 0]]])


def test_nothing_known_stays_unknown():
    assert np.isnan(robust_scale(np.full(SHAPE, NAN)).values).all()


@settings(deadline=None, max_examples=60)
@given(scores=grids(), shift=st.integers(-50, 50), factor=st.sampled_from([0.25, 2.0, 8.0]))
def test_scaling_keeps_masks_and_order_and_forgets_units(scores: np.ndarray, shift: int, factor: float):
    found, other = robust_scale(scores), robust_scale(factor * scores + shift)
    np.testing.assert_array_equal(np.isnan(found.values), np.isnan(scores))
    known = ~np.isnan(scores)
    if found.how == other.how:  # rounding may make two neighbouring scores equal
        assert other.values[known] == pytest.approx(found.values[known], rel=1e-6, abs=1e-6)
    order = np.argsort(scores[known], kind="stable")
    assert (np.diff(found.values[known][order]) >= 0).all()


# Totals


def test_the_total_is_the_weighted_mean_of_what_applies():
    scores = {"a": np.array([[[1.0, 1.0, NAN, NAN]]]), "b": np.array([[[4.0, NAN, 4.0, NAN]]])}
    found = total_score(scores, {"a": 3.0, "b": -1.0})
    np.testing.assert_allclose(found, [[[(3 - 4) / 4, 1, -4, NAN]]])


def test_a_labeller_without_weight_gives_no_total():
    scores = {"a": np.array([[[NAN, 2.0]]]), "b": np.array([[[4.0, 4.0]]])}
    np.testing.assert_allclose(total_score(scores, {"a": 1.0, "b": 0.0}), [[[NAN, 2.0]]])


@settings(deadline=None, max_examples=80)
@given(
    table=hnp.arrays(np.float64, (3, 6), elements=st.integers(-9, 9).map(float)),
    weights=st.tuples(*[st.integers(0, 4)] * 3),
    more=st.integers(0, 9),
)
def test_raising_a_weight_never_hurts_the_candidate_that_is_best_on_that_label(table, weights, more):
    scores = {name: row.reshape(1, 3, 2) for name, row in zip("abc", table, strict=True)}
    best = int(table[0].argmax())
    ranks = []
    for extra in (0, more, 1e6):
        total = total_score(scores, dict(zip("abc", weights, strict=True)) | {"a": weights[0] + 1 + extra}).ravel()
        ranks.append(int((total > total[best] + 1e-9).sum()))
    assert ranks[0] >= ranks[1] >= ranks[2]
    if (table[0] == table[0].max()).sum() == 1:
        assert ranks[2] == 0


def test_every_weight_changes_the_order_within_a_prompt():
    """A verifier's weight too: the candidate that is better on it alone wins when it is raised."""
    scores = {"quality": np.array([[[2.0, 1.0, 0.0]]]), "verifier": np.array([[[0.0, 0.0, 1.0]]])}
    light, heavy = ({"quality": 1.0, "verifier": weight} for weight in (0.5, 3.0))
    assert top(total_score(scores, light), 3)[0] == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
    assert top(total_score(scores, heavy), 3)[0] == [(0, 0, 2), (0, 0, 0), (0, 0, 1)]


def test_a_candidate_lacks_only_what_a_sibling_has():
    scores = {
        "quality": np.array([[[1.0, 1.0]], [[1.0, 1.0]], [[1.0, NAN]]]),
        "verifier": np.array([[[1.0, NAN]], [[NAN, NAN]], [[1.0, NAN]]]),
        "ignored": np.array([[[1.0, NAN]], [[1.0, NAN]], [[1.0, NAN]]]),
    }
    weights = {"quality": 1.0, "verifier": -1.0, "ignored": 0.0}
    assert lacking(scores, weights).tolist() == [[[0, 1]], [[0, 0]], [[0, 2]]]


def test_no_candidate_wins_by_a_mask():
    """The masked one has the best total, because the verifier that all the others failed says nothing of it."""
    scores = {"quality": np.array([[[0.1, 2.0, 0.5]]]), "verifier": np.array([[[-1.0, NAN, -1.0]]])}
    weights = {"quality": 1.0, "verifier": 1.0}
    total, lacks = total_score(scores, weights), lacking(scores, weights)
    assert total.argmax() == 1
    assert top(total, 3, lacks=lacks)[0] == [(0, 0, 2), (0, 0, 0), (0, 0, 1)]


# Ratings


def test_a_hand_worked_rating():
    # Prompt levels 2 and 6; distances of the first heuristic -1 and +1, mean 0; of the second 1 and -1.
    total = np.array([[[0.0, 2.0], [3.0, 3.0]], [[7.0, 7.0], [5.0, 5.0]]])
    assert heuristic_ratings(total, one(2), 2.0) == pytest.approx(np.array([[1.5, 2.5], [6.5, 5.5]]))
    assert heuristic_ratings(total, one(2), 0.0) == pytest.approx(np.array([[1.0, 3.0], [7.0, 5.0]]))
    assert heuristic_ratings(total, one(2), math.inf) == pytest.approx(np.array([[2.0, 2.0], [6.0, 6.0]]))
    assert heuristic_ratings(total, ["a", "b"], math.inf) == pytest.approx(np.array([[1.0, 3.0], [7.0, 5.0]]))


@settings(deadline=None, max_examples=50)
@given(total=grids((4, 3, 4), masked=False), shrinkage=st.floats(0, 100))
def test_without_masks_the_order_is_that_of_means_shrunk_to_the_stratum(total: np.ndarray, shrinkage: float):
    strata = ["a", "b", "a", "b"]
    means = total.mean(-1)
    prior = np.stack([means[::2].mean(0), means[1::2].mean(0)] * 2)
    weight = 4 / (4 + shrinkage)
    expected = weight * means + (1 - weight) * prior
    found = heuristic_ratings(total, strata, shrinkage)
    shift = found - expected  # constant within a prompt
    assert shift == pytest.approx(np.broadcast_to(shift[:, :1], shift.shape), abs=1e-8)


def test_a_mask_on_a_hard_prompt_does_not_win_it():
    """The stratum's plain mean would: it says 5, and the others have -10 there."""
    total = np.array([[[5.0], [6.0]], [[5.0], [6.0]], [[NAN], [-10.0]]])
    assert best_heuristic(heuristic_ratings(total, one(3), 0.0)).tolist() == [1, 1, 1]


def test_a_prompt_without_scores_gets_what_its_stratum_says():
    total = np.array([[[1.0], [3.0]], [[NAN], [NAN]], [[9.0], [4.0]]])
    found = heuristic_ratings(total, ["a", "a", "b"], 8.0)
    assert found[1] == pytest.approx([1, 3])
    assert best_heuristic(found).tolist() == [1, 1, 0]


def test_a_heuristic_without_any_score_has_no_rating_and_no_share():
    total = np.array([[[1.0], [NAN]], [[2.0], [NAN]]])
    found = heuristic_ratings(total, one(2), 8.0)
    assert np.isnan(found[:, 1]).all()
    assert best_heuristic(found).tolist() == [0, 0]
    assert soft_targets(found, 0.1).tolist() == [[1, 0], [1, 0]]


@settings(deadline=None, max_examples=60)
@given(
    ratings=hnp.arrays(np.float64, (3, 4), elements=st.one_of(NUMBERS, st.just(NAN))), temperature=st.floats(0.01, 9)
)
def test_soft_targets_are_a_softmax(ratings: np.ndarray, temperature: float):
    ratings[:, 0] = 1.0
    found = soft_targets(ratings, temperature)
    assert found.sum(-1) == pytest.approx(np.ones(3))
    assert (found[np.isnan(ratings)] == 0).all()
    assert (found.argmax(-1) == best_heuristic(ratings)).all()
    one_row = np.exp((ratings[0] - np.nanmax(ratings[0])) / temperature)
    assert found[0] == pytest.approx(np.nan_to_num(one_row / np.nansum(one_row)))


def test_targets_of_nothing_are_refused():
    with pytest.raises(InvalidValue, match="temperature must be > 0, got 0"):
        soft_targets(np.ones((1, 2)), 0.0)
    with pytest.raises(InvalidValue, match="at least one number a prompt"):
        soft_targets(np.array([[1.0, 2.0], [NAN, NAN]]), 1.0)


# Gains


def noise(means: np.ndarray, seeds: int, seed: int) -> np.ndarray:
    return means[..., None] + np.random.default_rng(seed).normal(size=(*means.shape, seeds))


def test_where_all_heuristics_are_alike_only_the_naive_gain_is_not_zero():
    found = [cross_fitted_gain(noise(np.zeros((100, 6)), 8, seed), one(100), 8.0) for seed in range(40)]
    honest = [gain.cross_fitted.mean for gain in found if gain.cross_fitted]
    # Each trial differs by 100 prompts of two folds with the difference of two means over four seeds.
    error = math.sqrt(2 / 4 / 2 / 100 / 40)
    assert len(honest) == 40
    assert abs(np.mean(honest)) < 4 * error
    assert np.mean([gain.naive.mean for gain in found if gain.naive]) > 0.2, "the winner's curse"
    covered = sum(gain.cross_fitted.low <= 0 <= gain.cross_fitted.high for gain in found if gain.cross_fitted)
    assert covered >= 34


def test_a_planted_gain_is_found():
    means = np.zeros((200, 3))
    means[np.arange(200), np.arange(200) % 2] = 2.0  # half of the prompts want one, half the other
    gain = cross_fitted_gain(noise(means, 16, 0), one(200), 4.0)
    assert gain.cross_fitted is not None
    assert gain.cross_fitted.low < 1.0 < gain.cross_fitted.high + 0.05


def test_choosing_by_stratum_is_an_infinite_shrinkage():
    means = np.array([[1.0, 0.0]] * 30 + [[0.0, 2.0]] * 30)
    strata = ["a"] * 30 + ["b"] * 30
    total = np.repeat(means[..., None], 4, -1)
    assert best_single(total, strata) == 1
    found = gains(total, total, strata, math.inf)
    assert found.tolist() == [1.0] * 30 + [0.0] * 30
    assert gains(total, total, one(60), math.inf).tolist() == [0.0] * 60


def test_a_hand_worked_cross_fit():
    # Seeds 0 and 2 choose heuristic 0 (mean .8), which has .4 on the others; those choose 1, which has .2.
    total = np.array([[[0.9, 0.3, 0.7, 0.5], [0.1, 1.0, 0.3, 0.6]]])
    # One prompt: the best single heuristic of each half is the chosen one, so nothing is gained.
    assert cross_fitted_gains(total, one(1), 0.0).tolist() == [0.0]
    both = np.concatenate([total, np.array([[[0.0] * 4, [3.0] * 4]])])
    # Now heuristic 1 is the best single one on both halves: prompt 0 gains .4 - .8 and then 0, prompt 1 nothing.
    assert cross_fitted_gains(both, one(2), 0.0) == pytest.approx([-0.2, 0.0])


def test_the_gain_needs_two_seeds():
    with pytest.raises(InvalidValue, match="seeds must be >= 2, got 1"):
        cross_fitted_gains(np.ones((2, 2, 1)), one(2), 1.0)


# Ranking


@settings(deadline=None, max_examples=60)
@given(total=grids(), digest=hnp.arrays(np.uint64, SHAPE, elements=st.integers(0, 9)), k=st.integers(1, 9))
def test_the_ranking_is_that_of_a_plain_sort(total: np.ndarray, digest: np.ndarray, k: int):
    lacks = (digest % 3).astype(int)
    ratings = np.array([[1.0, 2.0], [2.0, 1.0], [NAN, 0.0]])
    found = top_candidates(total, lacks, ratings, digest, k)
    for i, j_k in enumerate(found):
        cells = [(i, j, s) for j, s in itertools.product(range(2), range(4)) if not math.isnan(total[i, j, s])]
        rating = np.nan_to_num(ratings, nan=-np.inf)
        cells.sort(key=lambda cell: (lacks[cell], -total[cell], -rating[cell[:2]], cell))
        expected, seen = [], set()
        for cell in cells:
            if digest[cell] not in seen:
                seen.add(digest[cell])
                expected.append(cell)
        assert j_k == expected[:k]


def test_ties_go_to_the_better_rated_heuristic_then_to_the_earlier_cell():
    total = np.zeros((1, 2, 2))
    assert top(total, 4)[0] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert top(total, 2, ratings=np.array([[0.0, 1.0]]))[0] == [(0, 1, 0), (0, 1, 1)]


def test_equal_texts_count_once():
    digest = np.array([[[7, 7], [7, 8]]], np.uint64)
    total = np.array([[[3.0, 3.0], [3.0, 1.0]]])
    assert top(total, 3, digest=digest)[0] == [(0, 0, 0), (0, 1, 1)]


# Correlations


@settings(deadline=None, max_examples=60)
@given(x=grids((1, 3, 4)), y=grids((1, 3, 4)))
def test_spearman_is_the_correlation_of_mean_ranks(x: np.ndarray, y: np.ndarray):
    pairs = [(a, b) for a, b in zip(x.ravel(), y.ravel(), strict=True) if not math.isnan(a + b)]

    def ranks(values: list[float]) -> list[float]:
        return [sum(v < w for v in values) + (1 + sum(v == w for v in values)) / 2 for w in values]

    a, b = ([pair[i] for pair in pairs] for i in range(2))
    if len(set(a)) < 2 or len(set(b)) < 2:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
        assert spearman(x, y) == pytest.approx(spearman(y, 8 * x)), "monotone maps keep ranks"


# The stage

GRID = Grid(("p0", "p1", "p2", "p3"), ("cold", "hot", "wild"), (7, 8))
STRATA = ["easy", "easy", "hard", "hard"]


@pytest.fixture
def store(tmp_path: Path) -> CandidateStore:
    folder = tmp_path / "candidates"
    cells = list(GRID.keys(np.ones(GRID.shape, bool)))
    with ShardWriter(folder) as shard:
        shard.write(
            [
                candidate_record(
                    Candidate(p, h, s, "ümlaut" if h == "cold" else f"{p} {h} {s}", [s], terminated=h != "wild")
                )
                for p, h, s in cells
            ]
        )
    return CandidateStore(GRID, folder)


def labels(scores: np.ndarray) -> Labels:
    return Labels(scores, np.ones(GRID.shape, bool), scores)


def drawn(seed: int = 0) -> dict[str, Labels]:
    generator = np.random.default_rng(seed)
    verdict = generator.integers(0, 2, GRID.shape).astype(float)
    verdict[2] = NAN
    verdict[0, 1, 1] = NAN
    return {"quality": labels(generator.normal(size=GRID.shape)), "verifier": labels(verdict)}


WEIGHTS = {"quality": 1.0, "verifier": 2.0}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_selected_candidates_carry_texts_ranks_and_scores(store: CandidateStore, tmp_path: Path):
    found = drawn()
    summary = select(store, found, WEIGHTS, STRATA, SelectConfig(top_k=3), tmp_path / "selected")
    records = lines(tmp_path / "selected" / "selected.jsonl")
    assert [(r["prompt_id"], r["rank"]) for r in records] == [(p, n) for p in GRID.prompts for n in (1, 2, 3)]
    scaled = {name: robust_scale(part.scores).values for name, part in found.items()}
    total = total_score(scaled, WEIGHTS)
    for record in records:
        cell = GRID.index((record["prompt_id"], record["heuristic"], record["seed"]), "here")
        assert record["schema"] == "asn_rl.selected/1"
        text = (
            "ümlaut" if record["heuristic"] == "cold" else f"{record['prompt_id']} {record['heuristic']} {cell[2] + 7}"
        )
        assert (record["completion"], record["completion_ids"]) == (text, [record["seed"]])
        assert record["terminated"] == (record["heuristic"] != "wild")
        assert record["total"] == pytest.approx(total[cell])
        assert record["raw"]["quality"] == found["quality"].scores[cell]
        assert record["normalised"]["quality"] == pytest.approx(scaled["quality"][cell])
        assert (record["raw"]["verifier"] is None) == (record["prompt_id"] == "p2")
    assert summary == json.loads((tmp_path / "selected" / "summary.json").read_text())
    assert not list((tmp_path / "selected").glob("*.part"))


def test_targets_are_the_best_heuristic_or_shares(store: CandidateStore, tmp_path: Path):
    quality = np.zeros(GRID.shape)
    quality[:2, 1] = 1.0
    quality[2:, 2] = 1.0
    quality[0, 0, 0] = 0.5
    both = {"quality": labels(quality)}
    select(store, both, {"quality": 1.0}, STRATA, SelectConfig(normalize="none"), tmp_path / "best")
    assert lines(tmp_path / "best" / "targets.jsonl") == [
        {"schema": "asn_rl.target/1", "prompt_id": p, "stratum": s, "best": h, "weights": {h: 1.0}}
        for p, s, h in zip(GRID.prompts, STRATA, ["hot", "hot", "wild", "wild"], strict=True)
    ]
    config = SelectConfig(normalize="none", target="soft", temperature=0.5, shrinkage=0)
    select(store, both, {"quality": 1.0}, STRATA, config, tmp_path / "soft")
    soft = lines(tmp_path / "soft" / "targets.jsonl")
    weights = np.exp(np.array([0.25, 1.0, 0.0]) / 0.5)
    assert list(soft[0]["weights"].values()) == pytest.approx(weights / weights.sum())
    assert list(soft[0]["weights"]) == list(GRID.heuristics)
    sharp = SelectConfig(normalize="none", target="soft", temperature=1e-4, shrinkage=0)
    select(store, both, {"quality": 1.0}, STRATA, sharp, tmp_path / "sharp")
    assert lines(tmp_path / "sharp" / "targets.jsonl")[0]["weights"] == {"hot": 1.0}, "no share is written as 0"


def test_the_summary_says_what_was_counted_and_how_scores_were_scaled(store: CandidateStore, tmp_path: Path):
    summary = select(store, drawn(), WEIGHTS, STRATA, SelectConfig(), tmp_path)
    verifier = summary["labellers"]["verifier"]
    assert (verifier["scored"], verifier["masked"]) == (17, 7)
    assert verifier["masked_by_heuristic"] == {"cold": 2, "hot": 3, "wild": 2}
    assert verifier["scale"]["how"] == "std"
    assert sum(verifier["histogram"]["counts"]) == 17
    assert summary["labellers"]["quality"]["scale"]["how"] == "mad"
    assert summary["candidates"] == {
        "cells": 24, "missing": 0, "blank": 0, "truncated": 8, "without_total": 0, "lacking_labels": 1, "kept": 4,
    }  # fmt: skip
    assert summary["prompts"]["by_stratum"] == {"easy": 2, "hard": 2}
    assert sum(row["wins"] for row in summary["heuristics"].values()) == 4
    assert summary["heuristics"]["hot"]["lacking_labels"] == 1
    for row in summary["heuristics"].values():
        assert row["wins"] == sum(part["wins"] for part in row["strata"].values())
        assert row["mean"]["low"] <= row["mean"]["mean"] <= row["mean"]["high"]
    assert summary["correlations"]["quality"]["quality"] == pytest.approx(1)
    assert summary["correlations"]["quality"]["verifier"] == summary["correlations"]["verifier"]["quality"]
    assert set(summary["gain"]) == {"by_prompt", "by_stratum", "left_out"}
    assert summary["settings"]["weights"] == WEIGHTS


def test_examples_are_the_best_and_the_worst_of_some_prompts_of_each_stratum(store: CandidateStore, tmp_path: Path):
    found = drawn()
    select(store, found, WEIGHTS, STRATA, SelectConfig(), tmp_path)
    examples = lines(tmp_path / "examples.jsonl")
    assert [r["prompt_id"] for r in examples] == ["p0", "p0", "p2", "p2", "p1", "p1", "p3", "p3"]
    for best, worst in zip(examples[::2], examples[1::2], strict=True):
        assert best["rank"] == 1 < worst["rank"]
        assert (worst["lacks"], -worst["total"]) > (best["lacks"], -best["total"])


def test_the_lines_of_an_engine_are_those_of_one_process(store: CandidateStore, tmp_path: Path):
    calls = []

    def engine(function, blocks):
        for block in blocks:
            calls.append(len(block))
            yield function(block)

    config = SelectConfig(top_k=2)
    select(store, drawn(), WEIGHTS, STRATA, config, tmp_path / "a")
    select(store, drawn(), WEIGHTS, STRATA, config, tmp_path / "b", engine)
    assert calls == [8]
    for name in ("selected.jsonl", "targets.jsonl", "examples.jsonl", "summary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_interruption_leaves_the_old_files(store: CandidateStore, tmp_path: Path):
    select(store, drawn(), WEIGHTS, STRATA, SelectConfig(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json*")}

    def stopped(function, blocks):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select(store, drawn(1), WEIGHTS, STRATA, SelectConfig(), tmp_path, stopped)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.json*") if path.suffix != ".part"} == before


def test_candidates_that_were_not_generated_are_no_candidates(tmp_path: Path):
    with ShardWriter(tmp_path / "candidates") as shard:
        shard.write([candidate_record(Candidate(p, "hot", 7, p, [1], True)) for p in GRID.prompts])
    store = CandidateStore(GRID, tmp_path / "candidates")
    found = labels(np.full(GRID.shape, 2.0))
    found.scores[:, 1, 0] = [1, 2, 3, 4]
    summary = select(store, {"quality": found}, {"quality": 1.0}, STRATA, SelectConfig(top_k=5), tmp_path / "selected")
    assert summary["candidates"]["missing"] == 20
    assert summary["candidates"]["kept"] == 4
    assert summary["labellers"]["quality"]["scored"] == 4
    assert summary["gain"]["by_prompt"]["cross_fitted"] is None, "no heuristic has a total on both halves"
    assert [r["best"] for r in lines(tmp_path / "selected" / "targets.jsonl")] == ["hot"] * 4


# Refusals


def test_a_labeller_that_masked_everything_is_named(store: CandidateStore, tmp_path: Path):
    found = drawn() | {"judge": labels(np.full(GRID.shape, NAN))}
    with pytest.raises(DataError, match=r"labeller 'judge' masked all of its 24 scores.*counts\.json"):
        select(store, found, WEIGHTS | {"judge": 1.0}, STRATA, SelectConfig(), tmp_path)


def test_cells_that_were_not_labelled_are_not_taken_for_masked(store: CandidateStore, tmp_path: Path):
    found = drawn()
    found["verifier"].seen[1, 2, 0] = False
    with pytest.raises(DataError, match=r"'verifier' has not scored 1 of 24.*'p1', 'wild', 7.*`asn-rl label`"):
        select(store, found, WEIGHTS, STRATA, SelectConfig(), tmp_path)


def test_a_stratum_that_no_labeller_rates_is_refused(store: CandidateStore, tmp_path: Path):
    verdict = np.ones(GRID.shape)
    verdict[2:] = NAN
    with pytest.raises(DataError, match="no candidate of stratum 'hard' has all labels"):
        select(store, {"verifier": labels(verdict)}, {"verifier": 1.0}, STRATA, SelectConfig(), tmp_path)


def test_weights_name_the_labellers(store: CandidateStore, tmp_path: Path):
    with pytest.raises(UnknownName, match=r"unknown labeller 'qualty'.*Did you mean 'quality'"):
        select(store, drawn(), WEIGHTS | {"qualty": 1.0}, STRATA, SelectConfig(), tmp_path)
    for weights in ({"quality": 1.0}, {"quality": 0.0, "verifier": 0.0}, {"quality": math.inf, "verifier": 1.0}):
        with pytest.raises(ConfigError, match="every labeller needs a finite weight"):
            select(store, drawn(), weights, STRATA, SelectConfig(), tmp_path)
    with pytest.raises(InvalidValue, match="one label for each of the 4 prompts"):
        select(store, drawn(), WEIGHTS, STRATA[:3], SelectConfig(), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize": "rank"}, "normalize must be robust or none"),
        ({"target": "all"}, "target must be best or soft"),
        ({"shrinkage": -1.0}, "shrinkage must be >= 0"),
        ({"top_k": 0}, "top_k must be >= 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str):
    with pytest.raises(InvalidValue, match=message):
        SelectConfig(**change)


def test_labels_that_compare_candidates_gain_nothing_where_heuristics_are_alike(tmp_path: Path):
    """Scores of one group know of each other, and a shared level is carried from one half of the seeds to the other."""
    grid = Grid(tuple(f"p{i}" for i in range(40)), tuple(f"h{j}" for j in range(6)), tuple(range(8)))
    generator = np.random.default_rng(0)
    with ShardWriter(tmp_path / "candidates") as shard:
        cells = grid.keys(np.ones(grid.shape, bool))
        texts = [" ".join("abcdefgh"[i] for i in generator.integers(0, 8, 6)) for _ in range(grid.size)]
        shard.write(
            [candidate_record(Candidate(*key, text, None, True)) for key, text in zip(cells, texts, strict=True)]
        )
    store = CandidateStore(grid, tmp_path / "candidates")
    prompts = {name: Prompt(name, "q") for name in grid.prompts}
    label([RewardConfig("self_bleu_diversity")], store, prompts, tmp_path)
    found = read_labels(tmp_path / "self_bleu_diversity", "self_bleu_diversity", store)
    leaky = cross_fitted_gain(robust_scale(found.scores).values, one(40), 8.0).cross_fitted
    assert leaky is not None
    assert leaky.low > 0.1
    summary = select(store, {"d": found}, {"d": 1.0}, one(40), SelectConfig(shrinkage=8.0), tmp_path / "selected")
    gain = summary["gain"]["by_prompt"]["cross_fitted"]
    assert gain["low"] <= 0 <= gain["high"]
    assert summary["gain"]["left_out"] == []


def test_a_labeller_without_labels_of_halves_is_left_out_of_the_gain(store: CandidateStore, tmp_path: Path):
    found = drawn()
    judged = Labels(found["quality"].scores, found["quality"].seen, np.full(GRID.shape, NAN))
    summary = select(store, {**found, "quality": judged}, WEIGHTS, STRATA, SelectConfig(), tmp_path / "selected")
    assert summary["gain"]["left_out"] == ["quality"]
    other = select(store, {"verifier": found["verifier"]}, {"verifier": 1.0}, STRATA, SelectConfig(), tmp_path / "own")
    assert summary["gain"]["by_prompt"] == other["gain"]["by_prompt"]


def test_a_short_right_answer_is_ranked_before_long_wrong_ones(tmp_path: Path):
    grid = Grid(("p",), ("greedy", "hot"), (0, 1))
    texts = ["12", "It is 12", "I think it is 13", "It must be 15 or 14"]
    with ShardWriter(tmp_path / "candidates") as shard:
        cells = zip(grid.keys(np.ones(grid.shape, bool)), texts, strict=True)
        shard.write([candidate_record(Candidate(*key, text, None, True)) for key, text in cells])
    store = CandidateStore(grid, tmp_path / "candidates")
    rewards = [RewardConfig("numeric_answer"), RewardConfig("repetition_rate", weight=-0.1)]
    label(rewards, store, {"p": Prompt("p", "What is 5 + 7?", {"answer": "12"})}, tmp_path)
    found = {reward.function: read_labels(tmp_path / reward.function, reward.function, store) for reward in rewards}
    weights = {reward.function: reward.weight for reward in rewards}
    select(store, found, weights, ["all"], SelectConfig(top_k=4), tmp_path / "selected")
    records = lines(tmp_path / "selected" / "selected.jsonl")
    assert {record["completion"] for record in records[:2]} == {"12", "It is 12"}
    assert lines(tmp_path / "selected" / "targets.jsonl")[0]["best"] == "greedy"
