"""What is particular to the warps: their closed forms, limits and starts; other promises are in `tests/properties`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from asn_policies import Pipeline, PolicyModule
from asn_policies.features import logit_spread
from asn_policies.warp import TemperatureTopP, TwoSlopeWarp
from asn_rl.errors import InvalidValue
from asn_rl.ops.context import context_vector
from asn_rl.ops.divergences import kl
from asn_rl.ops.sketch import SketchSize, build_sketch
from asn_rl.types import Observation

LOGITS = torch.linspace(0.5, 5, 6)[:, None] * torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
Warp = TypeVar("Warp", bound=PolicyModule)
INPUTS = ["hidden", "prompt_embedding", "condition"]
WARPS: dict[str, Callable[..., PolicyModule]] = {
    "two slopes": TwoSlopeWarp,
    "temperature, top-p": functools.partial(TemperatureTopP, start_top_p=0.8),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Networks draw their first weights from the global state."""
    torch.manual_seed(0)


def observe(logits: Tensor, size: SketchSize | None = None) -> Observation:
    """By default every token is a point of its own."""
    sketch, _ = build_sketch(logits, size or SketchSize(logits.shape[-1], 1))
    ones = torch.ones(logits.shape[:-1])
    return Observation(sketch, context_vector(sketch, 3 * ones, 9 * ones, 2.5 * ones, 7 * ones))


def moved(policy: Warp, seed: int = 0, scale: float = 0.5) -> Warp:
    """The policy with random weights, whose parameters differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


def sorted_logits() -> Tensor:
    """(6, 40) float64 by descending value: the order of points."""
    return LOGITS.double().sort(-1, descending=True).values


def assert_probs(policy: PolicyModule, expected: Tensor, tolerance: float = 1e-5) -> None:
    found = policy(observe(LOGITS)).logprobs[:, :40].double().exp()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_two_slopes_is_the_papers_function_on_raw_logits(seed: int) -> None:
    policy = moved(TwoSlopeWarp(16), seed, scale=0.3)
    low, high, bend = policy.warp_parameters(observe(LOGITS)).detach().double().unsqueeze(-2).unbind(-1)
    logits = sorted_logits()
    bend = bend + torch.logsumexp(logits, -1, keepdim=True)  # from log-probabilities to raw logits
    warped = low * logits + (high - low) * torch.relu(logits - bend)
    assert ((low > 0.25) & (low < 4) & (high > 0.25) & (high < 4)).all()
    top, spread = logits[:, :1], logits.std(-1, correction=0, keepdim=True)
    assert ((bend < top) & (bend > top - 4 * spread)).all()
    assert low.max() - low.min() > 1e-3
    assert (low - high).abs().max() > 0.05
    assert_probs(policy, torch.softmax(warped, -1))


def test_the_bend_is_measured_in_deviations_of_all_logits() -> None:
    policy = TwoSlopeWarp(16)
    nn.init.constant_(policy.head.bias, 0.7)
    *_, bend = policy.warp_parameters(observe(LOGITS)).unbind(-1)
    logprobs = torch.log_softmax(LOGITS.double(), -1)
    expected = logprobs.amax(-1) - 4 * LOGITS.double().std(-1, correction=0) / (1 + math.exp(-0.7))
    torch.testing.assert_close(bend.double(), expected, rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([0.3, 1.0, 5.0]))
def test_two_slopes_rises_whatever_its_weights(seed: int, scale: float) -> None:
    policy = moved(TwoSlopeWarp(8), seed, scale)
    logprobs = policy(observe(LOGITS)).logprobs[:, :40].detach()
    assert (logprobs.diff(dim=-1) <= 1e-5).all()


def test_equal_slopes_are_a_temperature() -> None:
    policy = TwoSlopeWarp(16)
    with torch.no_grad():
        policy.head.bias[:2] = math.log(3)  # sigmoid 3/4: slope sqrt 4
    assert_probs(policy, torch.softmax(2 * sorted_logits(), -1))


def soft_top_p(logits: Tensor, temperature: Tensor, top_p: Tensor, sharpness: float) -> Tensor:
    """The rule over the vocabulary, in float64, tokens by descending logit."""
    probs = torch.softmax(logits / temperature, -1)
    above = probs.cumsum(-1) - probs
    damped = probs * torch.exp(-sharpness * torch.relu(above - top_p))
    return damped / damped.sum(-1, keepdim=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sharpness", [3.0, 30.0])
def test_temperature_and_soft_top_p_over_the_vocabulary(seed: int, sharpness: float) -> None:
    policy = moved(TemperatureTopP(16, sharpness=sharpness, start_top_p=0.7), seed, scale=0.3)
    temperature, top_p = policy.warp_parameters(observe(LOGITS)).detach().double().unsqueeze(-2).unbind(-1)
    assert temperature.max() - temperature.min() > 0.01
    assert top_p.max() - top_p.min() > 0.01
    assert ((temperature > 0) & (temperature < 2) & (top_p > 0) & (top_p < 1)).all()
    assert_probs(policy, soft_top_p(sorted_logits(), temperature, top_p, sharpness))


def fixed(temperature: float, top_p: float, sharpness: float = 30.0, hard_cut: bool = False) -> TemperatureTopP:
    policy = TemperatureTopP(8, sharpness=sharpness, start_top_p=top_p, hard_cut=hard_cut)
    nn.init.constant_(policy.temperature.bias, math.log(temperature / (2 - temperature)))
    return policy


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (0.6, 0.5), (1.7, 0.8), (1.0, 1e-6)])
def test_the_limit_of_a_sharp_cut_is_top_p(temperature: float, top_p: float) -> None:
    steps = [
        {"name": "temperature", "params": {"temperature": temperature}},
        {"name": "top_p", "params": {"top_p": top_p}},
    ]
    obs = observe(LOGITS)
    expected = Pipeline(steps)(obs).logprobs
    hard = fixed(temperature, top_p, hard_cut=True)(obs).logprobs
    assert torch.equal(hard > -math.inf, expected > -math.inf)
    torch.testing.assert_close(hard.exp(), expected.exp(), rtol=0, atol=1e-5)
    gaps = [
        (fixed(temperature, top_p, sharpness)(obs).logprobs.exp() - expected.exp()).abs().sum(-1).max().item()
        for sharpness in (10.0, 1e3, 1e7)
    ]
    assert gaps[0] >= gaps[1] >= gaps[2]
    assert gaps[2] < 1e-4


def test_the_start_is_next_to_the_base_model(smollm_logits: Tensor) -> None:
    obs = observe(smollm_logits, SketchSize())
    for policy, bound in ((TwoSlopeWarp(), 0.0), (TemperatureTopP(), 2e-5)):
        assert kl(policy(obs).logprobs.double(), obs.sketch.log_mass.double()).max() <= bound + 1e-6
    temperature, top_p = TemperatureTopP().warp_parameters(obs).unbind(-1)
    torch.testing.assert_close(temperature, torch.ones_like(temperature))
    torch.testing.assert_close(top_p, torch.full_like(top_p, 0.995))


def test_on_the_real_model_the_sketch_stands_for_the_vocabulary(smollm_logits: Tensor) -> None:
    """Neither warp is constant inside a tail point; 64 + 32 points are close to all 49,152 tokens."""
    obs, logits = observe(smollm_logits, SketchSize()), smollm_logits.double().sort(-1, descending=True).values
    expected = soft_top_p(logits, torch.tensor(0.8), torch.tensor(0.9), 30.0)[:, 0]
    found = fixed(0.8, 0.9)(obs).logprobs.exp()[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(logit_spread(obs.sketch).double(), logits.std(-1, correction=0), rtol=0.07, atol=0)


@pytest.mark.parametrize("name", WARPS)
def test_gradients_reach_every_parameter_and_optional_input(name: str) -> None:
    policy = moved(WARPS[name](8, INPUTS, 5, 1, 3), scale=0.3)
    base = observe(LOGITS)
    generator = torch.Generator().manual_seed(1)
    entries = {"hidden": 5, "prompt_embedding": 5, "condition": 1}
    read = {entry: torch.randn(6, size, generator=generator, requires_grad=True) for entry, size in entries.items()}
    obs = Observation(base.sketch, base.context, **read)
    policy(obs).logprobs[:, 3].sum().backward()
    for key, parameter in policy.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key
    for entry, value in read.items():
        assert value.grad is not None, entry
        assert value.grad.abs().max() > 0, f"{entry} has no effect"


@pytest.mark.parametrize("name", WARPS)
def test_a_warp_learns_a_temperature(name: str) -> None:
    """Cross-entropy against T = 0.5 from the identity, the two-slope warp within its bounds."""
    policy, obs = WARPS[name](8), observe(LOGITS)
    target = torch.softmax(sorted_logits() / 0.5, -1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)

    def divergence() -> Tensor:
        gap = target.clamp_min(1e-300).log() - policy(obs).logprobs[:, :40]
        return (target * gap).sum(-1).mean()

    for _ in range(150):
        optimizer.zero_grad()
        divergence().backward()
        optimizer.step()
    assert divergence() < 5e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sharpness": 0.0}, "sharpness must be in"),
        ({"sharpness": math.inf}, "hard_cut cuts exactly"),
        ({"start_top_p": 1.0}, r"start_top_p must be in \(0, 1\), got 1.0"),
        ({"inputs": ["hidden"]}, "inputs must be among 'hidden' .with hidden_size.* got 'hidden'"),
        ({"inputs": ["condition", "condition"], "condition_size": 2}, "names that differ"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        TemperatureTopP(**arguments)  # type: ignore[arg-type]


def test_a_missing_input_is_named() -> None:
    with pytest.raises(InvalidValue, match=r"observation\.condition must be a tensor"):
        TwoSlopeWarp(inputs=["condition"], condition_size=2)(observe(LOGITS))
