"""Win rates against references: ties, position bias, conversations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asn_rl.errors import InvalidValue, RewardError
from asn_rl.rewards.judge_win import judge_win, wins
from asn_rl.rewards.letter_judge import Comparison, one_question
from asn_rl.testing import check_reward


def judge(bias: float, silent: str = "") -> Any:
    """Prefers the longer text; leans to the first by `bias` letters; says nothing of texts with `silent` in them."""

    def answers(asked: Sequence[Comparison]) -> np.ndarray:
        p = np.array([1 / (1 + np.exp(len(second) - len(first) - bias)) for _, first, second in asked])
        share = np.array([0.05 if silent and silent in first + second else 0.9 for _, first, second in asked])
        return np.stack([share * p, share * (1 - p)], -1)

    return answers


@given(st.lists(st.tuples(st.text("ab", max_size=6), st.text("ab", max_size=6)), max_size=12), st.floats(-3, 3))
def test_a_win_takes_both_orders(texts: list[tuple[str, str]], bias: float):
    """Brute force, one comparison at a time; and the two sides of a pair share one point."""
    counts: Counter[str] = Counter()
    comparisons = [Comparison("q", *pair) for pair in texts]
    found = wins(comparisons, judge(bias), 0.2, counts)
    for (mine, theirs), won in zip(texts, found, strict=True):
        votes = [np.sign(len(mine) - len(theirs) + bias), np.sign(len(mine) - len(theirs) - bias)]
        expected = {2: 1.0, -2: 0.0}.get(int(sum(votes)), 0.5)
        assert won == (0.5 if mine == theirs else expected)
    swapped = wins([c._replace(first=c.second, second=c.first) for c in comparisons], judge(bias), 0.2)
    assert (found + swapped == 1).all()
    distinct = {pair for pair in texts if pair[0] != pair[1]}
    assert (counts["answers"], counts["pairs"], counts["neither"]) == (2 * len(distinct), len(distinct), 0)


def test_position_bias_shows_in_the_counts_and_wins_nothing():
    counts: Counter[str] = Counter()
    asked = [Comparison(str(i), "a" * i, "b" * (9 - i)) for i in range(10)]
    assert wins(asked, judge(100.0), 0.2, counts).tolist() == [0.5] * 10
    assert counts == {"answers": 20, "first_preferred": 20, "neither": 0, "pairs": 10, "disagreed": 10}


def test_what_the_judge_does_not_answer_is_masked():
    counts: Counter[str] = Counter()
    found = wins([Comparison("q", "aaa", "b"), Comparison("q", "ac", "b")], judge(0.0, silent="c"), 0.2, counts)
    assert found[0] == 1
    assert math.isnan(found[1])
    assert (counts["neither"], counts["pairs"]) == (2, 1)
    with pytest.raises(InvalidValue, match="minimum_share must be in"):
        wins([Comparison("q", "a", "b")], judge(0.0), 1.5)


def test_a_conversation_is_compared_from_where_it_parts():
    def turns(answer: str, follow_up: str = "Shorter?") -> list[dict[str, str]]:
        roles = ("user", "assistant", "user")
        return [{"role": role, "content": text} for role, text in zip(roles, ("Sing.", answer, follow_up), strict=True)]

    question, answers = one_question([turns("La la"), turns("No")], ["La", [{"role": "assistant", "content": "N"}]])
    assert question == "Sing."
    assert answers == ["La la\n\nUser: Shorter?\n\nAssistant: La", "No\n\nUser: Shorter?\n\nAssistant: N"]
    question, answers = one_question([turns("La"), turns("La")], ["x", "y"])
    assert (question, answers) == ("User: Sing.\nAssistant: La\nUser: Shorter?", ["x", "y"])
    longer = [*turns("La"), {"role": "assistant", "content": "L"}, {"role": "user", "content": "Bye"}]
    assert one_question([turns("La"), longer], ["x", "y"])[1] == ["x", "L\n\nUser: Bye\n\nAssistant: y"]


def test_reward_function(smollm: Any):
    """On the embedded model. The j-th completion of a group meets the j-th reference."""
    counts = judge_win.__dict__["counts"]
    counts.clear()
    prompts = ["What is 3 + 4?"] * 4 + [[{"role": "user", "content": "Name an animal."}]] * 2
    completions = ["7", "I like trains.", "7", "7", "a cat", "a rock"]
    references = [["7", "I like trains."]] * 4 + [[[{"role": "user", "content": "Name an animal."},
                                                    {"role": "assistant", "content": "a cat"}]], None]  # fmt: skip

    def score(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
        return judge_win(prompts, completions, dtype="float32", minimum_share=0.0, **columns)

    scores = check_reward(score, prompts, completions, references=references, prompt_id=["a"] * 4 + ["b", "c"])
    assert scores[:3] == [0.5, 0.5, 0.5]  # each meets its own text
    assert scores[3] in (0.0, 0.5, 1.0)
    assert scores[4:] == [0.5, None]
    assert counts["answers"] == 2 * 2  # two calls by the check; one pair is asked, in two orders
    with pytest.raises(RewardError, match="needs a column 'references'"):
        judge_win(["q"], ["a"])
