"""The vector environment: agreement with the single one and with rollouts, both autoreset modes, both faces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from asn_envs.decoding import DecodingEnv
from asn_envs.vector import DecodingVectorEnv
from asn_policies import Pipeline
from asn_rl.backends.toy import ToyBackend, ToySession
from asn_rl.errors import InvalidValue, UnknownName
from asn_rl.ops.draws import invert_cdf
from asn_rl.replay import replay
from asn_rl.rollout import RolloutConfig, rollout, uniform_stream
from asn_rl.types import Observation, PolicyOutput, State

PROMPTS = [{"id": f"p{i}", "prompt": f"w{i}", "answer": str(i)} for i in range(1, 8)]
NUM_ENVS = 4


def by_length(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
    return [None if len(ids) == 3 else float(len(ids)) for ids in completion_ids]


@pytest.fixture
def ending() -> ToyBackend:
    """A table in which about one token in six ends the sequence."""
    backend = ToyBackend.random(vocab=24, seed=1)
    backend.table[:, 0] = backend.table[:, 1:].logsumexp(-1) - 1.6
    return backend


class Remembering(ToyBackend):
    """A backend whose sessions remember how each row began, and reorder their rows when some leave."""

    def start(self, prompt_ids: Any, *, repeats: int = 1, hidden: bool = False, layers: Any = ()) -> RememberingSession:
        return RememberingSession(self, torch.tensor([ids[-1] for ids in prompt_ids]), hidden)


class RememberingSession(ToySession):
    def __init__(self, backend: ToyBackend, first: Tensor, hidden: bool) -> None:
        self.first = first
        super().__init__(backend, first, hidden)

    def step(self, tokens: Tensor) -> None:
        super().step(tokens)
        self.logits = self.logits + self.backend.table[self.first]

    def drop(self, finished: Tensor) -> Tensor:
        order = super().drop(finished).flip(0)
        self.first, self.logits = self.first[order], self.logits.flip(0)
        return order


def make(backend: ToyBackend, mode: str = "SameStep", **arguments: Any) -> DecodingVectorEnv:
    sizes: dict[str, Any] = {"num_envs": NUM_ENVS, "head": 6, "tail": 3, "max_new_tokens": 9}
    return DecodingVectorEnv(PROMPTS, by_length, backend, autoreset_mode=mode, **sizes | arguments)


def singles(backend: ToyBackend, mode: str) -> SyncVectorEnv:
    def one() -> DecodingEnv:
        return DecodingEnv(PROMPTS, by_length, backend, head=6, tail=3, max_new_tokens=9)

    return SyncVectorEnv([one] * NUM_ENVS, autoreset_mode=mode)


def assert_same(left: Any, right: Any) -> None:
    """Nested equality, dtypes and masks included."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple) or (isinstance(left, np.ndarray) and left.dtype == object):
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("kind", [ToyBackend, Remembering])
def test_same_step_equals_single_environments(ending: ToyBackend, kind: type[ToyBackend]):
    backend = kind(ending.table)
    ours, theirs = make(backend), singles(backend, "SameStep")
    assert_same(ours.reset(seed=5), theirs.reset(seed=5))
    rng, ended = np.random.default_rng(0), 0
    for _ in range(60):
        actions = rng.integers(9, size=NUM_ENVS)
        got, expected = ours.step(actions), theirs.step(actions)
        assert_same(got, expected)
        ended += int((got[2] | got[3]).sum())
    assert ended > 20
    assert_same(ours.reset(), theirs.reset())


def test_disabled_equals_single_environments(ending: ToyBackend):
    ending = Remembering(ending.table)
    ours, theirs = make(ending, "Disabled"), singles(ending, "Disabled")
    assert_same(ours.reset(seed=5), theirs.reset(seed=5))
    rng = np.random.default_rng(0)
    for _ in range(40):
        actions = rng.integers(9, size=NUM_ENVS)
        got, expected = ours.step(actions), theirs.step(actions)
        assert_same(got, expected)
        ended = got[2] | got[3]
        if ended.any():
            again = [env.reset(options={"reset_mask": ended.copy()}) for env in (ours, theirs)]
            assert_same(*again)


def test_rows_that_go_on_are_not_disturbed_by_rows_that_end(ending: ToyBackend):
    backend = Remembering(ending.table)
    env, rows = make(backend, "Disabled"), singles(backend, "Disabled").envs
    obs, _ = env.reset(seed=11)
    seen = [row.reset(seed=11 + i)[0] for i, row in enumerate(rows)]
    action, cut = np.full(NUM_ENVS, 2), 0
    while env.active.any():
        moved = env.active.nonzero()[0]
        cut += len(moved) < NUM_ENVS
        obs, *_ = env.step(action)
        for i in moved:
            seen[i], *_ = rows[i].step(2)
            for name, value in seen[i].items():
                np.testing.assert_array_equal(obs[name][i], value)
    assert cut > 2


def test_final_layout_in_same_step(ending: ToyBackend):
    env = make(ending)
    env.reset(seed=0)
    while True:
        obs, rewards, terminated, truncated, infos = env.step(np.zeros(NUM_ENVS, dtype=np.int64))
        ended = terminated | truncated
        if ended.any() and not ended.all():
            break
    assert infos["final_obs"].dtype == object
    np.testing.assert_array_equal(infos["_final_obs"], ended)
    np.testing.assert_array_equal(infos["_final_info"], ended)
    final = infos["final_info"]
    np.testing.assert_array_equal(final["_completion"], ended)
    assert (final["length"][ended] > 0).all()
    np.testing.assert_array_equal(rewards[ended], np.where(final["length"] == 3, 0, final["length"])[ended])
    np.testing.assert_array_equal(final["reward_masked"], (final["length"] == 3) & ended)
    np.testing.assert_array_equal(infos["_token_id"], ~ended)
    assert all((entry is None) != over for entry, over in zip(infos["final_obs"], ended, strict=True))
    assert all(env.single_observation_space.contains(entry) for entry in infos["final_obs"][ended])
    assert (obs["context"][ended, 0] == 0).all()
    assert env.observation_space.contains(obs)


def test_ended_rows_idle_until_they_are_reset(ending: ToyBackend):
    env = make(ending, "Disabled")
    env.reset(seed=0)
    ends, over = np.zeros(NUM_ENVS, dtype=int), np.zeros(NUM_ENVS, dtype=bool)
    while env.active.any():
        _, rewards, terminated, truncated, infos = env.step(np.full(NUM_ENVS, 1))
        np.testing.assert_array_equal(infos["_token_id"], ~over)
        assert not rewards[over].any()
        ends += terminated | truncated
        over |= terminated | truncated
        np.testing.assert_array_equal(env.active, ~over)
    np.testing.assert_array_equal(ends, 1)
    assert env.num_cohorts == 0
    with pytest.raises(ResetNeeded, match="reset_mask"):
        env.step(np.zeros(NUM_ENVS, dtype=np.int64))


def test_rows_reset_together_share_a_forward(ending: ToyBackend):
    env = make(ending, "Disabled")
    env.reset(seed=0)
    assert env.num_cohorts == 1
    env.step(np.zeros(NUM_ENVS, dtype=np.int64))
    env.reset(options={"reset_mask": np.array([True, False, True, False])})
    assert env.num_cohorts == 2
    env.reset()
    assert env.num_cohorts == 1


def test_a_partial_reset_leaves_other_rows_and_the_options_alone(ending: ToyBackend):
    env = make(ending, "Disabled")
    env.reset(seed=0)
    obs, *_ = env.step(np.zeros(NUM_ENVS, dtype=np.int64))
    mask = np.array([False, True, False, False])
    options = {"reset_mask": mask, "prompt_id": "p6"}
    again, infos = env.reset(options=options)
    assert options == {"reset_mask": mask, "prompt_id": "p6"}
    assert infos["prompt_id"].tolist() == [None, "p6", None, None]
    np.testing.assert_array_equal(infos["_prompt_id"], mask)
    for name in obs:
        np.testing.assert_array_equal(again[name][~mask], obs[name][~mask])
    assert again["context"][1, 0] == 0


def test_prompts_can_be_chosen_for_groups(ending: ToyBackend):
    env = make(ending)
    ids = ["p1", "p1", "p5", None]
    assert env.reset(options={"prompt_id": ids})[1]["prompt_id"].tolist()[:3] == ids[:3]
    assert env.reset(options={"prompt_id": "p2"})[1]["prompt_id"].tolist() == ["p2"] * NUM_ENVS


def test_one_reward_call_a_step_with_all_that_ended(toy: ToyBackend):
    sizes: list[int] = []

    def spy(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
        sizes.append(len(prompts))
        assert len(columns["answer"]) == len(completions) == len(columns["terminated"]) == len(prompts)
        return [1.0] * len(prompts)

    toy.table[:, 0] = -torch.inf  # nothing ends before the budget
    env = DecodingVectorEnv(PROMPTS, spy, toy, num_envs=3, max_new_tokens=4, autoreset_mode="Disabled")
    env.reset(seed=0)
    steps = [env.step(np.zeros(3, dtype=np.int64)) for _ in range(4)]
    _, rewards, _, truncated, _ = steps[-1]
    assert sizes == [3]
    assert truncated.all()
    np.testing.assert_array_equal(rewards, 1.0)


def test_the_token_limit_can_be_reported_as_termination(toy: ToyBackend):
    toy.table[:, 0] = -torch.inf
    env = make(toy, max_new_tokens=2, limit_terminates=True)
    env.reset(seed=0)
    env.step(np.zeros(NUM_ENVS, dtype=np.int64))
    _, _, terminated, truncated, infos = env.step(np.zeros(NUM_ENVS, dtype=np.int64))
    assert terminated.all()
    assert not truncated.any()
    assert not infos["final_info"]["end_of_sequence"].any()


class Tilted:
    """A stateful policy that halves the temperature and counts its steps."""

    needs = frozenset({"hidden", "prompt_embedding"})

    def initial_state(self, batch_size: int, device: torch.device) -> State | None:
        return None

    def __call__(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        assert obs.hidden is not None
        assert obs.prompt_embedding is not None
        tilt = obs.hidden.argmax(-1, keepdim=True) % 3 + obs.prompt_embedding.argmax(-1, keepdim=True) % 2
        weights = obs.sketch.log_mass * (1 + 0.3 * tilt)
        return PolicyOutput(weights.log_softmax(-1), state)


def test_a_policy_acts_here_as_in_a_rollout(ending: ToyBackend):
    policy, config = Tilted(), RolloutConfig(max_new_tokens=9, head=30, tail=3)  # every token is a point
    env = make(ending, "Disabled", num_envs=len(PROMPTS), head=30, output="torch", needs=sorted(policy.needs))
    ids = [row["id"] for row in PROMPTS]
    env.reset(seed=0, options={"prompt_id": ids})
    streams = torch.from_numpy(np.stack([uniform_stream(7, name, 0, 9) for name in ids]))
    tokens: list[list[int]] = [[] for _ in ids]
    contexts: list[list[Tensor]] = [[] for _ in ids]
    for t in range(9):
        if not env.active.any():
            break
        seen = env.observation()
        moved = env.active.nonzero()[0]
        points = invert_cdf(policy(seen).logprobs.double().exp(), streams[:, t, 0])
        *_, infos = env.step(points)
        for row in moved:
            tokens[row].append(int(infos["token_id"][row]))
            contexts[row].append(seen.context[row])
    expected = rollout(policy, ending, env.task.prompts, config, seed=7)
    assert tokens == [list(part) for part in expected.completion_ids]
    got = torch.stack([context for row in contexts for context in row])
    torch.testing.assert_close(got, expected.observations.context, atol=0, rtol=0)
    assert policy(env.observation()).logprobs[:, 0].isfinite().all()  # also after the end


@pytest.mark.parametrize(("base_model", "layers"), [("ending", ()), ("smollm", (10, 20))])
def test_what_text_and_earlier_layers_say_is_seen_as_by_a_policy_that_replays_it(
    base_model: str, layers: tuple[int, ...], request: pytest.FixtureRequest
):
    """Rows begin again while others go on, so each has a past of its own; short tables forget."""
    backend, needs = request.getfixturevalue(base_model), ["history", *(["layer_logprobs"] if layers else [])]
    config = RolloutConfig(max_new_tokens=7, head=12, tail=6, tracked=3, layers=layers)
    sizes: dict[str, Any] = {"max_new_tokens": 7, "head": 12, "tail": 6, "tracked": 3, "layers": layers}
    env = make(backend, "Disabled", num_envs=3, output="torch", needs=needs, **sizes)
    ids, episodes = [row["id"] for row in PROMPTS[:3]], 2 if layers else 4  # of a row
    obs, _ = env.reset(seed=0, options={"prompt_id": ids})
    assert obs["points"].shape == env.observation_space["points"].shape == (3, 21, 6)
    seen: list[Observation] = []
    texts: list[list[list[int]]] = [[[]] for _ in ids]
    places: list[tuple[int, int]] = []
    while env.active.any():
        now = env.observation()
        assert now.history is not None
        # Every other time what was said most; row 1 takes second choices in between.
        points = now.history[..., 0].argmax(-1) if len(seen) % 2 else torch.arange(3) % 2
        moved = env.active.nonzero()[0].tolist()
        *_, infos = env.step(points)
        for row in moved:
            seen.append(now.index(slice(row, row + 1)))
            places.append((row, len(texts[row]) - 1))
            texts[row][-1].append(int(infos["token_id"][row]))
        again = np.array([not env.active[i] and len(texts[i]) < episodes for i in range(3)])
        if again.any():
            env.reset(options={"reset_mask": again, "prompt_id": ids})
            for row in again.nonzero()[0]:
                texts[row].append([])
    rules: list[dict[str, Any]] = [{"name": "repetition_penalty", "params": {"penalty": 1.8}}]
    policy = Pipeline([*rules, *([{"name": "layer_contrast", "params": {}}] if layers else [])])
    flat = [(row, episode) for row in range(3) for episode in range(len(texts[row]))]
    whole = [texts[row][episode] for row, episode in flat]
    expected = replay(policy, backend, [env.task.prompts[row] for row, _ in flat], whole, config)[0].observations
    order = sorted(range(len(seen)), key=lambda i: (flat.index(places[i]), i))
    assert expected.history is not None
    assert expected.history[..., 0].max() > 1
    # On the real model rounding moves a token across a bin's edge now and then; what is said of that bin moves with it.
    alike = torch.cat([seen[i].sketch.log_count for i in order]) == expected.sketch.log_count
    assert alike.float().mean() >= (0.99 if layers else 1)
    for name in needs:
        got = torch.cat([getattr(seen[i], name) for i in order])
        torch.testing.assert_close(got[alike], getattr(expected, name)[alike], atol=2e-3, rtol=1e-3)
    mass = torch.cat([seen[i].sketch.log_mass for i in order]).exp()
    torch.testing.assert_close(mass, expected.sketch.log_mass.exp(), atol=1e-4, rtol=1e-3)
    assert policy(env.observation()).logprobs[:, 0].isfinite().all()  # also after the end


def test_the_torch_face_is_the_numpy_face_in_tensors(ending: ToyBackend):
    ours, theirs = make(ending, output="torch"), make(ending)
    obs, _ = ours.reset(seed=0)
    expected, _ = theirs.reset(seed=0)
    for _ in range(12):
        for name, value in expected.items():
            assert isinstance(obs[name], Tensor)
            np.testing.assert_array_equal(obs[name].numpy(), value)
        obs, *rest, infos = ours.step(torch.ones(NUM_ENVS, dtype=torch.long))
        expected, *expected_rest, expected_infos = theirs.step(np.ones(NUM_ENVS, dtype=np.int64))
        assert [part.dtype for part in rest] == [torch.float32, torch.bool, torch.bool]
        for part, other in zip(rest, expected_rest, strict=True):
            np.testing.assert_array_equal(part.numpy(), other)
        finals = [info.pop("final_obs", None) for info in (infos, expected_infos)]
        assert_same(infos, expected_infos)
        assert finals[0] is None or any(isinstance(last["points"], Tensor) for last in finals[0] if last is not None)


def test_data_is_fresh_every_step(ending: ToyBackend):
    env = make(ending)
    obs, infos = env.reset(seed=0)
    kept = {name: value.copy() for name, value in obs.items()}
    news, *_, next_infos = env.step(np.zeros(NUM_ENVS, dtype=np.int64))
    for name, value in obs.items():
        np.testing.assert_array_equal(value, kept[name])
        assert not np.shares_memory(value, news[name])
    assert not np.shares_memory(infos["action_mask"], next_infos["action_mask"])


def test_unseeded_rows_differ_and_seeded_ones_repeat(ending: ToyBackend):
    def prompts(env: DecodingVectorEnv, **reset: Any) -> list[str]:
        return env.reset(**reset)[1]["prompt_id"].tolist()

    env = make(ending, num_envs=12)
    assert len(set(prompts(env))) > 1
    assert prompts(env, seed=1) == prompts(make(ending, num_envs=12), seed=1)
    assert prompts(env, seed=1) != prompts(env, seed=50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "NextStep"}, "'SameStep' or 'Disabled', got 'NextStep'; NextStep would spend one decoding step"),
        ({"mode": AutoresetMode.NEXT_STEP}, "autoreset_mode must be 'SameStep' or 'Disabled'"),
        ({"mode": "sometimes"}, "autoreset_mode must be 'SameStep' or 'Disabled'"),
        ({"output": "jax"}, "output must be 'numpy' or 'torch'"),
        ({"num_envs": 0}, "num_envs must be >= 1"),
        ({"needs": ["condition"]}, "needs must be a subset of"),
        ({"max_episode_steps": 0}, "max_new_tokens must be >= 1, got 0"),
    ],
)
def test_arguments_that_cannot_be_used(toy: ToyBackend, arguments: dict, message: str):
    with pytest.raises(InvalidValue, match=message):
        make(toy, **arguments)


@pytest.mark.parametrize(
    "mask", [np.zeros(4, dtype=bool), np.ones(3, dtype=bool), np.ones(4, dtype=int), [True] * 4, "all"]
)
def test_a_reset_mask_of_the_wrong_kind(toy: ToyBackend, mask: Any):
    with pytest.raises(InvalidValue, match=r"reset_mask must be a bool array of shape \(4,\) with at least one True"):
        make(toy).reset(options={"reset_mask": mask})


def test_other_refusals(toy: ToyBackend):
    env = make(toy)
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(NUM_ENVS, dtype=np.int64))
    env.reset(seed=0)
    with pytest.raises(InvalidValue, match=r"action must be integers of shape \(4,\) in \[0, 8\], got 9"):
        env.step(np.array([0, 1, 9, 3]))
    with pytest.raises(InvalidValue, match=r"integers of shape \(4,\)"):
        env.step(np.zeros(3, dtype=np.int64))
    with pytest.raises(UnknownName, match="unknown prompt id 'p77'"):
        env.reset(options={"prompt_id": "p77"})
    with pytest.raises(InvalidValue, match="a sequence of 4"):
        env.reset(options={"prompt_id": ["p1"]})


def test_rendering(toy: ToyBackend):
    assert make(toy).render() is None
    env = make(toy, render_mode="ansi")
    env.reset(options={"prompt_id": "p3"})
    assert env.render() == ("w3\n",) * NUM_ENVS
