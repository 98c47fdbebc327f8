"""What every policy promises, whatever its weights: networks with random weights and pipelines of heuristics."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asn_policies import (
    Asked,
    DistributionAwareTransform,
    LocalTransform,
    Pipeline,
    PolicyModule,
    SamplingNetwork,
)
from asn_policies.cost import measure_cost
from asn_policies.fallback import Fallback
from asn_policies.recurrent import RecurrentPolicy
from asn_policies.strategy import SequenceStrategy, TokenStrategy
from asn_policies.token_features import TokenFeatureNetwork
from asn_policies.warp import TemperatureTopP, TwoSlopeWarp
from asn_rl.checkpoint import load_policy
from asn_rl.errors import CheckpointError, InvalidValue
from asn_rl.ops import logprobs
from asn_rl.ops.context import CONTEXT_SIZE, context_vector
from asn_rl.ops.sketch import PointMap, Sketch, SketchSize, build_sketch, expand
from asn_rl.protocols import Policy
from asn_rl.types import Observation

INF = math.inf
SIZE = SketchSize(6, 4)
MODEST = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31 - 1)

NETWORKS: dict[str, Callable[[], PolicyModule]] = {
    "local": lambda: LocalTransform(16),
    "distribution, dynamic": lambda: DistributionAwareTransform(16),
    "distribution, static": lambda: DistributionAwareTransform(16, dynamic=False),
    "attention": lambda: SamplingNetwork(16, 24, 2, 2),
    "attention, scale off": lambda: SamplingNetwork(16, 24, 2, 2, scale=False),
    "two slopes": lambda: TwoSlopeWarp(16),
}
STRATEGIES = [
    {"name": "base"},
    {"name": "greedy", "processors": [{"name": "greedy"}]},
    {"name": "hot", "processors": [{"name": "temperature", "params": {"temperature": 1.73}}]},
]
# Networks that do not start at the base model: next to it, or at a mixture of heuristics.
ELSEWHERE: dict[str, Callable[[], PolicyModule]] = {
    "temperature, soft top-p": lambda: TemperatureTopP(16),
    "temperature, top-p": lambda: TemperatureTopP(16, start_top_p=0.83, hard_cut=True),
    "strategy by token": lambda: TokenStrategy(STRATEGIES, 16, start="base", confident_above=0.9471),
    "strategy by token, context-free": lambda: TokenStrategy(STRATEGIES, context_free=True),
}
# The observations here have an entropy on either side of one nat: some rows are the network's, some the rule's.
GUARDED: dict[str, Callable[[], PolicyModule]] = {
    "asked": lambda: Asked(
        {
            "policy": "asn_policies:OrderStatisticsNetwork",
            "arguments": {"width": 16, "inputs": ["condition"], "condition_size": 1},
        },
        [0.7],
    ),
    "fallback": lambda: Fallback(
        {"policy": "asn_policies:LocalTransform", "arguments": {"hidden": 16}},
        steps(temperature={"temperature": 1.73}),
        {"entropy": [0.0, 1.0]},
    ),
}
# Networks that read more than a sketch and the context.
CONTEXTUAL: dict[str, Callable[[], PolicyModule]] = {
    "token features": lambda: TokenFeatureNetwork(8, 6, ["history", "layer_logprobs"], layer_count=2, token_width=6),
}
STATEFUL: dict[str, Callable[[], PolicyModule]] = {
    "strategy by completion": lambda: SequenceStrategy(STRATEGIES, 16),
    "recurrent": lambda: RecurrentPolicy(8),
}


def steps(**rules: dict[str, float]) -> list[dict[str, object]]:
    return [{"name": name, "params": params} for name, params in rules.items()]


# Odd parameter values, so that no cut falls on a rounding error.
PIPELINES: dict[str, list[dict[str, object]]] = {
    "base": [],
    "greedy": steps(greedy={}),
    "hot": steps(temperature={"temperature": 1.73}),
    "nucleus": steps(temperature={"temperature": 0.71}, top_p={"top_p": 0.8317}),
    "top-k": steps(top_k={"top_k": 3}, temperature={"temperature": 2.1}),
    "min-p": steps(min_p={"min_p": 0.0713, "min_tokens_to_keep": 2}),
    "typical": steps(typical={"mass": 0.6137}),
    "epsilon, eta": steps(epsilon={"epsilon": 0.01337}, eta={"epsilon": 0.0411}),
    "top-n-sigma": steps(top_n_sigma={"n": 0.8731}),
    "top-h": steps(top_h={"alpha": 0.4173}),
    "edt": steps(edt={"temperature": 0.9, "theta": 0.31}),
    "mirostat 1": steps(mirostat={"tau": 1.37, "version": 1}),
    "mirostat 2": steps(temperature={"temperature": 1.2}, mirostat={"tau": 1.37, "eta": 0.3}),
    "repetition penalty": steps(temperature={"temperature": 0.8}, repetition_penalty={"penalty": 1.37}),
    "frequency, presence": steps(frequency_presence={"frequency": 0.73, "presence": -0.31}),
    "layer contrast": steps(layer_contrast={"alpha": 0.0713}),
}
LEARNED = {**NETWORKS, **ELSEWHERE, **GUARDED, **CONTEXTUAL, **STATEFUL}
STATELESS = [*NETWORKS, *ELSEWHERE, *GUARDED, *CONTEXTUAL, *(name for name in PIPELINES if "mirostat" not in name)]
EVERY = [*LEARNED, *PIPELINES]


def make(name: str, seed: int | None = 0) -> PolicyModule:
    """A policy of the lists above; networks get random weights unless `seed` is None."""
    if name in PIPELINES:
        return Pipeline(PIPELINES[name])
    policy = LEARNED[name]()
    return policy if seed is None else randomized(policy, seed)


def randomized(policy: PolicyModule, seed: int, scale: float = 0.15) -> PolicyModule:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


@st.composite
def logit_rows(draw: st.DrawFn) -> Tensor:
    """(3, V) logits in [-8, 8] on a grid of 1/64, with ties and impossible tokens."""
    width = draw(st.integers(1, 24))
    values = st.sampled_from([st.integers(-512, 512), st.integers(-4, 4).map(lambda i: 64 * i)])
    rows = [draw(st.lists(draw(values), min_size=width, max_size=width)) for _ in range(3)]
    logits = torch.tensor(rows) / 64
    banned = draw(st.sets(st.integers(0, width - 1), max_size=width - 1))
    logits[:, sorted(banned)] = -INF
    return logits


def observe(logits: Tensor, size: SketchSize = SIZE, position: float = 3.0) -> tuple[Observation, PointMap]:
    sketch, points = build_sketch(logits, size)
    ones = torch.ones(logits.shape[:-1])
    context = context_vector(sketch, position * ones, 9 * ones, 2.5 * ones, 7 * ones)
    # What is said of a token goes by its point, so that it moves along when tokens are permuted.
    place = torch.arange(size.points).expand_as(sketch.log_mass)
    said = {
        "last_point": torch.full(logits.shape[:-1], -1),
        "history": torch.stack([place % 3, (place % 3 > 0) / (1.0 + place)], -1),
        "layer_logprobs": torch.stack([0.5 * sketch.log_mass.clamp_min(-9) - 1, -0.3 * place], -1),
    }
    return Observation(sketch, context, **said), points


def act(policy: Policy, obs: Observation) -> Tensor:
    """(..., N) log-probabilities after a first step, so that stateful rules have moved."""
    batch = obs.context.shape[0] if obs.context.ndim > 1 else 1
    return policy(obs, policy.initial_state(batch, obs.context.device)).logprobs


def over_vocabulary(policy: Policy, logits: Tensor, size: SketchSize = SIZE) -> Tensor:
    """(..., V) probabilities of the policy, float64."""
    obs, points = observe(logits, size)
    with torch.no_grad():
        logps = act(policy, obs)
    shift = torch.where(obs.sketch.mask, logps - obs.sketch.log_mass, 0.0)
    return torch.softmax(expand(logits, points, shift).double(), -1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", EVERY)
@MODEST
@given(logits=logit_rows(), seed=seeds)
def test_outputs_are_distributions_over_non_empty_points(name: str, logits: Tensor, seed: int) -> None:
    obs, _ = observe(logits)
    logps = act(make(name, seed), obs)
    assert logps.shape == obs.sketch.log_mass.shape
    assert not logps.isnan().any()
    assert (logps[~obs.sketch.mask] == -INF).all()
    assert torch.isfinite(logps).any(-1).all(), "no point survived"
    assert_close(torch.logsumexp(logps, -1), torch.zeros(3))
    impossible = logits == -INF
    assert (over_vocabulary(make(name, seed), logits)[impossible] == 0).all()


@pytest.mark.parametrize("name", EVERY)
@MODEST
@given(logits=logit_rows(), seed=seeds)
def test_permuting_tokens_permutes_probabilities(name: str, logits: Tensor, seed: int) -> None:
    order = torch.randperm(logits.shape[-1], generator=torch.Generator().manual_seed(seed))
    policy = make(name, seed)
    assert_close(over_vocabulary(policy, logits[:, order]), over_vocabulary(policy, logits)[:, order])


@pytest.mark.parametrize("name", EVERY)
@MODEST
@given(logits=logit_rows(), seed=seeds, steps=st.integers(-1280, 1280))
def test_adding_a_constant_changes_nothing(name: str, logits: Tensor, seed: int, steps: int) -> None:
    policy = make(name, seed)
    assert_close(over_vocabulary(policy, logits + steps / 64), over_vocabulary(policy, logits))


@pytest.mark.parametrize("name", EVERY)
@MODEST
@given(logits=logit_rows(), seed=seeds)
def test_equal_logits_get_equal_probabilities(name: str, logits: Tensor, seed: int) -> None:
    for row, probs in zip(logits, over_vocabulary(make(name, seed), logits), strict=True):
        for value in row.unique():
            assert len(probs[row == value].unique()) == 1


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_ties_get_equal_probabilities(name: str) -> None:
    logits = (3 * torch.randn(3, 500, generator=torch.Generator().manual_seed(1))).bfloat16()
    for row, probs in zip(logits, over_vocabulary(make(name), logits, SketchSize()), strict=True):
        for value in row.unique():
            assert len(probs[row == value].unique()) == 1


@pytest.mark.parametrize("name", EVERY)
@MODEST
@given(logits=logit_rows(), seed=seeds, extra=st.integers(1, 20))
def test_padding_the_vocabulary_changes_nothing(name: str, logits: Tensor, seed: int, extra: int) -> None:
    policy = make(name, seed)
    padded = torch.cat([logits, torch.full((3, extra), -INF)], -1)
    probs = over_vocabulary(policy, padded)
    assert_close(probs[:, : logits.shape[-1]], over_vocabulary(policy, logits))
    assert (probs[:, logits.shape[-1] :] == 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_tokens_banned_by_a_huge_negative_logit_yield_no_nan(name: str) -> None:
    """Masks are not always -inf: transformers' and others' fill with the smallest float."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.tensor([[1.0, lowest, 0.5, lowest], [lowest, 2.0, 1.5, 0.0]])
    probs = over_vocabulary(make(name), logits)
    assert not probs.isnan().any()
    assert (probs[logits == lowest] == 0).all()


@pytest.mark.parametrize("name", STATELESS)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_leading_dimensions_are_free(name: str, shape: tuple[int, ...]) -> None:
    logits = 3 * torch.randn(*shape, 40, generator=torch.Generator().manual_seed(4))
    policy = make(name)
    obs, _ = observe(logits)
    flat, _ = observe(logits.reshape(-1, 40))
    logps = policy(obs).logprobs
    assert logps.shape == (*shape, SIZE.points)
    assert_close(logps.reshape(-1, SIZE.points).exp(), policy(flat).logprobs.exp(), 1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_rows_do_not_see_each_other(name: str) -> None:
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(4))
    policy = make(name)
    obs, _ = observe(logits)
    together = act(policy, obs)
    for row in range(5):
        assert_close(act(policy, obs.index(slice(row, row + 1)))[0].exp(), together[row].exp(), 1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_saving_and_loading_changes_nothing(name: str, tmp_path: Path) -> None:
    policy = make(name)
    policy.save_pretrained(tmp_path, base_model="toy", fingerprint="abc", sketch={"head": 6, "tail": 4})
    obs, _ = observe(3 * torch.randn(4, 40, generator=torch.Generator().manual_seed(0)))
    for loaded in (type(policy).from_pretrained(tmp_path, fingerprint="abc"), load_policy(tmp_path)):
        assert type(loaded) is type(policy)
        assert torch.equal(act(loaded, obs), act(policy, obs))  # type: ignore[arg-type]
    assert f"{sum(p.numel() for p in policy.parameters()):,} parameters" in (tmp_path / "README.md").read_text()
    with pytest.raises(CheckpointError, match="fingerprint"):
        type(policy).from_pretrained(tmp_path, fingerprint="other")


def test_a_policy_of_another_class_is_refused(tmp_path: Path) -> None:
    LocalTransform().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="asn_policies:LocalTransform, not a asn_policies:SamplingNetwork"):
        SamplingNetwork.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [*NETWORKS, *CONTEXTUAL, "recurrent", "base"])
def test_a_new_policy_is_the_base_model(name: str, smollm_logits: Tensor) -> None:
    obs, _ = observe(smollm_logits, SketchSize())
    policy = make(name, seed=None)
    assert_close(act(policy, obs), obs.sketch.log_mass)
    if name in NETWORKS:
        shift = policy.shift(obs)[obs.sketch.mask]
        assert len(shift.unique()) == 1, "the shift must be the same for all points, exactly"


@pytest.mark.parametrize(
    ("policy", "count"),
    [
        (LocalTransform(), 213),
        (DistributionAwareTransform(), 5805),
        (DistributionAwareTransform(dynamic=False), 5801),
        (SamplingNetwork(), 38893),
        (SamplingNetwork(scale=False), 38222),
    ],
)
def test_parameter_counts_are_the_published_ones(policy: PolicyModule, count: int) -> None:
    assert sum(parameter.numel() for parameter in policy.parameters()) == count


# Layers whose weights start at 0. What lies before them gets no gradient until they have moved; neither do their
# biases and the gate's offset, which shift all points alike while the gate's slope is 0.
ALIVE_AT_THE_START = {
    "local": {"transform.down.weight", "slope"},
    "distribution, dynamic": {"transform.down.weight", "gate.weight", "gate.bias"},
    "distribution, static": {"transform.down.weight", "static_gate"},
    "attention": {
        "transform.down.weight",
        "gate.down.weight",
        "gate.down.bias",
        "multiplier.down.weight",
        "multiplier.down.bias",
    },
    "attention, scale off": {"transform.down.weight", "gate.down.weight", "gate.down.bias"},
    "two slopes": {"head.weight", "head.bias"},
}


def cross_entropy(policy: PolicyModule, obs: Observation) -> Tensor:
    """A loss that asks for a lower temperature and a cut: cross-entropy against p^2, renormalised."""
    target = logprobs.shifted(obs.sketch.log_mass, obs.sketch.log_mass)
    return -logprobs.expectation(target, policy(obs).logprobs).mean()


def gradients(policy: PolicyModule, obs: Observation) -> dict[str, float]:
    policy.zero_grad()
    cross_entropy(policy, obs).backward()
    norms = {}
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all(), name
        norms[name] = float(parameter.grad.norm())
    return norms


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_alive_at_the_start(name: str) -> None:
    torch.manual_seed(0)
    policy = make(name, seed=None)
    obs, _ = observe(2 * torch.randn(16, 40, generator=torch.Generator().manual_seed(0)))
    first = gradients(policy, obs)
    assert {key for key, norm in first.items() if norm > 1e-5} == ALIVE_AT_THE_START[name]

    for key, parameter in policy.named_parameters():
        if key in ALIVE_AT_THE_START[name]:
            before = policy(obs).logprobs.detach()
            with torch.no_grad():
                parameter -= 1e-3 * parameter.grad / parameter.grad.norm()  # type: ignore[operator]
            assert (policy(obs).logprobs - before)[obs.sketch.mask].abs().max() > 1e-7, key
    assert cross_entropy(policy, obs).detach() < cross_entropy(make(name, seed=None), obs).detach()
    second = gradients(policy, obs)
    assert all(norm > 0 for norm in second.values()), "after one step every parameter must have a gradient"


@pytest.mark.parametrize("name", [*NETWORKS, *ELSEWHERE])
@MODEST
@given(logits=logit_rows(), seed=seeds)
def test_gradients_are_finite_with_empty_points(name: str, logits: Tensor, seed: int) -> None:
    obs, _ = observe(logits)
    assert all(math.isfinite(norm) for norm in gradients(make(name, seed), obs).values())


def test_without_scale_the_multiplier_is_one() -> None:
    """The published code multiplies by softplus(1) = 1.3133 there."""
    policy = SamplingNetwork(16, 24, 2, 2, scale=False)
    randomized(policy, 0)
    for layer in (policy.transform, policy.gate):
        layer.starting_at(0.0)
    obs, _ = observe(3 * torch.randn(4, 40, generator=torch.Generator().manual_seed(0)))
    assert_close(policy(obs).logprobs, obs.sketch.log_mass, 1e-6)


def test_the_multiplier_alone_is_a_temperature() -> None:
    policy = SamplingNetwork()
    assert policy.multiplier is not None
    policy.multiplier.starting_at(math.log(math.expm1(1 / 0.7)))
    obs, _ = observe(3 * torch.randn(4, 40, generator=torch.Generator().manual_seed(0)))
    expected = Pipeline(steps(temperature={"temperature": 0.7}))
    assert_close(policy(obs).logprobs, expected(obs).logprobs)


def test_the_gate_alone_keeps_the_order_of_tokens() -> None:
    """Slope above -ln 2: the gated log-probability still rises with the log-probability."""
    policy = SamplingNetwork()
    with torch.no_grad():
        policy.gate.down.bias.copy_(torch.tensor([-50.0, 0.0]))
    obs, _ = observe(3 * torch.randn(4, 40, generator=torch.Generator().manual_seed(0)), SketchSize(40, 1))
    tokens = policy(obs).logprobs[..., :40].detach()
    assert (tokens[..., 1:] < tokens[..., :-1]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SamplingNetwork(32, heads=5), "heads must be a divisor of width = 32, got 5"),
        (lambda: LocalTransform(1), "SwiGLU hidden must be >= 2, got 1"),
    ],
)
def test_impossible_sizes_are_refused(call: Callable[[], PolicyModule], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        call()


def test_costs_are_stated() -> None:
    cost = LocalTransform().cost(points=96, rows=8)
    assert set(cost) == {"parameters", "flops_per_token", "ms_per_row"}
    assert cost["parameters"] == 213
    assert cost["flops_per_token"] == 2 * 96 * (42 + 42 + 42)  # the weights of the three matrices, once a point
    assert cost["ms_per_row"] > 0
    assert Pipeline(PIPELINES["mirostat 1"]).cost()["flops_per_token"] == 0


def test_costs_of_policies_with_optional_inputs() -> None:
    class Conditioned(LocalTransform):
        needs = frozenset({"hidden", "condition"})
        hidden_size, condition_size = 7, 3

        def shift(self, obs: Observation) -> Tensor:
            assert obs.hidden is not None
            assert obs.condition is not None
            assert obs.context.shape[-1] == CONTEXT_SIZE
            assert obs.hidden.shape == (4, 7)
            assert obs.condition.shape == (4, 3)
            return super().shift(obs)

    policy = Conditioned()
    assert measure_cost(policy, 16, 4)["parameters"] == 213
    del Conditioned.hidden_size
    with pytest.raises(InvalidValue, match="size of input 'hidden' must be known to the policy"):
        measure_cost(policy, 16, 4)


def test_a_sketch_need_not_be_normalised_exactly() -> None:
    """Sketches read back from a file are fp32: policies normalise what they are given."""
    sketch = Sketch(torch.tensor([[-0.1, -3.0, -INF]]), torch.zeros(1, 3), torch.zeros(1, 3))
    obs = Observation(sketch, torch.zeros(1, CONTEXT_SIZE))
    for name in ("base", "hot", "nucleus", "local", "attention"):
        assert_close(torch.logsumexp(make(name)(obs).logprobs, -1), torch.zeros(1))
