"""What is particular to the order-statistics network; the promises of every policy are in `tests/properties`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from asn_policies import OrderStatisticsNetwork
from asn_policies.order_statistics import _STEEPNESS, GLOBAL_FEATURES, POINT_FEATURES, global_features, point_features
from asn_rl.checkpoint import load_policy, save_policy
from asn_rl.errors import CheckpointError, InvalidValue
from asn_rl.ops.context import context_vector
from asn_rl.ops.sketch import SketchSize, build_sketch
from asn_rl.types import Observation


def observe(logits: torch.Tensor, size: SketchSize | None = None) -> Observation:
    sketch, _ = build_sketch(logits, size or SketchSize(logits.shape[-1], 1))
    ones = torch.ones(logits.shape[:-1])
    return Observation(sketch, context_vector(sketch, 3 * ones, 9 * ones, 2.5 * ones, 7 * ones))


LOGITS = 2 * torch.randn(5, 40, generator=torch.Generator().manual_seed(3))


def test_point_features_are_those_of_the_full_vocabulary() -> None:
    """With every token its own point, each feature by its definition, in float64."""
    features = point_features(observe(LOGITS))[:, :40].double()
    p = torch.log_softmax(LOGITS.double(), -1).sort(-1, descending=True).values
    entropy = -(p.exp() * p).sum(-1, keepdim=True)
    above = p.exp().cumsum(-1) - p.exp()
    distance = -p - entropy
    closer = ((distance[:, None, :].abs() < distance[:, :, None].abs()) * p.exp()[:, None, :]).sum(-1)
    expected = {
        "logprob": p / 10,
        "gap": (p - p[:, :1]) / 5,
        "mass_above": above,
        "log_rank": torch.log10(1 + torch.arange(40.0)).expand_as(p),
        "entropy_distance": distance / 5,
        "typical_mass": closer,
        "log_count": torch.zeros_like(p),
    }
    assert tuple(expected) == POINT_FEATURES
    for i, name in enumerate(POINT_FEATURES):
        torch.testing.assert_close(features[..., i], expected[name].double(), atol=1e-5, rtol=1e-4, msg=name)


def test_global_features_are_those_of_the_full_vocabulary() -> None:
    features = global_features(observe(LOGITS)).double()
    p = torch.log_softmax(LOGITS.double(), -1)
    entropy = -(p.exp() * p).sum(-1)
    expected = {
        "entropy": entropy / 5,
        "varentropy": (p.exp() * (-p - entropy[:, None]).square()).sum(-1) / 10,
        "max_logprob": p.amax(-1) / 5,
        "effective_support": -(2 * p).exp().sum(-1).log() / 5,
        "logit_spread": LOGITS.double().std(-1, correction=0) / 5,
    }
    assert tuple(expected) == GLOBAL_FEATURES
    for i, name in enumerate(GLOBAL_FEATURES):
        torch.testing.assert_close(features[..., i], expected[name], atol=1e-5, rtol=1e-4, msg=name)


def gated(hard_cut: bool) -> OrderStatisticsNetwork:
    """Keeps a point while the mass above it is below 0.7."""
    policy = OrderStatisticsNetwork(hard_cut=hard_cut)
    with torch.no_grad():
        policy.margin.bias.zero_()
        policy.margin.bias[0] = 7.0
        policy.margin.bias[1 + POINT_FEATURES.index("mass_above")] = -10.0
    return policy


def test_a_learned_gate_becomes_an_exact_nucleus() -> None:
    obs = observe(LOGITS)
    p = torch.log_softmax(LOGITS, -1).sort(-1, descending=True).values.exp()
    kept = (p.cumsum(-1) - p) <= 0.7
    cut = gated(True)(obs).logprobs[:, :40]
    assert torch.equal(cut > -math.inf, kept)
    soft = gated(False)(obs).logprobs[:, :40]
    assert torch.isfinite(soft).all()


def test_a_policy_that_was_trained_softly_cuts_exactly_when_asked(tmp_path: Path) -> None:
    save_policy(tmp_path / "soft", gated(False), base_model="toy", fingerprint="toy-1")
    hard = load_policy(tmp_path / "soft", hard_cut=True)
    obs = observe(LOGITS)
    assert torch.equal(hard(obs).logprobs, gated(True)(obs).logprobs)
    with pytest.raises(CheckpointError, match=r"does not take the arguments .*hardcut"):
        load_policy(tmp_path / "soft", hardcut=True)


def test_the_most_probable_point_survives_any_gate() -> None:
    policy = OrderStatisticsNetwork(hard_cut=True)
    nn.init.constant_(policy.margin.bias, -5.0)
    for logits in (LOGITS, torch.zeros(2, 40), torch.tensor([[3.0, 3.0, 1.0, -math.inf]])):
        logps = policy(observe(logits)).logprobs
        assert (logps.argmax(-1) == 0).all()
        torch.testing.assert_close(logps.exp().sum(-1), torch.ones(len(logits)))


def test_a_slope_is_a_temperature() -> None:
    policy = OrderStatisticsNetwork(max_slope=1e4)
    with torch.no_grad():
        policy.slope.bias.fill_((1 / 0.5 - 1) / _STEEPNESS)
    expected = torch.softmax(LOGITS.sort(-1, descending=True).values / 0.5, -1)
    torch.testing.assert_close(policy(observe(LOGITS)).logprobs.exp()[:, :40], expected, atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_parameter_once_the_zero_layers_have_moved() -> None:
    policy = OrderStatisticsNetwork(inputs=["condition"], condition_size=3)
    for layer in (policy.slope, policy.margin, policy.residual):
        nn.init.normal_(layer.weight, std=0.1)
    obs = observe(LOGITS, SketchSize(8, 8))
    obs = Observation(obs.sketch, obs.context, condition=torch.eye(3)[[0, 1, 2, 0, 1]])
    policy(obs).logprobs[:, 0].sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_condition_of_one_number_is_learned_from() -> None:
    """Cross-entropy on T = 0.5 where the number is -1 and on T = 2 where it is 1: after training it decides."""
    torch.manual_seed(0)
    policy = OrderStatisticsNetwork(width=8, point_width=4, inputs=["condition"], condition_size=1)
    base = observe(torch.cat([LOGITS, LOGITS]))
    sign = torch.tensor([[-1.0], [1.0]]).repeat_interleave(len(LOGITS), 0)
    told = Observation(base.sketch, base.context, condition=sign)
    heat = torch.where(sign < 0, 0.5, 2.0)
    target = torch.softmax(torch.cat([LOGITS, LOGITS]).sort(-1, descending=True).values / heat, -1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        (-(target * policy(told).logprobs[:, :40]).sum(-1).mean()).backward()
        optimizer.step()
    weight = dict(policy.named_parameters())["projections.condition.1.weight"]
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
    assert (policy(told).logprobs[:, :40].exp() - target).abs().sum(-1).max() < 0.15


@pytest.mark.parametrize("inputs", [["hidden"], ["nonsense"], ["condition"]])
def test_inputs_without_a_size_are_refused(inputs: list[str]) -> None:
    with pytest.raises(InvalidValue, match=inputs[0]):
        OrderStatisticsNetwork(inputs=inputs)


def test_a_missing_input_is_named() -> None:
    policy = OrderStatisticsNetwork(inputs=["condition"], condition_size=2)
    with pytest.raises(InvalidValue, match=r"observation\.condition"):
        policy(observe(LOGITS))


def test_it_states_its_cost_with_optional_inputs() -> None:
    policy = OrderStatisticsNetwork(inputs=["prompt_embedding", "condition"], hidden_size=12, condition_size=3)
    assert policy.cost(points=16, rows=4)["parameters"] == sum(p.numel() for p in policy.parameters())
