"""Several prompt sources as one, and rewards that apply to one of them."""

from __future__ import annotations

import math

import pytest

from asn_rl.data import DataConfig, load_prompts
from asn_rl.errors import ConfigError, DataError, InvalidValue, RewardError
from asn_rl.rewards.compose import RewardConfig, RewardSuite

ARITHMETIC = {"source": "arithmetic", "arguments": {"operations": "+"}, "limit": 5}
SYLLOGISM = {"source": "reasoning_gym", "arguments": {"family": "syllogism", "size": 4}}


@pytest.mark.parametrize("split", ["train", "selection", "test"])
def test_a_union_holds_the_prompts_of_every_source(split: str) -> None:
    both = load_prompts(DataConfig("union", {"sources": [ARITHMETIC, SYLLOGISM]}), split)
    parts = [load_prompts(DataConfig(**entry), split) for entry in (ARITHMETIC, SYLLOGISM)]
    assert both == [*parts[0], *parts[1]]
    assert {prompt.columns["task"] for prompt in both} == {"arithmetic", "syllogism"}


def test_bad_sources_are_refused() -> None:
    for sources, error in (([], InvalidValue), ([{"sauce": "jsonl"}], InvalidValue), ([ARITHMETIC] * 2, DataError)):
        with pytest.raises(error):
            load_prompts(DataConfig("union", {"sources": sources}), "train")
    with pytest.raises(ConfigError):
        load_prompts(DataConfig("union", {}), "train")


def test_a_reward_applies_where_it_is_told_to() -> None:
    prompts = load_prompts(DataConfig("union", {"sources": [ARITHMETIC, SYLLOGISM]}), "train")
    configs = [
        RewardConfig("numeric_answer", where={"task": "arithmetic"}),
        RewardConfig("exact_answer", where={"task": "syllogism"}),
    ]
    texts = [prompt.columns["answer"] for prompt in prompts]
    suite = RewardSuite(configs)
    result = suite(prompts, texts, [[1]] * len(prompts), terminated=[True] * len(prompts))
    assert result.total.tolist() == [1.0] * len(prompts)  # numeric_answer alone would refuse "Yes"
    for name, task in (("numeric_answer", "arithmetic"), ("exact_answer", "syllogism")):
        applies = [not math.isnan(value) for value in result.components[name].tolist()]
        assert applies == [prompt.columns["task"] == task for prompt in prompts]
        assert result.counts[f"{name}/masked"] == applies.count(False)


def test_rewards_that_apply_nowhere_say_so() -> None:
    prompts = load_prompts(DataConfig(**ARITHMETIC), "train")
    suite = RewardSuite([RewardConfig("numeric_answer", where={"tusk": "arithmetic"})])
    with pytest.raises(RewardError, match="the prompt has not"):
        suite(prompts, ["1"] * len(prompts), [[1]] * len(prompts), terminated=[True] * len(prompts))
