"""Training to hold a surprise: the simulated loop and its loss against sums by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from asn_policies import OrderStatisticsNetwork, Pipeline, RecurrentPolicy
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import InvalidPolicyOutput, InvalidValue
from asn_rl.ops.context import entropy
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.training.surprise_control import (
    SurpriseControlConfig,
    Walk,
    _drawn,
    control_loss,
    train_surprise_control,
    walk,
)
from asn_rl.types import Prompt, Trajectories

BACKEND = ToyBackend.random(24, seed=3, scale=1.5)
PROMPTS = [Prompt(str(i), f"w{i}") for i in range(1, 9)]
CONFIG = RolloutConfig(max_new_tokens=14, head=24, tail=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stored(generations: int = 4) -> Trajectories:
    conditions = torch.linspace(0.5, 2, len(PROMPTS)).unsqueeze(-1)
    return rollout(Pipeline([]), BACKEND, PROMPTS, CONFIG, num_generations=generations, seed=1, conditions=conditions)


def test_the_loss_is_that_of_sums_by_hand() -> None:
    lengths, requested, window = torch.tensor([9, 4, 12, 2]), torch.tensor([1.0, 0.5, 2.0, 1.5]), 4
    drawn = 3 * torch.rand(12, 4, generator=generator())
    drawn[torch.arange(12).unsqueeze(-1) >= lengths] = 0
    final, windows = control_loss(Walk(drawn, drawn, lengths), requested, window)
    for i, (length, target) in enumerate(zip(lengths.tolist(), requested.tolist(), strict=True)):
        row = drawn[:length, i]
        assert float(final[i]) == pytest.approx((float(row.mean()) - target) ** 2, rel=1e-4)
        width = min(window, length)
        means = [float(row[t : t + width].mean()) - target for t in range(length - width + 1)]
        assert float(windows[i]) == pytest.approx(sum(m * m for m in means) / len(means), rel=1e-4)


def test_a_walk_of_the_base_model_has_its_entropy_and_no_divergence() -> None:
    run = stored(60)
    with torch.no_grad():
        walked = walk(RecurrentPolicy(inputs=["condition"], condition_size=1), run, generator())
    assert walked.surprises.shape == (14, len(run))
    active = torch.arange(14).unsqueeze(-1) < run.lengths
    assert torch.equal(walked.surprises != 0, active)
    assert walked.divergences.abs().max() < 1e-5
    expected = entropy(run.observations.sketch).mean()
    error = walked.surprises[active].std() / math.sqrt(len(run.points))
    assert abs(float(walked.surprises[active].mean() - expected)) < 4 * float(error)


def test_a_walk_ends_like_the_stored_completions_in_their_order() -> None:
    run = stored()
    policy = Pipeline([{"name": "greedy"}])
    walked = walk(policy, run, generator())
    at = -run.observations.sketch.log_mass.amax(-1)
    for i, row in enumerate(at.split(run.lengths.tolist())):
        torch.testing.assert_close(walked.surprises[: len(row), i], row, atol=1e-5, rtol=1e-4)


def test_feedback_reaches_the_policy() -> None:
    """Mirostat reads the simulated surprises: mu moves by eta times what is left over, so sums telescope."""
    run = stored()
    tau, eta = 1.5, 0.4
    seen: list[Tensor] = []

    class Watched(Pipeline):
        def forward(self, obs: Any, state: Any = None) -> Any:
            output = super().forward(obs, state)
            assert output.state is not None
            seen.append(output.state["0/mu"])
            return output

    policy = Watched([{"name": "mirostat", "params": {"tau": tau, "eta": eta}}])
    walked = walk(policy, run, generator())
    bits = walked.surprises / math.log(2)
    longest = run.lengths == run.lengths.max()
    order = torch.argsort(run.lengths, descending=True, stable=True)
    last = torch.zeros(len(run)).index_put((order[: len(seen[-1])],), seen[-1])
    expected = 2 * tau - eta * (bits[: len(seen) - 1] - tau).sum(0)
    torch.testing.assert_close(last[longest], expected[longest], atol=1e-4, rtol=1e-4)


def test_the_gradient_of_a_draw_is_that_of_mean_and_deviation() -> None:
    logits = torch.randn(3, 6, dtype=torch.float64, generator=generator(), requires_grad=True)
    surprise = 4 * torch.rand(3, 6, dtype=torch.float64, generator=generator(1))
    points = torch.tensor([4, 0, 2])
    value = _drawn(torch.log_softmax(logits, -1), surprise, points)
    torch.testing.assert_close(value, surprise[torch.arange(3), points])

    probs = torch.softmax(logits, -1)
    mean = (probs * surprise).sum(-1)
    deviation = ((probs * surprise.square()).sum(-1) - mean.square() + 1e-6).sqrt()
    z = ((value - mean) / deviation).detach()
    expected = torch.autograd.grad((mean + z * deviation).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(value.sum(), logits)[0], expected)


@pytest.mark.parametrize("recurrent", [True, False])
def test_training_lowers_the_error(recurrent: bool) -> None:
    torch.manual_seed(0)
    kind = RecurrentPolicy if recurrent else OrderStatisticsNetwork
    policy = kind(width=8, inputs=["condition"], condition_size=1)
    run = stored()
    assert run.observations.condition is not None
    requested = run.observations.condition.squeeze(-1)
    if not recurrent:  # its condition is normalised: a single number would vanish
        run, policy = (
            run.with_condition(torch.eye(8).repeat_interleave(4, 0)),
            kind(8, inputs=["condition"], condition_size=8),
        )

    def error() -> float:
        with torch.no_grad():
            return float(control_loss(walk(policy, run, generator(9)), requested, 5)[0].sqrt().mean())

    before = error()
    config = SurpriseControlConfig(steps=25, window=5, learning_rate=1e-2, beta=0.0)
    figures = train_surprise_control(policy, run, requested, config)
    assert set(figures) == {"control/final_rmse", "control/window_rmse", "control/kl_base", "time/control"}
    assert error() < 0.75 * before


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": 0}, "steps must be >= 1, got 0"),
            ({"completions": 0}, "completions must be >= 1"),
            ({"window": 0}, "window must be >= 1"),
            ({"beta": -0.1}, r"beta must be >= 0, got -0\.1"),
            ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ],
    )
    def test_settings(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidValue, match=message):
            SurpriseControlConfig(**changes)

    def test_requests_of_another_number(self) -> None:
        policy = RecurrentPolicy(inputs=["condition"], condition_size=1)
        with pytest.raises(InvalidValue, match=r"requested shape must be \(32,\), one a completion, got \(3,\)"):
            train_surprise_control(policy, stored(), torch.ones(3), SurpriseControlConfig())

    def test_a_diverged_policy(self) -> None:
        policy, run = RecurrentPolicy(inputs=["condition"], condition_size=1), stored()
        with torch.no_grad():
            policy.slope.weight.fill_(math.nan)
        with pytest.raises(InvalidPolicyOutput, match="its weights may have diverged"):
            train_surprise_control(policy, run, torch.ones(len(run)), SurpriseControlConfig(steps=1))
