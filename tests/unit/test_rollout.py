"""Rollouts and replays on the toy backend, where every distribution is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asn_policies import LocalTransform, Pipeline
from asn_rl.backends.toy import ToyBackend, ToySession
from asn_rl.errors import DataError, InvalidLogits, InvalidPolicyOutput, InvalidValue
from asn_rl.ops.context import CONTEXT, CONTEXT_SIZE
from asn_rl.ops.sketch import build_sketch, expand, points_of
from asn_rl.protocols import Policy
from asn_rl.replay import replay
from asn_rl.rollout import RolloutConfig, concatenate, rollout, uniform_stream
from asn_rl.types import Observation, PolicyOutput, Prompt, State, Trajectories

CONFIG = RolloutConfig(max_new_tokens=7, head=5, tail=6)
PROMPTS = [Prompt("a", "w1"), Prompt("b", "w2 w3"), Prompt("c", "w4")]


def pipeline(**rules: dict[str, Any]) -> Pipeline:
    return Pipeline([{"name": name, "params": params} for name, params in rules.items()])


def learned() -> LocalTransform:
    """A network that is far from the base model."""
    torch.manual_seed(0)
    policy = LocalTransform(8)
    for parameter in policy.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return policy


POLICIES: dict[str, Callable[[], Policy]] = {
    "base": lambda: Pipeline([]),
    "nucleus": lambda: pipeline(temperature={"temperature": 1.3}, top_p={"top_p": 0.93}),
    "learned": learned,
}
MIROSTAT = {"temperature": {"temperature": 1.4}, "mirostat": {"tau": 2.0, "eta": 1.0}}


def ending_toy(vocab: int = 32, end_logit: float = 2.5) -> ToyBackend:
    """Ends after a few tokens, at different times."""
    backend = ToyBackend.random(vocab, seed=3)
    backend.table[:, 0] = end_logit
    return backend


class Shuffling(ToyBackend):
    """Hands the remaining rows back in descending order, as a backend may."""

    def start(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        repeats: int = 1,
        hidden: bool = False,
        layers: Sequence[int] = (),
    ) -> ToySession:
        last = torch.tensor([ids[-1] for ids in prompt_ids])
        return ShufflingSession(self, last.repeat_interleave(repeats), hidden)


class ShufflingSession(ToySession):
    def drop(self, finished: Tensor) -> Tensor:
        kept = super().drop(finished)
        turned = torch.arange(len(kept) - 1, -1, -1)
        self.logits = self.logits[turned]
        self.hidden = None if self.hidden is None else self.hidden[turned]
        return kept[turned]


def exact(policy: Policy, logits: Tensor, obs: Observation, config: RolloutConfig = CONFIG) -> Tensor:
    """(S, V) log-probabilities of a stateless policy over the vocabulary, by enumeration."""
    sketch, point_map = build_sketch(logits, config.size)
    shift = policy(obs).logprobs - sketch.log_mass
    return expand(logits, point_map, torch.where(sketch.mask, shift, 0.0)).log_softmax(-1)


def visited(run: Trajectories, backend: ToyBackend) -> tuple[Tensor, Tensor]:
    """(S, V) logits every token was drawn from, and (S, 1) the tokens."""
    pairs = list(zip(run.prompt_ids, run.completion_ids, strict=True))
    before = [token for prompt, ids in pairs for token in (prompt[-1], *ids[:-1])]
    return backend.table[before], torch.tensor([token for _, ids in pairs for token in ids]).unsqueeze(-1)


def assert_same(left: Trajectories, right: Trajectories, atol: float = 0.0) -> None:
    """Bit for bit, unless `atol` allows for rounding."""
    assert left.prompts == right.prompts
    assert (left.sample, left.prompt_ids) == (right.sample, right.prompt_ids)
    assert (left.completion_ids, left.completions) == (right.completion_ids, right.completions)
    for name in ("terminated", "points", "behaviour_logprobs", "base_logprobs"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name), atol=atol, rtol=0)
    torch.testing.assert_close(left.observations.context, right.observations.context, atol=atol, rtol=0)
    torch.testing.assert_close(left.observations.sketch.log_mass, right.observations.sketch.log_mass, atol=atol, rtol=0)
    assert left.extras.keys() == right.extras.keys()
    assert all(torch.equal(left.extras[name], right.extras[name]) for name in left.extras)


# What is drawn, and what is recorded


@pytest.mark.parametrize("name", POLICIES)
def test_frequencies_agree_with_the_exact_distribution(name: str):
    policy, backend = POLICIES[name](), ToyBackend.random(8, seed=5, scale=1.0)
    config = RolloutConfig(max_new_tokens=2, head=3, tail=4, max_batch=1 << 20)
    count = 6000
    run = rollout(policy, backend, [Prompt("a", "w1")], config, num_generations=count, seed=11)

    sketch, _ = build_sketch(backend.table, config.size)
    steps = exact(policy, backend.table, Observation(sketch, torch.zeros(8, CONTEXT_SIZE)), config).exp()
    expected = steps[1].unsqueeze(1) * steps  # (first, second) token after w1
    expected[0] = torch.where(torch.arange(8) == 0, steps[1, 0], 0.0)  # the first token ended the sequence
    observed = torch.zeros(8, 8)
    for ids in run.completion_ids:
        observed[ids[0], ids[-1] if len(ids) > 1 else 0] += 1

    assert observed[expected == 0].sum() == 0
    often = expected * count >= 5
    deviation = (observed - count * expected)[often].square() / (count * expected[often])
    freedom = int(often.sum()) - 1
    # Chi-square: mean = freedom, variance = 2 freedom; five deviations are one seed in a million.
    assert deviation.sum() < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", POLICIES)
def test_the_recorded_logprob_is_that_of_the_distribution_drawn_from(name: str):
    policy, backend = POLICIES[name](), ending_toy()
    run = rollout(policy, backend, PROMPTS, CONFIG, num_generations=40)
    logits, tokens = visited(run, backend)
    with torch.no_grad():
        enumerated = exact(policy, logits, run.per_token())
    torch.testing.assert_close(enumerated.exp().sum(-1), torch.ones(len(tokens)))
    torch.testing.assert_close(run.behaviour_logprobs, enumerated.gather(-1, tokens).squeeze(-1), atol=1e-5, rtol=0)


def test_the_recorded_points_and_base_logprobs_belong_to_the_tokens():
    backend = ending_toy()
    run = rollout(learned(), backend, PROMPTS, CONFIG, num_generations=40)
    logits, tokens = visited(run, backend)
    sketch, point_map = build_sketch(logits, CONFIG.size)
    assert torch.equal(run.points, points_of(logits, tokens, point_map).squeeze(-1))
    assert len(set(run.points.tolist())) > CONFIG.head, "tail points are drawn too"
    base = logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)
    torch.testing.assert_close(run.base_logprobs, base, atol=1e-5, rtol=0)
    assert torch.equal(run.observations.sketch.log_mass, sketch.log_mass)


def test_groups_are_adjacent_and_numbered():
    run = rollout(Pipeline([]), ending_toy(), PROMPTS, CONFIG, num_generations=2)
    assert [prompt.id for prompt in run.prompts] == ["a", "a", "b", "b", "c", "c"]
    assert run.sample == [0, 1, 0, 1, 0, 1]
    assert run.prompt_ids == [[1], [1], [2, 3], [2, 3], [4], [4]]


def test_an_end_of_sequence_token_terminates_and_the_limit_truncates():
    table = torch.full((4, 4), -math.inf)
    table[1, 2] = table[2, 0] = table[3, 3] = 0.0  # w1 -> w2 -> end; w3 -> w3 for ever
    run = rollout(Pipeline([]), ToyBackend(table), [Prompt("ends", "w1"), Prompt("goes on", "w3")], CONFIG)
    assert run.completion_ids == [[2, 0], [3] * CONFIG.max_new_tokens]
    assert run.terminated.tolist() == [True, False]
    assert run.completions == ["w2", " ".join(["w3"] * CONFIG.max_new_tokens)]
    assert run.lengths.tolist() == [2, CONFIG.max_new_tokens]
    assert run.rows.tolist() == [0] * 2 + [1] * CONFIG.max_new_tokens


def test_an_end_on_the_last_token_of_the_budget_terminates():
    table = torch.full((3, 3), -math.inf)
    table[1, 2] = table[2, 0] = 0.0
    run = rollout(Pipeline([]), ToyBackend(table), [Prompt("p", "w1")], replace(CONFIG, max_new_tokens=2))
    assert run.terminated.tolist() == [True]


# Reproducibility


def test_every_completion_has_draws_of_its_own():
    keys = [(seed, prompt, sample) for seed in (0, 1) for prompt in ("a", "b") for sample in (0, 1)]
    streams = {tuple(uniform_stream(*key, 3).flatten().tolist()) for key in keys}
    assert len(streams) == len(keys)
    twins = [Prompt("a", "w1"), Prompt("b", "w1")]
    run = rollout(Pipeline([]), ending_toy(), twins, CONFIG, num_generations=4)
    assert run.completion_ids[:4] != run.completion_ids[4:]


@pytest.mark.parametrize("policy", [learned(), pipeline(**MIROSTAT)])
def test_the_same_seed_repeats_bit_for_bit_and_another_one_differs(policy: Policy):
    runs = [rollout(policy, ending_toy(), PROMPTS, CONFIG, num_generations=5, seed=seed) for seed in (7, 7, 8)]
    assert_same(runs[0], runs[1])
    assert runs[0].completion_ids != runs[2].completion_ids


@pytest.mark.parametrize("policy", [learned(), pipeline(**MIROSTAT)])
@pytest.mark.parametrize("max_batch", [1, 4, 8])
def test_completions_do_not_depend_on_the_batch_size(policy: Policy, max_batch: int):
    whole = rollout(policy, ending_toy(), PROMPTS, CONFIG, num_generations=4)
    split = rollout(policy, ending_toy(), PROMPTS, replace(CONFIG, max_batch=max_batch), num_generations=4)
    assert_same(whole, split)


def test_completions_do_not_depend_on_the_other_prompts():
    policy, backend = pipeline(**MIROSTAT), ending_toy()
    together = rollout(policy, backend, PROMPTS, CONFIG, num_generations=4)
    alone = [rollout(policy, backend, [prompt], CONFIG, num_generations=4) for prompt in reversed(PROMPTS)]
    assert_same(together, concatenate(alone[::-1]))


def test_a_completion_does_not_depend_on_how_many_its_prompt_has():
    many = rollout(learned(), ending_toy(), PROMPTS, CONFIG, num_generations=6)
    few = rollout(learned(), ending_toy(), PROMPTS, CONFIG, num_generations=2)
    assert_same(many.select([i for i, sample in enumerate(many.sample) if sample < 2]), few)


def test_a_larger_budget_continues_the_same_completions():
    backend = ending_toy()
    long = rollout(Pipeline([]), backend, PROMPTS, CONFIG, num_generations=4)
    short = rollout(Pipeline([]), backend, PROMPTS, replace(CONFIG, max_new_tokens=3), num_generations=4)
    assert short.completion_ids == [ids[:3] for ids in long.completion_ids]


def test_the_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    rollout(learned(), ending_toy(), PROMPTS, CONFIG)
    assert torch.equal(before, torch.get_rng_state())


# What the policy sees


def test_the_context_is_as_documented_step_by_step():
    backend, budget = ToyBackend.random(6, seed=1), 5
    backend.table[:, 0] = -9.0
    config = RolloutConfig(budget, head=6, tail=1)  # every token is a point: all entries are exact
    run = rollout(Pipeline([]), backend, [Prompt("p", "w1")], config, seed=2)
    (ids,) = run.completion_ids
    assert len(ids) == budget
    surprises: list[float] = []
    for t, (before, token) in enumerate(zip([1, *ids], ids, strict=False)):
        p = torch.softmax(backend.table[before].double(), -1).numpy()
        surprise = -np.log(p)
        entropy = float((p * surprise).sum())
        expected = {
            "position": math.log2(1 + t),
            "tokens_left": math.log2(1 + budget - t),
            "entropy": entropy,
            "varentropy": float((p * (surprise - entropy) ** 2).sum()),
            "max_logprob": float(np.log(p.max())),
            "effective_support": float(-np.log((p**2).sum())),
            "last_surprise": surprises[-1] if surprises else 0.0,
            "mean_surprise": float(np.mean(surprises)) if surprises else 0.0,
        }
        assert list(expected) == [entry.name for entry in CONTEXT]
        found = run.observations.context[t].double()
        torch.testing.assert_close(found, torch.tensor(list(expected.values()), dtype=torch.double), atol=2e-5, rtol=0)
        surprises.append(float(surprise[token]))


class Witness:
    """Fails as soon as a row's state, condition, embedding or position is another row's."""

    needs = frozenset({"condition", "hidden", "prompt_embedding"})

    def __init__(self, last_tokens: Sequence[int]) -> None:
        self.last_tokens = torch.tensor(last_tokens)
        self.batches: list[int] = []

    def initial_state(self, batch_size: int, device: torch.device) -> State:
        return {"row": torch.arange(batch_size), "count": torch.zeros(batch_size)}

    def __call__(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        assert state is not None
        assert obs.condition is not None
        assert obs.prompt_embedding is not None
        assert obs.hidden is not None
        prompt = obs.condition.argmax(-1)
        repeats = 3
        assert torch.equal(state["row"] // repeats, prompt)
        assert torch.equal(obs.prompt_embedding.argmax(-1), self.last_tokens[prompt])
        position, left = (torch.exp2(obs.context[:, i]) - 1 for i in range(2))
        torch.testing.assert_close(position, state["count"])
        torch.testing.assert_close(position + left, torch.full_like(left, CONFIG.max_new_tokens))
        self.batches.append(len(prompt))
        return PolicyOutput(obs.sketch.log_mass, {"row": state["row"], "count": state["count"] + 1})


@pytest.mark.parametrize("kind", [ToyBackend, Shuffling])
def test_state_condition_and_embedding_follow_their_rows_when_rows_finish(kind: type[ToyBackend]):
    policy = Witness([1, 3, 4])
    run = rollout(policy, kind(ending_toy().table), PROMPTS, CONFIG, num_generations=3, conditions=torch.eye(3))
    assert len(set(policy.batches)) > 2, "rows finish at different times"
    assert policy.batches == [int((run.lengths > t).sum()) for t in range(len(policy.batches))], (
        "ended rows cost nothing"
    )


def test_the_order_in_which_a_backend_returns_rows_does_not_matter():
    table = ending_toy().table
    for policy in (learned(), pipeline(**MIROSTAT)):
        runs = [rollout(policy, kind(table), PROMPTS, CONFIG, num_generations=5) for kind in (ToyBackend, Shuffling)]
        assert_same(runs[0], runs[1])


def test_optional_entries_are_recorded_per_token_and_per_completion():
    backend = ending_toy()
    run = rollout(Witness([1, 3, 4]), backend, PROMPTS, CONFIG, num_generations=3, conditions=torch.eye(3))
    obs = run.per_token()
    assert obs.hidden is not None
    assert obs.prompt_embedding is not None
    assert obs.condition is not None
    pairs = zip(run.prompt_ids, run.completion_ids, strict=True)
    assert obs.hidden.argmax(-1).tolist() == [token for prompt, ids in pairs for token in (prompt[-1], *ids[:-1])]
    assert obs.prompt_embedding.argmax(-1).tolist() == [run.prompt_ids[i][-1] for i in run.rows]
    assert obs.condition.argmax(-1).tolist() == [i // 3 for i in run.rows.tolist()]


def test_entries_can_be_captured_for_another_policy_without_changing_the_draws():
    plain = rollout(Pipeline([]), ending_toy(), PROMPTS, CONFIG)
    more = rollout(Pipeline([]), ending_toy(), PROMPTS, CONFIG, capture=["hidden", "prompt_embedding"])
    assert_same(plain, more)
    assert plain.observations.hidden is None
    assert more.observations.hidden is not None
    assert more.observations.hidden.shape == (len(more.points), 32)
    assert more.observations.prompt_embedding is not None
    assert more.observations.prompt_embedding.shape == (3, 32)


@pytest.mark.parametrize("kind", [ToyBackend, Shuffling])
def test_probes_are_recorded_for_every_token_in_the_order_of_the_tokens(kind: type[ToyBackend]):
    backend = kind(ending_toy().table)
    run = rollout(
        learned(),
        backend,
        PROMPTS,
        replace(CONFIG, max_batch=6),
        num_generations=5,
        probes={
            "logits": lambda logits, sketch, points: logits,
            "mass": lambda logits, sketch, points: sketch.log_mass,
        },
    )
    assert torch.equal(run.extras["logits"], visited(run, backend)[0])
    assert torch.equal(run.extras["mass"], run.observations.sketch.log_mass)


def test_every_token_is_reported_to_the_progress_callback():
    drawn: list[int] = []
    run = rollout(Pipeline([]), ending_toy(), PROMPTS, CONFIG, num_generations=3, on_token=drawn.append)
    assert sum(drawn) == len(run.points)


# Refusals


def test_inputs_that_cannot_be_used_are_refused_with_what_to_do():
    backend = ending_toy()
    backend.max_context = 8
    with pytest.raises(DataError, match="prompt list is empty; check the data source"):
        rollout(Pipeline([]), backend, [], CONFIG)
    with pytest.raises(DataError, match="prompt 'void' is empty"):
        rollout(Pipeline([]), backend, [Prompt("a", "w1"), Prompt("void", " ")], CONFIG)
    with pytest.raises(
        DataError, match=r"prompt 'b' has 2 tokens.*max_new_tokens=7.*context of 8. Shorten the prompt or lower"
    ):
        rollout(Pipeline([]), backend, PROMPTS, CONFIG)
    with pytest.raises(DataError, match="word 'x' is not in the toy vocabulary"):
        rollout(Pipeline([]), backend, [Prompt("a", "x")], CONFIG)
    with pytest.raises(InvalidValue, match="num_generations must be >= 1, got 0"):
        rollout(Pipeline([]), backend, PROMPTS[:1], CONFIG, num_generations=0)
    with pytest.raises(InvalidValue, match=r"conditions must be of 1 rows, one a prompt, got \(3, 3\)"):
        rollout(Pipeline([]), backend, PROMPTS[:1], CONFIG, conditions=torch.eye(3))
    with pytest.raises(InvalidValue, match=r"capture must be a subset of .*'hidden'.*got \['hiden'\]"):
        rollout(Pipeline([]), backend, PROMPTS[:1], CONFIG, capture=["hiden"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0; a completion needs at least one token"),
        ({"max_batch": 0}, "max_batch must be >= 1"),
        ({"head": 0}, "sketch head must be >= 1"),
        ({"tail": 0}, "sketch tail must be in"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, int], message: str):
    with pytest.raises(InvalidValue, match=message):
        RolloutConfig(**values)


@pytest.mark.parametrize(("bad", "cause"), [(math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "no finite entry")])
@pytest.mark.parametrize("first", [True, False])
def test_logits_that_are_no_distribution_are_refused_wherever_they_occur(bad: float, cause: str, first: bool):
    table = torch.full((3, 3), -math.inf)
    table[1, 2] = 0.0
    table[1 if first else 2] = bad
    with pytest.raises(InvalidLogits, match=f"logits row 0 holds {cause}.*Check the model's dtype"):
        rollout(Pipeline([]), ToyBackend(table), [Prompt("p", "w1")], CONFIG)


@pytest.mark.parametrize(("value", "total"), [(math.nan, "nan"), (-math.inf, "0"), (0.0, "11")])
def test_a_policy_that_gives_no_distribution_is_refused(value: float, total: str):
    class Diverged(Pipeline):
        def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
            return PolicyOutput(torch.full_like(obs.sketch.log_mass, value))

    message = f"probabilities of Diverged over points sum to {total}, not to 1"
    with pytest.raises(InvalidPolicyOutput, match=message):
        rollout(Diverged([]), ending_toy(), PROMPTS, CONFIG)
    with pytest.raises(InvalidPolicyOutput, match=message):
        replay(Diverged([]), ending_toy(), PROMPTS[:1], [[1]], CONFIG)


def test_a_policy_that_needs_what_nobody_records_is_refused():
    policy = Pipeline([])
    policy.needs = frozenset({"hiden"})
    with pytest.raises(InvalidValue, match=r"policy\.needs must be a subset"):
        rollout(policy, ending_toy(), PROMPTS, CONFIG)


# Trajectories


@pytest.fixture
def run() -> Trajectories:
    probe = {"largest": lambda logits, sketch, points: logits.amax(-1)}
    policy = Witness([1, 3, 4])
    return rollout(policy, ending_toy(), PROMPTS, CONFIG, num_generations=3, conditions=torch.eye(3), probes=probe)


def test_selecting_keeps_every_completion_whole(run: Trajectories):
    order = [5, 0, 5, 8]
    picked = run.select(order)
    spans = torch.arange(len(run.points)).split(run.lengths.tolist())
    tokens = torch.cat([spans[i] for i in order])
    assert picked.completion_ids == [run.completion_ids[i] for i in order]
    assert picked.lengths.tolist() == [run.lengths[i] for i in order]
    for name in ("points", "behaviour_logprobs", "base_logprobs"):
        assert torch.equal(getattr(picked, name), getattr(run, name)[tokens])
    assert torch.equal(picked.extras["largest"], run.extras["largest"][tokens])
    theirs, mine = run.per_token(tokens), picked.per_token()
    for name in ("context", "hidden", "prompt_embedding", "condition"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert torch.equal(mine.sketch.inner_entropy, theirs.sketch.inner_entropy)


def test_parts_make_the_whole_again(run: Trajectories):
    assert_same(concatenate([run.select([0, 1]), run.select(range(2, 9))]), run)
    assert_same(run.select(range(9)), run)


def test_nothing_can_be_selected(run: Trajectories):
    nothing = run.select([])
    assert (len(nothing), len(nothing.points), len(nothing.rows)) == (0, 0, 0)
    assert_same(concatenate([nothing, run]), run)


def test_parts_with_different_optional_entries_are_not_mixed(run: Trajectories):
    with pytest.raises(DataError, match="only some of the trajectories recorded"):
        concatenate([run, rollout(Pipeline([]), ending_toy(), PROMPTS, CONFIG)])


def test_behaviour_logprobs_and_conditions_can_be_replaced(run: Trajectories):
    other = run.with_logprobs(run.behaviour_logprobs - 1).with_condition(torch.zeros(9, 2))
    assert torch.equal(other.behaviour_logprobs, run.behaviour_logprobs - 1)
    assert other.per_token().condition.shape == (len(run.points), 2)  # type: ignore[union-attr]


# Replay


@pytest.mark.parametrize("policy", [learned(), pipeline(**MIROSTAT), Pipeline([])])
def test_a_replayed_rollout_is_the_rollout(policy: Policy):
    backend = ending_toy()
    run = rollout(policy, backend, PROMPTS, CONFIG, num_generations=4)
    recorded = [part.tolist() for part in run.behaviour_logprobs.split(run.lengths.tolist())]
    again, mismatch = replay(
        policy, backend, run.prompts, run.completion_ids, CONFIG, sample=run.sample, logprobs=recorded
    )
    assert_same(run, again, atol=1e-5)
    assert mismatch is not None
    assert mismatch.tokens == len(run.points)
    fresh, none = replay(policy, backend, run.prompts, run.completion_ids, CONFIG)
    assert none is None
    torch.testing.assert_close(fresh.behaviour_logprobs, run.behaviour_logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(mismatch.largest, (fresh.behaviour_logprobs - run.behaviour_logprobs).abs().max().item())


def test_replay_records_the_optional_entries_of_a_rollout():
    class Reading(Pipeline):
        needs = frozenset({"hidden", "prompt_embedding", "condition"})

    backend, conditions = ending_toy(), torch.eye(3)
    run = rollout(Reading([]), backend, PROMPTS, CONFIG, conditions=conditions)
    again, _ = replay(Reading([]), backend, PROMPTS, run.completion_ids, CONFIG, conditions=conditions)
    for name in ("hidden", "prompt_embedding", "condition"):
        assert torch.equal(getattr(again.observations, name), getattr(run.observations, name)), name


def test_replay_keeps_foreign_logprobs_and_reports_how_far_they_are():
    policy, backend = learned(), ending_toy()
    run = rollout(policy, backend, PROMPTS, CONFIG)
    true = [part.tolist() for part in run.behaviour_logprobs.split(run.lengths.tolist())]
    foreign = [[value - 0.25 for value in row] for row in true]
    foreign[1][0] -= 1.0
    again, mismatch = replay(policy, backend, PROMPTS, run.completion_ids, CONFIG, logprobs=foreign)
    assert mismatch is not None
    assert mismatch.largest == pytest.approx(1.25, abs=1e-4)
    assert mismatch.mean_absolute == pytest.approx(0.25 + 1 / mismatch.tokens, abs=1e-4)
    torch.testing.assert_close(again.behaviour_logprobs, torch.tensor([value for row in foreign for value in row]))


def test_replay_under_a_policy_that_forbids_a_token_says_so_with_minus_infinity():
    backend = ending_toy()
    run = rollout(pipeline(temperature={"temperature": 3.0}), backend, PROMPTS, CONFIG, num_generations=4)
    again, _ = replay(pipeline(greedy={}), backend, run.prompts, run.completion_ids, CONFIG)
    greedy = again.points == 0
    torch.testing.assert_close(again.behaviour_logprobs[greedy], torch.zeros(int(greedy.sum())), atol=1e-5, rtol=0)
    assert (again.behaviour_logprobs[~greedy] == -math.inf).all()


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([[2, 1]], "token 1 at position 1 of a completion of prompt 'p' has no probability under the base model"),
        ([[]], "has 0 tokens; it must have between 1 and max_new_tokens=7"),
        ([[2] * 8], "has 8 tokens"),
        ([[2, 99]], "token 99 .* is outside the base model's vocabulary of 3"),
        ([[-1]], "token -1 .* is outside"),
        ([[2], [2]], "completion_ids has 2 entries for 1 prompts"),
    ],
)
def test_completions_that_cannot_be_replayed_are_refused(completions: list[list[int]], message: str):
    table = torch.zeros(3, 3)
    table[:, 1] = -math.inf
    with pytest.raises(DataError, match=message):
        replay(Pipeline([]), ToyBackend(table), [Prompt("p", "w1")], completions, CONFIG)


def test_columns_of_the_wrong_length_are_refused_by_replay():
    backend, prompts, completions = ending_toy(), PROMPTS[:2], [[1, 2], [3]]
    with pytest.raises(DataError, match="there are no completions to replay"):
        replay(Pipeline([]), backend, [], [], CONFIG)
    with pytest.raises(DataError, match="sample has 1 entries for 2 prompts"):
        replay(Pipeline([]), backend, prompts, completions, CONFIG, sample=[0])
    with pytest.raises(DataError, match="conditions has 3 entries for 2 prompts"):
        replay(Pipeline([]), backend, prompts, completions, CONFIG, conditions=torch.eye(3))
    with pytest.raises(DataError, match="completion 0 has 2 tokens and 1 recorded log-probs"):
        replay(Pipeline([]), backend, prompts, completions, CONFIG, logprobs=[[-1.0], [-1.0, -1.0]])


def test_a_prompt_that_is_too_long_is_refused_by_replay():
    backend = ending_toy()
    backend.max_context = 8
    with pytest.raises(DataError, match="exceeds the base model's context of 8"):
        replay(Pipeline([]), backend, [PROMPTS[1]], [[1]], CONFIG)
