from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asn_rl.errors import InvalidValue, RewardError
from asn_rl.rewards.format import format_match
from asn_rl.rewards.length import length_budget


def lengths(*counts: int) -> list[list[int]]:
    return [[0] * count for count in counts]


def test_budget() -> None:
    ids = lengths(1, 4, 5, 6, 8, 9)
    assert length_budget(["q"] * 6, [""] * 6, ids, budget=4) == [1, 1, 0, 0, 0, 0]
    assert length_budget(["q"] * 6, [""] * 6, ids, budget=4, ramp=4) == [1, 1, 0.75, 0.5, 0, 0]


@given(st.integers(1, 50), st.integers(0, 50))
def test_longer_is_never_better(budget: int, ramp: int) -> None:
    scores = length_budget([""] * 120, [""] * 120, lengths(*range(120)), budget=budget, ramp=ramp)
    numbers = [score for score in scores if score is not None]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[budget] == 1.0
    assert numbers[budget + ramp + 1] == 0.0


def test_budget_refusals() -> None:
    with pytest.raises(RewardError, match="needs completion_ids"):
        length_budget(["q"], ["a"])
    with pytest.raises(InvalidValue, match=r"budget must be >= 1 token, got 0"):
        length_budget(["q"], ["a"], [[1]], budget=0)
    with pytest.raises(InvalidValue, match=r"ramp must be >= 0 tokens, got -1"):
        length_budget(["q"], ["a"], [[1]], ramp=-1)


def test_default_format_is_one_reasoning_block() -> None:
    texts = ["<think>a\nb</think>\n7", "7", "<think>a<think>b</think>", "x<think>a</think>7"]
    assert format_match(["q"] * 4, texts) == [1.0, 0.0, 0.0, 0.0]


def test_full_match_and_search() -> None:
    texts = ["7", "It is 7.", [{"role": "assistant", "content": "7"}]]
    assert format_match(["q"] * 3, texts, pattern="[0-9]") == [1.0, 0.0, 1.0]
    assert format_match(["q"] * 3, texts, pattern="[0-9]", search=True) == [1.0, 1.0, 1.0]


def test_bad_pattern() -> None:
    with pytest.raises(RewardError, match=r"'\(' is no regular expression"):
        format_match(["q"], ["a"], pattern="(")
