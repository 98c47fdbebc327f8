"""Diversity of heuristics' completions: against the functions on plain lists, and from files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from asn_rl.errors import InvalidValue, RewardError
from asn_rl.job import Job, JobConfig
from asn_rl.job.labelling import prompts
from asn_rl.labelling.diversity import group_diversity, heuristic_diversity
from asn_rl.labelling.grid import Grid
from asn_rl.labelling.labels import Labels
from asn_rl.labelling.records import ShardWriter, candidate_record
from asn_rl.labelling.select import SelectConfig, select
from asn_rl.labelling.store import CandidateStore
from asn_rl.ops.ngrams import distinct_n, self_bleu
from asn_rl.rewards.compose import RewardConfig
from asn_rl.rewards.embedding_diversity import EMBEDDED, cosine_kernel, embed, load_encoder
from asn_rl.types import Candidate

CAT, CAT_AGAIN, MARKET = "A cat sat on the mat.", "The cat was sitting on a mat.", "Share prices fell sharply today."
SAME = "one two three four five"
TEXTS = {"cold": [SAME] * 3, "hot": [CAT, CAT_AGAIN, MARKET]}
GRID = Grid(("p0", "p1", "p2", "p3"), ("cold", "hot"), (1, 2, 3))
STRATA = ["easy", "easy", "hard", "hard"]


def stored(folder: Path, left_out: frozenset[tuple[str, str, int]] = frozenset()) -> CandidateStore:
    with ShardWriter(folder) as shard:
        shard.write(
            [
                candidate_record(Candidate(p, h, s, TEXTS[h][s - 1], [s], True))
                for p, h, s in GRID.keys(np.ones(GRID.shape, bool))
                if (p, h, s) not in left_out
            ]
        )
    return CandidateStore(GRID, folder)


def test_the_figures_of_a_group_are_those_of_the_oracles():
    texts = TEXTS["hot"]
    words = [text.split() for text in texts]
    kernel = cosine_kernel(embed(texts, load_encoder()))
    shares = np.linalg.eigvalsh(kernel.numpy() / 3)
    entropy = -math.fsum(share * math.log(share) for share in shares if share > 0)
    figures = group_diversity(texts, kernel)
    assert figures == {
        "self_bleu": pytest.approx(np.mean(self_bleu(words))),
        "distinct_1": distinct_n(words, 1),
        "distinct_2": distinct_n(words, 2),
        "distinct_3": distinct_n(words, 3),
        "vendi": pytest.approx(math.exp(entropy)),
        "embedding_entropy": pytest.approx(entropy),
    }
    assert 1.9 < figures["vendi"] < 2.5, "two cats and a market"
    assert set(group_diversity(texts)) == {"self_bleu", "distinct_1", "distinct_2", "distinct_3"}


def test_identical_texts_are_finite():
    figures = group_diversity([SAME] * 8, torch.ones(8, 8, dtype=torch.float64))
    assert (figures["self_bleu"], figures["vendi"], figures["embedding_entropy"]) == (1.0, 1.0, 0.0)
    assert figures["distinct_2"] == 1 / 8


def test_one_text_is_no_group():
    with pytest.raises(InvalidValue, match="number of texts must be >= 2, got 1"):
        group_diversity([CAT])


def test_each_heuristic_has_the_mean_over_prompts(tmp_path: Path):
    found = heuristic_diversity(stored(tmp_path), [0, 2, 3], STRATA, EMBEDDED)
    for heuristic, texts in TEXTS.items():
        expected = group_diversity(texts, cosine_kernel(embed(texts, load_encoder())))
        assert set(found[heuristic]) == set(expected)
        for measure, value in expected.items():
            assert found[heuristic][measure]["mean"] == pytest.approx(value, abs=1e-6)
            assert found[heuristic][measure]["low"] == pytest.approx(value, abs=1e-6), "all prompts have the same texts"


def test_a_heuristic_with_one_completion_a_prompt_has_none(tmp_path: Path):
    gone = frozenset((p, "hot", s) for p in GRID.prompts for s in (2, 3)) | {("p1", "cold", 3)}
    found = heuristic_diversity(stored(tmp_path, gone), range(4), STRATA)
    assert set(found["hot"].values()) == {None}
    assert found["cold"]["distinct_2"]["mean"] == pytest.approx(((1 / 3 + 1 / 2) / 2 + 1 / 3) / 2), "strata weigh alike"


def test_selecting_writes_it_into_the_summary(tmp_path: Path):
    store = stored(tmp_path / "candidates")
    scores = np.random.default_rng(0).normal(size=GRID.shape)
    labels = {"quality": Labels(scores, np.ones(GRID.shape, bool), scores)}
    for config, count in ((SelectConfig(diversity_prompts=3), 3), (SelectConfig(), 4)):
        summary = select(store, labels, {"quality": 1.0}, STRATA, config, tmp_path / "selected")
        assert summary["diversity"]["prompts"] == count
        assert summary["diversity"]["heuristics"]["cold"]["self_bleu"]["mean"] == 1.0
    assert summary == json.loads((tmp_path / "selected" / "summary.json").read_text())
    summary = select(store, labels, {"quality": 1.0}, STRATA, SelectConfig(diversity_prompts=0), tmp_path / "none")
    assert summary["diversity"] == {"prompts": 0, "heuristics": {}}


def test_a_missing_encoder_shows_before_anything_is_generated(tmp_path: Path):
    config = JobConfig(
        rewards=(RewardConfig("numeric_answer"),), select=SelectConfig(encoder=str(tmp_path / "nothing"))
    )
    with pytest.raises(RewardError, match="there is no sentence encoder"):
        prompts(Job(config, tmp_path))
