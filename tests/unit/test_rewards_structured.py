from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asn_rl.errors import RewardError
from asn_rl.rewards.structured import ChoiceReader, choice_answer, first_json, json_schema
from asn_rl.testing import check_reward

CITIES = ["Paris", "New York", "New York City", "Rome"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(b)", "B"),
        ("**B**", "B"),
        ("\\boxed{B}", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is: (B)", "B"),
        ("**Answer:** D", None),
        ("Answer: D", "D"),
        ("I choose option D because it is old.", "D"),
        ("It is Rome.", "D"),
        ("rome", "D"),
        ("D) Rome", "D"),
        ("It is in New York City.", "C"),
        ("It is in New York.", "B"),
        ("Not Paris. It is Rome.", "D"),
        ("A) Paris\nB) New York\nThe answer is D. ", "D"),
        ("The answer is A. No, wait.\nThe answer is D.", "D"),
        ("The answer is A or D.", None),
        ("Both A and D.", None),
        ("A, D", None),
        ("The answer is A) Rome.", None),
        ("Paris or Rome", None),
        ("A city I like is old.", None),
        ("Romeo was here.", None),
        ("E", None),
        ("", None),
    ],
)
def test_last_stated_choice(text: str, label: str | None) -> None:
    expected = None if label is None else "ABCD".index(label)
    assert ChoiceReader(CITIES).last_stated(text) == expected


def test_choices_that_are_letters_or_numbers() -> None:
    assert ChoiceReader(["C", "D"]).last_stated("The answer is D") == 1
    numbers = ChoiceReader(["4", "5", "4.5"])
    assert [numbers.last_stated(text) for text in ("It is 4.5", "It is 4.", "14 or 40", "C")] == [2, 0, None, 2]


@given(st.sampled_from("ABCD"), st.sampled_from(["The answer is {}.", "({})", "{}", "Answer: {}", "So, \\boxed{{{}}}"]))
def test_wordings_are_read_alike(label: str, wording: str) -> None:
    assert ChoiceReader(CITIES).last_stated("We think of it.\n" + wording.format(label)) == "ABCD".index(label)


def test_choice_scores() -> None:
    columns: dict[str, Any] = {
        "choices": [CITIES, CITIES, CITIES, CITIES, None, CITIES],
        "answer": ["D", "Rome", "Rome", "B", "B", None],
        "terminated": [True, True, False, True, True, True],
    }
    texts = ["(D)", [{"role": "assistant", "content": "D."}], "D.", "D.", "B", "B"]
    assert check_reward(choice_answer, ["q"] * 6, texts, **columns) == [1.0, 1.0, 0.0, 0.0, None, None]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": ["A"]}, "needs a column 'choices'"),
        ({"choices": [CITIES]}, "needs a column 'answer'"),
        ({"choices": [CITIES], "answer": ["Berlin"]}, "answer 'Berlin' is none of the choices"),
        ({"choices": ["ABCD"], "answer": ["A"]}, "must be a list of 2 to 26"),
        ({"choices": [["x"]], "answer": ["A"]}, "must be a list of 2 to 26"),
        ({"choices": [["x", "X "]], "answer": ["A"]}, "must be a list of 2 to 26"),
        ({"choices": [["x", ""]], "answer": ["A"]}, "must be a list of 2 to 26"),
    ],
)
def test_refused_choices(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        choice_answer(["q"], ["A"], **columns)


def test_choices_in_hostile_texts() -> None:
    for text in ("A or " * 400, "(" * 2000, "answer " * 300, " " * 2000, "**" * 1000, "." * 2000):
        assert choice_answer(["q"], [text], choices=[CITIES], answer=["B"]) == [0.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2]}', {"a": [1, 2]}),
        (" 7 ", 7),
        ('"x"', "x"),
        ("```json\n[1]\n```", [1]),
        ("See [here]:\n```\n{}\n```\nDone.", {}),
        ("```\n7\n```", 7),
        ('It is {"a": 1} and {"a": 2}.', {"a": 1}),
        ('{oops {"a": 1}', {"a": 1}),
        ('{"a": {"b": 1}', {"b": 1}),
        ('{"a": "}"} tail', {"a": "}"}),
    ],
)
def test_first_json(text: str, value: Any) -> None:
    assert first_json(text) == (True, value)


@pytest.mark.parametrize(
    "text", ["", "seven", "There are 7.", '{"a": 1', "{'a': 1}", "NaN", "[NaN]", "[" * 5000, "9" * 5000]
)
def test_no_json(text: str) -> None:
    assert first_json(text) == (False, None)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=10).map(lambda v: [v]))
def test_json_in_prose_is_found(value: list[Any]) -> None:
    assert first_json(f"Here you are: {json.dumps(value)}. [1]") == (True, value)


PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def test_schema_as_argument_and_as_column() -> None:
    texts = ['{"age": 7}', 'Sure: {"age": "7"}', "none"]
    assert check_reward(json_schema, ["q"] * 3, texts, schema=[PERSON] * 3) == [1.0, 0.0, 0.0]
    assert json_schema(["q"] * 3, texts, schema=PERSON) == [1.0, 0.0, 0.0]
    assert json_schema(["q"] * 3, texts, schema=json.dumps(PERSON)) == [1.0, 0.0, 0.0]
    assert json_schema(["q"] * 3, texts, schema=[PERSON, None, {}]) == [1.0, None, 0.0]


def test_value_too_deep_to_validate_is_masked() -> None:
    json_schema.__dict__["counts"].clear()
    nested = {"$ref": "#/$defs/list", "$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}}}}
    assert json_schema(["q"], ["[" * 400 + "]" * 400], schema=nested) == [None]
    assert json_schema.__dict__["counts"] == {"deep": 1}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (None, "needs a column 'schema'"),
        ({"type": "objct"}, "is no JSON schema: 'objct' is not valid"),
        ("{", "is no JSON schema"),
        ([3], "is no JSON schema"),
        ([{1, 2}], "is no JSON schema"),
        ({"$ref": "https://example.com/person.json"}, "leads nowhere"),
    ],
)
def test_refused_schemas(schema: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        json_schema(["q"], ["{}"], schema=schema)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jsonschema" else find(name))
    with pytest.raises(RewardError, match=r"pip install 'asn_rl\[schema\]'"):
        json_schema(["q"], ["{}"], schema=PERSON)
