"""Distillation: the loss goes where it should, targets are those of the heuristics, refusals say what to do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from asn_policies import LocalTransform, OrderStatisticsNetwork, Pipeline, PolicyModule, TemperatureTopP
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import InvalidValue, TrainingError
from asn_rl.metrics import MetricsLogger, read_metrics
from asn_rl.ops.losses import truncated_kl
from asn_rl.ops.sketch import build_sketch, token_points
from asn_rl.protocols import Policy
from asn_rl.rollout import Probe, RolloutConfig, rollout
from asn_rl.training.distill import DistillConfig, distill, full_logits_target, sketch_targets
from asn_rl.types import Observation, Prompt, Trajectories

ROLLOUT = RolloutConfig(max_new_tokens=8, head=32, tail=1)
PROMPTS = [Prompt(f"p{i}", f"w{i}") for i in range(1, 21)]
FAST = DistillConfig(epochs=60, minibatch_tokens=128, learning_rate=1e-2)


def rule(name: str, **params: float) -> Pipeline:
    return Pipeline([{"name": name, "params": params}])


def visited(policy: Policy | None = None, prompts: list[Prompt] = PROMPTS, **options: object) -> Trajectories:
    backend = ToyBackend.random(vocab=32, seed=0)
    return rollout(policy or Pipeline([]), backend, prompts, ROLLOUT, num_generations=4, **options)  # type: ignore[arg-type]


def small(**options: object) -> OrderStatisticsNetwork:
    torch.manual_seed(0)
    return OrderStatisticsNetwork(width=16, point_width=8, **options)  # type: ignore[arg-type]


RULES = {
    "temperature, cold": rule("temperature", temperature=0.4),
    "temperature, hot": rule("temperature", temperature=2.0),
    "top-k": rule("top_k", top_k=4),
    "top-p": rule("top_p", top_p=0.8),
    "min-p": rule("min_p", min_p=0.2),
    "typical": rule("typical", mass=0.7),
    "epsilon": rule("epsilon", epsilon=0.05),
    "eta": rule("eta", epsilon=0.1),
    "top-n-sigma": rule("top_n_sigma", n=1.0),
}


@pytest.mark.parametrize("name", RULES)
def test_each_classical_rule_is_learned_from_few_states(name: str) -> None:
    """The features make every rule a line: KL falls to a small part of what the base model starts with."""
    trajectories, target = visited(), RULES[name]
    targets = sketch_targets([target], torch.ones(len(trajectories), 1), trajectories)
    start, leak = (part.mean() for part in truncated_kl(targets, trajectories.observations.sketch.log_mass, 1.0))
    figures = distill(small(), trajectories, targets, FAST)
    assert figures["eval/distill_kl"] < 0.2 * float(start)
    assert figures["eval/distill_leak"] <= 0.1 * float(leak) + 1e-4


def test_a_choice_by_prompt_is_learned_as_conditioning() -> None:
    trajectories = visited()
    choice = [i // 4 % 2 for i in range(len(trajectories))]
    conditioned = trajectories.with_condition(nn.functional.one_hot(torch.tensor(choice), 2).float())
    rules = [rule("temperature", temperature=0.4), rule("temperature", temperature=2.0)]
    targets = sketch_targets(rules, nn.functional.one_hot(torch.tensor(choice), 2).float(), conditioned)
    told = distill(small(inputs=["condition"], condition_size=2), conditioned, targets, FAST)
    untold = distill(small(), conditioned, targets, FAST)
    assert told["eval/distill_kl"] < 0.2 * untold["eval/distill_kl"]


def test_sketch_targets_are_what_each_heuristic_answers() -> None:
    trajectories = visited()
    rules = [rule("top_p", top_p=0.7), rule("temperature", temperature=0.5)]
    choice = [i % 2 for i in range(len(trajectories))]
    targets = sketch_targets(rules, nn.functional.one_hot(torch.tensor(choice), 2).float(), trajectories)
    for i, heuristic in enumerate(rules):
        which = (torch.tensor(choice)[trajectories.rows] == i).nonzero().squeeze(-1)
        assert torch.equal(targets[which], heuristic(trajectories.per_token(which)).logprobs)


def test_full_logits_targets_equal_the_rule_on_the_vocabulary(smollm: HFBackend) -> None:
    """A rule that cuts in the tail: computed token by token, then summed over the points of the sketch."""
    size = RolloutConfig(max_new_tokens=4, head=8, tail=8)
    heuristic = rule("top_k", top_k=20)  # beyond the head
    out = rollout(
        Pipeline([]), smollm, [Prompt("a", "Name an animal.")], size, num_generations=2,
        probes={"target": full_logits_target(heuristic), "logits": lambda logits, sketch, points: logits},
    )  # fmt: skip
    for logits, target in zip(out.extras["logits"], out.extras["target"], strict=True):
        kept = torch.full_like(logits, -math.inf)
        top = logits.topk(20).indices
        kept[top] = logits[top]
        probs = torch.softmax(kept.double(), -1)
        _, points = build_sketch(logits[None], size.size)
        owner = token_points(logits[None], points)[0]
        expected = torch.zeros(16, dtype=torch.float64).index_add(0, owner.clamp_min(0), probs)
        torch.testing.assert_close(target.double().exp(), expected, atol=1e-6, rtol=1e-5)


def test_full_logits_and_sketch_targets_agree_where_no_rule_cuts_in_the_tail(smollm: HFBackend) -> None:
    heuristic = rule("top_p", top_p=0.6)
    out = rollout(
        Pipeline([]), smollm, [Prompt("a", "What is 3 + 4?")], RolloutConfig(max_new_tokens=6), num_generations=2,
        probes={"target": full_logits_target(heuristic)},
    )  # fmt: skip
    on_sketch = sketch_targets([heuristic], torch.ones(2, 1), out).exp()
    torch.testing.assert_close(out.extras["target"].exp(), on_sketch, atol=1e-5, rtol=1e-4)


def test_distillation_on_the_real_model_moves_towards_the_rule(smollm: HFBackend) -> None:
    prompts = [Prompt(f"p{i}", f"Name {thing}.") for i, thing in enumerate(("a bird", "a city", "a color", "a sport"))]
    out = rollout(Pipeline([]), smollm, prompts, RolloutConfig(max_new_tokens=8), num_generations=4)
    heuristic = rule("min_p", min_p=0.1)
    targets = sketch_targets([heuristic], torch.ones(len(out), 1), out)
    before = truncated_kl(targets, out.observations.sketch.log_mass, 1.0)[0].mean()
    figures = distill(small(), out, targets, replace(FAST, minibatch_tokens=64, holdout=0.25))
    assert figures["eval/distill_kl"] < 0.3 * float(before)


# Tokens as targets


def test_the_loss_of_tokens_is_that_of_the_vocabulary_up_to_what_lies_inside_points() -> None:
    """-log pi(token) over the vocabulary, computed on raw logits, minus -log(p(token) / p(point)) of the base model."""
    probes: dict[str, Probe] = {
        "logits": lambda logits, sketch, points: logits,
        "owner": lambda logits, sketch, points: token_points(logits, points),
    }
    coarse = RolloutConfig(max_new_tokens=8, head=4, tail=4)
    run = rollout(Pipeline([]), ToyBackend.random(32, 0), PROMPTS, coarse, num_generations=2, probes=probes)
    torch.manual_seed(0)
    policy = TemperatureTopP(8, start_top_p=0.7)
    nn.init.constant_(policy.temperature.bias, -0.5)
    shift = policy.shift(run.per_token()).detach().double()
    tokens = torch.tensor([token for ids in run.completion_ids for token in ids]).unsqueeze(-1)
    warped = run.extras["logits"].double() + shift.gather(-1, run.extras["owner"])
    whole = -torch.log_softmax(warped, -1).gather(-1, tokens)
    p = torch.softmax(run.extras["logits"].double(), -1)
    same = run.extras["owner"] == run.points.unsqueeze(-1)
    inside = -(p.gather(-1, tokens) / torch.where(same, p, 0.0).sum(-1, keepdim=True)).log()
    assert inside.max() > 0.1
    still = replace(FAST, target="tokens", epochs=1, learning_rate=1e-12, holdout=0.0, minibatch_tokens=64)
    found = distill(policy, run, run.points, still)["loss/distill_kl"]
    assert found == pytest.approx((whole - inside).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.7), (1.5, 0.8)])
def test_soft_heads_recover_a_temperature_and_top_p_from_samples(temperature: float, top_p: float) -> None:
    """The soft cut at P begins to bite where the hard one removes: P comes out low by about 1 / sharpness."""
    steps = [
        {"name": "temperature", "params": {"temperature": temperature}},
        {"name": "top_p", "params": {"top_p": top_p}},
    ]
    prompts = [Prompt(f"p{i}", f"w{i}") for i in range(1, 32)]
    run = rollout(Pipeline(steps), ToyBackend.random(32, 0), prompts, ROLLOUT, num_generations=40)
    torch.manual_seed(0)
    policy = TemperatureTopP(8, start_top_p=0.9)
    config = DistillConfig(target="tokens", epochs=12, minibatch_tokens=512, learning_rate=2e-2)
    figures = distill(policy, run, run.points, config)
    found = policy.warp_parameters(run.per_token()).detach()
    mean, spread = found.mean(0), found.std(0)
    assert mean[0].item() == pytest.approx(temperature, abs=0.05)
    assert mean[1].item() == pytest.approx(top_p - 1 / policy.sharpness, abs=0.025)
    assert spread.max() < 0.05
    assert figures["eval/distill_leak"] == 0
    assert figures["loss/distill_kl"] < -run.behaviour_logprobs.mean() + 0.03


def test_tokens_of_the_real_model_teach_the_soft_heads(smollm: HFBackend) -> None:
    prompts = [Prompt(f"p{i}", f"Name {thing}.") for i, thing in enumerate(("a bird", "a city", "a color", "a sport"))]
    out = rollout(rule("temperature", temperature=0.3), smollm, prompts, RolloutConfig(8), num_generations=4)
    torch.manual_seed(0)
    policy = TemperatureTopP(8)
    config = DistillConfig(target="tokens", epochs=15, minibatch_tokens=64, learning_rate=3e-2, holdout=0.25)
    figures = distill(policy, out, out.points, config)
    at_points = out.observations.sketch.log_mass.gather(-1, out.points.unsqueeze(-1))
    assert figures["loss/distill_kl"] < -0.8 * at_points.mean()
    assert policy.warp_parameters(out.per_token())[:, 0].mean() < 0.7


def test_same_seed_same_weights() -> None:
    trajectories = visited()
    targets = sketch_targets([RULES["top-p"]], torch.ones(len(trajectories), 1), trajectories)
    first, second = small(), small()
    for policy in (first, second):
        distill(policy, trajectories, targets, replace(FAST, epochs=2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_tokens_of_weight_zero_do_not_teach() -> None:
    trajectories = visited()
    half = torch.arange(len(trajectories.points)) % 2
    targets = sketch_targets([RULES["temperature, cold"]], torch.ones(len(trajectories), 1), trajectories)
    hot = sketch_targets([RULES["temperature, hot"]], torch.ones(len(trajectories), 1), trajectories)
    targets[half == 0] = hot[half == 0]
    policy = small()
    distill(policy, trajectories, targets, replace(FAST, holdout=0.0), weights=half.float())
    obs = trajectories.per_token((half == 1).nonzero().squeeze(-1))
    with torch.no_grad():
        divergence, _ = truncated_kl(RULES["temperature, cold"](obs).logprobs, policy(obs).logprobs, 1.0)
    assert float(divergence.mean()) < 0.02


def test_a_mixture_is_that_of_the_probabilities_over_the_vocabulary() -> None:
    trajectories = visited()
    rules = [RULES["temperature, cold"], RULES["top-k"], RULES["temperature, hot"]]
    weights = torch.rand(len(trajectories), 3, generator=torch.Generator().manual_seed(1))
    weights[:, 1] *= torch.arange(len(trajectories)) % 2  # some leave one out
    weights /= weights.sum(-1, keepdim=True)
    mixed = sketch_targets(rules, weights, trajectories).exp()
    parts = [rule(trajectories.per_token()).logprobs.exp() for rule in rules]
    expected = sum(weights[trajectories.rows, i, None] * part for i, part in enumerate(parts))
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(InvalidValue, match="sum to 1"):
        sketch_targets(rules, 2 * weights, trajectories)


def test_no_prompt_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    """A policy that can memorise prompts shows it: its held-out loss stays above its training loss."""
    trajectories = visited(capture=("prompt_embedding",))
    choice = torch.tensor([int(p.id[1:]) * 7 % 5 % 2 for p in trajectories.prompts])
    rules = [rule("temperature", temperature=t) for t in (0.3, 3.0)]
    targets = sketch_targets(rules, nn.functional.one_hot(choice, 2).float(), trajectories)
    policy = small(inputs=["prompt_embedding"], hidden_size=32)
    with MetricsLogger(tmp_path) as log:
        distill(policy, trajectories, targets, replace(FAST, holdout=0.3), log=log)
    last = read_metrics(tmp_path)[-1]
    assert last["eval/distill_kl"] > 2 * last["loss/distill_kl"]


class Frozen(PolicyModule):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def shift(self, obs: Observation) -> Tensor:
        return torch.zeros_like(obs.sketch.log_mass)


class TestRefusals:
    def test_a_policy_without_gradient_fails(self) -> None:
        trajectories = visited()
        targets = sketch_targets([RULES["top-k"]], torch.ones(len(trajectories), 1), trajectories)
        with pytest.raises((TrainingError, RuntimeError), match=r"gradient|does not require grad"):
            distill(Frozen(), trajectories, targets, FAST)

    def test_heuristics_cannot_be_distilled_into(self) -> None:
        trajectories = visited()
        with pytest.raises(TrainingError, match="no trainable parameter"):
            distill(Pipeline([]), trajectories, trajectories.observations.sketch.log_mass, FAST)

    def test_weights_of_sixteen_bits_are_refused(self) -> None:
        trajectories = visited()
        policy = LocalTransform(4).bfloat16()
        with pytest.raises(TrainingError, match=r"LocalTransform has weights in torch.bfloat16.*policy.float\(\)"):
            distill(policy, trajectories, trajectories.observations.sketch.log_mass, FAST)

    def test_targets_of_another_shape(self) -> None:
        trajectories = visited()
        for wrong in (trajectories.observations.sketch.log_mass[:, :-1], trajectories.points[:-1]):
            with pytest.raises(InvalidValue, match="targets shape"):
                distill(small(), trajectories, wrong, FAST)

    def test_a_policy_that_cuts_hard_cannot_be_trained(self) -> None:
        trajectories = visited()
        policy = small(hard_cut=True)
        nn.init.constant_(policy.margin.bias, -1.0)
        with pytest.raises(TrainingError, match="cuts hard"):
            distill(policy, trajectories, trajectories.observations.sketch.log_mass, FAST)

    @pytest.mark.parametrize(
        ("key", "value"), [("epochs", 0), ("minibatch_tokens", 0), ("holdout", 1.0), ("gamma", -1.0)]
    )
    def test_illegal_settings_are_named(self, key: str, value: float) -> None:
        with pytest.raises(InvalidValue, match=key):
            replace(FAST, **{key: value})  # type: ignore[arg-type]
