"""Wall time of PPO to 95 % of the optimal return on the toy environment, against stable-baselines3's PPO.

Training ends when fresh completions, sampled as in training (256, on all four prompts), have a mean return of 0.95 of
1.0; they are drawn after every update, and their time does not count. stable-baselines3 runs on `asn/ToyDecoding-v0`
in its own vectorisation (`make_vec_env`); that is the figure. A second one gives it `DecodingVectorEnv` through an
adapter, so that both sides step one batched base model.

Ours: `asn_rl.training.ppo` with everything that a run writes. Settings of both sides were chosen by hand for time to
the goal, on other seeds. stable-baselines3: environments 1 to 64, steps 8 to 512, batches 32 to 256, learning rates
2e-3 to 1e-2, clipping 0.2 to 0.6, default network; gamma 1 on both sides.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from asn_rl.threads import limit_spinning

limit_spinning()

import gymnasium as gym
import numpy as np
import torch
from _benchmark import finish, options
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from asn_envs.toy import LENGTH, SIZE, STATES, WORDS, RightWords, ToyDecodingVectorEnv, optimal_return, toy_table
from asn_policies import OrderStatisticsNetwork
from asn_rl.backends.toy import ToyBackend
from asn_rl.metrics import MetricsLogger
from asn_rl.protocols import Policy
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.threads import set_threads
from asn_rl.training.ppo import PPOConfig, Trainer
from asn_rl.types import Prompt

GOAL, SHARE, EPISODES = 5.0, 0.95, 256
ENOUGH = SHARE * optimal_return()
OURS = {
    "num_generations": 16,
    "num_iterations": 8,
    "learning_rate": 4e-2,
    "critic_learning_rate": 4e-2,
    "epsilon": 0.6,
    "minibatch_tokens": 4096,
    "beta": 0.0,
}
THEIRS = {"n_steps": 8, "batch_size": 64, "learning_rate": 5e-3, "clip_range": 0.4}
THEIRS_BATCHED = {"n_steps": 8, "batch_size": 128, "learning_rate": 1e-2, "clip_range": 0.4}

PROMPTS = [Prompt(word, word) for word in STATES]
BACKEND = ToyBackend(toy_table(), WORDS)
ROLLOUT = RolloutConfig(max_new_tokens=LENGTH, head=SIZE["head"], tail=SIZE["tail"])
right_words = RightWords()


def main() -> int:
    arguments = options(__doc__ or "", "python scripts/benchmark_ppo.py --seeds 5", seeds=5)
    set_threads(arguments.threads)
    seeds = range(100, 100 + (3 if arguments.quick else arguments.seeds))
    sides: dict[str, Callable[[int], tuple[float, int]]] = {
        "asn_rl": ours,
        "sb3": theirs,
        "sb3, batched": theirs_batched,
    }
    for side in (ours, theirs_batched):
        side(0)  # what is imported or compiled at first use
    medians = {}
    for name, side in sides.items():
        runs = [side(seed) for seed in seeds]
        medians[name] = statistics.median(seconds for seconds, _ in runs)
        each = ", ".join(f"{seconds:.2f} s ({tokens} tokens)" for seconds, tokens in runs)
        print(f"{name}: median {medians[name]:.2f} s; {each}", flush=True)
    print(f"against stable-baselines3 on DecodingVectorEnv: {medians['sb3, batched'] / medians['asn_rl']:.2f}")
    return finish("benchmark_ppo", medians["sb3"] / medians["asn_rl"], GOAL, at_least=True)


def until_enough(update: Callable[[], int], mean_return: Callable[[], float], limit: int = 40_000) -> tuple[float, int]:
    """Seconds that updates took until the return was enough, and the tokens drawn for them; infinite at the limit."""
    seconds, tokens = 0.0, 0
    while tokens < limit:
        begin = time.perf_counter()
        tokens += update()
        seconds += time.perf_counter() - begin
        if mean_return() >= ENOUGH:
            return seconds, tokens
    return float("inf"), tokens


def ours(seed: int) -> tuple[float, int]:
    with TemporaryDirectory() as folder:
        begin = time.perf_counter()
        torch.manual_seed(seed)
        policy = OrderStatisticsNetwork(width=16, point_width=8)
        rewards = RewardSuite([RewardConfig(f"{__name__}:right_words")])
        config = PPOConfig(prompts_per_step=len(PROMPTS), seed=seed, **OURS)  # type: ignore[arg-type]
        trainer = Trainer(policy, policy, BACKEND, PROMPTS, rewards, ROLLOUT, config, Path(folder), {})
        with MetricsLogger(Path(folder)) as log:
            made = time.perf_counter() - begin

            def update() -> int:
                length = trainer.train_step(log)["policy/length"]
                return round(length * config.num_generations * len(PROMPTS))

            seconds, tokens = until_enough(update, lambda: our_return(policy))
    return made + seconds, tokens


def our_return(policy: Policy) -> float:
    out = rollout(policy, BACKEND, PROMPTS, ROLLOUT, num_generations=EPISODES // len(PROMPTS), seed=-1)
    scores = right_words([str(prompt.content) for prompt in out.prompts], out.completions)
    return float(np.mean([score for score in scores if score is not None]))


def theirs(seed: int) -> tuple[float, int]:
    env = make_vec_env(lambda: gym.make("asn_envs:asn/ToyDecoding-v0", limit_terminates=True), 16, seed=seed)
    return _theirs(env, seed, THEIRS)


def theirs_batched(seed: int) -> tuple[float, int]:
    return _theirs(Batched(32, seed), seed, THEIRS_BATCHED)


def _theirs(env: VecEnv, seed: int, settings: dict[str, Any]) -> tuple[float, int]:
    begin = time.perf_counter()
    torch.manual_seed(seed)
    model = PPO("MultiInputPolicy", env, gamma=1.0, device="cpu", **settings)
    made = time.perf_counter() - begin
    size = settings["n_steps"] * env.num_envs

    def update() -> int:
        model.learn(size, reset_num_timesteps=False)
        return size

    seconds, tokens = until_enough(update, lambda: their_return(model))
    return made + seconds, tokens


def their_return(model: PPO) -> float:
    env = ToyDecodingVectorEnv(num_envs=EPISODES, autoreset_mode="Disabled")
    obs, _ = env.reset(seed=0, options={"prompt_id": [*STATES] * (EPISODES // len(STATES))})
    total = np.zeros(EPISODES)
    while env.active.any():
        obs, rewards, *_ = env.step(model.predict(obs)[0])  # type: ignore[arg-type]
        total += rewards
    return float(total.mean())


class Batched(VecEnv):
    """`ToyDecodingVectorEnv` as stable-baselines3 wants it."""

    def __init__(self, num_envs: int, seed: int) -> None:
        self.env = ToyDecodingVectorEnv(num_envs=num_envs, limit_terminates=True)
        self.first_seed = seed
        super().__init__(num_envs, self.env.single_observation_space, self.env.single_action_space)

    def reset(self) -> Any:
        return self.env.reset(seed=self.first_seed)[0]

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        obs, rewards, terminated, truncated, news = self.env.step(self.actions)
        ended = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for row in np.flatnonzero(ended):
            infos[row]["terminal_observation"] = news["final_obs"][row]
        return obs, rewards, ended, infos

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("the learner sets nothing")

    def env_method(self, method_name: str, *arguments: Any, indices: Any = None, **named: Any) -> list[Any]:
        raise NotImplementedError("the learner calls nothing")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


if __name__ == "__main__":
    sys.exit(main())
