"""Choosing one heuristic for all completions of a prompt: a contextual bandit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from asn_envs.decoding import checked_actions
from asn_envs.infos import Info
from asn_envs.scoring import Episode, score
from asn_envs.sources import BackendSource, PromptsSource, RewardSource, find_prompt
from asn_envs.spaces import observation_space
from asn_envs.strategies import PIPELINE, StrategiesSource, as_strategies, checked_budgets, needs_of
from asn_envs.task import DEFAULT_BACKEND, Task, checked_options
from asn_rl.errors import ConfigError, InvalidValue
from asn_rl.evaluation.reward_log import RewardLog, load_reward_log
from asn_rl.evaluation.statistics import masked_mean
from asn_rl.rollout import RolloutConfig, rollout

Obs = dict[str, Any]
MOST_SAMPLES = 1 << 16
"""bound of the parallel-sample budget, for the observation space"""


class StrategyBanditEnv(gym.Env[Obs, np.int64]):
    """Choose the heuristic that draws all completions of a prompt (the bandit of Su et al. 2026, arXiv:2603.09065).

    ## Description
    An episode is one step: a prompt and a parallel-sample budget B are shown, the agent names a strategy, B completions
    are drawn with it from the frozen base model, and the best of them is paid. With `log` nothing is generated: B
    different samples of the logged cell (prompt, strategy) are drawn instead, so that any learner trains in seconds.

    ## Action Space
    `Discrete(A)`, the index of a strategy in the list given, or among the log's `actions`.

    ## Observation Space
    `Dict(prompt_embedding: Box(D,), budget: Box(1,), context: Box(8,))`, float32.

    * `prompt_embedding`: the base model's hidden state at the last prompt token, divided by its root mean square, so
      that every entry lies in [-sqrt(D), sqrt(D)] whatever the prompt (the bound is the next integer). A zero vector
      stays zero. With `log`: `features` as they are, bounded by their least and greatest value over its prompts.
    * `budget`: log2(B), in [0, 16].
    * `context`: that of `DecodingEnv` before the first token. Absent with `log`.

    The observation after the step is the same one.

    ## Rewards
    The greatest reward of the B completions (`pay="max"`; for a reward of 0 or 1 this is pass@B), or their mean. The
    reward function is called once, with all B completions. Completions it does not apply to are left out; where that is
    all of them, the reward is 0.0 and `info["reward_masked"]` True.

    ## Starting State
    A prompt drawn uniformly, then a budget drawn uniformly from `budgets`; `reset(options={"prompt_id": ID})` chooses
    the prompt.

    ## Episode End
    Termination, at the first step.

    ## Information
    Always `prompt_id` (str) and `samples` (int, B); after the step `strategy` (str), `rewards` (float64, (B,), NaN:
    masked) and `reward_masked` (bool).

    ## Arguments
    * `prompts`, `reward`, `backend`, `max_new_tokens`, `head`, `tail`: as for `DecodingEnv`.
    * `strategies`, `pipeline`: as for `StrategyDecodingEnv`.
    * `log`: instead of prompts, reward and strategies, the folder of an `asn_rl.evaluation.reward_log.RewardLog` in
      which every action was run, or the log itself.
    * `budgets`: parallel-sample budgets, one of them an episode; with `log`, none above its S.
    * `pay`: "max" or "mean".

    ## Version History
    * v0: first version.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        prompts: PromptsSource | None = None,
        reward: RewardSource | None = None,
        strategies: StrategiesSource | None = None,
        backend: BackendSource = DEFAULT_BACKEND,
        *,
        log: RewardLog | str | Path | None = None,
        pipeline: str = PIPELINE,
        budgets: Sequence[int] = (1,),
        pay: Literal["max", "mean"] = "max",
        max_new_tokens: int = RolloutConfig.max_new_tokens,
        head: int = RolloutConfig.head,
        tail: int = RolloutConfig.tail,
    ) -> None:
        if pay not in ("max", "mean"):
            raise InvalidValue("pay", pay, "'max' or 'mean'")
        self._pay = pay
        if log is not None:
            if not (prompts is None and reward is None and strategies is None):
                raise ConfigError("log takes the place of prompts, reward and strategies; give one or the other")
            self._arms: _Generated | _Logged = _Logged(log)
        elif prompts is None or reward is None or strategies is None:
            raise ConfigError("give prompts, reward and strategies, or a log of rewards")
        else:
            limits = RolloutConfig(max_new_tokens, head, tail)
            self._arms = _Generated(Task.make(prompts, reward, backend, limits), strategies, pipeline)
        most, why = self._arms.most_samples
        self._budgets = checked_budgets(budgets, most, why)
        self.names = self._arms.names
        self.action_space = Discrete(len(self.names))
        budget = Box(0.0, math.log2(MOST_SAMPLES), (1,), np.float32)
        self.observation_space = gym.spaces.Dict({**self._arms.spaces(), "budget": budget})
        self._state: tuple[int, int] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, Info]:
        """Show a prompt and a budget.

        Args:
            seed: seeds prompts, budgets and completions from here on.
            options: `{"prompt_id": ID}` chooses the prompt.

        Raises:
            UnknownName: no such prompt or option.
        """
        super().reset(seed=seed)
        prompt = self._arms.choose_prompt(self.np_random, checked_options(options, ["prompt_id"]).get("prompt_id"))
        self._state = prompt, self._budgets[int(self.np_random.integers(len(self._budgets)))]
        return self._seen(*self._state)

    def step(self, action: np.int64 | int) -> tuple[Obs, float, bool, bool, Info]:
        """Draw the completions, and pay for them.

        Raises:
            InvalidValue: the action is no strategy.
            ResetNeeded: no episode is under way.
            RewardError: the reward function broke its contract.
        """
        chosen = int(checked_actions(action, (), len(self.names), "strategy"))
        if self._state is None:
            raise ResetNeeded("no episode is under way; call reset() before step()")
        (prompt, samples), self._state = self._state, None
        rewards = self._arms.rewards(prompt, chosen, samples, self.np_random)
        masked = bool(np.isnan(rewards).all())
        paid = 0.0 if masked else float(np.nanmax(rewards) if self._pay == "max" else masked_mean(rewards))
        obs, info = self._seen(prompt, samples)
        news = {"strategy": self.names[chosen], "rewards": rewards, "reward_masked": masked}
        return obs, paid, True, False, info | news

    def _seen(self, prompt: int, samples: int) -> tuple[Obs, Info]:
        obs = {**self._arms.observe(prompt), "budget": np.array([math.log2(samples)], dtype=np.float32)}
        return obs, {"prompt_id": self._arms.prompt_id(prompt), "samples": samples}


class _Generated:
    """Completions of the base model, as they are asked for."""

    most_samples = (MOST_SAMPLES, "so many completions of a prompt are drawn together")

    def __init__(self, task: Task, strategies: StrategiesSource, pipeline: str) -> None:
        policies = as_strategies(strategies, pipeline)
        if "condition" in needs_of(policies):
            raise InvalidValue("strategies", list(policies), "policies without a condition", "there is none to give")
        self.task, self.names, self._policies = task, list(policies), list(policies.values())
        self._generation = task.generation(1, {"prompt_embedding"})
        self._known: dict[int, Obs] = {}

    def spaces(self) -> dict[str, Box]:
        width = self.task.backend.hidden_size
        bound = math.floor(math.sqrt(width)) + 1
        context = observation_space(self.task.limits.size.points)["context"]
        assert isinstance(context, Box)
        return {"prompt_embedding": Box(-bound, bound, (width,), np.float32), "context": context}

    def choose_prompt(self, rng: np.random.Generator, prompt_id: str | None) -> int:
        return self.task.choose_prompt(rng, prompt_id)

    def prompt_id(self, prompt: int) -> str:
        return self.task.prompts[prompt].id

    def observe(self, prompt: int) -> Obs:
        """Copies of what is known of a prompt; one prefill, the first time that it is seen."""
        if prompt not in self._known:
            self._generation.begin([0], [self.task.prompts[prompt]], [self.task.prompt_ids[prompt]])
            obs = self._generation.observation()
            self._generation.clear()
            assert obs.prompt_embedding is not None
            seen = {"prompt_embedding": unit_mean_square(obs.prompt_embedding), "context": obs.context}
            self._known[prompt] = {name: value[0].cpu().numpy() for name, value in seen.items()}
        return {name: value.copy() for name, value in self._known[prompt].items()}

    def rewards(self, prompt: int, chosen: int, samples: int, rng: np.random.Generator) -> np.ndarray:
        """(samples,) float64 rewards of fresh completions; NaN: masked."""
        row, task = self.task.prompts[prompt], self.task
        seed = int(rng.integers(2**62))
        drawn = rollout(self._policies[chosen], task.backend, [row], task.limits, num_generations=samples, seed=seed)
        completions = zip(drawn.completion_ids, drawn.completions, drawn.terminated.tolist(), strict=True)
        values = score(task.reward, [Episode(row, *completion) for completion in completions])
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


class _Logged:
    """Rewards that were recorded before."""

    def __init__(self, source: RewardLog | str | Path) -> None:
        log = source if isinstance(source, RewardLog) else load_reward_log(Path(source))
        if log.propensities is not None:
            raise InvalidValue("log", "one with drawn actions", "a log in which every action was run on every prompt")
        if not log.features.shape[1]:
            raise InvalidValue("log.features shape", log.features.shape, "(P, D) with D >= 1", "the agent sees them")
        self.log, self.names = log, list(log.actions)
        self._features = log.features.astype(np.float32)
        self._index = {name: i for i, name in enumerate(log.prompt_ids)}
        self.most_samples = (log.rewards.shape[2], "the log holds no more samples of a prompt and strategy")

    def spaces(self) -> dict[str, Box]:
        low, high = self._features.min(0), self._features.max(0)
        same = low == high  # a box of no width is a warning of Gymnasium's checker
        return {"prompt_embedding": Box(np.where(same, low - 1, low), np.where(same, high + 1, high), dtype=np.float32)}

    def choose_prompt(self, rng: np.random.Generator, prompt_id: str | None) -> int:
        return int(rng.integers(len(self._index))) if prompt_id is None else find_prompt(self._index, prompt_id)

    def prompt_id(self, prompt: int) -> str:
        return self.log.prompt_ids[prompt]

    def observe(self, prompt: int) -> Obs:
        return {"prompt_embedding": self._features[prompt].copy()}

    def rewards(self, prompt: int, chosen: int, samples: int, rng: np.random.Generator) -> np.ndarray:
        """(samples,) rewards of different logged samples; NaN: masked."""
        cell = self.log.rewards[prompt, chosen]
        return cell[rng.choice(len(cell), samples, replace=False)]


def unit_mean_square(values: Tensor) -> Tensor:
    """(..., D) rows divided by their root mean square, so that no entry exceeds sqrt(D); rows of zeros stay."""
    return values / values.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(values.dtype).tiny)
