"""Which few actions (heuristics) should a policy choose among? Greedy coverage of a logged reward tensor, without the
winner's curse.

A set of n actions covers a prompt by the best of n completions, one under each. The greedy construction is that of
"Learning Adaptive LLM Decoding" (arXiv:2603.09065, after AuPair, arXiv:2502.18487): add the action that raises the mean
coverage most. Maxima of noisy rewards flatter what was chosen by them: even among actions that are all alike greedy
seems to beat the n best. So sets are chosen on one half of the seeds and scored on the other, and the other way round.

Actions draw from common random numbers (a seed belongs to a prompt and a sample), so equal seeds give similar
completions. The best of n must not profit from that or suffer by it: every action of a set gets another seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.statistics import masked_mean, stratified_mean

Chooser = Callable[[np.ndarray, Sequence[str], int], list[int]]
"""(rewards (P, A, S), strata, size) -> action indices in the order they were added"""


@dataclass(frozen=True)
class ActionSetScore:
    """How well a way to choose actions covers the prompts."""

    actions: tuple[int, ...]
    """chosen on all seeds: the set to use"""
    naive: float
    """coverage of sets on the very seeds that chose them: flattered"""
    cross_fitted: float
    """coverage on seeds that had no part in the choice"""
    per_prompt: np.ndarray
    """(P,) cross-fitted coverage of each prompt, for paired intervals; NaN: masked"""


def coverage(rewards: np.ndarray, actions: Sequence[int]) -> np.ndarray:
    """(P,) mean of the best reward of one completion under each action, over draws of the seeds; NaN: masked.

    Args:
        rewards: (P, A, S) reward of prompt, action, seed; NaN is masked. In draw k the j-th action has seed
            (k + j) mod S, so that no two share one while there are as many seeds as actions; an action may recur.
    """
    covered = np.full((len(rewards), rewards.shape[-1]), np.nan)
    for place, action in enumerate(actions):
        covered = np.fmax(covered, np.roll(rewards[:, action], -place, axis=-1))
    return masked_mean(covered)


def greedy_coverage(rewards: np.ndarray, strata: Sequence[str], size: int) -> list[int]:
    """`size` different actions, each the one that raises the mean coverage most. With one seed it is the paper's
    construction, S += argmax_a mean_i max(cov_i, R_ia), within 1 - 1/e of the best set.

    Args:
        rewards: (P, A, S) reward of prompt, action, seed; NaN is masked.
        strata: P labels; every stratum weighs the same.
    """
    _check_size(size, rewards)
    chosen: list[int] = []
    while len(chosen) < size:
        left = [action for action in range(rewards.shape[1]) if action not in chosen]
        chosen.append(max(left, key=lambda action: stratified_mean(coverage(rewards, [*chosen, action]), strata)))
    return chosen


def top_actions(rewards: np.ndarray, strata: Sequence[str], size: int) -> list[int]:
    """The `size` actions with the highest mean reward."""
    _check_size(size, rewards)
    means = [stratified_mean(masked_mean(rewards[:, action]), strata) for action in range(rewards.shape[1])]
    return sorted(range(len(means)), key=lambda action: -means[action])[:size]


def repeated_action(rewards: np.ndarray, strata: Sequence[str], size: int) -> list[int]:
    """The action with the highest mean reward, `size` times: what many samples reach without any choice."""
    return top_actions(rewards, strata, 1) * size


CHOOSERS: dict[str, Chooser] = {"greedy": greedy_coverage, "top": top_actions, "repeated": repeated_action}


def compare_action_sets(rewards: np.ndarray, strata: Sequence[str], size: int) -> dict[str, ActionSetScore]:
    """Greedy coverage beside the n best actions and the best one n times, cross-fitted on two halves of the seeds.

    Args:
        rewards: (P, A, S) reward of prompt, action, seed; NaN is masked.
        strata: P labels; every stratum weighs the same.
        size: n, at most A and S // 2: in each half every action has a seed of its own.

    Raises:
        InvalidValue: another size, or a stratum without a value.
    """
    seeds = rewards.shape[-1]
    if size > seeds // 2:
        advice = "record more seeds, or build a smaller set"
        raise InvalidValue("size", size, f"at most {seeds // 2}, half of the {seeds} seeds", advice)
    return {name: _cross_fitted(choose, rewards, strata, size) for name, choose in CHOOSERS.items()}


def _cross_fitted(choose: Chooser, rewards: np.ndarray, strata: Sequence[str], size: int) -> ActionSetScore:
    halves = [rewards[:, :, i::2] for i in range(2)]
    sets = [choose(half, strata, size) for half in halves]
    flattered = [stratified_mean(coverage(half, actions), strata) for half, actions in zip(halves, sets, strict=True)]
    fair = np.stack([coverage(half, actions) for half, actions in zip(halves, sets[::-1], strict=True)], -1)
    return ActionSetScore(
        actions=tuple(choose(rewards, strata, size)),
        naive=float(np.mean(flattered)),
        cross_fitted=float(np.mean([stratified_mean(part, strata) for part in fair.T])),
        per_prompt=masked_mean(fair),
    )


def _check_size(size: int, rewards: np.ndarray) -> None:
    if not 1 <= size <= rewards.shape[1]:
        raise InvalidValue("size", size, f"in [1, {rewards.shape[1]}], the number of actions")
