from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asn_rl.errors import InvalidValue
from asn_rl.ops.overlap import answered, breaks, coverage, greedy_matches, match_search

CORPUS = ["abcabcd", "bdda", "cc"]
TEXTS = st.text("abcdx", max_size=24)
LIMITS = st.tuples(st.integers(1, 4), st.none() | st.integers(0, 6)).map(
    lambda pair: (pair[0], None if pair[1] is None else pair[0] + pair[1])
)


def occurs_in(corpus: list[str], text: str) -> bool:
    return any(text in document for document in corpus)


def longest(corpus: list[str], text: str, start: int) -> int:
    lengths = range(len(text) - start, 0, -1)
    return next((n for n in lengths if occurs_in(corpus, text[start : start + n])), 0)


def plain_parse(corpus: list[str], text: str, min_match: int, max_match: int | None) -> list[str]:
    """One letter a token, by the definition: M a match's first token, m its others, . a miss."""
    marks, start = [], 0
    while start < len(text):
        n = min(longest(corpus, text, start), max_match or len(text))
        piece = "M" + "m" * (n - 1) if n >= min_match else "."
        marks.append(piece)
        start += len(piece)
    return marks


@given(TEXTS, st.lists(TEXTS, max_size=4), LIMITS)
def test_the_parse_is_the_brute_force_parse(text: str, corpus: list[str], limits: tuple[int, int | None]) -> None:
    min_match, max_match = limits
    marks = plain_parse(corpus, text, min_match, max_match)
    asked: list[tuple[int, int]] = []

    def occurs(start: int, stop: int) -> bool:
        asked.append((start, stop))
        return occurs_in(corpus, text[start:stop])

    matches = answered(match_search(len(text), min_match=min_match, max_match=max_match), occurs)
    lengths = [longest(corpus, text, i) for i in range(len(text))]
    assert greedy_matches(lengths, min_match=min_match, max_match=max_match) == matches
    drawn = ["."] * len(text)
    for start, stop in matches:
        drawn[start:stop] = "M" + "m" * (stop - start - 1)
    line = "".join(drawn)
    assert line == "".join(marks)
    if text:
        assert coverage(matches, len(text)) == sum(letter in "Mm" for letter in line) / len(text)
        ends = sum(first != "." and second == "." for first, second in pairwise(line))
        joins = line[1:].count("M") - line.count(".M")
        assert breaks(matches, len(text)) == ends / len(text)
        assert breaks(matches, len(text), seams=True) == (ends + joins) / len(text)
    assert len(set(asked)) == len(asked)
    assert all(stop - start >= min_match and stop <= len(text) for start, stop in asked)
    allowed = sum(2 * math.log2(stop - start) + 2 for start, stop in matches) + line.count(".")
    assert len(asked) <= allowed + 1e-9


@given(TEXTS, st.lists(TEXTS, max_size=4))
def test_coverage_is_at_most_what_any_match_covers(text: str, corpus: list[str]) -> None:
    lengths = [longest(corpus, text, i) for i in range(len(text))]
    for min_match in (1, 2, 3):
        inside = {i for start, n in enumerate(lengths) if n >= min_match for i in range(start, start + n)}
        covered = round(coverage(greedy_matches(lengths, min_match=min_match), len(text) or 1) * len(text))
        assert covered <= len(inside)
        assert min_match > 1 or covered == len(inside)


def test_by_hand() -> None:
    # abc abc x dd x: the corpus has abcabcd, bdda
    text = "abcabcxddx"
    lengths = [longest(CORPUS, text, i) for i in range(len(text))]
    assert lengths == [6, 5, 4, 3, 2, 1, 0, 2, 1, 0]
    whole = greedy_matches(lengths)
    assert whole == [(0, 6), (7, 9)]
    assert coverage(whole, 10) == 0.8
    assert breaks(whole, 10) == 0.2
    short = greedy_matches(lengths, max_match=4)
    assert short == [(0, 4), (4, 6), (7, 9)]
    assert (breaks(short, 10), breaks(short, 10, seams=True)) == (0.2, 0.3)
    assert greedy_matches(lengths, min_match=3) == [(0, 6)]


def test_nothing_and_everything() -> None:
    assert greedy_matches([]) == []
    assert greedy_matches([0, 0]) == []
    assert greedy_matches([3, 2, 1], min_match=4) == []
    assert (coverage([(0, 3)], 3), breaks([(0, 3)], 3, seams=True)) == (1.0, 0.0)
    assert (coverage([], 3), breaks([], 3)) == (0.0, 0.0)


@pytest.mark.parametrize(("min_match", "max_match", "name"), [(0, None, "min_match"), (3, 2, "max_match")])
def test_limits_that_make_no_sense(min_match: int, max_match: int | None, name: str) -> None:
    with pytest.raises(InvalidValue, match=name):
        match_search(5, min_match=min_match, max_match=max_match)
