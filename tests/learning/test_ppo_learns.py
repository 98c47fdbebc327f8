"""PPO solves the toy environment, and reaches the return that stable-baselines3's PPO reaches. About 15 s."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from asn_envs.toy import LENGTH, SIZE, STATES, WORDS, RightWords, order_keeping_return, toy_table
from asn_policies import OrderStatisticsNetwork
from asn_rl.backends.toy import ToyBackend
from asn_rl.protocols import Policy
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.training.ppo import PPOConfig, train
from asn_rl.types import Prompt

PROMPTS = [Prompt(word, word) for word in STATES]
BACKEND = ToyBackend(toy_table(), WORDS)
ROLLOUT = RolloutConfig(max_new_tokens=LENGTH, **SIZE)
CONFIG = PPOConfig(
    steps=12,
    prompts_per_step=4,
    num_generations=16,
    num_iterations=8,
    learning_rate=3e-2,
    critic_learning_rate=3e-2,
    epsilon=0.4,
    beta=0.0,
    save_every=12,
)

right_words = RightWords()


def our_return(policy: Policy) -> float:
    """Mean over 256 fresh completions."""
    out = rollout(policy, BACKEND, PROMPTS, ROLLOUT, num_generations=64, seed=99)
    scores = right_words([str(prompt.content) for prompt in out.prompts], out.completions)
    return float(np.mean([score for score in scores if score is not None]))


def our_training(folder: Path, config: PPOConfig) -> float:
    torch.manual_seed(0)
    policy = OrderStatisticsNetwork(width=16, point_width=8)
    rewards = RewardSuite([RewardConfig(f"{__name__}:right_words")])
    train(policy, policy, BACKEND, PROMPTS, rewards, ROLLOUT, config, folder)
    return our_return(policy)


def their_return(model: PPO, episodes: int = 256) -> float:
    """Mean over fresh episodes of sampled actions."""
    env = gym.make_vec("asn_envs:asn/ToyDecoding-v0", episodes, limit_terminates=True, autoreset_mode="Disabled")
    obs, _ = env.reset(seed=99, options={"prompt_id": [*STATES] * (episodes // 4)})
    total = np.zeros(episodes)
    for _ in range(LENGTH):
        obs, rewards, *_ = env.step(model.predict(obs)[0])
        total += rewards
        if not env.unwrapped.active.any():
            break
    return float(total.mean())


def their_training() -> float:
    """Settings as in `scripts/benchmark_ppo.py`."""
    env = make_vec_env(lambda: gym.make("asn_envs:asn/ToyDecoding-v0", limit_terminates=True), 16, seed=0)
    settings = {"learning_rate": 5e-3, "n_steps": 8, "batch_size": 64, "clip_range": 0.4, "gamma": 1.0}
    return their_return(PPO("MultiInputPolicy", env, seed=0, device="cpu", **settings).learn(2048))


def test_it_reaches_the_return_of_stable_baselines3(tmp_path: Path) -> None:
    ours, theirs = our_training(tmp_path, CONFIG), their_training()
    assert ours > 0.95 > order_keeping_return()
    assert ours == pytest.approx(theirs, abs=0.06)
