"""Metrics of samples, against every choice of k written out."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asn_rl.errors import InvalidValue, UnknownName
from asn_rl.evaluation.metrics import METRICS, available, measure, parse_name
from asn_rl.evaluation.samples import Samples
from asn_rl.evaluation.voting import vote_at_k, vote_credit
from asn_rl.ops.kernels import vendi_score
from asn_rl.ops.ngrams import distinct_n, self_bleu
from asn_rl.rewards.embedding_diversity import EMBEDDED, cosine_kernel, embed, load_encoder

NAN = math.nan
TEXTS = ["a cat sat", "a cat sat", "two dogs ran home", None]


def made(seed: int = 0, prompts: int = 4, arms: int = 2, samples: int = 6) -> Samples:
    """Random scores and answers that agree, some of them masked."""
    generator = np.random.default_rng(seed)
    answers = generator.integers(-1, 3, (prompts, arms, samples))
    scores = (answers == 0).astype(float)
    scores[generator.random(scores.shape) < 0.2] = NAN
    ranks = generator.integers(0, 3, scores.shape).astype(float)
    ranks[generator.random(scores.shape) < 0.1] = NAN
    return Samples(
        tuple(f"arm {i}" for i in range(arms)), ("all",) * prompts, scores, answers=answers, scorers={"rank": ranks}
    )


def over_choices(samples: Samples, k: int, kept: np.ndarray, credit) -> np.ndarray:
    """(P, A) mean of `credit(cell, choice)` over all choices of k of the samples that count."""
    found = np.full(kept.shape[:2], NAN)
    for cell in np.ndindex(*found.shape):
        choices = list(combinations(np.flatnonzero(kept[cell]).tolist(), k))
        if choices:
            found[cell] = np.mean([credit(cell, list(choice)) for choice in choices])
    return found


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_metrics_of_k_samples_are_means_over_all_choices_of_those_that_are_not_masked(k: int):
    samples = made()
    assert samples.answers is not None
    ranks, known = samples.scorers["rank"], ~np.isnan(samples.scores)

    def vote(cell, choice):
        return vote_credit([None if c < 0 else int(c) for c in samples.answers[cell][choice]], 0)  # type: ignore[index]

    def best(cell, choice):
        top = max(ranks[cell][i] for i in choice)
        # Equal ranks share a place as if one of all that have it were drawn.
        return np.mean([samples.scores[cell][i] for i in np.flatnonzero(both[cell]) if ranks[cell][i] == top])

    both = known & ~np.isnan(ranks)
    expected = {
        f"pass@{k}": over_choices(samples, k, known, lambda cell, choice: samples.scores[cell][choice].max()),
        f"maj@{k}": over_choices(samples, k, known, vote),
        f"best_of@{k}:rank": over_choices(samples, k, both, best),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(measure(samples, name), values, atol=1e-12, err_msg=name)
    assert np.isnan(expected["pass@5"]).any() if k == 5 else True, "too few samples: masked, not guessed"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=8), st.data())
def test_the_vote_equals_enumeration(answers: list[int], data: st.DataObject):
    k = data.draw(st.integers(1, len(answers)))
    credits = [vote_credit([None if c < 0 else c for c in choice], 0) for choice in combinations(answers, k)]
    assert vote_at_k(answers, k) == pytest.approx(np.mean(credits), abs=1e-12)


def test_votes_of_many_samples_neither_overflow_nor_round():
    answers = [0] * 700 + [1] * 700 + [-1] * 700
    assert vote_at_k(answers, 3) == pytest.approx(
        # Two right; or one right and two silent; half of the ties of one against one with a silent one.
        (math.comb(700, 2) * 1400 + math.comb(700, 3) + 700 * math.comb(700, 2) + 700**3 / 2) / math.comb(2100, 3)
    )
    with pytest.raises(InvalidValue, match=r"k must be an integer in \[1, 2\], got 3"):
        vote_at_k([0, 1], 3)


def test_of_one_sample_all_metrics_are_the_accuracy():
    samples = made()
    for name in ("pass@1", "maj@1"):
        np.testing.assert_allclose(measure(samples, name), measure(samples, "accuracy"))


def test_pass_at_k_refuses_graded_scores():
    samples = Samples(("a",), ("s",), np.array([[[0.5, 1.0]]]))
    with pytest.raises(InvalidValue, match=r"score must be 0 or 1 for pass@k, got 0\.5; .* take best_of@k"):
        measure(samples, "pass@2")


def test_tokens_truncation_and_cost_count_what_was_generated():
    scores = np.zeros((2, 1, 2))
    lengths = np.array([[[10, 30]], [[NAN, NAN]]])
    samples = Samples(("a",), ("s",) * 2, scores, tokens=lengths, truncated=np.array([[[0, 1]], [[NAN, NAN]]]))
    for name, value in {"tokens": 20, "truncated": 0.5, "cost": 40}.items():
        np.testing.assert_array_equal(measure(samples, name), [[value], [NAN]])
    np.testing.assert_allclose(measure(replace(samples, price=1e-6), "cost"), [[4e-5], [NAN]])


def test_diversity_is_that_of_the_existing_functions_on_what_was_generated():
    samples = Samples(("a", "b"), ("s",), np.zeros((1, 2, 4)), texts=[[TEXTS, ["one", None, None, None]]])
    words = [text.split() for text in TEXTS if text is not None]
    np.testing.assert_allclose(measure(samples, "distinct_2"), [[distinct_n(words, 2), 0.0]])
    np.testing.assert_allclose(measure(samples, "self_bleu"), [[np.mean(self_bleu(words)), NAN]])


def test_vendi_is_that_of_the_sentence_encoder():
    texts = [[TEXTS, ["one", "one", None, None]], [[None] * 4, TEXTS]]
    samples = Samples(("a", "b"), ("s",) * 2, np.zeros((2, 2, 4)), texts=texts, encoder=EMBEDDED)
    group = vendi_score(cosine_kernel(embed([text for text in TEXTS if text is not None], load_encoder())))
    np.testing.assert_allclose(measure(samples, "vendi"), [[group, 1.0], [NAN, group]], atol=1e-6)


def test_the_registry_says_what_samples_allow():
    samples = made()
    assert available(samples, [2, 4]) == [
        "accuracy", "pass@2", "pass@4", "maj@2", "maj@4", "best_of@2:rank", "best_of@4:rank",
    ]  # fmt: skip
    assert available(Samples(("a",), ("s",), np.zeros((1, 1, 1)))) == ["accuracy"]
    found = parse_name("best_of@8:reward: a")
    assert (found.metric, found.k, found.which) == (METRICS["best_of"], 8, "reward: a")


@pytest.mark.parametrize("name", ["accuracy@2", "pass", "pass@0", "pass@two", "best_of@2", "pass@2:rank"])
def test_names_of_another_form_are_refused(name: str):
    with pytest.raises(InvalidValue, match="metric must be"):
        parse_name(name)


def test_what_cannot_be_measured_is_refused():
    samples = made()
    with pytest.raises(UnknownName, match="Did you mean 'accuracy'"):
        measure(samples, "acuracy")
    with pytest.raises(UnknownName, match="unknown scorer 'length'"):
        measure(samples, "best_of@2:length")
    with pytest.raises(InvalidValue, match=r"samples for tokens must be with .*tokens"):
        measure(samples, "tokens")
    with pytest.raises(InvalidValue, match=r"k of pass@7 must be in \[1, 6\], the samples of a prompt"):
        measure(samples, "pass@7")
    with pytest.raises(InvalidValue, match="shape of tokens must be"):
        replace(samples, tokens=np.zeros((1, 2, 3)))
    with pytest.raises(InvalidValue, match="names that differ"):
        replace(samples, arms=("a", "a"))
