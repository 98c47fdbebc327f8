"""The single environment: starts, steps, ends and refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded

from asn_envs.decoding import DecodingEnv
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import DataError, InvalidLogits, InvalidValue, RewardError, UnknownName
from asn_rl.types import Prompt

PROMPTS = [{"id": f"p{i}", "prompt": f"w{i}", "answer": str(i)} for i in range(1, 6)]
# After "a" always "b", after "b" mostly <eos>.
CHAIN = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.0, 1.0], [0.9, 0.1, 0.0]]).log()


def by_length(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
    return [float(len(ids)) for ids in completion_ids]


def make(backend: ToyBackend, reward: Any = by_length, **arguments: Any) -> DecodingEnv:
    defaults: dict[str, Any] = {"prompts": PROMPTS, "head": 8, "tail": 4}
    return DecodingEnv(reward=reward, backend=backend, **defaults | arguments)


def chain(**arguments: Any) -> DecodingEnv:
    backend = ToyBackend(CHAIN, ["<eos>", "a", "b"])
    defaults: dict[str, Any] = {"prompts": [{"id": "a", "prompt": "a"}]}
    return make(backend, **defaults | arguments)


def episode(env: DecodingEnv, seed: int | None = None, **options: Any) -> tuple[list, list]:
    """Observations, and (action, reward, flags, info) of every step, under seeded random actions."""
    rng = np.random.default_rng(0)
    obs, info = env.reset(seed=seed, options=options)
    seen: list[Any] = [obs]
    steps: list[Any] = [info]
    ended = False
    while not ended:
        action = int(rng.integers(env.task.limits.size.points))
        obs, reward, terminated, truncated, info = env.step(action)
        seen.append(obs)
        steps.append((action, reward, terminated, truncated, info))
        ended = terminated or truncated
    return seen, steps


def test_an_episode_by_hand():
    env = chain(max_new_tokens=5)
    obs, info = env.reset(seed=0)
    assert info["prompt_id"] == "a"
    assert info["action_mask"].nonzero()[0].tolist() == [0]
    np.testing.assert_allclose(obs["points"][0], [0, 0, 0, 0, 0, 1])
    np.testing.assert_allclose(obs["context"], [0, math.log2(6), 0, 0, 0, 0, 0, 0], atol=1e-6)

    obs, reward, terminated, truncated, info = env.step(0)
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (info["token_id"], info["base_logprob"], info["empty_point"]) == (2, pytest.approx(0.0), False)
    assert info["action_mask"].nonzero()[0].tolist() == [0, 1]
    np.testing.assert_allclose(obs["points"][:2, 0], np.log([0.9, 0.1]), rtol=1e-5)
    np.testing.assert_allclose(obs["context"][:2], [1, math.log2(5)])

    obs, reward, terminated, truncated, info = env.step(0)
    assert (reward, terminated, truncated) == (2.0, True, False)
    assert info["token_id"] == 0
    assert info["base_logprob"] == pytest.approx(math.log(0.9))
    assert (info["completion"], info["length"], info["end_of_sequence"]) == ("b", 2, True)
    assert info["reward_masked"] is False
    assert obs["points"].sum() == 1.0
    assert info["action_mask"].nonzero()[0].tolist() == [0]
    surprise = -math.log(0.9)
    expected = [math.log2(3), 2, 0, 0, 0, 0, surprise, surprise / 2]
    np.testing.assert_allclose(obs["context"], expected, rtol=1e-5, atol=1e-6)


def test_the_token_limit_truncates_and_end_of_sequence_terminates():
    def ends(budget: int) -> tuple[bool, bool, int]:
        env, terminated, truncated, info = chain(max_new_tokens=budget), False, False, {}
        env.reset(seed=0)
        while not (terminated or truncated):
            _, _, terminated, truncated, info = env.step(0)
            assert type(terminated) is type(truncated) is bool
        return terminated, truncated, info["length"]

    assert ends(1) == (False, True, 1)
    assert ends(2) == (True, False, 2)  # end of sequence with the last token of the budget
    assert ends(3) == (True, False, 2)


def test_the_token_limit_can_be_reported_as_termination():
    seen: list[bool] = []

    def spy(prompts: Any, completions: Any, terminated: Any = None, **columns: Any) -> list[float | None]:
        seen.extend(terminated)
        return [1.0]

    env = chain(reward=spy, max_new_tokens=1, limit_terminates=True)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(0)
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert seen == [False]
    assert info["end_of_sequence"] is False


def test_an_empty_point_is_replaced_and_reported():
    env = chain()
    env.reset(seed=0)
    _, _, _, _, info = env.step(7)
    assert (info["token_id"], info["empty_point"]) == (2, True)


def test_a_tail_point_draws_in_proportion_to_the_base_model():
    table = torch.full((6, 6), -math.inf)
    table[:, 1:] = torch.tensor([0.5, 0.2, 0.16, 0.09, 0.05]).log()
    env = make(ToyBackend(table), head=2, tail=1, max_new_tokens=3000)
    env.reset(seed=0)
    tokens = [env.step(2)[-1]["token_id"] for _ in range(1000)]
    shares = np.bincount(tokens, minlength=6)[3:] / 1000
    np.testing.assert_allclose(shares, np.array([0.16, 0.09, 0.05]) / 0.3, atol=0.06)


def test_episodes_repeat_by_seed(toy: ToyBackend):
    first, again = (episode(make(toy), seed=3) for _ in range(2))
    np.testing.assert_equal(first, again)
    env = make(toy)
    prompts = {env.reset(seed=i)[1]["prompt_id"] for i in range(20)}
    assert len(prompts) > 2
    env.reset(seed=3)
    assert len({env.reset()[1]["prompt_id"] for _ in range(20)}) > 2


def test_the_global_generators_play_no_part(toy: ToyBackend):
    env = make(toy)
    torch.manual_seed(0)
    first = episode(env, seed=3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    np.testing.assert_equal(first, episode(env, seed=3))
    assert torch.equal(state, torch.get_rng_state())


def test_a_prompt_can_be_chosen(toy: ToyBackend):
    env, options = make(toy), {"prompt_id": "p4"}
    assert env.reset(options=options)[1]["prompt_id"] == "p4"
    assert options == {"prompt_id": "p4"}
    with pytest.raises(UnknownName, match=r"unknown prompt id 'p44'\. Did you mean 'p4'"):
        env.reset(options={"prompt_id": "p44"})
    with pytest.raises(UnknownName, match=r"unknown reset option 'prompt'\. Did you mean 'prompt_id'"):
        env.reset(options={"prompt": "p4"})


def test_returned_data_is_fresh(toy: ToyBackend):
    env = make(toy)
    obs, info = env.reset(seed=0)
    kept, mask = {name: value.copy() for name, value in obs.items()}, info["action_mask"].copy()
    next_obs, *_, next_info = env.step(0)
    for name in obs:
        np.testing.assert_array_equal(obs[name], kept[name])
        assert not np.shares_memory(obs[name], next_obs[name])
    np.testing.assert_array_equal(info["action_mask"], mask)
    next_obs["points"][:] = 0
    next_info["action_mask"][:] = False
    env.step(0)


def test_the_reward_function_sees_the_episode(toy: ToyBackend):
    calls: list[dict[str, Any]] = []

    def spy(**arguments: Any) -> list[float | None]:
        calls.append(arguments)
        return [0.25]

    env = make(toy, spy, max_new_tokens=4)
    _, steps = episode(env, seed=0, prompt_id="p2")
    assert [step[1] for step in steps[1:]] == [0.0] * (len(steps) - 2) + [0.25]
    tokens = [step[-1]["token_id"] for step in steps[1:]]
    assert calls == [
        {
            "prompts": ["w2"],
            "completions": [steps[-1][-1]["completion"]],
            "completion_ids": [tokens],
            "answer": ["2"],
            "terminated": [tokens[-1] == 0],
            "prompt_id": ["p2"],
        }
    ]


def test_message_prompts_get_message_completions(toy: ToyBackend):
    seen: list[Any] = []

    def spy(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        seen.extend([prompts, completions])
        return [0.0]

    messages = [{"role": "user", "content": "w1"}]
    env = make(toy, spy, prompts=[Prompt("m", messages)], max_new_tokens=1, render_mode="ansi")
    episode(env, seed=0)
    assert seen[0] == [messages]
    assert [message["role"] for message in seen[1][0]] == ["assistant"]
    assert env.render().startswith("user: w1\n")  # type: ignore[union-attr]


def test_a_reward_that_does_not_apply_is_masked(toy: ToyBackend):
    _, steps = episode(make(toy, lambda completions, **_: [None]), seed=0)
    _, reward, *_, info = steps[-1]
    assert reward == 0.0
    assert info["reward_masked"] is True


@pytest.mark.parametrize("values", [[], [1.0, 2.0], [math.nan], [math.inf], ["high"]])
def test_a_reward_that_breaks_its_contract_is_an_error(toy: ToyBackend, values: list):
    with pytest.raises(RewardError, match="reward"):
        episode(make(toy, lambda completions, **_: values), seed=0)


@pytest.mark.parametrize("action", [-1, 12, 1.5, True, [0], None])
def test_an_action_that_is_no_point(toy: ToyBackend, action: Any):
    env = make(toy)
    env.reset(seed=0)
    with pytest.raises(InvalidValue, match=r"action must be an integer in \[0, 11\]"):
        env.step(action)


def test_a_vocabulary_smaller_than_the_sketch():
    env = chain(head=64, tail=32)
    obs, _ = env.reset(seed=0)
    assert obs["points"].shape == (96, 6)
    assert env.observation_space.contains(obs)
    episode(env)


def test_stepping_needs_an_episode(toy: ToyBackend):
    env = make(toy)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(0)
    episode(env, seed=0)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(0)
    env.reset()
    env.close()
    env.close()
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": []}, DataError, "the prompt list is empty"),
        ({"prompts": [{"id": "blank", "prompt": ""}]}, DataError, "'prompt' must be text"),
        ({"max_new_tokens": 0}, InvalidValue, "max_new_tokens must be >= 1, got 0"),
        ({"head": 0}, InvalidValue, "sketch head must be >= 1"),
        ({"render_mode": "human"}, InvalidValue, "render_mode must be None or 'ansi'"),
        ({"max_new_tokens": 1 << 20}, DataError, "exceeds the base model's context"),
    ],
)
def test_arguments_that_cannot_be_used(toy: ToyBackend, arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make(toy, **arguments)


def test_nan_logits_stop_the_episode():
    table = torch.zeros(3, 3)
    table[2, 1] = math.nan
    env = make(ToyBackend(table), prompts=[{"id": "w", "prompt": "w2"}])
    with pytest.raises(InvalidLogits, match="NaN"):
        env.reset()


def test_rendering(toy: ToyBackend):
    assert make(toy).render() is None
    env = make(toy, render_mode="ansi")
    assert env.render() == ""
    env.reset(seed=0, options={"prompt_id": "p3"})
    assert env.render() == "w3\n"
    token = env.step(1)[-1]["token_id"]
    assert env.render() == f"w3\n{toy.decode([token])}"
