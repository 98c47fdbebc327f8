"""Gymnasium 1.4: its checker, its registry, its wrappers. Warnings are errors here as everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import NormalizeReward, RecordEpisodeStatistics

from asn_envs.decoding import DecodingEnv
from asn_envs.strategy import StrategyDecodingEnv
from asn_envs.strategy_bandit import StrategyBanditEnv
from asn_envs.toy import LENGTH, ToyDecodingVectorEnv
from asn_envs.vector import DecodingVectorEnv
from asn_rl.backends.hf import HFBackend

DECODING = "asn_envs:asn/Decoding-v0"
TOY = "asn_envs:asn/ToyDecoding-v0"
STRATEGY = "asn_envs:asn/StrategyDecoding-v0"
BANDIT = "asn_envs:asn/StrategyBandit-v0"
STRATEGIES = [{"name": "greedy", "processors": [{"name": "greedy"}]}, {"name": "T=1", "processors": []}]


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """JSON arguments of a small decoding task, its reward in an importable module."""

    def length(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
        return [float(len(ids)) for ids in completion_ids]

    module = types.ModuleType("rewards_of_a_user")
    module.length = length  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return {
        "prompts": [{"id": f"p{i}", "prompt": f"w{i}", "answer": i} for i in range(1, 4)],
        "reward": "rewards_of_a_user:length",
        "backend": {"kind": "toy", "model": "random:16:0"},
        "max_new_tokens": 6,
        "head": 5,
        "tail": 2,
    }


def test_registration_imports_nothing_heavy():
    code = "import asn_envs, sys; print([m for m in ('torch', 'transformers', 'asn_rl') if m in sys.modules])"
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=paths)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("render_mode", [None, "ansi"])
def test_check_env_on_the_toy(render_mode: str | None):
    check_env(gym.make(TOY, render_mode=render_mode).unwrapped)


def test_check_env_on_a_decoding_task(arguments: dict[str, Any]):
    check_env(gym.make(DECODING, **arguments).unwrapped)
    check_env(gym.make(DECODING, **arguments | {"max_new_tokens": 1, "limit_terminates": True}).unwrapped)


@pytest.mark.parametrize("options", [{}, {"budgets": [1, 4], "confident_above": 0.5, "limit_terminates": True}])
def test_check_env_on_a_choice_of_strategies(arguments: dict[str, Any], options: dict[str, Any]):
    env = gym.make(STRATEGY, strategies=STRATEGIES, **arguments | options)
    assert env.spec is not None
    check_env(gym.make(EnvSpec.from_json(env.spec.to_json())).unwrapped)
    envs = gym.make_vec(STRATEGY, num_envs=2, strategies=STRATEGIES, **arguments | options)
    envs.reset(seed=0)
    for _ in range(10):
        assert envs.observation_space.contains(envs.step(envs.action_space.sample())[0])


def test_check_env_on_the_bandit(arguments: dict[str, Any]):
    env = gym.make(BANDIT, strategies=STRATEGIES, budgets=[1, 3], **arguments)
    assert env.spec is not None
    check_env(gym.make(EnvSpec.from_json(env.spec.to_json())).unwrapped)


def contains_seven(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
    return [float("7" in text) for text in completions]


def text_length(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
    return [float(len(text)) for text in completions]


def test_check_env_on_the_real_model(smollm: HFBackend):
    env = DecodingEnv(
        [{"id": "sum", "prompt": "What is 3 + 4?", "answer": "7"}, {"id": "animal", "prompt": "Name an animal."}],
        contains_seven,
        smollm,
        max_new_tokens=6,
    )
    env.spec = EnvSpec("asn/Decoding-v0", entry_point=lambda render_mode=None: env)  # type: ignore[arg-type]
    check_env(env, skip_render_check=True, skip_close_check=True)


def test_strategies_on_the_real_model(smollm: HFBackend):
    prompts = [{"id": "sum", "prompt": "What is 3 + 4?"}, {"id": "animal", "prompt": "Name an animal."}]
    decoding = StrategyDecodingEnv(
        prompts, contains_seven, STRATEGIES, smollm, max_new_tokens=4, budgets=[2, 4], confident_above=0.95
    )
    bandit = StrategyBanditEnv(prompts, contains_seven, STRATEGIES, smollm, max_new_tokens=8, budgets=[1, 2])
    for env in (decoding, bandit):
        env.spec = EnvSpec("asn/Env-v0", entry_point=lambda render_mode=None, env=env: env)  # type: ignore[arg-type]
        check_env(env, skip_render_check=True, skip_close_check=True)
    bandit.reset(seed=0, options={"prompt_id": "sum"})
    assert bandit.step(0)[1] == 1.0  # greedy: "3 + 4 is equal to 7."


def test_vector_environment_on_the_real_model(smollm: HFBackend):
    texts = {"sum": "What is 3 + 4?", "animal": "Name an animal."}
    env = DecodingVectorEnv(
        [{"id": name, "prompt": text} for name, text in texts.items()],
        text_length,
        smollm,
        num_envs=2,
        max_new_tokens=5,
        autoreset_mode="Disabled",
    )
    greedy = np.zeros(2, dtype=np.int64)
    env.reset(seed=0, options={"prompt_id": list(texts)})
    tokens = [env.step(greedy)[-1]["token_id"][0] for _ in range(2)]
    env.reset(options={"reset_mask": np.array([False, True]), "prompt_id": "animal"})
    assert env.num_cohorts == 2
    steps = [env.step(greedy) for _ in range(3)]
    rows = np.array([step[-1]["token_id"] for step in steps]).T.tolist()
    for text, ids in zip(texts.values(), (tokens + rows[0], rows[1]), strict=True):
        logits, _ = smollm.score(smollm.encode(text), ids)
        assert ids == logits.argmax(-1).tolist()
    _, rewards, _, truncated, infos = steps[-1]
    assert truncated.tolist() == [True, False]
    completion = smollm.decode(tokens + rows[0])
    assert infos["completion"][0] == completion
    assert rewards.tolist() == [float(len(completion)), 0.0]
    assert env.num_cohorts == 1


def test_spec_round_trip(arguments: dict[str, Any]):
    env = gym.make(DECODING, **arguments)
    assert env.spec is not None
    copy = gym.make(EnvSpec.from_json(env.spec.to_json()))
    obs, info = env.reset(seed=1)
    again, info_again = copy.reset(seed=1)
    np.testing.assert_equal((obs, info), (again, info_again))
    assert json.loads(env.spec.to_json())["kwargs"] == arguments


def test_the_checkers_wrappers_accept_every_step(arguments: dict[str, Any]):
    env = gym.make(DECODING, disable_env_checker=False, **arguments)
    env.action_space.seed(0)
    for episode in range(10):
        _, ended = env.reset(seed=episode), False
        while not ended:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            ended = terminated or truncated


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_make_vec(arguments: dict[str, Any], mode: str):
    envs = gym.make_vec(DECODING, num_envs=3, autoreset_mode=mode, **arguments)
    assert isinstance(envs.unwrapped, DecodingVectorEnv)
    assert envs.metadata["autoreset_mode"] is AutoresetMode(mode)
    assert envs.num_envs == 3
    assert envs.action_space.shape == (3,)
    obs, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(obs)
    obs, *_ = envs.step(envs.action_space.sample())
    assert envs.observation_space.contains(obs)
    assert envs.spec is not None
    copy = gym.make_vec(EnvSpec.from_json(envs.spec.to_json()))
    np.testing.assert_equal(copy.reset(seed=4)[0], envs.reset(seed=4)[0])
    copy.close()
    copy.close()


def test_the_class_keeps_no_mode(arguments: dict[str, Any]):
    gym.make_vec(DECODING, autoreset_mode="Disabled", **arguments)
    assert "autoreset_mode" not in DecodingEnv.metadata


def test_make_vec_passes_max_episode_steps(arguments: dict[str, Any]):
    envs = gym.make_vec(DECODING, num_envs=2, max_episode_steps=2, autoreset_mode="Disabled", **arguments)
    envs.reset(seed=0)
    envs.step(np.zeros(2, dtype=np.int64))
    _, rewards, terminated, truncated, _ = envs.step(np.zeros(2, dtype=np.int64))
    assert (terminated | truncated).all()
    np.testing.assert_array_equal(rewards, 2.0)
    toys = gym.make_vec(TOY, num_envs=2, max_episode_steps=2)
    assert isinstance(toys.unwrapped, ToyDecodingVectorEnv)
    toys.reset(seed=0)


def test_gymnasiums_own_vectorizer_runs_the_single_environment(arguments: dict[str, Any]):
    envs = gym.make_vec(DECODING, num_envs=2, vectorization_mode="sync", **arguments)
    assert isinstance(envs.unwrapped, SyncVectorEnv)
    envs.reset(seed=0)
    for _ in range(15):
        envs.step(envs.action_space.sample())


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_episode_statistics(mode: str):
    envs = RecordEpisodeStatistics(gym.make_vec(TOY, num_envs=3, autoreset_mode=mode))
    obs, _ = envs.reset(seed=0)
    for step in range(3 * LENGTH):
        best = (obs["context"][:, 2] > 1.2).astype(np.int64)
        obs, _, terminated, truncated, infos = envs.step(best)
        ended = terminated | truncated
        assert ended.all() == ((step + 1) % LENGTH == 0)
        if ended.all():
            np.testing.assert_allclose(infos["episode"]["r"], 1.0)
            np.testing.assert_array_equal(infos["episode"]["l"], LENGTH)
            if mode == "Disabled":
                obs, _ = envs.reset(options={"reset_mask": ended})
    assert len(envs.return_queue) == 9


def test_partial_resets_keep_the_statistics_of_other_rows():
    envs = RecordEpisodeStatistics(gym.make_vec(TOY, num_envs=3, autoreset_mode="Disabled"))
    envs.reset(seed=0)
    for _ in range(3):
        envs.step(np.zeros(3, dtype=np.int64))
    envs.reset(options={"reset_mask": np.array([True, False, False])})
    assert envs.episode_lengths.tolist() == [0, 3, 3]


def test_episodes_are_counted_once_while_ended_rows_idle():
    envs = RecordEpisodeStatistics(gym.make_vec(TOY, num_envs=2, autoreset_mode="Disabled"))
    envs.reset(seed=0)
    last_word_ends = np.array([4, 0])
    _, _, terminated, _, _ = envs.step(last_word_ends)
    assert terminated.tolist() == [True, False]
    for _ in range(LENGTH - 1):
        envs.step(np.zeros(2, dtype=np.int64))
    assert list(envs.length_queue) == [1, LENGTH]


def test_vector_wrappers_of_gymnasium():
    envs = NormalizeReward(gym.make_vec(TOY, num_envs=3))
    envs.reset(seed=0)
    for _ in range(20):
        _, rewards, *_ = envs.step(envs.action_space.sample())
        assert np.isfinite(rewards).all()
