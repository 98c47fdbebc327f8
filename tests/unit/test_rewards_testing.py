from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import asn_rl.rewards
from asn_rl.errors import RewardError
from asn_rl.rewards import REWARDS
from asn_rl.testing import check_reward

PROMPTS, COMPLETIONS = ["7 + 8?", "Name an animal."], ["15", "a cat"]
COLUMNS: dict[str, Any] = {
    "completion_ids": [[1], [2, 3]],
    "answer": [15, None],
    "valid": [None, ["cat"]],
    "terminated": [True, True],
    "unheard_of": [1, 2],
}


@pytest.mark.parametrize("name", sorted(REWARDS.entries))
def test_builtin_rewards_keep_the_contract(name: str) -> None:
    scores = check_reward(REWARDS.resolve(name), PROMPTS, COMPLETIONS, **COLUMNS)
    assert any(score is not None for score in scores)


@pytest.mark.parametrize("name", sorted(REWARDS.entries))
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


def test_names_of_the_package() -> None:
    assert asn_rl.rewards.numeric_answer is REWARDS.resolve("numeric_answer")
    for name in asn_rl.rewards.__all__:
        assert getattr(asn_rl.rewards, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'numeric_anser'"):
        _ = asn_rl.rewards.numeric_anser  # pyright: ignore[reportAttributeAccessIssue]
