"""A trained policy inside the range of contexts it was trained on, a static rule outside."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asn_policies import LocalTransform, Pipeline
from asn_policies.fallback import Fallback
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.checkpoint import load_policy, read_policy_config, save_policy
from asn_rl.errors import AsnError, CheckpointError, ConfigError, DataError, InvalidValue, UnknownName
from asn_rl.evaluation.context_range import context_limits, outside_share
from asn_rl.ops.context import CONTEXT, context_vector
from asn_rl.ops.sketch import SketchSize, build_sketch
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.testing import check_policy
from asn_rl.types import Observation, Prompt, Trajectories

SIZE = SketchSize(8, 4)
GREEDY = [{"name": "greedy"}]
MIROSTAT = [{"name": "mirostat", "params": {"tau": 2.0}}]
INNER = {"policy": "asn_policies:LocalTransform", "arguments": {"hidden": 8}}
NAMES = [entry.name for entry in CONTEXT]
PROMPTS = [Prompt(f"p{i}", f"w{i}") for i in range(1, 9)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A policy that is far from the base model."""
    policy = LocalTransform(8)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    save_policy(tmp_path / "trained", policy, base_model="toy", fingerprint="toy-1")
    return tmp_path / "trained"


def observation(rows: int = 6, position: float = 3.0) -> Observation:
    sketch, _ = build_sketch(3 * torch.randn(rows, 40, generator=torch.Generator().manual_seed(1)), SIZE)
    ones = torch.ones(rows)
    return Observation(sketch, context_vector(sketch, position * ones, 9 * ones, 2.0 * ones, 6 * ones))


def trajectories(policy: Any, backend: Any, **options: Any) -> Trajectories:
    return rollout(policy, backend, PROMPTS, RolloutConfig(10, 8, 4), num_generations=4, **options)


def test_it_is_shown_what_the_policy_or_the_rule_reads(folder: Path):
    repetition = [{"name": "repetition_penalty", "params": {"penalty": 1.3}}]
    policy = Fallback.around(folder, repetition, {"entropy": [0.0, 0.5]})
    assert "history" in policy.needs
    out = trajectories(policy, ToyBackend.random(vocab=40, seed=0))
    assert len(out) == 32
    assert policy.fallback_share > 0


def test_a_state_of_another_batch_is_named(folder: Path):
    policy, obs = Fallback.around(folder, MIROSTAT, {"entropy": [0.0, 0.5]}), observation()
    with pytest.raises(InvalidValue, match=r"rows of state .* must be 6, as the observation, got 1"):
        policy(obs, policy.initial_state(1, torch.device("cpu")))
    with pytest.raises(InvalidValue, match=r"rows of state '0/mu' must be 6, as the observation, got 4"):
        Pipeline(MIROSTAT)(obs, Pipeline(MIROSTAT).initial_state(4, torch.device("cpu")))


def test_rows_outside_are_the_rules_and_rows_inside_the_trained_policys(folder: Path):
    obs, trained = observation(), load_policy(folder)
    entropies = obs.context[:, NAMES.index("entropy")].sort().values
    policy = Fallback.around(folder, GREEDY, {"entropy": [float(entropies[1]), float(entropies[3])]})
    outside = policy.outside(obs)
    assert outside.sum() == 3
    found = policy(obs).logprobs
    torch.testing.assert_close(found[~outside], trained(obs).logprobs[~outside])
    torch.testing.assert_close(found[outside], Pipeline(GREEDY)(obs).logprobs[outside])
    assert policy.fallback_share == 0.5
    policy.reset_counts()
    assert math.isnan(policy.fallback_share)


def test_not_a_number_is_outside(folder: Path):
    policy, obs = Fallback.around(folder, GREEDY, {"position": [0.0, 24.0]}), observation()
    assert not policy.outside(obs).any()
    obs.context[2, 0] = math.nan
    assert policy.outside(obs).tolist() == [False, False, True, False, False, False]


def test_both_states_are_carried_whoever_answers(folder: Path, toy: ToyBackend):
    limits = {"position": [0.0, 1.0]}  # the first two tokens are the inner policy's
    policy = Fallback.around(folder, MIROSTAT, limits)
    drawn = trajectories(policy, toy, seed=3)
    assert set(policy.initial_state(2, torch.device("cpu")) or {}) == {"rule/0/mu"}
    # Oracle: mirostat's mu by its own formula over the whole completion, and its cut at tokens 3 and later.
    mirostat, start = Pipeline(MIROSTAT), 0
    for length in drawn.lengths.tolist():
        state = mirostat.initial_state(1, torch.device("cpu"))
        for t in range(start, start + length):
            output = mirostat(drawn.per_token(slice(t, t + 1)), state)
            state = output.state
            if t - start >= 2:
                point = int(drawn.points[t])
                expected = output.logprobs[0, point] + drawn.base_logprobs[t]
                expected = expected - drawn.observations.sketch.log_mass[t, point]
                assert float(drawn.behaviour_logprobs[t]) == pytest.approx(float(expected), abs=1e-5)
        start += length
    late = (drawn.lengths - 2).clamp_min(0).sum() / drawn.lengths.sum()
    assert policy.fallback_share == pytest.approx(float(late))


def test_a_nested_fallback_keeps_the_states_apart(folder: Path):
    inner = Fallback.around(folder, MIROSTAT, {"entropy": [0.0, 20.0]})
    nested = Fallback(
        {"policy": "asn_policies.fallback:Fallback", "arguments": inner.arguments}, MIROSTAT, {"position": [0.0, 1.0]}
    )
    state = nested.initial_state(6, torch.device("cpu"))
    assert state is not None
    assert set(state) == {"inner/rule/0/mu", "rule/0/mu"}
    assert set(nested(observation(), state).state or {}) == set(state)


def test_one_folder_holds_all_of_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("asn_policies.Fallback", Fallback, raising=False)
    obs = observation()
    limits = {"entropy": [0.0, float(obs.context[:, NAMES.index("entropy")].median())], "position": [0.0, 4.0]}
    policy = Fallback.around(folder, GREEDY, limits)
    save_policy(tmp_path / "guarded", policy, base_model="toy", fingerprint="toy-1")
    shutil.rmtree(folder)
    loaded = load_policy(tmp_path / "guarded")
    assert isinstance(loaded, Fallback)
    torch.testing.assert_close(loaded(obs).logprobs, policy(obs).logprobs, rtol=0, atol=0)
    assert loaded.fallback_share == policy.fallback_share > 0
    copied = copy.deepcopy(policy)
    torch.testing.assert_close(copied(obs).logprobs, policy(obs).logprobs, rtol=0, atol=0)
    arguments = read_policy_config(tmp_path / "guarded").arguments
    assert arguments["limits"] == limits


def test_it_is_a_policy_and_trains_inside_its_range(folder: Path):
    for rule in (GREEDY, MIROSTAT):
        check_policy(Fallback.around(folder, rule, {"entropy": [1.0, 4.0]}))
    policy, obs = Fallback.around(folder, GREEDY, {"position": [0.0, 24.0]}), observation()
    policy(obs).logprobs[:, 1].sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in policy.parameters())
    fresh = Fallback(INNER, GREEDY, {"position": [0.0, 24.0]})
    torch.testing.assert_close(fresh(obs).logprobs, Pipeline([])(obs).logprobs)


# Limits


def test_the_training_tokens_lie_inside_and_a_longer_budget_outside(toy: ToyBackend, folder: Path):
    trained = load_policy(folder)
    seen = trajectories(trained, toy)
    limits = context_limits(seen)
    assert list(limits) == NAMES
    policy = Fallback.around(folder, GREEDY, limits)
    assert policy.outside(seen.observations).float().mean() <= 2 * 0.001 * len(NAMES)
    assert not policy.outside(observation(position=3.0)).all()
    assert policy.outside(observation(position=200.0)).all()
    fresh = trajectories(trained, toy, seed=9)
    assert policy.outside(fresh.observations).float().mean() < 0.05
    assert outside_share(fresh, limits) == pytest.approx(float(policy.outside(fresh.observations).float().mean()))


def test_limits_are_quantiles_and_a_margin(toy: ToyBackend):
    seen = trajectories(Pipeline([]), toy)
    exact = context_limits(seen, cut=0.0, margin=0.0)
    context = seen.observations.context
    for i, entry in enumerate(CONTEXT):
        assert exact[entry.name] == [float(context[:, i].min()), float(context[:, i].max())]
        low, high = exact[entry.name]
        wider = context_limits(seen, cut=0.0, margin=0.1)[entry.name]
        extra = 0.1 * max(high - low, 0.01 * (entry.high - entry.low))
        assert wider == pytest.approx([max(entry.low, low - extra), min(entry.high, high + extra)])


@settings(deadline=None, max_examples=25)
@given(cut=st.floats(0, 0.49), seed=st.integers(0, 100))
def test_no_entry_leaves_out_more_than_twice_the_cut(cut: float, seed: int):
    seen = trajectories(Pipeline([]), ToyBackend.random(vocab=32, seed=seed))
    limits = context_limits(seen, cut=cut, margin=0.0)
    context = seen.observations.context.double()
    for i, (low, high) in enumerate(limits.values()):
        outside = (context[:, i] < low) | (context[:, i] > high)
        assert outside.double().mean() <= 2 * cut + 1e-12


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({}, InvalidValue, "limits must be at least one"),
        ({"entropi": [0, 1]}, UnknownName, "Did you mean 'entropy'"),
        ({"entropy": [2.0, 1.0]}, InvalidValue, r"limits of 'entropy' must be \[low, high\] within \[0, 20\]"),
        ({"entropy": [0.0, 21.0]}, InvalidValue, r"within \[0, 20\], got \[0.0, 21.0\]"),
        ({"entropy": [0.0]}, InvalidValue, "limits of 'entropy'"),
        ({"entropy": [math.nan, 1.0]}, InvalidValue, "limits of 'entropy'"),
    ],
)
def test_limits_that_cannot_be_used(limits: dict, error: type[AsnError], message: str):
    with pytest.raises(error, match=message):
        Fallback(INNER, GREEDY, limits)


def test_what_cannot_be_wrapped_is_refused(tmp_path: Path, toy: ToyBackend):
    limits = {"entropy": [0.0, 1.0]}
    for inner in ({"policy": "asn_policies:LocalTransform"}, {"policy": "builtins:print", "arguments": {}}):
        with pytest.raises(ConfigError):
            Fallback(inner, GREEDY, limits)
    with pytest.raises(UnknownName, match="Did you mean 'greedy'"):
        Fallback(INNER, [{"name": "gredy"}], limits)
    with pytest.raises(CheckpointError, match="holds no policy"):
        Fallback.around(tmp_path, GREEDY, limits)
    with pytest.raises(InvalidValue, match="cut"):
        context_limits(trajectories(Pipeline([]), toy), cut=0.5)
    with pytest.raises(DataError, match="no tokens"):
        context_limits(trajectories(Pipeline([]), toy).select([]))


def test_on_the_real_model_an_unseen_temperature_of_text_is_noticed(smollm: HFBackend, folder: Path):
    prompts = [Prompt(str(i), f"What is {i} + {i + 3}?") for i in range(6)]
    config = RolloutConfig(max_new_tokens=8)
    calm = rollout(Pipeline(GREEDY), smollm, prompts, config)
    policy = Fallback.around(folder, GREEDY, context_limits(calm))
    policy(calm.per_token())
    assert policy.fallback_share < 0.2
    policy.reset_counts()
    hot = Pipeline([{"name": "temperature", "params": {"temperature": 3.0}}])
    policy(rollout(hot, smollm, prompts, config).per_token())
    assert policy.fallback_share > 0.5
