from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from asn_rl.errors import InvalidValue
from asn_rl.ops.ngrams import distinct_n, marginal_distinct_n, ngrams, repetition_rate, self_bleu

TEXT = st.lists(st.sampled_from("abcd"), max_size=12)
GROUP = st.lists(TEXT, min_size=2, max_size=6)


def nltk_self_bleu(texts: Sequence[Sequence[str]]) -> list[float]:
    smooth = SmoothingFunction().method1
    return [
        sentence_bleu([*texts[:i], *texts[i + 1 :]], text, smoothing_function=smooth)  # type: ignore[arg-type]
        for i, text in enumerate(texts)
    ]


def split(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


@given(GROUP)
def test_self_bleu_is_nltks(texts: list[list[str]]) -> None:
    assert self_bleu(texts) == pytest.approx(nltk_self_bleu(texts), rel=0, abs=1e-9)


def test_self_bleu_is_nltks_on_long_texts_with_many_ties() -> None:
    generator = random.Random(0)
    for size in (2, 3, 16, 40):
        texts = [generator.choices(["the", "a", "cat", "sat", "on"], k=generator.randint(0, 80)) for _ in range(size)]
        assert self_bleu(texts) == pytest.approx(nltk_self_bleu(texts), rel=0, abs=1e-9)


@pytest.mark.parametrize(
    "texts",
    [
        split("", ""),
        split("", "a b c d e"),
        split("a", "a"),
        split("a b", "a b", "c"),
        split("a b c", "a b c"),
        split("a b c d", "e f g h"),
        split("a a a a a a", "a a", "a a a"),
        split("a b c d", "a b", "a b c d e f"),  # two references equally close in length
        split("a b c d e", "a b c d e", "a b c d e"),
        split("b", "a b c d e f g", "", "h"),
    ],
)
def test_self_bleu_is_nltks_at_the_edges(texts: list[list[str]]) -> None:
    assert self_bleu(texts) == pytest.approx(nltk_self_bleu(texts), rel=0, abs=1e-9)


def test_self_bleu_by_hand() -> None:
    assert self_bleu(split("a b c d", "a b c d")) == [1.0, 1.0]
    assert self_bleu(split("a b c d", "e f g h")) == [0.0, 0.0]
    assert self_bleu(split("a", "a")) == pytest.approx([0.1**0.75] * 2)
    first, second = self_bleu(split("a b c d e", "a b c x"))
    assert first == pytest.approx((3 / 5 * 2 / 4 * 1 / 3 * 0.1 / 2) ** 0.25)
    assert second == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.1 / 1) ** 0.25 * 2.718281828459045 ** (1 - 5 / 4))


@given(GROUP, st.randoms(use_true_random=False))
def test_self_bleu_does_not_depend_on_the_order(texts: list[list[str]], generator: random.Random) -> None:
    order = list(range(len(texts)))
    generator.shuffle(order)
    values = self_bleu(texts)
    assert self_bleu([texts[i] for i in order]) == [values[i] for i in order]


@pytest.mark.parametrize("texts", [[], [["a", "b"]]])
def test_self_bleu_needs_others(texts: list[list[str]]) -> None:
    with pytest.raises(InvalidValue, match=rf"number of texts must be >= 2, got {len(texts)}"):
        self_bleu(texts)


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b c d"], 3, 1.0),
        (["a b c", "a b c"], 3, 0.5),
        (["a b a b a"], 2, 2 / 4),
        (["a b c", "b c d", "a b c d"], 3, 2 / 4),
        (["a  b\nc"], 3, 1.0),
        (["a b", "c", ""], 3, 0.0),
        ([], 3, 0.0),
        (["a b", "c"], 1, 1.0),
    ],
)
def test_distinct_n_by_hand(texts: list[str], n: int, expected: float) -> None:
    assert distinct_n(split(*texts), n) == expected


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b c", "a b d"], 2, [1 / 2, 1 / 2]),
        (["a b c", "a b c"], 2, [0.0, 0.0]),
        (["a b c", "x y"], 2, [1.0, 1.0]),
        (["x y x y x", "a b"], 2, [2 / 4, 1.0]),
        (["a", "", "a b"], 2, [0.0, 0.0, 1.0]),
        (["a b a b a"], 2, [2 / 4]),
        ([], 2, []),
    ],
)
def test_marginal_distinct_n_by_hand(texts: list[str], n: int, expected: list[float]) -> None:
    assert marginal_distinct_n(split(*texts), n) == expected


@given(st.lists(TEXT, max_size=6), st.integers(1, 4))
def test_marginal_distinct_n_is_what_leaving_out_costs(texts: list[list[str]], n: int) -> None:
    def distinct(group: list[list[str]]) -> int:
        return len({tuple(text[i : i + n]) for text in group for i in range(len(text) - n + 1)})

    own = [max(1, len(text) - n + 1) for text in texts]
    lost = [distinct(texts) - distinct(texts[:i] + texts[i + 1 :]) for i in range(len(texts))]
    assert marginal_distinct_n(texts, n) == [change / count for change, count in zip(lost, own, strict=True)]


def test_repetition_rate_by_hand() -> None:
    assert repetition_rate(["a", "b", "c", "d"], 1) == 0.0
    assert repetition_rate(["a", "a", "a", "a"], 1) == 3 / 4
    assert repetition_rate(["a", "b", "a", "b", "a"], 2) == 2 / 4
    assert repetition_rate(["a", "b"], 3) == 0.0
    assert repetition_rate([], 1) == 0.0


@given(TEXT, st.integers(1, 4))
def test_repetition_rate_counts_what_occurred_before(words: list[str], n: int) -> None:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    before = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repetition_rate(words, n) == (pytest.approx(before / len(grams)) if grams else 0.0)


def test_ngrams() -> None:
    assert list(ngrams(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")]
    assert list(ngrams(["a"], 2)) == []


def test_n_below_one_is_refused() -> None:
    for call in (lambda: distinct_n([["a"]], 0), lambda: marginal_distinct_n([["a"]], 0), lambda: ngrams(["a"], -1)):
        with pytest.raises(InvalidValue, match="n must be >= 1 word"):
            call()
    with pytest.raises(InvalidValue, match="n must be >= 1 word, got 0"):
        repetition_rate(["a"], 0)


def test_strings_are_no_lists_of_words() -> None:
    texts: list[str] = ["a cat", "a dog"]
    for call in (lambda: self_bleu(texts), lambda: distinct_n(texts), lambda: marginal_distinct_n(texts)):
        with pytest.raises(InvalidValue, match=r"text must be a list of words, got 'a cat'; split it: text.split\(\)"):
            call()
    with pytest.raises(InvalidValue, match="a list of words"):
        repetition_rate("a cat")
