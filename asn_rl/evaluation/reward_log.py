"""A logged reward tensor R[prompt, action, sample]: recorded once, learned from and judged on without generating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asn_rl.checkpoint import atomic_folder, load_state, save_state
from asn_rl.errors import DataError, InvalidValue
from asn_rl.evaluation.statistics import masked_mean


@dataclass(frozen=True)
class RewardLog:
    """Rewards of S samples of P prompts under A actions (heuristics, policies, configurations).

    Either every action was run on every prompt (full information), or the action of each sample was drawn; the log
    then says with which probabilities, and only the drawn action's cell holds a completion.

    A reward that compares the samples of a group (distinct answers) depends on all of them: such samples are not
    independent, and their halves are not either.

    Raises:
        InvalidValue: an array of the wrong shape or dtype, names that repeat, infinite numbers, or propensities that
            are no distribution.
        DataError: a reward where there is no completion, or samples with propensities and not exactly one action.
    """

    rewards: np.ndarray
    """(P, A, S) float64; NaN: masked, or no completion in this cell"""
    tokens: np.ndarray
    """(P, A, S) int64 tokens of each completion; 0: no completion in this cell; -1: a completion whose tokens were not
    counted (from a server that returns text only)"""
    actions: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    strata: tuple[str, ...]
    """P labels; every stratum weighs the same in means"""
    features: np.ndarray
    """(P, D) float32 or float64 context of each prompt, such as its embedding; D may be 0"""
    propensities: np.ndarray | None = None
    """(P, A) float64 probabilities that each sample's action was drawn with; None: every action was run"""

    def __post_init__(self) -> None:
        count, actions = len(self.prompt_ids), len(self.actions)
        shape = self.rewards.shape
        if self.rewards.ndim != 3 or shape[:2] != (count, actions) or 0 in shape:
            raise InvalidValue(
                "rewards shape", shape, f"({count} prompt ids, {actions} actions, samples), none of them 0"
            )
        _check_array("rewards", self.rewards, shape, "f")
        _check_array("tokens", self.tokens, shape, "i")
        _check_array("features", self.features, (count, *(self.features.shape[1:2] or (0,))), "f")
        for name, names in (("actions", self.actions), ("prompt_ids", self.prompt_ids)):
            if len(set(names)) != len(names):
                twice = next(item for item in names if names.count(item) > 1)
                raise InvalidValue(name, twice, "names that differ", "it occurs more than once")
        if len(self.strata) != count:
            raise InvalidValue("strata", len(self.strata), f"{count} labels, one a prompt")
        if np.isinf(self.rewards).any() or not np.isfinite(self.features).all() or (self.tokens < -1).any():
            raise InvalidValue(
                "log", "infinite or negative entries", "finite features, finite or NaN rewards, tokens >= -1"
            )
        if (~np.isnan(self.rewards) & ~self.present).any():
            raise DataError("the log has a reward where tokens says that there is no completion; record both alike")
        if self.propensities is None and not self.present.all():
            raise DataError(
                f"{int((~self.present).sum())} of {self.present.size} cells hold no completion; run every action on "
                "every prompt, or give the propensities with which actions were drawn"
            )
        if self.propensities is not None:
            check_distribution("propensities", self.propensities, (count, actions))
            self._check_draws(self.propensities)

    def _check_draws(self, propensities: np.ndarray) -> None:
        per_sample = self.present.sum(1)
        if (per_sample != 1).any():
            p, s = np.argwhere(per_sample != 1)[0].tolist()
            raise DataError(
                f"sample {s} of prompt {self.prompt_ids[p]!r} holds {per_sample[p, s]} actions; a log with "
                "propensities has one drawn action a sample. Leave them out of a log in which every action was run"
            )
        impossible = np.argwhere(self.present.any(-1) & (propensities <= 0))
        if len(impossible):
            p, a = impossible[0].tolist()
            raise InvalidValue(
                f"propensity of {self.actions[a]!r} on prompt {self.prompt_ids[p]!r}", 0.0, "> 0", "it was drawn there"
            )

    @property
    def present(self) -> np.ndarray:
        """(P, A, S) bool: there is a completion in this cell."""
        return self.tokens != 0

    @property
    def means(self) -> np.ndarray:
        """(P, A) mean reward over samples; NaN where all are masked or there are none."""
        return masked_mean(self.rewards)


def _check_array(name: str, array: np.ndarray, shape: Sequence[int], kind: str) -> None:
    if array.shape != tuple(shape) or array.dtype.kind != kind:
        kinds = {"f": "floating point", "i": "integer"}
        raise InvalidValue(name, f"{array.dtype} {array.shape}", f"{kinds[kind]} {tuple(shape)}")


def check_distribution(name: str, probabilities: np.ndarray, shape: tuple[int, int]) -> None:
    """`InvalidValue` unless the rows of a (P, A) array are distributions over actions."""
    if probabilities.shape != shape:
        raise InvalidValue(f"{name} shape", probabilities.shape, f"{shape}: one row a prompt, one column an action")
    wrong = ~((probabilities >= 0).all(-1) & (np.abs(probabilities.sum(-1) - 1) < 1e-6))  # NaN is wrong too
    if wrong.any():
        row = int(wrong.nonzero()[0][0])
        raise InvalidValue(f"{name} of prompt {row}", probabilities[row].tolist(), ">= 0 with sum 1")


def draw_actions(log: RewardLog, propensities: np.ndarray, seed: int) -> RewardLog:
    """What a logging policy would have left: for each sample one action drawn, the other cells emptied.

    Args:
        log: full information.
        propensities: (P, A) probabilities over actions.
    """
    if log.propensities is not None:
        raise InvalidValue("log", "one with propensities", "a log in which every action was run")
    check_distribution("propensities", propensities, log.means.shape)
    uniforms = np.random.default_rng(seed).random((len(log.prompt_ids), 1, log.rewards.shape[2]))
    cumulative = (propensities / propensities.sum(-1, keepdims=True)).cumsum(-1)
    # Rounding may leave the last sum below 1; the last action that has probability is then meant.
    last = len(log.actions) - 1 - (propensities[:, ::-1] > 0).argmax(-1)
    drawn = np.minimum((cumulative[..., None] <= uniforms).sum(1), last[:, None])
    chosen = np.arange(len(log.actions))[:, None] == drawn[:, None]
    return replace(
        log,
        rewards=np.where(chosen, log.rewards, np.nan),
        tokens=np.where(chosen, log.tokens, 0),
        propensities=propensities,
    )


def save_reward_log(folder: Path, log: RewardLog) -> None:
    """Write a log to `folder`; an interruption leaves nothing there."""
    with atomic_folder(folder) as scratch:
        save_state(scratch, {name: _plain(value) for name, value in vars(log).items()})


def load_reward_log(folder: Path) -> RewardLog:
    """What `save_reward_log` wrote.

    Raises:
        CheckpointError: missing or truncated.
    """
    state = load_state(folder)
    return RewardLog(**{name: _restored(value) for name, value in state.items()})


def _plain(value: object) -> object:
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def _restored(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else tuple(value) if isinstance(value, list) else value
