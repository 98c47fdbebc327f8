"""What is particular to strategy policies: the mixture, its gradient, and the marginal of a whole completion."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from asn_policies import Pipeline
from asn_policies.strategy import SequenceStrategy, TokenStrategy, at_points, mixture
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import CheckpointError, ConfigError, InvalidValue, UnknownName
from asn_rl.ops.advantages import group_advantages
from asn_rl.ops.context import context_vector
from asn_rl.ops.sketch import SketchSize, build_sketch
from asn_rl.replay import replay
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Observation, Prompt, Trajectories
from asn_rl.unroll import unroll


def step(name: str, **params: float) -> dict[str, object]:
    return {"name": name, "params": params}


GREEDY = {"name": "greedy", "processors": [step("greedy")]}
BASE = {"name": "T=1"}
HOT = {"name": "hot", "processors": [step("temperature", temperature=1.7)]}
CUT = {"name": "cut", "processors": [step("top_k", top_k=2), step("temperature", temperature=0.8)]}
MIROSTAT = {"name": "mirostat", "processors": [step("mirostat", tau=1.2, eta=0.4)]}
FOUR = [GREEDY, BASE, HOT, CUT]
Gated = TypeVar("Gated", TokenStrategy, SequenceStrategy)
LOGITS = torch.linspace(0.5, 5, 6)[:, None] * torch.randn(6, 30, generator=torch.Generator().manual_seed(3))
TOY = ToyBackend.random(vocab=4, seed=1, scale=1.0)
WORDS = [Prompt(f"p{i}", f"w{i}") for i in range(1, 4)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Networks draw their first weights from the global state."""
    torch.manual_seed(0)


def observe(logits: Tensor = LOGITS, size: SketchSize | None = None, position: float = 3.0) -> Observation:
    """By default every token is a point of its own."""
    sketch, _ = build_sketch(logits, size or SketchSize(logits.shape[-1], 1))
    ones = torch.ones(logits.shape[:-1])
    return Observation(sketch, context_vector(sketch, position * ones, 9 * ones, 2.5 * ones, 7 * ones))


def moved(policy: Gated, seed: int = 0, scale: float = 0.6) -> Gated:
    """The policy with random weights, whose gate differs from row to row."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


def four_rules(logits: Tensor) -> Tensor:
    """(..., 4, V) float64 probabilities of `FOUR` over the vocabulary, each by its definition."""
    x = logits.double()
    ranks = x.argsort(-1, descending=True).argsort(-1)
    cut = torch.softmax(torch.where(ranks < 2, x, -math.inf) / 0.8, -1)
    return torch.stack([(ranks == 0).double(), torch.softmax(x, -1), torch.softmax(x / 1.7, -1), cut], -2)


# The mixture and its gradient


def test_the_answer_is_the_mixture_over_the_vocabulary() -> None:
    policy, obs = moved(TokenStrategy(FOUR, 8)), observe()
    gate = policy.gate_probabilities(obs).detach().double()
    assert (gate.amax(0) - gate.amin(0)).max() > 0.05, "the gate does not read its context"
    expected = (gate.unsqueeze(-1) * four_rules(LOGITS.sort(-1, descending=True).values)).sum(-2)
    torch.testing.assert_close(policy(obs).logprobs[:, :30].double().exp(), expected, rtol=0, atol=1e-6)


def test_the_gradient_to_the_gate_is_posterior_minus_gate() -> None:
    """Zero, up to rounding, where the strategies agree on the token."""
    logits = torch.cat([LOGITS, torch.tensor([[60.0, *[0.0] * 29]])])
    policy, obs = moved(TokenStrategy(FOUR, 8)), observe(logits)
    points = torch.tensor([0, 1, 0, 4, 2, 1, 0])
    gate = policy.gate_logprobs(obs).detach().requires_grad_()
    answers, _ = policy.strategy_logprobs(obs)
    mixture(torch.log_softmax(gate, -1), answers).gather(-1, points[:, None]).sum().backward()
    expected = policy.posterior(obs, points) - policy.gate_probabilities(obs)
    assert gate.grad is not None
    torch.testing.assert_close(gate.grad, expected.detach(), rtol=0, atol=1e-6)
    assert gate.grad[:6].abs().amax(-1).min() > 1e-3
    assert gate.grad[6].abs().max() < 1e-6


def test_a_strategy_drawn_from_the_posterior_has_the_law_of_one_drawn_first() -> None:
    """sum_y pi(y) posterior(a | y) = gate(a), and pi(y) posterior(a | y) = gate(a) pi_a(y)."""
    policy, obs = moved(TokenStrategy(FOUR, 8)), observe()
    answers, _ = policy.strategy_logprobs(obs)
    gate = policy.gate_probabilities(obs)
    for point in range(30):
        points = torch.full((6,), point)
        joint = policy(obs).logprobs.gather(-1, points[:, None]).exp() * policy.posterior(obs, points)
        torch.testing.assert_close(joint, gate * at_points(answers, points).exp(), rtol=0, atol=1e-6)


def test_points_without_mass_pass_no_gradient() -> None:
    gate = torch.zeros(1, 2, requires_grad=True)
    parts = torch.log(torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]]))
    found = mixture(torch.log_softmax(gate, -1), parts)
    torch.testing.assert_close(found.exp(), torch.tensor([[0.75, 0.25, 0.0]]))
    found[0, :2].sum().backward()
    assert gate.grad is not None
    assert torch.isfinite(gate.grad).all()


# Options of the token gate


def test_the_start_is_equal_shares_or_a_preferred_strategy() -> None:
    obs = observe()
    torch.testing.assert_close(TokenStrategy(FOUR)(obs).logprobs.exp()[:, :30], four_sorted().mean(-2).float())
    gate = TokenStrategy(FOUR, start="hot", start_share=0.7).gate_probabilities(obs)
    torch.testing.assert_close(gate, torch.tensor([0.1, 0.1, 0.7, 0.1]).expand(6, 4))
    torch.testing.assert_close(TokenStrategy([BASE], start="T=1")(obs).logprobs, obs.sketch.log_mass)


def four_sorted() -> Tensor:
    return four_rules(LOGITS.sort(-1, descending=True).values)


def test_where_the_base_model_is_confident_the_gate_stays_at_its_start() -> None:
    logits = torch.cat([LOGITS, 12 * LOGITS])
    obs = observe(logits)
    top = torch.softmax(logits, -1).amax(-1)
    policy = moved(TokenStrategy(FOUR, 8, start="T=1", confident_above=0.8))
    free = TokenStrategy(FOUR, 8, start="T=1")
    free.load_state_dict(policy.state_dict())
    gate, confident = policy.gate_probabilities(obs), top > 0.8
    assert 0 < confident.sum() < len(top)
    start = TokenStrategy(FOUR, start="T=1").gate_probabilities(obs)
    torch.testing.assert_close(gate[confident], start[confident])
    torch.testing.assert_close(gate[~confident], free.gate_probabilities(obs)[~confident])
    policy.gate_logprobs(obs)[confident][:, 0].sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in policy.parameters())


def test_a_context_free_gate_is_one_vector() -> None:
    policy = moved(TokenStrategy(FOUR, context_free=True))
    assert [tuple(p.shape) for p in policy.parameters()] == [(4,)]
    gate = policy.gate_probabilities(observe())
    assert len(gate.unique(dim=0)) == 1
    policy(observe()).logprobs[:, 1].sum().backward()
    assert policy.gate.logits.grad is not None
    assert policy.gate.logits.grad.abs().max() > 0


def test_argmax_is_the_likeliest_strategy_alone() -> None:
    obs = observe()
    soft = moved(TokenStrategy(FOUR, 8), scale=1.0)
    hard = TokenStrategy(FOUR, 8, argmax=True)
    hard.load_state_dict(soft.state_dict())
    chosen = soft.gate_probabilities(obs).argmax(-1)
    expected = four_sorted()[torch.arange(6), chosen]
    torch.testing.assert_close(hard(obs).logprobs.exp()[:, :30].double(), expected, rtol=0, atol=1e-6)


def test_the_budget_moves_the_gate() -> None:
    """Tokens left are an entry of the context; a trained gate uses them."""
    policy = TokenStrategy([GREEDY, HOT], 16)
    obs = observe(LOGITS.repeat(2, 1))
    left = torch.tensor([1.0] * 6 + [5.0] * 6)
    context = obs.context.clone()
    context[:, 1] = left
    obs = replace(obs, context=context)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    for _ in range(60):
        gate = policy.gate_logprobs(obs)
        loss = -torch.where(left > 2, gate[:, 0], gate[:, 1]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gate = policy.gate_probabilities(obs)
    assert gate[:6, 1].min() > 0.9
    assert gate[6:, 0].min() > 0.9


def test_optional_inputs_reach_the_gate() -> None:
    policy = moved(TokenStrategy(FOUR, 8, ["hidden", "prompt_embedding", "condition"], 5, 1, 3))
    read = {"hidden": torch.randn(6, 5), "prompt_embedding": torch.randn(6, 5), "condition": torch.randn(6, 1)}
    leaves = {name: value.requires_grad_() for name, value in read.items()}
    policy(replace(observe(), **leaves)).logprobs[:, 2].sum().backward()
    for name, value in leaves.items():
        assert value.grad is not None
        assert value.grad.abs().max() > 0, name


# A whole completion


def completions(length: int) -> list[tuple[int, ...]]:
    """Every completion of the toy within a budget: ended by token 0, or cut."""
    words = range(1, TOY.vocab_size)
    cut = list(itertools.product(words, repeat=length))
    return cut + [(*head, 0) for n in range(length) for head in itertools.product(words, repeat=n)]


def log_probability(
    policy: Pipeline | SequenceStrategy, prompt: Prompt, ids: tuple[int, ...], condition: Tensor
) -> Tensor:
    config = RolloutConfig(max_new_tokens=3, head=4, tail=1)
    out, _ = replay(policy, TOY, [prompt], [list(ids)], config, conditions=condition)
    return out.behaviour_logprobs.double().sum()


@pytest.mark.parametrize("strategies", [FOUR, [GREEDY, CUT], [HOT, MIROSTAT, GREEDY]])
def test_the_product_over_a_completion_is_the_mixture_of_products(strategies: list[dict[str, object]]) -> None:
    """By enumeration: prod_t pi(y_t | y_<t) = sum_a gate_a prod_t pi_a(y_t | y_<t), and all of them sum to one."""
    policy = moved(SequenceStrategy(strategies, 8, ["condition"], condition_size=1), scale=1.0)
    condition = torch.tensor([[2.0]])
    gate = policy.gate_probabilities(replace(observe(TOY.table[:1]), condition=condition))[0].detach().double()
    assert gate.max() - gate.min() > 0.05
    pipelines = [Pipeline(strategy.get("processors", [])) for strategy in strategies]  # type: ignore[arg-type]
    total = 0.0
    for ids in completions(3):
        found = log_probability(policy, WORDS[0], ids, condition).exp().item()
        parts = torch.stack([log_probability(rule, WORDS[0], ids, condition).exp() for rule in pipelines])
        assert found == pytest.approx((gate * parts).sum().item(), abs=1e-6)
        total += found
    assert total == pytest.approx(1.0, abs=1e-5)


def test_a_rollout_replays_and_its_gradient_is_the_posterior_of_the_whole_text() -> None:
    policy = moved(SequenceStrategy(FOUR[1:], 8, ["condition"], condition_size=2))
    conditions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    config = RolloutConfig(max_new_tokens=6, head=4, tail=1)
    out = rollout(policy, TOY, WORDS, config, num_generations=5, seed=2, conditions=conditions)
    assert len(out.lengths.unique()) > 1, "rows must leave at different steps"
    logprobs = unroll(policy, out, torch.arange(len(out.points))).logprobs
    own = logprobs.gather(-1, out.points[:, None]).squeeze(-1)
    torch.testing.assert_close(own.detach(), out.behaviour_logprobs, rtol=0, atol=1e-5)

    obs = out.per_token()
    parts = at_points(policy.strategy_logprobs(obs)[0], out.points)
    whole = torch.zeros(len(out), 3).index_add(0, out.rows, parts)
    starts = out.lengths.cumsum(0) - out.lengths
    first = out.per_token(starts)
    gate = policy.gate_logprobs(first)
    summed = torch.zeros(len(out)).index_add(0, out.rows, own)
    torch.testing.assert_close(summed, torch.logsumexp(gate + whole, -1), rtol=0, atol=1e-5)
    policy.zero_grad()
    summed.sum().backward()
    assert policy.gate.logits.grad is not None
    expected = (torch.softmax(gate + whole, -1) - gate.exp()).sum(0).detach()
    torch.testing.assert_close(policy.gate.logits.grad, expected, rtol=0, atol=1e-4)


def test_text_that_no_strategy_could_have_drawn_has_probability_zero_and_no_nan() -> None:
    policy = moved(SequenceStrategy([GREEDY, CUT], 8))
    base = rollout(Pipeline([]), TOY, WORDS, RolloutConfig(6, 4, 1), num_generations=8, capture=["last_point"])
    logprobs = unroll(policy, base, torch.arange(len(base.points))).logprobs
    own = logprobs.gather(-1, base.points[:, None]).squeeze(-1)
    assert (own == -math.inf).any()
    assert not logprobs.isnan().any()
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(len(logprobs)))
    own[own > -math.inf].sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in policy.parameters())


def test_a_sequence_gate_without_inputs_is_the_control_and_argmax_is_one_heuristic() -> None:
    policy = moved(SequenceStrategy(FOUR), scale=1.0)
    assert [tuple(p.shape) for p in policy.parameters()] == [(4,)]
    alone = SequenceStrategy(FOUR, argmax=True)
    alone.load_state_dict(policy.state_dict())
    best = FOUR[int(policy.gate.logits.argmax())]
    config = RolloutConfig(6, 4, 1)
    ours = rollout(alone, TOY, WORDS, config, num_generations=3)
    theirs = rollout(Pipeline(best.get("processors", [])), TOY, WORDS, config, num_generations=3)  # type: ignore[arg-type]
    assert ours.completion_ids == theirs.completion_ids


@pytest.mark.parametrize("cls", [TokenStrategy, SequenceStrategy])
def test_the_marginal_gradient_finds_opposite_strategies_for_two_kinds_of_prompts(
    cls: type[TokenStrategy] | type[SequenceStrategy],
) -> None:
    """The first prompts reward the most probable word, the others any other one: no single strategy does both."""
    backend, prompts = ToyBackend.random(vocab=16, seed=3), [Prompt(f"p{i}", f"w{i}") for i in range(1, 9)]
    policy = cls([GREEDY, HOT], 16, inputs=["prompt_embedding"], hidden_size=16)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)

    def draw(seed: int) -> tuple[Trajectories, Tensor]:
        out = rollout(policy, backend, prompts, RolloutConfig(6, 16, 1), num_generations=8, seed=seed)
        likeliest = torch.bincount(out.rows, (out.points == 0).double(), minlength=len(out)) / out.lengths
        return out, torch.where(torch.arange(len(out)) < len(out) // 2, likeliest, 1 - likeliest)

    for step in range(50):
        out, rewards = draw(step)
        advantages = group_advantages(rewards.reshape(8, 8)).flatten().float()
        own = unroll(policy, out, torch.arange(len(out.points))).logprobs.gather(-1, out.points[:, None]).squeeze(-1)
        optimizer.zero_grad()
        (-advantages[out.rows] * own).mean().backward()
        optimizer.step()
    out, _ = draw(99)
    gate = policy.gate_probabilities(out.per_token(out.lengths.cumsum(0) - out.lengths))
    assert gate[: len(out) // 2, 0].mean() > 0.8
    assert gate[len(out) // 2 :, 1].mean() > 0.8


def test_on_the_real_model_a_completion_has_its_marginal_probability(smollm: HFBackend) -> None:
    prompts = [Prompt("a", "Name an animal."), Prompt("b", "What is 3 + 4?")]
    policy = moved(SequenceStrategy([BASE, CUT], 8, ["prompt_embedding"], hidden_size=smollm.hidden_size), scale=0.3)
    out = rollout(policy, smollm, prompts, RolloutConfig(max_new_tokens=5), num_generations=2, seed=1)
    parts = at_points(policy.strategy_logprobs(out.per_token())[0], out.points)
    inner = out.base_logprobs - out.observations.sketch.log_mass.gather(-1, out.points[:, None]).squeeze(-1)
    whole = torch.zeros(len(out), 2).index_add(0, out.rows, parts + inner[:, None])
    gate = policy.gate_logprobs(out.per_token(out.lengths.cumsum(0) - out.lengths))
    found = torch.zeros(len(out)).index_add(0, out.rows, out.behaviour_logprobs)
    torch.testing.assert_close(found, torch.logsumexp(gate + whole, -1).detach(), rtol=0, atol=1e-4)
    assert not torch.equal(gate[0], gate[-1]), "the gate must tell the prompts apart"


# State, saving, bad input


def test_state_of_a_heuristic_is_carried_along() -> None:
    """A token gate over mirostat: the state is that of mirostat alone on the same tokens."""
    policy = moved(TokenStrategy([BASE, MIROSTAT], 8))
    out = rollout(policy, TOY, WORDS, RolloutConfig(6, 4, 1), num_generations=4, seed=5)
    assert len(out.lengths.unique()) > 1
    everything = torch.arange(len(out.points))
    answers = unroll(policy, out, everything).logprobs
    own = answers.gather(-1, out.points[:, None]).squeeze(-1)
    torch.testing.assert_close(own.detach(), out.behaviour_logprobs, rtol=0, atol=1e-5)
    alone = unroll(Pipeline(MIROSTAT["processors"]), out, everything).logprobs  # type: ignore[arg-type]
    both = torch.stack([out.observations.sketch.log_mass, alone], -2)
    expected = mixture(policy.gate_logprobs(out.per_token()), both)
    torch.testing.assert_close(answers.exp(), expected.exp(), rtol=0, atol=1e-6)


def test_what_a_heuristic_reads_is_captured_for_it() -> None:
    penalty = {"name": "penalty", "processors": [step("repetition_penalty", penalty=1.7)]}
    policy = moved(TokenStrategy([BASE, penalty], 8))
    assert "history" in policy.needs
    out = rollout(policy, TOY, WORDS, RolloutConfig(6, 4, 1), num_generations=2)
    own = policy(out.per_token()).logprobs.gather(-1, out.points[:, None]).squeeze(-1)
    torch.testing.assert_close(own.detach(), out.behaviour_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", [TokenStrategy, SequenceStrategy])
def test_a_state_of_the_wrong_batch_is_refused(cls: type[TokenStrategy] | type[SequenceStrategy]) -> None:
    policy = cls([BASE, MIROSTAT])
    obs = replace(observe(), last_point=torch.full((6,), -1))
    with pytest.raises(InvalidValue, match=r"rows of state .* must be 6, as the observation, got 4"):
        policy(obs, policy.initial_state(4, torch.device("cpu")))
    with pytest.raises(InvalidValue, match="initial_state"):
        policy(obs)


def test_a_sequence_gate_names_the_input_it_misses() -> None:
    policy = SequenceStrategy(FOUR)
    with pytest.raises(InvalidValue, match=r"observation\.last_point must be a tensor"):
        policy(observe(), policy.initial_state(6, torch.device("cpu")))


@pytest.mark.parametrize(
    "other",
    [
        [GREEDY, BASE, HOT, {**CUT, "name": "renamed"}],
        [GREEDY, BASE, HOT, {**CUT, "processors": [step("top_k", top_k=3)]}],
        [BASE, GREEDY, HOT, CUT],
        [GREEDY, BASE],
    ],
    ids=["name", "processors", "order", "number"],
)
def test_a_gate_of_other_strategies_is_refused(other: list[dict[str, object]], tmp_path: Path) -> None:
    policy = TokenStrategy(FOUR, 8)
    with pytest.raises(CheckpointError, match=r"the gate was trained for the strategies greedy .* train a new gate"):
        TokenStrategy(other, 8).load_state_dict(policy.state_dict())
    policy.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["arguments"]["strategies"] = other
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the gate was trained for the strategies"):
        TokenStrategy.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", [TokenStrategy, SequenceStrategy])
@pytest.mark.parametrize(
    ("strategies", "error", "message"),
    [
        ([], InvalidValue, r"strategies must be at least one \{name, processors\}, got \[\]"),
        ([BASE, {**GREEDY, "name": "T=1"}], InvalidValue, "strategies must be names that differ, got"),
        ([{"processors": []}], ConfigError, "with a text as its name"),
        ([{"name": "a", "weight": 2}], ConfigError, "a strategy is {name, processors}"),
        ([{"name": "a", "processors": [{"name": "top_q"}]}], UnknownName, "unknown heuristic 'top_q'"),
    ],
)
def test_bad_lists_are_refused(
    cls: type[TokenStrategy] | type[SequenceStrategy],
    strategies: list[dict[str, object]],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        cls(strategies)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": "cold"}, r"start must be one of the strategies \['greedy', 'T=1', 'hot', 'cut'\], got 'cold'"),
        ({"start": "hot", "start_share": 1.0}, "never get a gradient"),
        ({"confident_above": 1.0}, r"confident_above must be in \(0, 1\)"),
        ({"context_free": True, "inputs": ["condition"], "condition_size": 1}, "reads nothing"),
        ({"inputs": ["hidden"]}, "inputs must be among"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        TokenStrategy(FOUR, **arguments)  # type: ignore[arg-type]


def test_a_sequence_gate_may_not_read_what_changes() -> None:
    with pytest.raises(InvalidValue, match=r"inputs must be among 'prompt_embedding' .* got 'hidden'"):
        SequenceStrategy(FOUR, inputs=["hidden"], hidden_size=4)
