"""Several samples of a prompt, one answer: majority vote (maj@k), the best of k by a scorer, and pass@k.

A masked answer is None: it casts no vote and is never chosen. Where a figure is an expectation it is exact, in closed
form, never drawn.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from asn_rl.errors import InvalidValue
from asn_rl.rewards.extraction import marked_answer
from asn_rl.rewards.inputs import completion_text
from asn_rl.rewards.math import plain_formula
from asn_rl.rewards.numeric import last_number, normalised

NO_ANSWER = -1
"""code of a completion that gives no answer: it is drawn, but casts no vote"""
Answer = Hashable | None
"""what votes are counted by; None: masked"""
AnswerKey = Callable[[str], Answer]
"""text of a completion -> the answer it gives"""


def marked(text: str) -> Answer:
    """The answer that a text marks as its own (`extraction.marked_answer`), without what only changes its looks; where
    it is a plain number, that number."""
    answer = marked_answer(text)
    if answer is None:
        return None
    formula = plain_formula(answer)
    return last_number(formula) if _NUMBER.fullmatch(formula) else formula


_NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+|-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")
ANSWER_KEYS: dict[str, AnswerKey] = {
    "number": last_number,
    "marked": marked,
    "text": lambda text: normalised(text) or None,
    "exact": lambda text: text.strip() or None,
}
"""`number`: the last number ("15." and "It is 15.0" agree, a text without one is masked; not for formulas, of which it
sees no more); `marked`: the answer in the last box, or after "the answer is" (one that only looks different is the
same, one that is only equal is not; a text that marks none is masked); `text`: the whole text up to case, spaces and
surrounding punctuation (an empty one is masked); `exact`: the whole text, spaces around it aside (likewise)"""


def read_answers(completions: Sequence[Any], terminated: Sequence[bool], key: AnswerKey) -> list[Answer]:
    """The answer of each completion; None where it has none or where the token limit cut it off."""
    return [key(completion_text(text)) if done else None for text, done in zip(completions, terminated, strict=True)]


def leaders(answers: Sequence[Answer]) -> list[Answer]:
    """The answers with the most votes, in the order they were first given; none where all are masked."""
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    return [answer for answer, count in votes.items() if count == most]


def majority_vote(answers: Sequence[Answer]) -> Answer:
    """The answer with the most votes (self-consistency, Wang et al. 2022, arXiv:2203.11171); of tied ones the one that
    was given first. None where all are masked."""
    return next(iter(leaders(answers)), None)


def vote_credit(answers: Sequence[Answer], correct: Hashable) -> float:
    """Probability that the vote is `correct` when a tie is broken by an even draw: 1 / (tied answers) where it is among
    them, else 0. Votes that are all masked give no answer, which is not correct."""
    tied = leaders(answers)
    return 1 / len(tied) if correct in tied else 0.0


def vote_at_k(answers: Sequence[int] | np.ndarray, k: int) -> float:
    """Mean over all choices of k of these answers of the majority vote's credit (`vote_credit`).

    Args:
        answers: n codes: 0 is correct, -1 casts no vote.

    Raises:
        InvalidValue: k outside [1, n].
    """
    if not 1 <= k <= len(answers):
        raise InvalidValue("k", k, f"an integer in [1, {len(answers)}]")
    codes, counts = np.unique(np.asarray(answers), return_counts=True)
    found = dict(zip(codes.tolist(), counts.tolist(), strict=True))
    correct, silent = found.pop(0, 0), found.pop(NO_ANSWER, 0)
    return _vote_at_k(correct, tuple(sorted(found.values())), silent, k)


@lru_cache(maxsize=100_000)
def _vote_at_k(correct: int, others: tuple[int, ...], silent: int, k: int) -> float:
    """For each number of correct votes, counts the choices in which no other answer gets more: a product of
    polynomials, one for each answer that could tie (in whole numbers, so that nothing is rounded or overflows)."""
    total = correct + sum(others) + silent
    won = Fraction(0)
    for votes in range(1, min(correct, k) + 1):
        rivals, rest = [count for count in others if count >= votes], k - votes
        harmless = total - correct - sum(rivals)
        ways = np.zeros((len(rivals) + 1, rest + 1), dtype=object)  # [answers that tie, samples chosen]
        ways[0] = [math.comb(harmless, chosen) for chosen in range(rest + 1)]
        for count in rivals:
            fewer = sum(_shifted(ways, v) * math.comb(count, v) for v in range(min(votes, rest + 1)))
            tied = _shifted(ways, votes) * math.comb(count, votes) if votes <= rest else np.zeros_like(ways)
            ways = fewer + np.vstack([np.zeros((1, rest + 1), dtype=object), tied[:-1]])
        credit = sum(Fraction(int(count), 1 + ties) for ties, count in enumerate(ways[:, rest]))
        won += math.comb(correct, votes) * credit
    return float(won / math.comb(total, k))


def _shifted(ways: np.ndarray, by: int) -> np.ndarray:
    return np.hstack([np.zeros((len(ways), by), dtype=object), ways[:, : ways.shape[1] - by]])


def vote_accuracy(probabilities: Sequence[float], samples: int) -> np.ndarray:
    """(samples + 1,) probability that the vote of 0, 1, ..., `samples` independent samples is correct, ties broken by
    an even draw.

    Args:
        probabilities: of the answers, the correct one first; what is missing to 1 is the probability of a masked one.

    For every number c of correct votes the other answers get fewer (or c, and tie): the coefficients of a product of
    exponential generating functions, one factor an answer, count the ways. The cost is about (answers + 1) samples^3.

    Raises:
        InvalidValue: no probabilities, or not a (sub)distribution.
    """
    shares = np.asarray(probabilities, dtype=np.float64)
    if shares.ndim != 1 or len(shares) == 0 or not (shares >= 0).all() or not shares.sum() <= 1 + 1e-9:
        raise InvalidValue("probabilities", list(probabilities), ">= 0, at least one, with a sum of at most 1")
    _check_count("samples", samples, 1)
    right, others, masked = shares[0], shares[1:][shares[1:] > 0], max(0.0, 1 - shares.sum())
    factorial = np.array([math.factorial(m) for m in range(samples + 1)], dtype=np.float64)
    accuracy = np.zeros(samples + 1)
    for correct in range(1, samples + 1):
        rest = samples - correct
        ways = np.zeros((rest // correct + 1, rest + 1))  # [answers tied with the correct one, votes elsewhere]
        ways[0] = masked ** np.arange(rest + 1) / factorial[: rest + 1]
        for share in others:
            ways = _with_rival(ways, share, correct, factorial)
        credit = (ways / np.arange(1, len(ways) + 1)[:, None]).sum(0)
        drawn = np.arange(correct, samples + 1)
        accuracy[drawn] += factorial[drawn] * right**correct / factorial[correct] * credit
    return accuracy


def _with_rival(ways: np.ndarray, share: float, correct: int, factorial: np.ndarray) -> np.ndarray:
    """Generating function with one more answer, which gets at most `correct` votes."""
    total = np.zeros_like(ways)
    width = ways.shape[1]
    for votes in range(min(correct, width - 1) + 1):
        term = ways[:, : width - votes] * (share**votes / factorial[votes])
        if votes < correct:
            total[:, votes:] += term
        else:
            total[1:, votes:] += term[:-1]  # what falls off has more tied answers than there are votes
    return total


def best_of(scores: Sequence[float | None]) -> int | None:
    """Index of the highest score, the first of equal ones; None and NaN are masked. None where all are."""
    ranked = [(score, -i) for i, score in enumerate(scores) if score is not None and not math.isnan(score)]
    return -max(ranked)[1] if ranked else None


def expected_best_of(scores: Sequence[float], rewards: Sequence[float], k: int) -> float:
    """Mean reward of the best-scored of k, over all choices of k of the n samples; equal scores share their places.

    Unbiased for the best of k fresh samples. With the rewards themselves as scores it is the mean of the maximum, and
    for 0/1 rewards pass@k.

    Args:
        scores: n scores, by which one is chosen.
        rewards: n rewards of the same samples.

    Raises:
        InvalidValue: lists of different lengths, a NaN (leave masked samples out), or k outside [1, n].
    """
    ranked, gains = np.asarray(scores, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    if ranked.shape != gains.shape or np.isnan(ranked).any() or np.isnan(gains).any():
        raise InvalidValue("scores and rewards", (list(scores), list(rewards)), "as many numbers of either, none NaN")
    _check_count("k", k, 1, len(ranked))
    levels, level = np.unique(ranked, return_inverse=True)
    below = np.concatenate([[0], np.cumsum(np.bincount(level))])  # samples with a lower score than each level
    chances = np.array([math.comb(int(m), k) for m in below], dtype=np.float64) / math.comb(len(ranked), k)
    return sum(float(np.diff(chances)[i] * gains[level == i].mean()) for i in range(len(levels)))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that k of `samples` completions hold a correct one, `correct` being right in all.

    1 - C(samples - correct, k) / C(samples, k): unbiased (Chen et al. 2021, arXiv:2107.03374, eq. 1).

    Raises:
        InvalidValue: `correct` outside [0, samples], or k outside [1, samples].
    """
    _check_count("samples", samples, 1)
    _check_count("correct", correct, 0, samples)
    _check_count("k", k, 1, samples)
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def _check_count(name: str, value: int, low: int, high: int | None = None) -> None:
    if not isinstance(value, int | np.integer) or value < low or (high is not None and value > high):
        raise InvalidValue(name, value, f"an integer in [{low}, {'inf' if high is None else high}]")
