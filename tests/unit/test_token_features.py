"""What is particular to the network with token features; the promises of every policy are in `tests/properties`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asn_policies import Pipeline
from asn_policies.order_statistics import _SHARPNESS as MARGIN_SHARPNESS
from asn_policies.order_statistics import POINT_FEATURES
from asn_policies.token_features import _STEEPNESS, HISTORY_FEATURES, TokenFeatureNetwork, history_point_features
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import InvalidValue
from asn_rl.ops.context import context_vector
from asn_rl.ops.sketch import SketchSize, build_sketch
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.testing import check_policy, random_entry
from asn_rl.types import Observation, Prompt
from asn_rl.unroll import recorded_logprobs

BOTH: dict[str, Any] = {"inputs": ["history", "layer_logprobs"], "layer_count": 3}


def observe(size: SketchSize | None = None) -> Observation:
    generator = torch.Generator().manual_seed(3)
    sketch, _ = build_sketch(2 * torch.randn(5, 40, generator=generator), size or SketchSize(40, 1))
    context = context_vector(sketch, *(torch.full((5,), value) for value in (3.0, 9.0, 2.5, 7.0)))
    entries = {name: random_entry(name, sketch, 3, generator) for name in ("history", "layer_logprobs")}
    return Observation(sketch, context, **entries)


def rule(name: str, **params: Any) -> Pipeline:
    return Pipeline([{"name": name, "params": params}])


def assert_same(policy: TokenFeatureNetwork, expected: Pipeline, obs: Observation) -> None:
    torch.testing.assert_close(policy(obs).logprobs.exp(), expected(obs).logprobs.exp(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [{"inputs": ["history"]}, {"inputs": ["layer_logprobs"], "layer_count": 3}, {**BOTH, "hard_cut": True}],
)
def test_a_new_one_is_the_base_model_and_keeps_the_contract(arguments: dict[str, Any]) -> None:
    policy, obs = TokenFeatureNetwork(**arguments), observe(SketchSize(12, 6))
    assert policy.needs == set(arguments["inputs"])
    torch.testing.assert_close(policy(obs).logprobs, obs.sketch.log_mass, atol=1e-6, rtol=0)
    check_policy(policy)
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=0.3)
    check_policy(policy)
    assert policy.cost(points=16, rows=4)["parameters"] == sum(p.numel() for p in policy.parameters())


def test_features_of_the_generated_text() -> None:
    obs = observe()
    assert obs.history is not None
    features = history_point_features(obs)
    occurred = (obs.history[..., 0] > 0) & obs.sketch.mask
    assert (features[~occurred] == 0).all()
    count, recency = obs.history[occurred].unbind(-1)
    expected = {
        "occurred": torch.ones_like(count),
        "count": count / 4,
        "recency": recency,
        "logprob": obs.sketch.log_mass[occurred] / 5,
    }
    assert tuple(expected) == HISTORY_FEATURES
    for i, name in enumerate(HISTORY_FEATURES):
        torch.testing.assert_close(features[occurred][:, i], expected[name], msg=name)


def test_constant_weights_are_the_penalties() -> None:
    policy, obs = TokenFeatureNetwork(), observe(SketchSize(16, 6))
    assert policy.weights is not None
    with torch.no_grad():
        policy.weights.bias[HISTORY_FEATURES.index("logprob")] = 5 * (1.4 - 1) / _STEEPNESS
    # A tail point with a history holds one token in a rollout; here make it so.
    obs = Observation(obs.sketch, obs.context, history=obs.history * (obs.sketch.log_count == 0).unsqueeze(-1))  # type: ignore[operator]
    assert_same(policy, rule("repetition_penalty", penalty=1.4), obs)
    with torch.no_grad():
        policy.weights.bias.zero_()
        policy.weights.bias[HISTORY_FEATURES.index("occurred")] = -0.6 / _STEEPNESS
        policy.weights.bias[HISTORY_FEATURES.index("count")] = -4 * 0.3 / _STEEPNESS
    assert_same(policy, rule("frequency_presence", frequency=0.3, presence=0.6), obs)


@pytest.mark.parametrize("layer", [0, 2, None])
def test_unit_strength_is_layer_contrast(layer: int | None) -> None:
    obs = observe()
    assert obs.layer_logprobs is not None
    near = obs.sketch.log_mass.clamp_min(-30).unsqueeze(-1) + 0.5 * obs.layer_logprobs.clamp_min(-20)
    obs = Observation(obs.sketch, obs.context, layer_logprobs=torch.log_softmax(near, -2))
    policy = TokenFeatureNetwork(inputs=["layer_logprobs"], layer_count=3, hard_cut=True)
    assert policy.contrast is not None
    with torch.no_grad():
        policy.contrast.bias[0] = 1 / _STEEPNESS
        policy.contrast.bias[1] = 0 if layer is not None else 100.0
        if layer is not None:
            policy.contrast.bias[2 + layer] = 1e4
        policy.margin.bias.zero_()  # keep what lies within log 10 of the most probable
        policy.margin.bias[0] = 1e5 * math.log(10) / MARGIN_SHARPNESS
        policy.margin.bias[1 + POINT_FEATURES.index("gap")] = 5e5 / MARGIN_SHARPNESS
    assert_same(policy, rule("layer_contrast", alpha=0.1, layer=layer), obs)


def test_gradients_reach_every_parameter_once_the_zero_layers_have_moved() -> None:
    policy = TokenFeatureNetwork(**{**BOTH, "inputs": [*BOTH["inputs"], "condition"]}, condition_size=2)
    assert policy.weights is not None
    assert policy.contrast is not None
    for layer in (policy.slope, policy.margin, policy.residual, policy.weights, policy.contrast):
        nn.init.normal_(layer.weight, std=0.1)
    obs = observe(SketchSize(12, 6))
    condition = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    whole = Observation(
        obs.sketch, obs.context, condition=condition, history=obs.history, layer_logprobs=obs.layer_logprobs
    )
    policy(whole).logprobs[:, 0].sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_rollout_gives_it_what_it_reads() -> None:
    policy = TokenFeatureNetwork(width=8, point_width=4, token_width=8)
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=0.2)
    backend, prompts = ToyBackend.random(12, seed=1, scale=1.0), [Prompt(str(i), f"w{i}") for i in range(1, 5)]
    run = rollout(policy, backend, prompts, RolloutConfig(max_new_tokens=8, head=6, tail=3, tracked=5), seed=3)

    def chosen(logprobs: Tensor) -> Tensor:
        return (logprobs - run.observations.sketch.log_mass).gather(-1, run.points.unsqueeze(-1)).squeeze(-1)

    torch.testing.assert_close(
        chosen(recorded_logprobs(policy, run)), run.behaviour_logprobs - run.base_logprobs, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": []}, r"inputs must be different names, at least one of .*'history', 'layer_logprobs'.*, got \[\]"),
        ({"inputs": ["condition"], "condition_size": 2}, "inputs must be different names, at least one of"),
        ({"inputs": ["history", "history"]}, "inputs must be different names"),
        ({"inputs": ["history", "nonsense"]}, "inputs must be among .*'hidden'.*, got 'nonsense'"),
        ({"inputs": ["layer_logprobs"]}, "layer_count must be >= 1 with 'layer_logprobs', else 0, got 0"),
        ({"inputs": ["history"], "layer_count": 2}, "layer_count must be >= 1 with 'layer_logprobs', else 0, got 2"),
    ],
)
def test_impossible_inputs_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        TokenFeatureNetwork(**arguments)


def test_missing_and_unexpected_entries_are_named() -> None:
    obs = observe()
    bare = Observation(obs.sketch, obs.context)
    with pytest.raises(InvalidValue, match=r"observation\.history"):
        TokenFeatureNetwork()(bare)
    with pytest.raises(InvalidValue, match=r"observation\.layer_logprobs"):
        TokenFeatureNetwork(inputs=["layer_logprobs"], layer_count=3)(bare)
    with pytest.raises(InvalidValue, match=r"rollout\.layers must be 2 layers, as the policy expects, got 3"):
        TokenFeatureNetwork(inputs=["layer_logprobs"], layer_count=2)(obs)
