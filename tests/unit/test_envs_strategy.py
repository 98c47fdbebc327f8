"""The strategy environments: a heuristic a token, and one a prompt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv

from asn_envs.strategies import as_strategies
from asn_envs.strategy import StrategyDecodingEnv, StrategyDecodingVectorEnv
from asn_envs.strategy_bandit import StrategyBanditEnv, unit_mean_square
from asn_policies import Pipeline
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import AsnError, ConfigError, DataError, InvalidValue, UnknownName
from asn_rl.evaluation.reward_log import RewardLog, save_reward_log
from asn_rl.rollout import RolloutConfig, rollout, uniform_stream
from asn_rl.types import Observation, PolicyOutput, Prompt, State

PROMPTS = [{"id": f"p{i}", "prompt": f"w{i}", "answer": str(i)} for i in range(1, 6)]
GREEDY = {"name": "greedy", "processors": [{"name": "greedy"}]}
HOT = {"name": "T=2", "processors": [{"name": "temperature", "params": {"temperature": 2.0}}]}
BASE = {"name": "T=1", "processors": []}
MIROSTAT = {"name": "mirostat", "processors": [{"name": "mirostat", "params": {"tau": 1.5, "eta": 0.3}}]}
STRATEGIES = [GREEDY, HOT, MIROSTAT, BASE]
SIZES: dict[str, Any] = {"head": 8, "tail": 4}


def by_length(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
    return [float(len(ids)) for ids in completion_ids]


def make(backend: Any, **arguments: Any) -> StrategyDecodingEnv:
    defaults: dict[str, Any] = {"prompts": PROMPTS, "reward": by_length, "strategies": STRATEGIES, **SIZES}
    return StrategyDecodingEnv(backend=backend, **defaults | arguments)


def play(env: Any, actions: Any, **reset: Any) -> tuple[list[int], list[dict], float]:
    """Tokens, infos (that of the reset first) and return of one episode; actions repeat."""
    _, info = env.reset(**reset)
    tokens, infos, total, ended = [], [info], 0.0, False
    while not ended:
        _, reward, terminated, truncated, info = env.step(actions[len(tokens) % len(actions)])
        tokens.append(info["token_id"])
        infos.append(info)
        total, ended = total + reward, terminated or truncated
    return tokens, infos, total


class Scripted:
    """Strategies in turn, as a policy: what a sequence of actions means, by another path."""

    needs = frozenset()

    def __init__(self, strategies: Any, actions: list[int]) -> None:
        self.policies, self.actions, self.step = list(as_strategies(strategies).values()), actions, 0

    def initial_state(self, batch_size: int, device: torch.device) -> State | None:
        self.step = 0
        states = enumerate(policy.initial_state(batch_size, device) or {} for policy in self.policies)
        return {f"{a}:{name}": value for a, state in states for name, value in state.items()}

    def __call__(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        following, answers = {}, []
        for a, policy in enumerate(self.policies):
            own = {name.partition(":")[2]: v for name, v in (state or {}).items() if name.startswith(f"{a}:")}
            output = policy(obs, own or None)
            answers.append(output.logprobs)
            following |= {f"{a}:{name}": value for name, value in (output.state or {}).items()}
        self.step += 1
        return PolicyOutput(answers[self.actions[(self.step - 1) % len(self.actions)]], following)


# Decoding


@pytest.mark.parametrize("actions", [[0], [1], [2], [3], [1, 2, 0, 3, 2]])
def test_the_tokens_are_those_of_a_rollout_with_the_chosen_strategies(toy: ToyBackend, actions: list[int]):
    prompt, budget = Prompt("p3", "w3"), 12
    config = RolloutConfig(budget, **SIZES)
    expected = rollout(Scripted(STRATEGIES, actions), toy, [prompt], config, seed=5).completion_ids[0]
    env = make(toy, max_new_tokens=budget)
    _, info = env.reset(options={"prompt_id": "p3"})
    env.np_random = Replayed(uniform_stream(5, "p3", 0, budget))  # type: ignore[assignment]
    tokens = []
    for t in range(len(expected)):
        _, _, _, _, info = env.step(actions[t % len(actions)])
        tokens.append(info["token_id"])
        assert info["strategy"] == STRATEGIES[actions[t % len(actions)]]["name"]
    assert tokens == list(expected)
    assert info["length"] == len(expected)


class Replayed:
    """The draws of a rollout, in place of an environment's own."""

    def __init__(self, uniforms: np.ndarray) -> None:
        self.rows = iter(uniforms)

    def random(self, shape: tuple[int, int]) -> np.ndarray:
        return next(self.rows).reshape(shape)


def test_infos_and_spaces(toy: ToyBackend):
    env = make(toy, max_new_tokens=4)
    obs, info = env.reset(seed=0, options={"prompt_id": "p2"})
    assert env.action_space.n == 4
    assert env.observation_space.contains(obs)
    assert info.keys() == {"prompt_id", "budget", "decision", "action_mask"}
    assert (info["prompt_id"], info["budget"], info["decision"]) == ("p2", 4, True)
    assert info["action_mask"].tolist() == [True] * 4
    _, infos, total = play(env, [0], seed=0)
    assert total == infos[-1]["length"]
    assert infos[-1].keys() >= {"token_id", "base_logprob", "strategy", "completion", "reward_masked"}


def test_a_confident_token_is_drawn_by_the_first_strategy_whatever_the_action():
    # After "a" the model is sure of "b" (0.96), after "b" it is not sure of "a" (0.6).
    table = torch.tensor([[0.1, 0.45, 0.45], [0.0, 0.04, 0.96], [0.0, 0.6, 0.4]]).log()
    backend = ToyBackend(table, ["<eos>", "a", "b"])
    always_rarest = {"name": "rarest", "processors": [{"name": "temperature", "params": {"temperature": 50.0}}]}
    arguments: dict[str, Any] = {"strategies": [GREEDY, always_rarest], "prompts": [{"id": "a", "prompt": "a"}]}
    env = make(backend, confident_above=0.95, max_new_tokens=300, **arguments)
    tokens, infos, _ = play(env, [1], seed=0)
    before = [1, *tokens[:-1]]
    assert 50 < sum(info["decision"] for info in infos) < 250
    for last, token, info, after in zip(before, tokens, infos, infos[1:], strict=False):
        assert info["decision"] is (last == 2)
        assert info["action_mask"].tolist() == [True, last == 2]
        assert after["strategy"] == ("rarest" if last == 2 else "greedy")
        if last == 1:
            assert token == 2
    assert {token for last, token in zip(before, tokens, strict=True) if last == 2} == {1, 2}
    free = make(backend, max_new_tokens=300, **arguments)
    assert all(info["decision"] is True for info in play(free, [1], seed=0)[1])


def test_budgets_are_drawn_observed_and_kept(toy: ToyBackend):
    env = make(toy, budgets=[2, 7], max_new_tokens=9)
    seen = set()
    for seed in range(12):
        obs, info = env.reset(seed=seed)
        budget = info["budget"]
        assert obs["context"][1] == pytest.approx(math.log2(1 + budget))
        tokens, _, _ = play(env, [3], seed=seed)
        assert len(tokens) <= budget
        seen.add(budget)
    assert seen == {2, 7}
    assert play(make(toy, max_new_tokens=9), [3], seed=0)[1][0]["budget"] == 9


def test_episodes_repeat_by_seed_and_leave_the_global_generators_alone(toy: ToyBackend):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again = (play(make(toy, budgets=[3, 9], max_new_tokens=9), [2, 1], seed=3) for _ in range(2))
    np.testing.assert_equal(first, again)
    assert torch.equal(state, torch.get_rng_state())


def test_the_state_of_one_episode_does_not_reach_the_next(toy: ToyBackend):
    env = make(toy)
    first = play(env, [2], seed=3)
    play(env, [2], seed=4)
    np.testing.assert_equal(play(env, [2], seed=3), first)


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_the_vector_environment_is_the_single_one_many_times(mode: str):
    backend = ToyBackend.random(vocab=24, seed=1)
    backend.table[:, 0] = backend.table[:, 1:].logsumexp(-1) - 1.6  # about one token in six ends the sequence
    options: dict[str, Any] = {"budgets": [2, 5, 9], "max_new_tokens": 9, "confident_above": 0.3, **SIZES}
    envs = StrategyDecodingVectorEnv(
        PROMPTS, by_length, STRATEGIES, backend, num_envs=3, autoreset_mode=mode, **options
    )
    singles = SyncVectorEnv([lambda: make(backend, **options)] * 3, autoreset_mode=mode)
    rng = np.random.default_rng(0)
    seen, expected = (both.reset(seed=7) for both in (envs, singles))
    strategies = set()
    for _ in range(40):
        np.testing.assert_equal(seen[0], expected[0])
        for key in ("budget", "prompt_id", "decision", "action_mask"):
            np.testing.assert_array_equal(seen[-1][key][envs.active], expected[-1][key][envs.active])
        actions = rng.integers(4, size=3)
        seen, expected = envs.step(actions), singles.step(actions)
        for mine, theirs in zip(seen[1:4], expected[1:4], strict=True):
            np.testing.assert_array_equal(mine, theirs)
        strategies.update(name for name in np.atleast_1d(seen[-1].get("strategy", [])) if name)
        ended = seen[2] | seen[3]
        if mode == "Disabled" and ended.any():
            seen, expected = (both.reset(options={"reset_mask": ended}) for both in (envs, singles))
    assert strategies == {strategy["name"] for strategy in STRATEGIES}


def test_live_policies_may_be_strategies_and_get_what_they_read(toy: ToyBackend):
    class Reader(Pipeline):
        def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
            assert obs.hidden is not None
            return super().forward(obs, state)

    reader = {"name": "reader", "policy": Reader([])}
    reader["policy"].needs = frozenset({"hidden"})  # type: ignore[attr-defined]
    play(make(toy, strategies=[GREEDY, reader]), [1], seed=0)
    reader["policy"].needs = frozenset({"condition"})  # type: ignore[attr-defined]
    with pytest.raises(InvalidValue, match="needs must be a subset of"):
        make(toy, strategies=[GREEDY, reader])


def test_a_strategy_reads_the_text_so_far(toy: ToyBackend):
    """Greedy under a penalty on what was said leaves the circle that greedy goes in, as in a rollout."""
    steps = [{"name": "frequency_presence", "params": {"frequency": 2.0, "presence": 2.0}}, {"name": "greedy"}]
    table = toy.table.clone()
    table[:, 0] = -30.0
    endless = ToyBackend(table)
    every: dict[str, Any] = {"max_new_tokens": 16, "head": 32, "tail": 1, "tracked": 8}  # every token is a point
    env = make(endless, strategies=[GREEDY, {"name": "novel", "processors": steps}], **every)
    obs, _ = env.reset(seed=0, options={"prompt_id": "p1"})
    assert obs["points"].shape == (32 + 1 + 8, 6)
    assert env.observation_space.contains(obs)
    said = [play(env, [action], options={"prompt_id": "p1"})[0] for action in range(2)]
    for tokens, policy in zip(said, [Pipeline([{"name": "greedy"}]), Pipeline(steps)], strict=True):
        assert tokens == rollout(policy, endless, [Prompt("p1", "w1")], RolloutConfig(**every)).completion_ids[0]
    assert len(set(said[1])) > 10
    layered = {"name": "layers", "processors": [{"name": "layer_contrast", "params": {}}]}
    with pytest.raises(InvalidValue, match="layers must be at least one layer"):
        make(toy, strategies=[GREEDY, layered])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strategies": []}, InvalidValue, "strategies must be a list of at least one"),
        ({"strategies": [GREEDY, BASE, GREEDY]}, InvalidValue, "'greedy' occurs twice"),
        ({"strategies": ["greedy"]}, ConfigError, "a strategy is {name, processors}"),
        ({"strategies": [{"name": "x", "processors": [{"name": "topp"}]}]}, UnknownName, "Did you mean 'top_p'"),
        ({"strategies": [{"name": "x", "policy": 3}]}, ConfigError, "'x' is no policy"),
        ({"pipeline": "asn_policies:Pipelin"}, UnknownName, "Did you mean 'Pipeline'"),
        ({"budgets": []}, InvalidValue, "budgets must be a list of at least one"),
        ({"budgets": [4, 0]}, InvalidValue, r"budgets must be integers in \[1, 28\], got \[4, 0\]"),
        ({"budgets": [4, 29]}, InvalidValue, "raise it where the prompts leave room"),
        ({"max_new_tokens": 1 << 20, "budgets": [4]}, DataError, "exceeds the base model's context"),
        ({"confident_above": 1.0}, InvalidValue, r"confident_above must be in \(0, 1\)"),
        ({"confident_above": 0.0}, InvalidValue, r"confident_above must be in \(0, 1\)"),
    ],
)
def test_arguments_that_cannot_be_used(toy: ToyBackend, arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make(toy, **arguments)


def test_an_action_that_is_no_strategy(toy: ToyBackend):
    env = make(toy)
    env.reset(seed=0)
    with pytest.raises(InvalidValue, match=r"in \[0, 3\], got 4; an action is the index of a strategy"):
        env.step(4)


# Bandit


def second_word(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
    """1 where the completion's first token is not the most probable one."""
    table = ToyBackend.random(vocab=32, seed=0).table
    return [float(ids[0] != int(table[int(p[1:])].argmax())) for p, ids in zip(prompts, completion_ids, strict=True)]


def bandit(backend: Any, **arguments: Any) -> StrategyBanditEnv:
    defaults: dict[str, Any] = {"prompts": PROMPTS, "reward": second_word, "strategies": STRATEGIES, **SIZES}
    return StrategyBanditEnv(backend=backend, max_new_tokens=3, **defaults | arguments)


def log(**changes: Any) -> RewardLog:
    """Two prompts, two actions, three samples."""
    rewards = np.array([[[0.0, 0, 1], [1, 1, 0]], [[np.nan, np.nan, np.nan], [0.25, np.nan, 0.75]]])
    fields: dict[str, Any] = {
        "rewards": rewards,
        "tokens": np.full(rewards.shape, 5),
        "actions": ("greedy", "T=1"),
        "prompt_ids": ("a", "b"),
        "strata": ("all", "all"),
        "features": np.array([[0.5, 2.0], [-1.5, 2.0]]),
    }
    return RewardLog(**fields | changes)


def test_one_step_pays_for_the_best_of_the_samples(toy: ToyBackend):
    env = bandit(toy, budgets=[4])
    obs, info = env.reset(seed=0, options={"prompt_id": "p2"})
    assert env.observation_space.contains(obs)
    assert info == {"prompt_id": "p2", "samples": 4}
    assert obs["budget"].tolist() == [2.0]
    again, reward, terminated, truncated, info = env.step(1)
    assert (terminated, truncated) == (True, False)
    np.testing.assert_equal(again, obs)
    assert info["rewards"].shape == (4,)
    assert (reward, info["strategy"], info["reward_masked"]) == (info["rewards"].max(), "T=2", False)
    with pytest.raises(ResetNeeded):
        env.step(1)
    env.reset(seed=0)
    assert env.step(0)[1] == 0.0  # greedy never takes another word
    mean = bandit(toy, budgets=[4], pay="mean")
    mean.reset(seed=0, options={"prompt_id": "p2"})
    _, paid, *_, news = mean.step(1)
    assert paid == pytest.approx(news["rewards"].mean())
    np.testing.assert_array_equal(news["rewards"], info["rewards"])


def test_the_observation_is_the_base_models(toy: ToyBackend):
    obs, _ = bandit(toy).reset(options={"prompt_id": "p3"})
    hidden = toy.embed(torch.tensor([toy.ids["w3"]]))
    np.testing.assert_allclose(obs["prompt_embedding"], unit_mean_square(hidden)[0])
    first, _ = make(toy, max_new_tokens=3).reset(options={"prompt_id": "p3"})
    np.testing.assert_array_equal(obs["context"], first["context"])


def test_embeddings_stay_within_their_bounds():
    rows = torch.cat([torch.eye(16), 1e6 * torch.randn(50, 16), 1e-12 * torch.randn(50, 16), torch.zeros(1, 16)])
    scaled = unit_mean_square(rows)
    assert scaled.isfinite().all()
    assert scaled.abs().max() <= 4 + 1e-5
    torch.testing.assert_close(scaled[:-1].square().mean(-1), torch.ones(116), rtol=1e-4, atol=0)
    assert scaled[-1].tolist() == [0.0] * 16


def test_pass_at_b_of_the_bandit_is_that_of_its_strategy(toy: ToyBackend):
    env = bandit(toy, budgets=[1, 2], strategies=[BASE])
    chance = 1 - float(torch.softmax(toy.table[2], -1).max())
    paid: dict[int, list[float]] = {1: [], 2: []}
    for seed in range(400):
        _, info = env.reset(seed=seed, options={"prompt_id": "p2"})
        paid[info["samples"]].append(env.step(0)[1])
    for samples, values in paid.items():
        expected = 1 - (1 - chance) ** samples
        assert np.mean(values) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(values)))


def test_bandit_episodes_repeat_by_seed(toy: ToyBackend):
    def episode() -> Any:
        env = bandit(toy, budgets=[1, 8])
        return env.reset(seed=5), env.step(2), env.reset(), env.step(1)

    np.testing.assert_equal(episode(), episode())


def test_rewards_that_do_not_apply_are_left_out(toy: ToyBackend):
    env = bandit(toy, budgets=[2], reward=lambda completions, **_: [None, -1.0])
    env.reset(seed=0)
    assert env.step(1)[1] == -1.0
    env = bandit(toy, budgets=[2], reward=lambda completions, **_: [None, None])
    env.reset(seed=0)
    _, reward, *_, info = env.step(1)
    assert (reward, info["reward_masked"]) == (0.0, True)


def test_a_log_takes_the_place_of_generating(tmp_path: Path):
    save_reward_log(tmp_path / "log", log())
    for source in (log(), tmp_path / "log", str(tmp_path / "log")):
        env = StrategyBanditEnv(log=source, budgets=[2, 3], pay="mean")
        check_env(env, skip_render_check=True)
        assert env.names == ["greedy", "T=1"]
        obs, info = env.reset(seed=0, options={"prompt_id": "a"})
        assert info["prompt_id"] == "a"
        assert obs["prompt_embedding"].tolist() == [0.5, 2.0]
    seen = []
    for seed in range(200):
        _, info = env.reset(seed=seed, options={"prompt_id": "a"})
        _, reward, *_, news = env.step(1)
        assert reward == pytest.approx(news["rewards"].mean())
        if info["samples"] == 3:
            assert sorted(news["rewards"]) == [0.0, 1.0, 1.0]
        else:
            seen.append(tuple(news["rewards"]))
    assert set(seen) == {(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)}
    env.reset(options={"prompt_id": "b"})
    _, reward, *_, info = env.step(0)
    assert (reward, info["reward_masked"]) == (0.0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give prompts, reward and strategies, or a log"),
        ({"log": log(), "reward": second_word}, "log takes the place of"),
        ({"log": log(), "budgets": [4]}, r"budgets must be integers in \[1, 3\], got \[4\]; the log holds no more"),
        ({"log": log(), "budgets": [0]}, r"budgets must be integers in \[1, 3\]"),
        ({"log": log(), "pay": "sum"}, "pay must be 'max' or 'mean'"),
        ({"log": log(features=np.zeros((2, 0)))}, "log.features shape"),
        ({"prompts": PROMPTS, "reward": second_word, "strategies": []}, "strategies must be a list of at least one"),
    ],
)
def test_bandit_arguments_that_cannot_be_used(toy: ToyBackend, arguments: dict, message: str):
    with pytest.raises(AsnError, match=message):
        StrategyBanditEnv(backend=toy, **arguments)


def test_the_checker_of_gymnasium(toy: ToyBackend):
    check_env(make(toy, budgets=[1, 5], confident_above=0.5, render_mode="ansi"), skip_render_check=True)
    check_env(bandit(toy, budgets=[1, 4]), skip_render_check=True)
