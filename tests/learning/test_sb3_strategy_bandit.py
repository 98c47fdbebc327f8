"""stable-baselines3's PPO, unmodified, learns which heuristic suits which prompt. About 15 s on one thread."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3 import PPO

from asn_rl.backends.toy import ToyBackend

BANDIT = "asn_envs:asn/StrategyBandit-v0"
TOY = ToyBackend.random(vocab=16, seed=0)
WORDS = range(1, 9)
STRATEGIES = [
    {"name": "greedy", "processors": [{"name": "greedy"}]},
    {"name": "T=3", "processors": [{"name": "temperature", "params": {"temperature": 3.0}}]},
]


def wanted(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
    """After an odd word the most probable next word is right, after an even one every other word."""
    firsts = zip(prompts, completion_ids, strict=True)
    return [float((ids[0] == int(TOY.table[int(p[1:])].argmax())) == int(p[1:]) % 2) for p, ids in firsts]


def bandit() -> gym.Env:
    prompts = [{"id": f"p{i}", "prompt": f"w{i}"} for i in WORDS]
    options: dict[str, Any] = {"budgets": [2], "max_new_tokens": 1, "head": 16, "tail": 1}
    return gym.make(BANDIT, prompts=prompts, reward=wanted, strategies=STRATEGIES, backend=TOY, **options)


def test_ppo_learns_which_strategy_suits_which_prompt():
    model = PPO("MultiInputPolicy", bandit(), n_steps=128, learning_rate=5e-3, gamma=1.0, seed=0, device="cpu")
    model.learn(1024)
    env = bandit()
    for word in WORDS:
        obs, _ = env.reset(options={"prompt_id": f"p{word}"})
        action, _ = model.predict(obs, deterministic=True)
        assert STRATEGIES[int(action)]["name"] == ("greedy" if word % 2 else "T=3")


def test_training_repeats_by_seed():
    def weights() -> list[np.ndarray]:
        model = PPO("MultiInputPolicy", bandit(), n_steps=64, n_epochs=1, seed=0, device="cpu").learn(64)
        return [part.detach().numpy().copy() for part in model.policy.parameters()]

    for first, again in zip(weights(), weights(), strict=True):
        np.testing.assert_array_equal(first, again)
