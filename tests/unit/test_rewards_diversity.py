from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asn_rl.errors import RewardError
from asn_rl.rewards.diversity import distinct_valid, first_phrase

ANIMALS = ["cat", "dog", "sea lion", "lion", "fly", "fox", "polar bear", "bear"]


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("A Dog, then a cat.", "dog"),
        ("I like foxes", "fox"),
        ("flies and cats", "fly"),
        ("a firefly", None),
        ("scatter the catalogue", None),
        ("the sea\nlions", "sea lion"),
        ("a sea-lion", "sea lion"),
        ("sea, lion", "lion"),
        ("polar bears are bears", "polar bear"),
        ("cat's milk", "cat"),
        ("", None),
        ("flys", "fly"),
    ],
)
def test_first_phrase(text: str, phrase: str | None) -> None:
    assert first_phrase(text, tuple(ANIMALS)) == phrase


def test_phrases_of_the_prompt_are_no_answers() -> None:
    accepted = tuple(ANIMALS)
    assert first_phrase("Unlike dogs, a cat purrs.", accepted, "Name an animal that is no Dog.") == "cat"
    assert first_phrase("The sea lion and the bear", accepted, "What lives with a sea lion?") == "bear"
    assert first_phrase("A sea lion", accepted, "What lives with a lion?") == "sea lion"


def test_regular_expression_characters_are_text() -> None:
    assert first_phrase("I write c++ daily", ("c++", "c")) == "c++"


def score(texts: list[str], **columns: object) -> list[float | None]:
    return distinct_valid(["Name an animal."] * len(texts), texts, **{"valid": [ANIMALS] * len(texts), **columns})


def test_equal_answers_share_one_point() -> None:
    assert score(["a cat", "Cats!", "a dog", "a rock"]) == [0.5, 0.5, 1.0, 0.0]


def test_truncated_completions_neither_score_nor_count() -> None:
    assert score(["a cat", "a cat", "a dog"], terminated=[True, False, True]) == [1.0, 0.0, 1.0]


def test_rows_without_phrases() -> None:
    assert score(["cat", "cat", "cat"], valid=[ANIMALS, None, []]) == [1.0, None, 0.0]


def test_groups() -> None:
    texts = ["a cat"] * 4
    assert score(texts) == [0.25] * 4
    assert score(texts, prompt_id=["a", "a", "a", "b"]) == [1 / 3, 1 / 3, 1 / 3, 1.0]
    assert score(texts, prompt_id=["a", "a", "a", "b"], group=[1, 2, 1, 2]) == [0.5] * 4
    assert score(texts, group=[1, None, None, 1]) == [0.5] * 4
    message = [{"role": "assistant", "content": "a cat"}]
    prompts = [[{"role": "user", "content": "Name one."}], [{"role": "user", "content": "Name an animal."}]]
    assert distinct_valid([prompts[0], prompts[1], prompts[0]], [message] * 3, valid=[ANIMALS] * 3) == [0.5, 1.0, 0.5]


@given(st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from([*ANIMALS, "a rock", "cats", "nothing"]))))
def test_sum_of_a_group_is_its_number_of_distinct_valid_answers(rows: list[tuple[str, str]]) -> None:
    scores = distinct_valid([p for p, _ in rows], [t for _, t in rows], valid=[ANIMALS] * len(rows))
    sums, answers = defaultdict(float), defaultdict(set)
    for (prompt, text), value in zip(rows, scores, strict=True):
        assert value is not None
        sums[prompt] += value
        answers[prompt] |= {text.removesuffix("s")} & set(ANIMALS)
    assert {p: round(total, 9) for p, total in sums.items()} == {p: len(answers[p]) for p in sums}


@pytest.mark.parametrize("valid", ["cat", [1], [""], 3])
def test_cells_that_are_no_phrases(valid: object) -> None:
    with pytest.raises(RewardError, match="needs a list of accepted phrases in the column 'valid'"):
        score(["cat"], valid=[valid])


def test_missing_column() -> None:
    with pytest.raises(RewardError, match="needs a column 'valid'"):
        distinct_valid(["q"], ["cat"])
