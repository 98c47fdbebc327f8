"""Off-policy estimates of 20 heuristics' mean rewards from one log at T = 1, against fresh generations of each.

Prompts and base model of configs/demo.yaml. A completion's reward is 1 for a right answer (arithmetic) or an accepted
one (open prompts; `distinct_valid` in groups of one, because a reward that compares a group cannot be weighted one
completion at a time). Tasks are judged one by one: answers to arithmetic are short and their weights tame, open answers
are long and much of what a cut heuristic would say is in no log of this size.

Only estimates with an effective sample size of 50 count, by `effective_sample_size`, which sees what was never drawn;
what Kong's figure alone would have let through is printed beside.

An estimate and a fresh value are means over the same prompts, and both are noisy. So neither is taken for the truth:
what must hold is that the 95 % interval of their difference, prompts resampled together with all their logged and fresh
samples, holds zero. That removes the spread between prompts, which would widen the estimate's own interval, and adds
the noise of the fresh value. For comparison the table also says whether the estimate's own interval holds the fresh
mean as if that were exact. Several logs with seeds of their own are judged, since the estimates from one log share its
luck; the fresh values they are judged by are the same.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from asn_rl.threads import limit_spinning, set_threads

limit_spinning()

import numpy as np
from _benchmark import finish, options

from asn_policies.heuristics import Pipeline
from asn_rl.backends import load_backend
from asn_rl.config import load_config
from asn_rl.data import load_prompts
from asn_rl.data.sampler import PromptSampler
from asn_rl.evaluation.off_policy import decision_terms, log_ratios
from asn_rl.evaluation.statistics import Interval, Resampling, bootstrap
from asn_rl.job import JobConfig
from asn_rl.mixed_batch import MixedBatch
from asn_rl.protocols import LogitsBackend
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig, concatenate, rollout
from asn_rl.types import Prompt, Trajectories

GOAL, MIN_ESS = 0.90, 50
_ROWS = 400  # completions decoded at a time
_PARAMETERS = {"T": "temperature", "min_p": "min_p", "top_p": "top_p", "top_k": "top_k"}
_HEURISTICS: tuple[dict[str, Any], ...] = (
    *({"T": t} for t in (0.5, 0.7, 0.8, 0.9, 1.1, 1.2)),
    *({"min_p": p} for p in (0.02, 0.05, 0.1, 0.2)),
    *({"top_p": p} for p in (0.5, 0.8, 0.9, 0.95)),
    *({"top_k": k} for k in (4, 16)),
    *({"T": 0.8, "top_p": 0.95}, {"T": 0.9, "top_k": 8}, {"T": 1.2, "min_p": 0.05}, {"T": 1.5, "min_p": 0.1}),
)
_REWARDS = (RewardConfig("numeric_answer"), RewardConfig("distinct_valid"))


@dataclass(frozen=True)
class Setup:
    """What logs and fresh generations share."""

    backend: LogitsBackend
    prompts: list[Prompt]
    config: RolloutConfig
    rewards: RewardSuite

    @property
    def ids(self) -> list[str]:
        return sorted(prompt.id for prompt in self.prompts)

    @property
    def task(self) -> dict[str, str]:
        return {prompt.id: prompt.columns["task"] for prompt in self.prompts}


@dataclass(frozen=True)
class Judged:
    """One heuristic on one task from one log."""

    task: str
    agrees: bool
    ess: float
    kong: float


def main() -> int:
    arguments = options(
        __doc__ or "",
        "python scripts/benchmark_off_policy.py --prompts 48 --samples 32 --fresh 4 --logs 2",
        prompts=48, samples=32, fresh=4, logs=2,
    )  # fmt: skip
    set_threads(arguments.threads)
    count, logs = (10, 1) if arguments.quick else (arguments.prompts, arguments.logs)
    fresh_samples = min(arguments.fresh, 2) if arguments.quick else arguments.fresh
    setup = _setup(count)
    begin = time.perf_counter()
    fresh = _fresh_values(setup, fresh_samples)
    print(f"{count} prompts; {fresh_samples} fresh completions each, {time.perf_counter() - begin:.0f} s", flush=True)
    judged: list[Judged] = []
    for seed in range(logs):
        log = rollout(
            Pipeline([]), setup.backend, setup.prompts, setup.config, num_generations=arguments.samples, seed=seed
        )
        print(f"\nlog {seed}: {len(log)} completions at T = 1, {len(log.points)} tokens")
        judged += _judge(setup, log, fresh)
    for name, rows in {
        "Kong's figure alone": [row for row in judged if row.kong >= MIN_ESS],
        **{task: [row for row in judged if row.task == task and row.ess >= MIN_ESS] for task in ("arithmetic", "open")},
    }.items():
        print(f"effective sample size >= {MIN_ESS}, {name}: {sum(row.agrees for row in rows)} of {len(rows)} agree")
    counted = [row.agrees for row in judged if row.ess >= MIN_ESS]
    print(
        f"{sum(counted)} of {len(counted)} agree ({len(judged)} estimates: {len(_HEURISTICS)} heuristics, tasks, logs)"
    )
    return finish("benchmark_off_policy", float(np.mean(counted)) if counted else 0.0, GOAL, at_least=True)


def _setup(count: int) -> Setup:
    config = load_config(JobConfig, Path(__file__).resolve().parents[1] / "configs" / "demo.yaml")
    prompts = [prompt for split in ("train", "selection", "test") for prompt in load_prompts(config.data, split)]
    prompts = PromptSampler(prompts, count, 0, "task").draw(0)
    return Setup(load_backend(config.backend), prompts, config.rollout, RewardSuite(_REWARDS))


def _scores(setup: Setup, trajectories: Trajectories) -> np.ndarray:
    """(B,) reward of each completion by itself."""
    alone = [replace(p, columns={**p.columns, "group": str(i)}) for i, p in enumerate(trajectories.prompts)]
    ended = trajectories.terminated.tolist()
    result = setup.rewards(alone, trajectories.completions, trajectories.completion_ids, terminated=ended)
    return result.total.numpy()


def _fresh_values(setup: Setup, samples: int) -> np.ndarray:
    """(heuristics, P, samples) rewards of fresh generations, prompts in the order of their ids."""
    policies = [Pipeline(_steps(heuristic)) for heuristic in _HEURISTICS]
    prompts = sorted(setup.prompts, key=lambda prompt: prompt.id)
    per_batch, parts = max(1, _ROWS // (samples * len(policies))), []
    for low in range(0, len(prompts), per_batch):
        pairs = [(prompt, i) for prompt in prompts[low : low + per_batch] for i in range(len(policies))]
        mixed = MixedBatch(policies, [i for _, i in pairs for _ in range(samples)])
        # Seeds of their own: otherwise heuristics share their draws, and their errors.
        seeds = [1000 + i for _, i in pairs]
        config = replace(setup.config, max_batch=len(pairs) * samples)
        parts.append(rollout(mixed, setup.backend, [p for p, _ in pairs], config, num_generations=samples, seed=seeds))
    return _scores(setup, concatenate(parts)).reshape(len(prompts), len(policies), samples).swapaxes(0, 1)


def _steps(heuristic: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": _PARAMETERS[name], "params": {_PARAMETERS[name]: value}} for name, value in heuristic.items()]


def _judge(setup: Setup, log: Trajectories, fresh: np.ndarray) -> list[Judged]:
    """Print a line a heuristic and task: does the estimate agree with the fresh value?"""
    rewards, tasks, how = _scores(setup, log), np.array([setup.task[p.id] for p in log.prompts]), Resampling()
    by_id, judged = np.array([setup.task[i] for i in setup.ids]), []
    ratios = [log_ratios(Pipeline(_steps(heuristic)), log).numpy() for heuristic in _HEURISTICS]
    for task in np.unique(by_id).tolist():
        print(f"{task:>18}  {'estimate':>20}  ESS  weight  {'fresh':>20}  {'difference':>22}  agrees  (own interval)")
        for heuristic, ratio, values in zip(_HEURISTICS, ratios, fresh[:, by_id == task].mean(-1), strict=True):
            terms = decision_terms(ratio, log, np.where(tasks == task, rewards, np.nan))
            assert terms.prompts.tolist() == [i for i in setup.ids if setup.task[i] == task]
            estimate, truth = terms.estimate(how), bootstrap(values, [task] * len(values))
            gap, own = terms.minus(values).interval(how), estimate.reward
            row = Judged(task, gap.low <= 0 <= gap.high, terms.ess, _kong(log, ratio, tasks == task))
            judged.append(row)
            name = " ".join(f"{key}={value}" for key, value in heuristic.items())
            print(
                f"{name:>18}  {_shown(own)} {terms.ess:4.0f}  {terms.mean_weight:6.2f}  {_shown(truth)}  "
                f"{_shown(gap, '+')}  {'yes' if row.agrees else 'NO':>6}  "
                f"({'inside' if own.low <= truth.mean <= own.high else 'outside'})"
                + ("" if row.ess >= MIN_ESS else "  not counted"),
                flush=True,
            )
    return judged


def _kong(log: Trajectories, ratios: np.ndarray, which: np.ndarray) -> float:
    """(sum of weights)^2 / (sum of squared weights), which does not see what was never drawn."""
    weights = np.exp(np.bincount(log.rows.numpy(), ratios)[which])
    return float(weights.sum()) ** 2 / float((weights**2).sum())


def _shown(interval: Interval, sign: str = "") -> str:
    return f"{interval.mean:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


if __name__ == "__main__":
    sys.exit(main())
