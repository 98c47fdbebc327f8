"""Word n-grams of one text and of a group of texts. A text is a list of words; n-grams do not cross texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from asn_rl.errors import InvalidValue

MAX_ORDER = 4
EPSILON = 0.1
"""count that stands in for no match at all (Chen & Cherry 2014, smoothing 1)"""


def self_bleu(texts: Sequence[Sequence[str]]) -> list[float]:
    """BLEU of each text against all others of its group, in [0, 1]: higher is less diverse (Zhu et al. 2018,
    "Texygen", arXiv:1802.01886).

    Sentence BLEU (Papineni et al. 2002) up to 4-grams with equal weights: the geometric mean of the clipped precisions
    times the brevity penalty against the reference of the closest length, of two the shorter. A precision without a
    match counts 0.1 matches, one without n-grams counts 0.1 of 1. It is nltk's `sentence_bleu` with
    `SmoothingFunction().method1`, hence 0 for a text that shares no word with the others, also for an empty one, and
    below 1 for equal texts of fewer than 4 words (0.1^(3/4) = 0.18 for one word).

    Raises:
        InvalidValue: fewer than two texts, which leaves nothing to compare with, or texts that are strings.
    """
    _check_words(texts)
    if len(texts) < 2:
        raise InvalidValue("number of texts", len(texts), ">= 2", "self-BLEU compares a text with others")
    lengths = Counter(map(len, texts))
    return [
        _brevity_penalty(len(text), _closest(len(text), lengths)) * _geometric_mean(orders) if orders[0] else 0.0
        for text, orders in zip(texts, _precisions(texts), strict=True)
    ]


def distinct_n(texts: Sequence[Sequence[str]], n: int = 3) -> float:
    """Distinct n-grams over all n-grams of the texts (Li et al. 2016, arXiv:1510.03055); 0 without any.

    Raises:
        InvalidValue: `n` below 1, or texts that are strings.
    """
    _check_words(texts)
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def marginal_distinct_n(texts: Sequence[Sequence[str]], n: int = 3) -> list[float]:
    """What each text adds to its group, in [0, 1]: the group's distinct n-grams minus those of the group without it,
    over the text's own number of n-grams; 0 for a text of fewer than `n` words.

    The numerator counts each n-gram once that no other text has. So an n-gram that another text has, or that the text
    repeats, adds nothing, and alone a text has its own distinct-n.

    Raises:
        InvalidValue: `n` below 1, or texts that are strings.
    """
    _check_words(texts)
    grams = [Counter(ngrams(text, n)) for text in texts]
    holders = Counter(gram for counts in grams for gram in counts)
    return [
        sum(holders[gram] == 1 for gram in counts) / counts.total() if counts else 0.0  # keys: distinct n-grams
        for counts in grams
    ]


def repetition_rate(words: Sequence[str], n: int = 3) -> float:
    """Share of the n-grams of one text that occurred before in it, in [0, 1): 1 - distinct-n. Fewer than `n` words
    repeat none: 0.

    Raises:
        InvalidValue: `n` below 1, or words that are one string.
    """
    _check_words([words])
    grams = list(ngrams(words, n))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """All runs of `n` neighbouring words, from left to right.

    Raises:
        InvalidValue: `n` below 1.
    """
    if n < 1:
        raise InvalidValue("n", n, ">= 1 word")
    return zip(*(words[start:] for start in range(n)), strict=False)


def _check_words(texts: Iterable[Sequence[str]]) -> None:
    # A string is a sequence of strings too and would pass for a list of one-letter words.
    for text in texts:
        if isinstance(text, str):
            raise InvalidValue("text", text[:80], "a list of words", "split it: text.split()")


def _precisions(texts: Sequence[Sequence[str]]) -> Iterator[tuple[float, ...]]:
    """For each text its smoothed clipped precisions of 1-grams to 4-grams; the first is 0 when no word matches."""
    for text, counts in zip(texts, _matches(texts).T.tolist(), strict=True):
        smoothed = [counts[0], *(count or EPSILON for count in counts[1:])]
        yield tuple(count / max(1, len(text) - n) for n, count in enumerate(smoothed))


def _matches(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """(4, texts) n-grams of each text that match, n = 1 to 4: counts clipped to the largest among the other texts."""
    numbers: dict[str, int] = {}
    words = np.array([numbers.setdefault(word, len(numbers)) for text in texts for word in text], dtype=np.int64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    grams, matches = words, []
    for n in range(1, MAX_ORDER + 1):
        if n > 1:
            # Numbered anew at every order, so that numbers stay below the square of the words.
            _, grams = np.unique(grams[:-1] * len(numbers) + words[n - 1 :], return_inverse=True)
        text = owner[: len(grams)]
        inside = text == owner[n - 1 :]  # not across texts
        matches.append(_shared(grams[inside], text[inside], len(texts)))
    return np.stack(matches)


def _shared(grams: np.ndarray, owner: np.ndarray, texts: int) -> np.ndarray:
    """(texts,) clipped counts, from the number and the text of each n-gram.

    Let the k-th time that a text has an n-gram be an item of its own. A count clipped to the largest among other texts
    is the number of these items that any other text has too.
    """
    keys = np.sort(grams * texts + owner)
    grams, owner = np.divmod(keys, texts)
    position = np.arange(len(keys))
    times = position - np.maximum.accumulate(np.where(np.diff(keys, prepend=-1) > 0, position, 0))
    _, item, holders = np.unique(grams * len(keys) + times, return_inverse=True, return_counts=True)
    return np.bincount(owner[holders[item] > 1], minlength=texts)


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def _closest(length: int, lengths: Counter[int]) -> int:
    """The length of another text that is closest to that of a text of the group, of two the shorter."""
    if lengths[length] > 1:
        return length
    return min((other for other in lengths if other != length), key=lambda other: (abs(other - length), other))


def _brevity_penalty(length: int, reference: int) -> float:
    return 1.0 if length > reference else math.exp(1 - reference / length)
