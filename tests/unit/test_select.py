"""The selecting stage, on files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asn_rl.errors import ConfigError, DataError, InvalidValue, UnknownName
from asn_rl.labelling.grid import Grid
from asn_rl.labelling.labels import Labels, label, read_labels
from asn_rl.labelling.rating import (
    cross_fitted_gain,
    robust_scale,
    total_score,
)
from asn_rl.labelling.records import ShardWriter, candidate_record
from asn_rl.labelling.select import SelectConfig, select
from asn_rl.labelling.store import CandidateStore
from asn_rl.rewards.compose import RewardConfig
from asn_rl.types import Candidate, Prompt

NAN = math.nan
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
    leaky = cross_fitted_gain(robust_scale(found.scores).values, ["all"] * 40, 8.0).cross_fitted
    assert leaky is not None
    assert leaky.low > 0.1
    summary = select(store, {"d": found}, {"d": 1.0}, ["all"] * 40, SelectConfig(shrinkage=8.0), tmp_path / "selected")
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
