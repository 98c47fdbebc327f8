from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from asn_rl.errors import RewardError
from asn_rl.rewards import REWARDS
from asn_rl.testing import check_reward

PROMPTS, COMPLETIONS = ["7 + 8?", "Name an animal."], ["15", "a cat"]
COLUMNS: dict[str, Any] = {
    "completion_ids": [[1], [2, 3]],
    "answer": [15, None],
    "valid": [None, ["cat"]],
    "terminated": [True, True],
    "choices": [["15", "16"], None],
    "schema": [None, {"type": "object"}],
    "instruction_id_list": [["punctuation:no_comma"], None],
    "kwargs": [[{}], None],
    "unheard_of": [1, 2],
}
# The others need a model, an index or a server; their own tests check the contract.
LIGHT = (
    "numeric_answer", "exact_answer", "math_answer", "choice_answer", "json_schema", "ifeval", "length_budget",
    "format_match", "distinct_valid", "distinct_ngrams", "self_bleu_diversity", "repetition_rate",
)  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
def test_builtin_rewards_keep_the_contract(name: str) -> None:
    twice = {column: cells * 2 for column, cells in COLUMNS.items()}  # groups of two
    scores = check_reward(REWARDS.resolve(name), PROMPTS * 2, ["a b c 15", "a cat"] * 2, **twice)
    assert any(score is not None for score in scores)


@pytest.mark.parametrize("name", LIGHT)
def test_builtin_rewards_take_messages(name: str) -> None:
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    completions = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]
    function = REWARDS.resolve(name)
    assert check_reward(function, prompts, completions, **COLUMNS) == function(PROMPTS, COMPLETIONS, **COLUMNS)


def draws(completions: Any, **columns: Any) -> list[float]:
    random.random()
    return [0.0 for _ in completions]


def draws_numpy(completions: Any, **columns: Any) -> list[float]:
    np.random.rand()  # noqa: NPY002  (what the check is for)
    return [0.0 for _ in completions]


def draws_torch(completions: Any, **columns: Any) -> list[float]:
    torch.rand(1)
    return [0.0 for _ in completions]


class Wanders:
    calls = 0

    def __call__(self, completions: Any, **columns: Any) -> list[float]:
        self.calls += 1
        return [float(self.calls) for _ in completions]


def modifies(completions: Any, answer: Any, **columns: Any) -> list[float]:
    answer[0] = 0
    return [0.0 for _ in completions]


def too_many(completions: Any, **columns: Any) -> list[float]:
    return [0.0] * 3


def columnless(prompts: Any, completions: Any) -> list[float]:
    return [0.0, 0.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (draws, "draws from the global state of random,"),
        (draws_numpy, "draws from the global state of numpy"),
        (draws_torch, "draws from the global state of torch"),
        (Wanders(), r"scores the same input differently: \[1.0, 1.0\] then \[2.0, 2.0\]"),
        (modifies, "modifies its input 'answer'"),
        (too_many, "got 3 values for 2 completions"),
        (columnless, r"add '\*\*columns'"),
    ],
)
def test_broken_contracts_are_found(function: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        check_reward(function, PROMPTS, COMPLETIONS, **COLUMNS)


def test_every_short_name_stands_for_a_function() -> None:
    for name in REWARDS.entries:
        function = REWARDS.resolve(name)
        assert function.__name__ == name
        assert function.__doc__
