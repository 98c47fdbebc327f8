"""Policies that read more than the sketch learn rules that need it; the same network without those entries cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from asn_policies import OrderStatisticsNetwork, Pipeline, RecurrentPolicy, TokenFeatureNetwork
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.mixed_batch import MixedBatch
from asn_rl.ops.divergences import kl
from asn_rl.protocols import Policy, TrainablePolicy
from asn_rl.replay import replay
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.training.distill import DistillConfig, distill, sketch_targets
from asn_rl.training.surprise_control import SurpriseControlConfig, train_surprise_control
from asn_rl.types import Prompt, Trajectories
from asn_rl.unroll import recorded_logprobs

TARGETS = (2.0, 2.5, 3.0)
"""bits"""
ROLLOUT = RolloutConfig(max_new_tokens=24, head=24, tail=1)


def endless() -> ToyBackend:
    """A Markov chain that hardly ever ends."""
    backend = ToyBackend.random(24, seed=3, scale=1.5)
    table = backend.table.clone()
    table[:, 0] = -20.0
    return ToyBackend(table)


def mirostat(target: float) -> Pipeline:
    return Pipeline([{"name": "mirostat", "params": {"tau": target, "eta": 0.1, "version": 2}}])


def held(policies: Sequence[Policy], words: range, seed: int) -> Trajectories:
    """Completions of every word at every target in turn."""
    prompts = [Prompt(str(i), f"w{i}") for i in words for _ in TARGETS]
    conditions = math.log(2) * torch.tensor(TARGETS).repeat(len(words)).unsqueeze(-1)
    policy = MixedBatch(policies, [i % len(policies) for i in range(len(prompts))])
    return rollout(policy, endless(), prompts, ROLLOUT, seed=seed, conditions=conditions)


def errors(run: Trajectories) -> Tensor:
    """(B,) bits between the mean surprise of a completion and its target."""
    means = torch.stack([row.mean() for row in (-run.base_logprobs / math.log(2)).split(run.lengths.tolist())])
    return (means - torch.tensor(TARGETS).repeat(len(run) // len(TARGETS))).abs()


def test_a_recurrent_policy_distils_mirostat_and_then_holds_a_surprise_better() -> None:
    teachers = [mirostat(target) for target in TARGETS]
    run = held(teachers, range(1, 13), seed=0)
    torch.manual_seed(0)
    policy = RecurrentPolicy(width=16, inputs=["condition"], condition_size=1, holds_surprise=True)
    targets = sketch_targets(teachers, torch.eye(len(TARGETS)).repeat(12, 1), run)
    before = float(kl(targets, recorded_logprobs(policy, run)).mean())
    figures = distill(
        policy, run, targets, DistillConfig(epochs=14, minibatch_tokens=300, learning_rate=2e-2, holdout=0.25)
    )
    assert before > 0.15
    assert figures["eval/distill_kl"] < 0.5 * before

    assert run.observations.condition is not None
    config = SurpriseControlConfig(steps=15, completions=24, window=20)
    train_surprise_control(policy, run, run.observations.condition.squeeze(-1), config)
    fresh = range(13, 24)
    ours, theirs = (errors(held(policies, fresh, seed=7)).mean() for policies in ([policy], teachers))
    assert ours < 0.6 * theirs


def rule(name: str, **params: float) -> Pipeline:
    return Pipeline([{"name": name, "params": params}])


LAYERS = (10, 20)
TEXTS = {
    "music": "Music is a language that everybody understands, and the music of the sea is the oldest music of all.",
    "rain": "The rain fell on the roof all night, and in the morning the rain had washed the dust from every leaf.",
    "a dog": "My dog is a small brown dog with long ears. Every morning my dog waits at the door until I wake up.",
    "bread": "To bake bread, mix flour, water, salt and yeast, let the dough rest, and bake the bread until brown.",
    "a train": "The train left the station at noon. The train was full, so the people stood in the aisle of the train.",
    "winter": "In winter the days are short and the nights are long, and the snow lies on the hills until the spring.",
    "gold": "Gold does not rust, and gold is soft, so people have made rings and coins of gold for a very long time.",
    "a king": "Once there was a king who had three sons. The first son was strong, the second son was clever.",
    "the moon": "The moon has no light of its own; the light of the moon is the light of the sun, sent back to us.",
    "a garden": "In the garden behind the house there are roses, and beans, and an apple tree older than the house.",
}


@pytest.fixture(scope="module")
def visited(smollm: HFBackend) -> Trajectories:
    """States along short texts, with all that the rules read."""
    ids = [smollm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS.values()]
    prompts = [Prompt(word, f"Write about {word}.") for word in TEXTS]
    penalty = {"name": "repetition_penalty", "params": {"penalty": 1.4}}
    reader = Pipeline([penalty, {"name": "layer_contrast", "params": {}}])
    return replay(reader, smollm, prompts, ids, RolloutConfig(max_new_tokens=40, layers=LAYERS))[0]


@pytest.mark.parametrize(
    ("teacher", "entry", "bound"),
    [
        (rule("repetition_penalty", penalty=1.4), "history", 0.002),
        (rule("layer_contrast", alpha=0.1), "layer_logprobs", 0.6),
    ],
    ids=["repetition penalty", "layer contrast"],
)
def test_token_features_distil_what_needs_them(
    visited: Trajectories, teacher: Pipeline, entry: str, bound: float
) -> None:
    targets = sketch_targets([teacher], torch.ones(len(visited), 1), visited)
    config = DistillConfig(epochs=25, minibatch_tokens=128, learning_rate=1e-2, holdout=0.3)
    held_out: dict[str, float] = {}
    layers = len(LAYERS) if entry == "layer_logprobs" else 0
    for name in ("with", "without"):
        torch.manual_seed(0)
        policy: TrainablePolicy = OrderStatisticsNetwork()
        if name == "with":
            policy = TokenFeatureNetwork(inputs=[entry], layer_count=layers)
        held_out[name] = distill(policy, visited, targets, config)["eval/distill_kl"]
    base = float(kl(targets, visited.observations.sketch.log_mass).mean())
    print(f"{entry}: held-out KL {held_out}, of the base model {base:.3f}")
    assert held_out["with"] < bound
    assert held_out["without"] > 2 * held_out["with"]
