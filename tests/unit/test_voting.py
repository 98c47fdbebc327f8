from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asn_rl.data.benchmark import load_benchmark
from asn_rl.errors import InvalidValue
from asn_rl.evaluation.benchmarking import answer_codes, gold_texts
from asn_rl.evaluation.voting import (
    ANSWER_KEYS,
    best_of,
    expected_best_of,
    majority_vote,
    pass_at_k,
    read_answers,
    vote_accuracy,
    vote_at_k,
    vote_credit,
)
from asn_rl.types import Prompt

ANSWERS = st.lists(st.sampled_from(["a", "b", "c", None]), max_size=7)


# Answers


def test_completions_that_mean_the_same_number_share_a_vote():
    texts = ["15", "It is 15.0.", "7 + 8 = 15", "15", "no idea", "16"]
    found = read_answers(texts, [True, True, True, False, True, True], ANSWER_KEYS["number"])
    assert found == [Decimal(15), Decimal(15), Decimal(15), None, None, Decimal(16)]
    assert len(set(found[:3])) == 1


def test_texts_are_compared_without_case_and_punctuation():
    found = read_answers(["Paris.", " paris", "Rome", ""], [True] * 4, ANSWER_KEYS["text"])
    assert found == ["paris", "paris", "rome", None]


def test_where_every_character_counts_the_vote_is_right_where_the_answer_is():
    """CRUXEval: the value 'ab' is neither 'AB' nor "ab"."""
    benchmark, gold = load_benchmark("cruxeval"), " 'ab'"
    assert benchmark.answers == "exact"
    texts = [gold, "'ab'", "'AB'", '"ab"', "ab", "  "]
    scores = np.array([[[float(text.strip() == "'ab'") for text in texts]]])
    codes = answer_codes([[texts]], scores, np.zeros_like(scores), benchmark.answers, [gold])
    assert codes.tolist() == [[[0, 0, 1, 2, 3, -1]]]


def test_formulas_are_told_apart_and_looks_are_not():
    key = ANSWER_KEYS["marked"]
    same = [
        "\\boxed{\\frac{1}{56}}",
        "so $\\boxed{ \\dfrac{1}{56} }$.",
        "The final answer is $\\frac{1}{56}$. I hope so.",
    ]
    assert len({key(text) for text in same}) == 1
    other = ["\\boxed{\\frac{5}{56}}", "\\boxed{\\frac{15}{6}}", "\\boxed{\\frac{1}{5}6}", "\\boxed{56}"]
    assert len({key(text) for text in [*same, *other]}) == 5
    assert key("\\boxed{1,234}") == key("The answer is 1234.0") == Decimal(1234)
    assert key("1/56") is None


# Codes of benchmarks


def test_a_right_answer_votes_for_itself_however_it_is_written():
    """GSM8K: 18 without its marks is the same vote; what the token limit cut off casts none, accepted or not."""
    texts = [[["#### 18", "It is 18.", "#### 17", "17, I think", "#### 18", "17", "none"]]]
    scores = np.array([[[1, 0, 0, 0, 1, 0, 0.0]]])
    truncated = np.array([[[0, 0, 0, 0, 1, 1, 0.0]]])
    assert answer_codes(texts, scores, truncated, "number", ["#### 18"]).tolist() == [[[0, 0, 1, 1, -1, -1, -1]]]
    assert answer_codes(texts, scores, truncated, "number").tolist() == [[[0, 1, 2, 2, -1, -1, -1]]]
    prompts = [Prompt("p", "q", {"answer": "18"})]
    assert gold_texts(load_benchmark("gsm8k"), prompts) == ["#### 18"]
    assert gold_texts(load_benchmark("humaneval"), prompts) == gold_texts(load_benchmark("ifeval"), prompts) == [None]


DRAWS = st.lists(st.tuples(st.sampled_from(["#### 18", "18", "7", "8", "?"]), st.booleans()), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(DRAWS, st.data())
def test_majorities_are_those_of_every_choice_of_finished_completions(
    draws: list[tuple[str, bool]], data: st.DataObject
):
    k = data.draw(st.integers(1, len(draws)))
    texts, cut = [text for text, _ in draws], np.array([[[float(cut) for _, cut in draws]]])
    scores = np.array([[[float(text == "#### 18") for text in texts]]])
    codes = answer_codes([[texts]], scores, cut, "number", ["#### 18"])
    votes = [None if cut or text == "?" else text.removeprefix("#### ") for text, cut in draws]
    expected = np.mean([vote_credit(choice, "18") for choice in combinations(votes, k)])
    assert vote_at_k(codes[0, 0], k) == pytest.approx(expected, abs=1e-12)


# Votes


def test_the_most_frequent_answer_wins_and_the_first_of_tied_ones():
    assert majority_vote(["b", "a", "a"]) == "a"
    assert majority_vote(["b", "a", "a", "b"]) == "b"
    assert majority_vote([None, None, "a"]) == "a"
    assert majority_vote([None, None]) is None
    assert majority_vote([]) is None


def test_a_tie_is_worth_its_share():
    assert vote_credit(["a", "b"], "a") == 0.5
    assert vote_credit(["a", "b", "c"], "c") == pytest.approx(1 / 3)
    assert vote_credit(["a", "b", "b"], "a") == 0
    assert vote_credit([None], "a") == 0


@given(ANSWERS)
def test_credits_of_all_answers_sum_to_one_unless_all_are_masked(answers: list[str | None]):
    total = sum(vote_credit(answers, answer) for answer in "abc")
    assert total == pytest.approx(float(any(answer is not None for answer in answers)))


@given(ANSWERS, st.randoms())
def test_credit_does_not_depend_on_the_order(answers: list[str | None], random):
    shuffled = random.sample(answers, len(answers))
    assert vote_credit(shuffled, "a") == vote_credit(answers, "a")


# Expected accuracy of the vote


def enumerated(probabilities: Sequence[float], samples: int) -> float:
    """Every sequence of answers with its probability; the last one is masked."""
    shares = [*probabilities, 1 - sum(probabilities)]
    answers: list[int | None] = [*range(len(probabilities)), None]
    return sum(
        math.prod(shares[i] for i in draw) * vote_credit([answers[i] for i in draw], 0)
        for draw in product(range(len(shares)), repeat=samples)
    )


@pytest.mark.parametrize(
    "probabilities", [[0.5, 0.3, 0.1], [0.2, 0.2, 0.6], [0.25] * 4, [1.0], [0.3], [0.0, 0.4, 0.6], [0.4, 0.0, 0.2, 0.2]]
)
def test_accuracy_of_the_vote_equals_enumeration(probabilities: list[float]):
    expected = [enumerated(probabilities, n) for n in range(7)]
    np.testing.assert_allclose(vote_accuracy(probabilities, 6), expected, atol=1e-12)


def test_two_answers_give_the_binomial_majority():
    p, n = 0.6, 31
    expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n // 2 + 1, n + 1))
    assert vote_accuracy([p, 1 - p], n)[-1] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.floats(0, 1))
def test_accuracies_are_probabilities_and_sum_to_the_probability_of_any_vote(weights: list[float], masked: float):
    shares = [w / sum(weights) * (1 - masked) for w in weights]
    total = sum(vote_accuracy([shares[i], *shares[:i], *shares[i + 1 :]], 9) for i in range(len(shares)))
    np.testing.assert_allclose(total, 1 - (1 - sum(shares)) ** np.arange(10), atol=1e-9)


@pytest.mark.parametrize("probabilities", [[], [0.6, 0.6], [-0.1, 0.5], [math.nan]])
def test_probabilities_that_are_none_are_refused(probabilities: list[float]):
    with pytest.raises(InvalidValue, match="probabilities must be >= 0"):
        vote_accuracy(probabilities, 4)


def test_no_samples_are_refused():
    with pytest.raises(InvalidValue, match="samples must be an integer in"):
        vote_accuracy([0.5], 0)


# Best of k


def test_the_best_is_the_first_of_the_highest_and_never_a_masked_one():
    assert best_of([1.0, 3.0, 3.0]) == 1
    assert best_of([math.nan, None, -5.0]) == 2
    assert best_of([None, math.nan]) is None
    assert best_of([]) is None


def subsets(count: int, k: int) -> Iterator[tuple[int, ...]]:
    return combinations(range(count), k)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-1, 1)), min_size=1, max_size=7), st.data())
def test_expected_best_of_k_equals_the_mean_over_all_choices(rows: list[tuple[int, float]], data: st.DataObject):
    k = data.draw(st.integers(1, len(rows)))
    means = []
    for chosen in subsets(len(rows), k):
        top = max(rows[i][0] for i in chosen)
        # Equal scores share their place: every one of the tied samples is equally likely to be the one in the choice.
        means.append(np.mean([reward for score, reward in rows if score == top]))
    scores, rewards = [float(score) for score, _ in rows], [reward for _, reward in rows]
    assert expected_best_of(scores, rewards, k) == pytest.approx(np.mean(means), abs=1e-12)


@pytest.mark.parametrize(("samples", "correct", "k"), [(8, 3, 2), (8, 0, 4), (8, 8, 1), (5, 2, 5), (5, 1, 1)])
def test_pass_at_k_is_the_share_of_choices_that_hold_a_correct_one(samples: int, correct: int, k: int):
    expected = np.mean([min(chosen) < correct for chosen in subsets(samples, k)])
    assert pass_at_k(samples, correct, k) == pytest.approx(expected)
    right = [1.0] * correct + [0.0] * (samples - correct)
    assert expected_best_of(right, right, k) == pytest.approx(expected)


@pytest.mark.parametrize(("samples", "correct", "k"), [(0, 0, 1), (4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_counts_that_cannot_be_are_refused(samples: int, correct: int, k: int):
    with pytest.raises(InvalidValue, match="must be an integer in"):
        pass_at_k(samples, correct, k)


def test_best_of_k_refuses_what_it_cannot_rank():
    with pytest.raises(InvalidValue, match="none NaN"):
        expected_best_of([1.0, math.nan], [1.0, 0.0], 1)
    with pytest.raises(InvalidValue, match="as many numbers"):
        expected_best_of([1.0], [1.0, 0.0], 1)
    with pytest.raises(InvalidValue, match="k must be an integer"):
        expected_best_of([1.0, 0.5], [1.0, 0.0], 3)
