"""Decoding as a Gymnasium environment: one completion at a time."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from torch import Tensor

from asn_envs.generation import Drawn
from asn_envs.infos import Info, episode_info, state_info, token_info
from asn_envs.scoring import score
from asn_envs.sources import BackendSource, PromptsSource, RewardSource
from asn_envs.spaces import action_space, as_dict, observation_space
from asn_envs.task import DEFAULT_BACKEND, Task, checked_options
from asn_rl.errors import InvalidValue
from asn_rl.rollout import RolloutConfig
from asn_rl.types import Observation

Obs = dict[str, Any]


class DecodingEnv(gym.Env[Obs, np.int64]):
    """Sample a completion from a frozen language model, one token a step.

    ## Description
    The base model's next-token distribution is summarised by N = head + tail *points*: the `head` most probable
    tokens, one point each, and the rest in `tail` bins of probability (`asn_rl.ops.sketch`). The agent chooses a
    point; a token is drawn inside it in proportion to the base model; the base model reads it and the next step
    begins. Tokens are known by their numbers alone, so whatever the agent is, it cannot prefer a word for its
    identity.

    ## Action Space
    `Discrete(N)`, the index of a point; points are ordered by descending probability of their tokens, so for a
    distribution without ties action 0 is the most probable token. Some points are empty (`action_mask` in `info`,
    feature `nonempty`). An empty point is replaced by the nearest point before it that holds tokens, else by the
    nearest after it, and `info["empty_point"]` is True.

    ## Observation Space
    `Dict(points: Box(N, 6), context: Box(8,))`, float32. Values beyond a bound are clamped to it.

    | `points[:, i]` | feature | range | unit |
    |---|---|---|---|
    | 0 | logprob | [-100, 0] | nats, base log-probability of a token of the point |
    | 1 | gap | [0, 100] | nats below the most probable token |
    | 2 | mass_above | [0, 1] | base probability of all points before this one |
    | 3 | log_rank | [0, 20] | log(1 + tokens in the points before this one) |
    | 4 | log_count | [0, 20] | log of the number of tokens in the point |
    | 5 | nonempty | 0 or 1 | 1: the point holds tokens; 0: empty, and so are its other features |

    | `context[i]` | entry | range | unit |
    |---|---|---|---|
    | 0 | position | [0, 24] | log2(1 + tokens generated) |
    | 1 | tokens_left | [0, 24] | log2(1 + tokens left of the budget) |
    | 2 | entropy | [0, 20] | nats, base model, over the vocabulary |
    | 3 | varentropy | [0, 400] | nats^2, variance of the surprise |
    | 4 | max_logprob | [-20, 0] | nats, most probable token |
    | 5 | effective_support | [0, 20] | nats, -log sum p^2 over the vocabulary |
    | 6 | last_surprise | [0, 100] | nats, -log p of the previous token under the base model; 0 at the start |
    | 7 | mean_surprise | [0, 100] | nats, mean of the surprises so far; 0 at the start |

    The observation after the last token costs no forward pass: point 0 has probability 1, all others are empty, and
    the context holds the final counts and surprises.

    ## Rewards
    0 until the episode ends; then the reward function's value for the completion. The function has TRL's signature
    `f(prompts, completions, completion_ids=None, **columns) -> list[float | None]` and sees this one episode, with
    the prompt's columns, `terminated` and `prompt_id`. `None` (not applicable) gives 0.0 and
    `info["reward_masked"]` True: leave such episodes out of the loss. Group-aware rewards need `DecodingVectorEnv`.

    ## Starting State
    The prompt, through the backend's chat template, and no completion. The prompt is drawn uniformly with the
    environment's generator; `reset(options={"prompt_id": ID})` chooses it.

    ## Episode End
    1. Termination: the token drawn is one of the base model's end-of-sequence tokens.
    2. Truncation: the token budget is spent. The budget is observed (`tokens_left`) and the reward has been paid, so
       nothing of value follows (Pardo et al. 2018, arXiv:1712.00378). Learners that bootstrap at truncations, such
       as stable-baselines3, add an estimate of it that nothing corrects and learn worse for it: give them
       `limit_terminates=True`, which reports the limit as termination. The reward function's `terminated` and
       `info["end_of_sequence"]` do not depend on it.

    `TimeLimit` (`gym.make(max_episode_steps=...)`) below the budget cuts the episode before its reward is paid; lower
    `max_new_tokens` instead.

    ## Information
    `prompt_id` (str) and `action_mask` (bool, (N,)) always; after a step `token_id` (int), `base_logprob` (float,
    nats) and `empty_point` (bool); at the end also `completion` (str), `length` (int, tokens), `end_of_sequence`
    (bool, False: cut off by the token limit) and `reward_masked` (bool).

    ## Arguments
    For `gym.make` and `EnvSpec.to_json` all of them are JSON values; live objects may be given to the class itself.

    * `prompts`: list of `{"prompt", ...columns}`, or the path of a JSONL file of them; or a list of `Prompt`.
      `prompt` is text or chat messages; without an `id`, rows are called by their number.
    * `reward`: a name in `asn_rl.rewards.REWARDS` or "module:function"; or a function.
    * `backend`: dict of `BackendConfig` fields, "kind:model" ("toy:random:32:0"), or a model name or folder; or a
      backend. Environments of a process that name the same one share it.
    * `max_new_tokens`: token budget, the end-of-sequence token included.
    * `head`, `tail`: size of the sketch.
    * `limit_terminates`: report the token limit as termination, not as truncation.
    * `render_mode`: "ansi": `render()` returns the prompt and the text so far.

    ## Version History
    * v0: first version.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012
    action_meaning = "point"

    def __init__(
        self,
        prompts: PromptsSource,
        reward: RewardSource,
        backend: BackendSource = DEFAULT_BACKEND,
        *,
        max_new_tokens: int = RolloutConfig.max_new_tokens,
        head: int = RolloutConfig.head,
        tail: int = RolloutConfig.tail,
        limit_terminates: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.task = Task.make(prompts, reward, backend, RolloutConfig(max_new_tokens, head, tail))
        self.limit_terminates = limit_terminates
        self.render_mode = checked_render_mode(render_mode)
        self.observation_space = observation_space(self.task.limits.size.points)
        self.action_space = action_space(self.task.limits.size.points)
        self._num_actions = self.task.limits.size.points
        self._generation = self.task.generation(1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, Info]:
        """Begin a completion.

        Args:
            seed: seeds prompts and draws from here on.
            options: `{"prompt_id": ID}` chooses the prompt.

        Raises:
            UnknownName: no such prompt or option.
        """
        super().reset(seed=seed)
        self._begin(checked_options(options, ["prompt_id"]).get("prompt_id"))
        return self._seen(self._generation.observation())

    def step(self, action: np.int64 | int) -> tuple[Obs, float, bool, bool, Info]:
        """Draw a token inside a point.

        Raises:
            InvalidValue: the action is no point.
            ResetNeeded: no episode is under way.
            RewardError: the reward function broke its contract.
        """
        chosen = checked_actions(action, (), self._num_actions, self.action_meaning)
        if not self._generation.active.any():
            raise ResetNeeded("no episode is under way; call reset() before step()")
        drawn, news = self._draw(torch.from_numpy(chosen.reshape(1)).to(self.task.backend.device))
        obs, info = self._seen(self._generation.observation())
        info |= news
        terminated, truncated = bool(drawn.terminated[0]), bool(drawn.truncated[0])
        if not (terminated or truncated):
            return obs, 0.0, False, False, info
        episode = self._generation.episode(0, terminated)
        (value,) = score(self.task.reward, [episode])
        terminated = terminated or self.limit_terminates
        return obs, value or 0.0, terminated, not terminated, info | episode_info(episode, value)

    def render(self) -> str | None:
        """Prompt and text so far, in render mode "ansi"."""
        return self._generation.text(0) if self.render_mode == "ansi" else None

    def close(self) -> None:
        """Free the base model's cache; the base model itself may serve other environments."""
        self._generation.clear()

    def _begin(self, prompt_id: str | None) -> None:
        index = self.task.choose_prompt(self.np_random, prompt_id)
        self._generation.begin([0], [self.task.prompts[index]], [self.task.prompt_ids[index]])

    def _draw(self, action: Tensor) -> tuple[Drawn, Info]:
        """Draw a token under an action (1,), and what is to be told of it."""
        drawn = self._generation.advance(action, self._uniforms(1)[:, 0])
        return drawn, token_info(int(drawn.tokens[0]), float(drawn.base_logprobs[0]), bool(drawn.empty_point[0]))

    def _uniforms(self, count: int) -> Tensor:
        """(1, count) float64 draws in [0, 1)."""
        return torch.from_numpy(self.np_random.random((1, count))).to(self.task.backend.device)

    def _seen(self, observed: Observation) -> tuple[Obs, Info]:
        prompt = self._generation.prompts[0]
        assert prompt is not None
        obs = {name: value[0].cpu().numpy() for name, value in as_dict(observed).items()}
        return obs, self._state_info(prompt.id, observed)

    def _state_info(self, prompt_id: str, observed: Observation) -> Info:
        return state_info(prompt_id, observed.sketch.mask[0].cpu().numpy())


def checked_actions(actions: Any, shape: tuple[int, ...], count: int, meaning: str) -> np.ndarray:
    """Actions as int64 of `shape`; `InvalidValue` unless all of them are integers in [0, count)."""
    array = np.asarray(actions)
    allowed = f"integers of shape {shape} in [0, {count - 1}]" if shape else f"an integer in [0, {count - 1}]"
    if array.shape != shape or array.dtype.kind not in "iu":
        raise InvalidValue("action", actions, allowed, f"an action is the index of a {meaning}")
    outside = array[(array < 0) | (array >= count)]
    if outside.size:
        raise InvalidValue("action", int(outside.flat[0]), allowed, f"an action is the index of a {meaning}")
    return array.astype(np.int64)


def checked_render_mode(mode: str | None) -> str | None:
    if mode not in (None, "ansi"):
        raise InvalidValue("render_mode", mode, "None or 'ansi'")
    return mode
