"""How the job chooses winners; its stages are run in `tests/recipes`."""

from __future__ import annotations

import numpy as np
import pytest

from asn_rl.errors import ConfigError, InvalidValue
from asn_rl.evaluation.comparison import ArmResult
from asn_rl.job import CompareConfig, HeuristicSpec, JobConfig, LabelConfig, _choose
from asn_rl.rewards.compose import RewardConfig


def result(name: str, rewards: list[list[float]]) -> ArmResult:
    array = np.array(rewards)
    return ArmResult(name, array, np.ones_like(array), np.zeros_like(array), np.ones(len(array)))


A = result("a", [[1, 1], [0, 0], [0, 1], [0, 0]])
B = result("b", [[0, 0], [1, 0], [1, 1], [1, 0]])
STRATA = ["x", "x", "y", "y"]


def test_without_shrinkage_each_prompt_gets_its_own_winner() -> None:
    assert _choose([A, B], STRATA, LabelConfig(num_generations=2, shrinkage=0)) == ["a", "b", "b", "b"]


def test_with_much_shrinkage_each_stratum_gets_one() -> None:
    assert _choose([A, B], STRATA, LabelConfig(num_generations=2, shrinkage=1e6)) == ["a", "a", "b", "b"]


def test_a_masked_prompt_neither_wins_nor_spoils_its_stratum() -> None:
    masked = result("a", [[np.nan, np.nan], [0, 0], [0, 1], [0, 0]])
    config = LabelConfig(num_generations=2, shrinkage=2)
    assert _choose([masked, B], STRATA, config) == ["b", "b", "b", "b"]
    only = result("c", [[np.nan, np.nan]])
    assert _choose([only, result("d", [[0.0, 0.0]])], ["x"], config) == ["d"]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LabelConfig(num_generations=1), "num_generations"),
        (lambda: LabelConfig(train_prompts=0), "train_prompts"),
        (lambda: LabelConfig(shrinkage=-1.0), "shrinkage"),
        (lambda: CompareConfig(num_generations=0), "num_generations"),
        (lambda: CompareConfig(level=1.0), "level"),
        (lambda: JobConfig(), "rewards is empty"),
        (lambda: JobConfig(rewards=(RewardConfig("numeric_answer"),), threads=0), "threads"),
        (lambda: JobConfig(rewards=(RewardConfig("numeric_answer"),), heuristics=(HeuristicSpec("rl"),)), "learned"),
        (lambda: JobConfig(rewards=(RewardConfig("numeric_answer"),), heuristics=(HeuristicSpec("a/b"),)), "name"),
    ],
)
def test_illegal_settings_are_named(make, named: str) -> None:
    with pytest.raises((InvalidValue, ConfigError), match=named):
        make()
