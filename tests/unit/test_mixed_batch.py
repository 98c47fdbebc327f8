"""Rows of several policies in one batch are what each policy makes of them alone."""

from __future__ import annotations

import pytest
import torch

from asn_policies import Pipeline
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import InvalidValue
from asn_rl.mixed_batch import MixedBatch
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt

CONFIG = RolloutConfig(max_new_tokens=9, head=5, tail=6)
RULES = [
    Pipeline([]),
    Pipeline([{"name": "greedy"}]),
    Pipeline([{"name": "mirostat", "params": {"tau": 2.0, "eta": 1.0}}]),
    Pipeline([{"name": "mirostat", "params": {"tau": 1.0, "eta": 0.5}}]),
]


def ending_toy() -> ToyBackend:
    """Ends after a few tokens, at different times."""
    backend = ToyBackend.random(32, seed=3)
    backend.table[:, 0] = 2.5
    return backend


def test_each_row_is_what_its_policy_makes_of_it_alone() -> None:
    backend, rows = ending_toy(), [(f"w{1 + i % 7}", i % len(RULES), 100 + i) for i in range(1, 25)]
    prompts = [Prompt(f"p{i}", text) for i, (text, _, _) in enumerate(rows)]
    policy = MixedBatch(RULES, [member for _, member, _ in rows])
    mixed = rollout(policy, backend, prompts, CONFIG, seed=[seed for _, _, seed in rows])
    starts = mixed.lengths.cumsum(0) - mixed.lengths
    assert mixed.lengths.unique().numel() > 2  # rows left at different times
    for i, (_, member, seed) in enumerate(rows):
        alone = rollout(RULES[member], backend, [prompts[i]], CONFIG, seed=seed)
        assert mixed.completion_ids[i] == alone.completion_ids[0]
        span = slice(int(starts[i]), int(starts[i] + mixed.lengths[i]))
        torch.testing.assert_close(mixed.behaviour_logprobs[span], alone.behaviour_logprobs)


def test_on_the_real_model(smollm: HFBackend) -> None:
    prompts = [Prompt("a", "What is 2 + 3?"), Prompt("b", "Name an animal.")]
    config = RolloutConfig(max_new_tokens=6)
    greedy, base = RULES[1], RULES[0]
    everyone = [prompts[0], prompts[0], prompts[1], prompts[1]]
    mixed = rollout(MixedBatch([greedy, base], [0, 1, 0, 1]), smollm, everyone, config, seed=[5, 5, 6, 6])
    for member, policy in enumerate((greedy, base)):
        for which, prompt in enumerate(prompts):
            alone = rollout(policy, smollm, [prompt], config, seed=5 + which)
            assert mixed.completion_ids[2 * which + member] == alone.completion_ids[0]


def test_wrong_assignments_are_refused() -> None:
    with pytest.raises(InvalidValue, match="member"):
        MixedBatch(RULES, [4])
    with pytest.raises(InvalidValue, match="batch size"):
        rollout(MixedBatch(RULES, [0, 1]), ending_toy(), [Prompt("a", "w1")], CONFIG)
    with pytest.raises(InvalidValue, match="one a prompt"):
        rollout(RULES[0], ending_toy(), [Prompt("a", "w1")], CONFIG, seed=[1, 2])
