from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asn_rl.errors import RewardError
from asn_rl.rewards.numeric import exact_answer, last_number, normalised, numeric_answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("15", "15"),
        ("7 + 8 = 15.", "15"),
        ("7 + 8", "8"),
        ("The answer is -5", "-5"),
        ("The answer is \u22125.", "-5"),
        ("x = - 5", "-5"),
        ("x=\u20135", "-5"),
        ("-$5", "-5"),
        ("-\\$5.50", "-5.5"),
        ("10-3", "3"),
        ("10 - 3", "3"),
        ("5 -3", "3"),
        ("(2)-3", "3"),
        ("5 - -3", "-3"),
        ("a list:\n-\n5", "5"),
        ("42.0", "42"),
        ("1,234", "1234"),
        ("$1,234,567.50 in all", "1234567.5"),
        ("$1{,}234$", "1234"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("it is...15", "15"),
        (".5", "0.5"),
        ("2e3", "2000"),
        ("\\boxed{15}", "15"),
        ("**15**", "15"),
        ("15 apples, see H2O", "15"),
        ("version 1.2.3", "1.2"),
        ("007", "7"),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "H2O", "-", "five", "\u00b2"])
def test_no_number(text: str) -> None:
    assert last_number(text) is None


@given(st.integers(), st.sampled_from(["{}", "It is {}.", "1 + 2 = {}\n", "**{}**", "so x={}, done"]))
def test_reads_back_any_integer(number: int, template: str) -> None:
    assert last_number(template.format(number)) == number
    assert last_number(template.format(f"{number:,}")) == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4))
def test_reads_back_decimals(number: Decimal) -> None:
    assert last_number(f"The answer is {number:f}.") == number


@given(st.text())
def test_reads_any_text(text: str) -> None:
    assert last_number(text) is None or last_number(text) == last_number(text)


def test_scores_by_row() -> None:
    scores = numeric_answer(
        ["7 + 8?"] * 6,
        ["15.", "7 + 8", "15", "15", "fifteen", "15.00"],
        answer=["15", 15, 15.0, None, 15, "15"],
        terminated=[True, True, False, True, True, True],
    )
    assert scores == [1.0, 0.0, 0.0, None, 0.0, 1.0]


def test_messages_and_absent_terminated() -> None:
    message = [{"role": "assistant", "content": "It is 15"}]
    assert numeric_answer([[{"role": "user", "content": "7 + 8?"}]], [message], answer=[15]) == [1.0]


def test_missing_column_names_it() -> None:
    with pytest.raises(RewardError, match=r"'numeric_answer' needs a column 'answer'.*columns: topic.*add 'answer'"):
        numeric_answer(["a"], ["1"], topic=["sums"])


@pytest.mark.parametrize("answer", ["cat", True, [1], ""])
def test_gold_that_is_no_number(answer: object) -> None:
    with pytest.raises(RewardError, match="needs a number in the column 'answer'"):
        numeric_answer(["a"], ["1"], answer=[answer])


def test_completion_that_is_no_text() -> None:
    with pytest.raises(RewardError, match="must be text or a list of messages"):
        numeric_answer(["a"], [3], answer=[3])


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("Paris", "paris", 1.0),
        (" 'Paris'. ", "Paris", 1.0),
        ("**New   York**!", "new york", 1.0),
        ("Paris, France", "Paris", 0.0),
        ("5", "-5", 0.0),
        ("-5.", "-5", 1.0),
        ("42", 42, 1.0),
        ("!", "?", 0.0),
        ("?", "?", 1.0),
        ("", "Paris", 0.0),
    ],
)
def test_exact_answer(completion: str, answer: object, score: float) -> None:
    assert exact_answer(["q"], [completion], answer=[answer]) == [score]


def test_exact_answer_masks_and_refuses_truncated() -> None:
    assert exact_answer(["q"] * 2, ["a", "a"], answer=["a", None], terminated=[False, True]) == [0.0, None]


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)
