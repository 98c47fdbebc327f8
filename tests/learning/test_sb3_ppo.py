"""stable-baselines3's PPO, unmodified, learns the toy environment. About 15 s on one thread."""

from __future__ import annotations

import warnings

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from torch import Tensor

from asn_envs.toy import STATES, base_return, optimal_return, order_keeping_return

TOY = "asn_envs:asn/ToyDecoding-v0"


def test_the_environment_checker_of_sb3():
    with warnings.catch_warnings():
        # Advice to flatten matrices; MultiInputPolicy flattens them itself.
        warnings.filterwarnings("ignore", "Your observation points has an unconventional shape", UserWarning)
        check_env(gym.make(TOY).unwrapped)


def toy() -> gym.Env:
    """PPO bootstraps at truncations: the observed token limit must reach it as termination."""
    return gym.make(TOY, limit_terminates=True)


def greedy_return(model: PPO) -> float:
    """Exact return of the model's most probable actions: only the prompt is random, and there are four."""
    env, total = toy(), 0.0
    for word in STATES:
        obs, _ = env.reset(options={"prompt_id": word})
        ended = False
        while not ended:
            action, _ = model.predict(obs, deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            ended = terminated or truncated
    return total / len(STATES)


def test_ppo_learns_the_toy():
    model = PPO("MultiInputPolicy", toy(), n_steps=512, learning_rate=2e-3, gamma=1.0, seed=0, device="cpu")
    assert greedy_return(model) < order_keeping_return()
    model.learn(4096)
    learned = greedy_return(model)
    gap_closed = (learned - base_return()) / (optimal_return() - base_return())
    assert gap_closed >= 0.9, f"PPO reached {learned:.3f} of {optimal_return()}; the base model has {base_return():.3f}"


def test_training_repeats_by_seed():
    def weights() -> list[Tensor]:
        model = PPO("MultiInputPolicy", toy(), n_steps=64, n_epochs=1, seed=0, device="cpu").learn(128)
        return [part.detach().clone() for part in model.policy.parameters()]

    first, again = weights(), weights()
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
