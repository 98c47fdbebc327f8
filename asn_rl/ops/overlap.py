"""How much of a sequence occurs elsewhere: its greedy parse into longest matches, and what that parse says.

The parse goes from left to right. Where at least `min_match` tokens occur in the corpus it takes the longest match, of
at most `max_match` tokens, and goes on behind it; elsewhere it misses one token. With `min_match` 1 and `max_match` 10,
over words, it is the one of Adaptive Sampling Networks (infini-gram labels: words covered, match-to-miss transitions).
A match is a pair (start, stop).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from asn_rl.errors import InvalidValue

Match = tuple[int, int]
Search = Generator[Match, bool, list[Match]]
"""yields (start, stop) and is sent whether that stretch occurs; returns the matches"""


def match_search(length: int, *, min_match: int = 1, max_match: int | None = None) -> Search:
    """The greedy parse of `length` tokens as a search that asks few questions.

    A stretch that occurs contains only stretches that occur, so existence is monotone in the length of a match:
    doubling, then bisection. A miss costs one question, a match of n tokens at most 2 log2(n) + 2.

    Raises:
        InvalidValue: `min_match` below 1, or `max_match` below it.
    """
    if min_match < 1:
        raise InvalidValue("min_match", min_match, ">= 1 token")
    if max_match is not None and max_match < min_match:
        raise InvalidValue("max_match", max_match, f">= min_match={min_match} tokens, or none for no limit")
    return _search(length, min_match, length if max_match is None else max_match)


def _search(length: int, min_match: int, max_match: int) -> Search:
    matches: list[Match] = []
    start = 0
    while start + min_match <= length:
        if not (yield start, start + min_match):
            start += 1
            continue
        found, absent = min_match, min(max_match, length - start) + 1
        while absent - found > 1:
            tried = min(2 * found, (found + absent) // 2)
            if (yield start, start + tried):
                found = tried
            else:
                absent = tried
        matches.append((start, start + found))
        start += found
    return matches


def greedy_matches(lengths: Sequence[int], *, min_match: int = 1, max_match: int | None = None) -> list[Match]:
    """The greedy parse, from the length of the longest match at each position (0: the token occurs nowhere)."""
    search = match_search(len(lengths), min_match=min_match, max_match=max_match)
    return answered(search, lambda start, stop: stop - start <= lengths[start])


def answered(search: Search, occurs: Callable[[int, int], bool]) -> list[Match]:
    """The matches of a search whose questions are answered by `occurs(start, stop)`."""
    try:
        question = next(search)
        while True:
            question = search.send(occurs(*question))
    except StopIteration as end:
        return end.value


def coverage(matches: Sequence[Match], length: int) -> float:
    """Share of `length` >= 1 tokens that lie in a match, in [0, 1].

    With `min_match` 1 it is the share of tokens that occur at all. Above that it is at most the share of tokens inside
    any long enough match (1 - L-uniqueness; Lu et al. 2024, "AI as Humanity's Salieri"), because matches of
    a parse do not overlap.
    """
    return sum(stop - start for start, stop in matches) / length


def breaks(matches: Sequence[Match], length: int, *, seams: bool = False) -> float:
    """Ends of matches that a missed token follows, a token, in [0, 1/2].

    Args:
        seams: count also where a match ends and the next begins at once; then in [0, 1].
    """
    starts = {start for start, _ in matches}
    followed = sum(stop < length and (seams or stop not in starts) for _, stop in matches)
    return followed / length
