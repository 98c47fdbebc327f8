"""A policy with a memory: state through rollout and update, gradients through time; other promises in `properties`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_rewards
from torch import Tensor, nn

from asn_policies import Pipeline
from asn_policies.order_statistics import POINT_FEATURES
from asn_policies.recurrent import _SHARPNESS, _STEEPNESS, RecurrentPolicy, balance_features
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.checkpoint import load_policy
from asn_rl.errors import InvalidValue
from asn_rl.ops.context import context_vector
from asn_rl.ops.sketch import SketchSize, build_sketch
from asn_rl.protocols import LogitsBackend
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.testing import check_policy
from asn_rl.training.grpo import GRPOConfig, train
from asn_rl.types import Observation, PolicyOutput, Prompt, Trajectories
from asn_rl.unroll import recorded_logprobs, unroll

BACKEND = ToyBackend.random(24, seed=3, scale=1.5)
PROMPTS = [Prompt(str(i), f"w{i}") for i in range(1, 6)]
CONFIG = RolloutConfig(max_new_tokens=12, head=8, tail=4)
LOGITS = 2 * torch.randn(5, 40, generator=torch.Generator().manual_seed(3))


def lively(seed: int = 0, **arguments: Any) -> RecurrentPolicy:
    """One whose answers depend on its state."""
    torch.manual_seed(seed)
    policy = RecurrentPolicy(width=8, **arguments)
    for layer in (policy.slope, policy.margin):
        nn.init.normal_(layer.weight, std=0.1)
    return policy


def observe(logits: Tensor = LOGITS) -> Observation:
    sketch, _ = build_sketch(logits, SketchSize(40, 1))
    context = context_vector(sketch, *(torch.full((len(logits),), value) for value in (3.0, 9.0, 2.5, 7.0)))
    return Observation(sketch, context)


def sampled(policy: RecurrentPolicy, backend: LogitsBackend = BACKEND, config: RolloutConfig = CONFIG) -> Trajectories:
    prompts = PROMPTS if backend is BACKEND else [Prompt("a", "Name an animal."), Prompt("b", "What is 3 + 4?")]
    conditions = torch.linspace(-1, 1, len(prompts)).unsqueeze(-1) if "condition" in policy.needs else None
    return rollout(policy, backend, prompts, config, num_generations=6, seed=5, conditions=conditions)


def chosen(logprobs: Tensor, run: Trajectories) -> Tensor:
    """(S,) log-probabilities of the drawn tokens relative to the base model's."""
    return (logprobs - run.observations.sketch.log_mass).gather(-1, run.points.unsqueeze(-1)).squeeze(-1)


def assert_replays(policy: RecurrentPolicy, run: Trajectories) -> None:
    expected = run.behaviour_logprobs - run.base_logprobs
    torch.testing.assert_close(chosen(recorded_logprobs(policy, run), run), expected, atol=2e-5, rtol=1e-4)


def test_a_new_one_is_the_base_model_whatever_its_state() -> None:
    policy, obs = RecurrentPolicy(inputs=["condition"], condition_size=2), observe()
    obs = Observation(obs.sketch, obs.context, condition=torch.randn(5, 2))
    output = policy(obs, {"h": torch.randn(5, 24)})
    torch.testing.assert_close(output.logprobs, obs.sketch.log_mass, atol=1e-6, rtol=0)
    assert sum(p.numel() for p in policy.parameters()) < 4000
    check_policy(policy, condition_size=2)
    check_policy(lively(inputs=["condition"], condition_size=2, holds_surprise=True), condition_size=2)


CONDITIONED: dict[str, Any] = {"inputs": ["condition"], "condition_size": 1}


@pytest.mark.parametrize(
    "arguments", [{}, CONDITIONED, {**CONDITIONED, "holds_surprise": True}], ids=["plain", "condition", "balance"]
)
def test_a_stored_trajectory_replays_to_the_recorded_logprobs(arguments: dict[str, Any], tmp_path: Path) -> None:
    policy = lively(**arguments)
    run = sampled(policy)
    assert len(set(run.lengths.tolist())) > 3, "rows leave the batch at different times"
    assert_replays(policy, run)
    assert_replays(policy, run.select([7, 2, 20, 2]))
    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path)
    assert isinstance(loaded, RecurrentPolicy)
    assert_replays(loaded, run)

    forgetful = recorded_logprobs(_Forgetful(policy), run)
    assert (chosen(forgetful, run) - chosen(recorded_logprobs(policy, run), run)).abs().max() > 1e-3


class _Forgetful(nn.Module):
    """The same policy, its state thrown away at every step."""

    def __init__(self, policy: RecurrentPolicy) -> None:
        super().__init__()
        self.policy, self.needs = policy, policy.needs

    def initial_state(self, batch_size: int, device: torch.device) -> dict[str, Tensor] | None:
        return self.policy.initial_state(batch_size, device)

    def forward(self, obs: Observation, state: dict[str, Tensor] | None = None) -> PolicyOutput:
        return self.policy(obs, self.policy.initial_state(len(obs.context), obs.context.device))


def test_it_replays_on_the_real_model(smollm: HFBackend) -> None:
    policy = lively(inputs=["condition"], condition_size=1)
    run = sampled(policy, smollm, RolloutConfig(max_new_tokens=10))
    assert_replays(policy, run)


def test_the_balance_is_the_sum_of_surprises_over_the_request() -> None:
    policy = lively(**CONDITIONED, holds_surprise=True)
    run = sampled(policy)
    features = balance_features(run.per_token())
    assert run.observations.condition is not None
    excess = -run.base_logprobs - run.observations.condition[run.rows, 0]
    for rows, found in zip(excess.split(run.lengths.tolist()), features.split(run.lengths.tolist()), strict=True):
        balance = torch.nn.functional.pad(rows.cumsum(0), (1, -1))
        left = CONFIG.max_new_tokens - torch.arange(len(rows))
        expected = torch.tanh(torch.stack((balance / 5, balance / 30, balance / left), -1))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_gradients_go_through_time_to_every_parameter() -> None:
    policy = lively(inputs=["condition"], condition_size=1)
    run = sampled(policy)
    last = run.lengths.cumsum(0) - 1
    chosen(unroll(policy, run, torch.arange(len(run.points))).logprobs, run)[last[run.lengths > 4]].sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    # Only the steps before the last one have a state to multiply these weights with.
    assert policy.cell.weight_hh.grad is not None
    first = torch.zeros(1, 8), run.per_token(slice(0, 1))
    policy.zero_grad()
    policy(first[1], {"h": first[0]}).logprobs[0, 0].backward()
    assert policy.cell.weight_hh.grad is None or (policy.cell.weight_hh.grad[16:] == 0).all()


def test_a_slope_is_a_temperature_and_a_weight_on_the_logprob_cuts_by_surprise() -> None:
    obs = observe()
    logprobs = torch.log_softmax(LOGITS, -1).sort(-1, descending=True).values
    policy = RecurrentPolicy(max_slope=1e4)
    nn.init.constant_(policy.slope.bias, (1 / 0.5 - 1) / _STEEPNESS)
    heated = policy(obs, policy.initial_state(5, torch.device("cpu"))).logprobs.exp()[:, :40]
    torch.testing.assert_close(heated, torch.softmax(2 * logprobs, -1), atol=1e-5, rtol=1e-4)

    policy = RecurrentPolicy()
    with torch.no_grad():  # margin 1e5 * (3 + logprob): a surprise below 3 nats
        policy.margin.bias[0] = 3e5 / _SHARPNESS
        policy.margin.bias[1 + POINT_FEATURES.index("logprob")] = 1e6 / _SHARPNESS
    below = policy(obs, policy.initial_state(5, torch.device("cpu"))).logprobs.exp()[:, :40]
    expected = torch.softmax(torch.where(logprobs > -3, logprobs, -torch.inf), -1)
    torch.testing.assert_close(below, expected, atol=1e-5, rtol=1e-4)


def test_grpo_trains_it(tmp_path: Path) -> None:
    policy = RecurrentPolicy(width=8)
    torch.manual_seed(1)
    before = [parameter.clone() for parameter in policy.parameters()]
    suite = RewardSuite([RewardConfig("toy_rewards:second_choice")])
    config = GRPOConfig(steps=3, prompts_per_step=4, num_generations=6, learning_rate=1e-2, minibatch_tokens=64)
    figures: list[dict[str, float]] = []
    prompts = [Prompt(f"p{i}", f"w{i}") for i in range(1, 9)]
    setting = RolloutConfig(max_new_tokens=8, head=16, tail=4)
    train(
        policy,
        Pipeline([]),
        toy_rewards.TOY,
        prompts,
        suite,
        setting,
        config,
        tmp_path,
        on_step=lambda step, row: figures.append(row),
    )
    assert len(figures) == 3
    moved = [not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True)]
    assert all(moved)
    loaded = load_policy(tmp_path / "policy")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), policy.parameters(), strict=True))


def test_a_missing_state_or_one_of_another_batch_is_refused() -> None:
    policy, obs = RecurrentPolicy(width=8), observe()
    with pytest.raises(InvalidValue, match=r"state must be \{'h': \(batch, 8\)\}, here \(5, 8\), got None; begin with"):
        policy(obs)
    with pytest.raises(InvalidValue, match=r"here \(5, 8\), got \(4, 8\)"):
        policy(obs, policy.initial_state(4, torch.device("cpu")))


def test_an_input_without_a_size_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"inputs must be among .*, got 'condition'"):
        RecurrentPolicy(inputs=["condition"])
    with pytest.raises(
        InvalidValue, match=r"inputs must be with 'condition', got \[\]; its first number is the surprise"
    ):
        RecurrentPolicy(holds_surprise=True)
