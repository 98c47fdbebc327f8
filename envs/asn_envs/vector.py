"""Many completions at a time, each step one batched forward of the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from asn_envs.decoding import DecodingEnv, checked_actions, checked_render_mode
from asn_envs.generation import Drawn
from asn_envs.infos import Info, episode_info, state_info, token_info
from asn_envs.scoring import score
from asn_envs.sources import BackendSource, PromptsSource, RewardSource
from asn_envs.spaces import action_space, as_dict, observation_space
from asn_envs.task import DEFAULT_BACKEND, Task, checked_options
from asn_rl.errors import InvalidValue
from asn_rl.rollout import RolloutConfig
from asn_rl.types import Observation


class DecodingVectorEnv(VectorEnv[dict[str, Any], Any, Any]):
    """`num_envs` copies of `DecodingEnv` on one base model.

    ## Description
    Actions, observations, rewards, ends and infos of every sub-environment are those of `DecodingEnv`, batched along
    the first axis; its documentation holds here. Sub-environment i of an environment seeded with `s` draws what a
    `DecodingEnv` seeded with `s + i` draws, and on a backend that is `batch_invariant` sees the same numbers.

    Two faces. `output="numpy"` returns NumPy arrays and works with Gymnasium's wrappers. `output="torch"` returns
    tensors on the base model's device (rewards float32, flags bool), takes tensors as actions; Gymnasium's own wrappers
    expect NumPy. Infos hold NumPy and Python values in both. `observation()` gives what an `asn_rl`
    policy takes, in both.

    ## Rewards
    One call of the reward function a step, with all episodes that end in it. Group-aware rewards therefore see a
    whole group only if its episodes end together; where they do not, collect completions from the infos and
    score them yourself, or use `asn_rl.rollout`.

    ## Autoreset
    * `SAME_STEP` (default): an episode that ends is replaced at once. Observation and info are the new episode's; the
      old one's last are in `infos["final_obs"]` (object array of dicts) and `infos["final_info"]`. A base-model
      session takes no new rows, so the rows reset in one step form a cohort, and a step costs one forward per cohort
      (`num_cohorts`): up to `num_envs` of them where episodes end at different times.
    * `DISABLED`: the caller resets with `options={"reset_mask": bool array (num_envs,)}`. Rows that have ended idle at
      no cost: their actions are ignored, reward 0, both flags False (they are True only in the step that ends an
      episode), and no entry in the info masks; `active` tells which rows are under way. Resetting everything at once
      keeps a step to one forward; this is the mode for groups.
    * `NEXT_STEP` is refused: the reset step ignores the action, so each episode would waste a decoding step and put
      a row into the batch that no learner may use.

    ## Arguments
    Those of `DecodingEnv`, and

    * `num_envs`: number of sub-environments.
    * `autoreset_mode`: "SameStep", "Disabled", or an `AutoresetMode`.
    * `output`: "numpy" or "torch".
    * `needs`: optional entries of `observation()` to capture: "hidden", "prompt_embedding", "history",
      "layer_logprobs". With "history" the latest `tracked` distinct tokens are points of their own, and N is `tracked`
      more; "layer_logprobs" are those of `layers`.
    * `tracked`, `layers`: as in `asn_rl.rollout.RolloutConfig`.
    * `max_episode_steps`: another bound on the token budget, as `make_vec` passes it; the smaller one holds.

    ## Version History
    * v0: first version.
    """

    action_meaning = "point"

    def __init__(
        self,
        prompts: PromptsSource,
        reward: RewardSource,
        backend: BackendSource = DEFAULT_BACKEND,
        *,
        num_envs: int = 1,
        max_new_tokens: int = RolloutConfig.max_new_tokens,
        head: int = RolloutConfig.head,
        tail: int = RolloutConfig.tail,
        limit_terminates: bool = False,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        output: Literal["numpy", "torch"] = "numpy",
        needs: Sequence[str] = (),
        tracked: int = RolloutConfig.tracked,
        layers: Sequence[int] = (),
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if num_envs < 1:
            raise InvalidValue("num_envs", num_envs, ">= 1")
        if output not in ("numpy", "torch"):
            raise InvalidValue("output", output, "'numpy' or 'torch'")
        budget = max_new_tokens if max_episode_steps is None else min(max_new_tokens, max_episode_steps)
        limits = RolloutConfig(budget, head, tail, tracked=tracked, layers=tuple(layers))
        self.task = Task.make(prompts, reward, backend, limits)
        self.num_envs = num_envs
        self.output = output
        self.limit_terminates = limit_terminates
        self.autoreset_mode = checked_autoreset_mode(autoreset_mode)
        self.metadata = DecodingEnv.metadata | {"autoreset_mode": self.autoreset_mode}
        self.render_mode = checked_render_mode(render_mode)
        self._generation = self.task.generation(num_envs, needs)
        self._num_actions = self._generation.points
        self.single_observation_space = observation_space(self._num_actions)
        self.single_action_space = action_space(self._num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs: list[np.random.Generator] = []

    @property
    def active(self) -> np.ndarray:
        """(num_envs,) bool, which rows have an episode under way."""
        return self._generation.active.cpu().numpy().copy()

    @property
    def num_cohorts(self) -> int:
        """Base-model forwards that the next step costs at most."""
        return len(self._generation.cohorts)

    def observation(self) -> Observation:
        """What an `asn_rl` policy takes: sketches (num_envs, N), context, and the entries in `needs`.

        Rows that have ended see a single point of probability 1. The tensors are the environment's own: do not write.
        """
        return self._generation.observation()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin a completion in every row, or in those that a mask names.

        Args:
            seed: row i, if it is reset, is seeded with `seed + i`.
            options: `reset_mask` (num_envs,) bool, True: reset this row; `prompt_id`, an id for all rows or a
                sequence of num_envs ids. The dictionary is not changed.

        Raises:
            InvalidValue: a mask or sequence of another type or shape, or a mask that names no row.
            UnknownName: no such prompt or option.
        """
        super().reset(seed=seed)
        chosen = checked_options(options, ["reset_mask", "prompt_id"])
        rows = np.flatnonzero(checked_mask(chosen.get("reset_mask"), self.num_envs)).tolist()
        prompt_ids = checked_prompt_ids(chosen.get("prompt_id"), self.num_envs)
        self._seed(rows, seed)
        self._begin(rows, prompt_ids)
        observed, infos = self.observation(), {}
        for row, info in self._state_infos(rows, observed).items():
            self._add_info(infos, info, row)
        return self._as_output(as_dict(observed)), infos

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """Draw a token in every row under way.

        Args:
            actions: (num_envs,) integers, one point a row; those of rows that have ended are ignored.

        Returns:
            Observations, rewards (num_envs,), terminations, truncations and infos.

        Raises:
            InvalidValue: an action is no point.
            ResetNeeded: no row is under way.
            RewardError: the reward function broke its contract.
        """
        chosen = self._checked_actions(actions)
        moved = np.flatnonzero(self.active).tolist()
        if not moved:
            raise ResetNeeded("no episode is under way; call reset(), all or with a reset_mask, before step()")
        drawn, told = self._draw(chosen, moved)
        ended = (drawn.terminated | drawn.truncated).nonzero().squeeze(-1).tolist()
        rewards, endings = self._score(ended, drawn)
        news = {row: info | endings.get(row, {}) for row, info in told.items()}

        infos: dict[str, Any] = {}
        if ended and self.autoreset_mode is AutoresetMode.SAME_STEP:
            for row, final in self._finals(ended, news).items():
                self._add_info(infos, final, row)
            news |= {row: {} for row in ended}
            self._begin(ended, [None] * self.num_envs)
        observed = self.observation()
        for row, info in self._state_infos(moved, observed).items():
            self._add_info(infos, info | news[row], row)
        terminated = drawn.terminated | drawn.truncated if self.limit_terminates else drawn.terminated
        flags = {"terminated": terminated, "truncated": drawn.truncated & ~terminated}
        obs, ends = self._as_output(as_dict(observed)), self._as_output(flags)
        return obs, self._as_rewards(rewards), ends["terminated"], ends["truncated"], infos

    def render(self) -> tuple[str, ...] | None:
        """Prompt and text so far of every row, in render mode "ansi"."""
        return tuple(map(self._generation.text, range(self.num_envs))) if self.render_mode == "ansi" else None

    def close_extras(self, **kwargs: Any) -> None:
        """Free the base model's caches; the base model itself may serve other environments."""
        self._generation.clear()

    def _seed(self, rows: Sequence[int], seed: int | None) -> None:
        if not self._rngs:
            seeds = self.np_random.integers(2**63, size=self.num_envs).tolist()
            self._rngs = [seeding.np_random(fresh)[0] for fresh in seeds]
        if seed is not None:
            for row in rows:
                self._rngs[row], _ = seeding.np_random(seed + row)

    def _begin(self, rows: Sequence[int], prompt_ids: Sequence[str | None]) -> None:
        chosen = [self.task.choose_prompt(self._rngs[row], prompt_ids[row]) for row in rows]
        self._generation.begin(rows, [self.task.prompts[i] for i in chosen], [self.task.prompt_ids[i] for i in chosen])

    def _checked_actions(self, actions: Any) -> Tensor:
        values = actions.cpu().numpy() if isinstance(actions, Tensor) else actions
        chosen = checked_actions(values, (self.num_envs,), self._num_actions, self.action_meaning)
        return torch.from_numpy(chosen).to(self.task.backend.device)

    def _draw(self, actions: Tensor, rows: Sequence[int]) -> tuple[Drawn, dict[int, Info]]:
        """Draw a token in each of the rows under actions (num_envs,), and what is to be told of it."""
        drawn = self._generation.advance(actions, self._uniforms(rows, 1)[:, 0])
        return drawn, _token_infos(rows, drawn)

    def _uniforms(self, rows: Sequence[int], count: int) -> Tensor:
        """(num_envs, count) float64 draws in [0, 1) for some rows, zero elsewhere."""
        uniforms = np.zeros((self.num_envs, count))
        for row in rows:
            uniforms[row] = self._rngs[row].random(count)
        return torch.from_numpy(uniforms).to(self.task.backend.device)

    def _score(self, ended: Sequence[int], drawn: Drawn) -> tuple[np.ndarray, dict[int, Info]]:
        """(num_envs,) float64 rewards, and the infos of the episodes that ended."""
        rewards = np.zeros(self.num_envs)
        if not ended:
            return rewards, {}
        episodes = [self._generation.episode(row, bool(drawn.terminated[row])) for row in ended]
        values = score(self.task.reward, episodes)
        rewards[ended] = [value or 0.0 for value in values]
        pairs = zip(episodes, values, strict=True)
        return rewards, dict(zip(ended, (episode_info(*pair) for pair in pairs), strict=True))

    def _state_infos(self, rows: Sequence[int], observed: Observation) -> dict[int, Info]:
        masks = observed.sketch.mask.cpu().numpy()
        prompts = self._generation.prompts
        return {row: state_info(prompt.id, masks[row]) for row in rows if (prompt := prompts[row]) is not None}

    def _finals(self, ended: Sequence[int], news: Mapping[int, Info]) -> dict[int, Info]:
        """`final_obs` and `final_info` of rows that have ended and are about to begin again."""
        observed = self._generation.last_observation()
        obs, states = self._as_output(as_dict(observed)), self._state_infos(ended, observed)
        return {
            row: {
                "final_obs": {name: value[row] for name, value in obs.items()},
                "final_info": states[row] | news[row],
            }
            for row in ended
        }

    def _as_output(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        if self.output == "torch":
            return dict(tensors)
        return {name: value.cpu().numpy() for name, value in tensors.items()}

    def _as_rewards(self, rewards: np.ndarray) -> Any:
        return torch.from_numpy(rewards).float().to(self.task.backend.device) if self.output == "torch" else rewards


def _token_infos(rows: Sequence[int], drawn: Drawn) -> dict[int, Info]:
    columns = (drawn.tokens.tolist(), drawn.base_logprobs.tolist(), drawn.empty_point.tolist())
    return {row: token_info(*(column[row] for column in columns)) for row in rows}


def checked_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """DISABLED or SAME_STEP; `InvalidValue` otherwise, with the reason for NEXT_STEP."""
    known = {kind.value: kind for kind in AutoresetMode}
    kind = known.get(mode, mode) if isinstance(mode, str) else mode
    if kind not in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
        advice = "NextStep would spend one decoding step an episode on a row that no learner may use"
        raise InvalidValue("autoreset_mode", mode, "'SameStep' or 'Disabled'", advice)
    return AutoresetMode(kind)


def checked_mask(mask: Any, rows: int) -> np.ndarray:
    """(rows,) bool, all True for None."""
    if mask is None:
        return np.ones(rows, dtype=bool)
    array = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    valid = isinstance(array, np.ndarray) and array.shape == (rows,) and array.dtype == np.bool_
    if not (valid and array.any()):
        raise InvalidValue("reset_mask", mask, f"a bool array of shape ({rows},) with at least one True")
    return array


def checked_prompt_ids(ids: str | Sequence[str | None] | None, rows: int) -> list[str | None]:
    """One id a row; None: draw one."""
    if ids is None or isinstance(ids, str):
        return [ids] * rows
    if len(ids) != rows:
        raise InvalidValue("prompt_id", ids, f"one id, or a sequence of {rows}")
    return list(ids)
