"""Policies and static rules on the same prompts, with the same draws, at the same token budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asn_rl.evaluation.statistics import as_plain, bootstrap, masked_mean, split_by_stratum, stratified_mean
from asn_rl.ops.ngrams import distinct_n
from asn_rl.protocols import LogitsBackend, Policy
from asn_rl.rewards.compose import RewardSuite, score
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt, Trajectories


@dataclass(frozen=True)
class Arm:
    """One contestant."""

    name: str
    policy: Policy
    deterministic: bool = False
    """one completion a prompt is generated and counted as all of its samples (greedy decoding)"""


@dataclass(frozen=True)
class ArmResult:
    """How one arm did; arrays are (prompts, samples)."""

    name: str
    rewards: np.ndarray
    """NaN: masked"""
    tokens: np.ndarray
    truncated: np.ndarray
    distinct: np.ndarray
    """(prompts,) different word trigrams over all word trigrams of the samples"""

    def per_prompt(self) -> np.ndarray:
        """(prompts,) mean reward; NaN where every sample is masked."""
        return masked_mean(self.rewards)


def run_arm(
    arm: Arm,
    backend: LogitsBackend,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    samples: int,
    seed: int,
    capture: Collection[str] = (),
) -> Trajectories:
    """`samples` completions of every prompt under one arm. All arms share their random draws."""
    if not arm.deterministic:
        return rollout(arm.policy, backend, prompts, config, num_generations=samples, seed=seed, capture=capture)
    once = rollout(arm.policy, backend, prompts, config, num_generations=1, seed=seed, capture=capture)
    return once.select([i for i in range(len(prompts)) for _ in range(samples)])


def arm_result(name: str, trajectories: Trajectories, rewards: RewardSuite, samples: int) -> ArmResult:
    """Score the completions of one arm."""
    words = [completion.split() for completion in trajectories.completions]
    return ArmResult(
        name=name,
        rewards=score(rewards, trajectories).total.numpy().reshape(-1, samples),
        tokens=trajectories.lengths.numpy().reshape(-1, samples),
        truncated=~trajectories.terminated.numpy().reshape(-1, samples),
        distinct=np.array([distinct_n(words[i : i + samples]) for i in range(0, len(trajectories), samples)]),
    )


def best_static(results: Sequence[ArmResult], strata: Sequence[str]) -> str:
    """Name of the arm with the highest mean, every stratum weighing the same."""
    return max(results, key=lambda result: stratified_mean(result.per_prompt(), strata)).name


def table(
    results: Sequence[ArmResult],
    strata: Sequence[str],
    baseline: str,
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row an arm: mean rewards by stratum and overall, difference to `baseline` with its interval, diversity,
    tokens and truncation."""
    options = {"resamples": resamples, "level": level, "seed": seed}
    anchor = next(result for result in results if result.name == baseline)
    return [
        {
            "name": result.name,
            "reward": as_plain(bootstrap(result.per_prompt(), strata, **options)),
            "difference": paired_difference(result, anchor, strata, **options),
            "by_stratum": by_stratum(result.per_prompt(), strata),
            "distinct_3": stratified_mean(result.distinct, strata),
            "tokens": float(result.tokens.mean()),
            "truncated": float(result.truncated.mean()),
        }
        for result in results
    ]


def paired_difference(
    result: ArmResult, anchor: ArmResult, strata: Sequence[str], *, resamples: int, level: float, seed: int
) -> dict[str, float | None]:
    """Mean difference of two arms on the same prompts, with its interval: mean, low, high."""
    gap = result.per_prompt() - anchor.per_prompt()
    return as_plain(bootstrap(gap, strata, resamples=resamples, level=level, seed=seed))


def by_stratum(values: np.ndarray, strata: Sequence[str]) -> Mapping[str, float]:
    return {label: float(part.mean()) for label, part in split_by_stratum(values, strata).items()}
