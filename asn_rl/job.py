"""The main job, stage by stage in one run folder: label -> distil -> GRPO -> compare.

Every stage leaves its result in the run folder and is skipped when that is there, so the same command continues after
an interruption. Policies are known by name only.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asn_rl.backends import BackendConfig, load_backend
from asn_rl.checkpoint import check_compatible, load_policy, save_policy
from asn_rl.data import DataConfig, load_prompts
from asn_rl.data.sampler import PromptSampler
from asn_rl.data.store import load_trajectories, save_trajectories
from asn_rl.errors import ConfigError, DataError, InvalidValue, check_at_least
from asn_rl.evaluation.comparison import (
    Arm,
    ArmResult,
    arm_result,
    best_static,
    by_stratum,
    paired_difference,
    run_arm,
    table,
)
from asn_rl.evaluation.statistics import masked_mean, split_half_oracle
from asn_rl.metrics import MetricsLogger
from asn_rl.protocols import LogitsBackend, TrainablePolicy
from asn_rl.registry import load_attribute
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig, concatenate
from asn_rl.runs import console, open_run, progress, write_json
from asn_rl.threads import set_threads
from asn_rl.training.distill import DistillConfig, distill, sketch_targets
from asn_rl.training.grpo import GRPOConfig, train
from asn_rl.types import Prompt, Trajectories

GREEDY, BASE = "greedy", "T=1"


@dataclass(frozen=True)
class PolicySpec:
    """The policy to train."""

    name: str = "asn_policies:OrderStatisticsNetwork"
    """policy class as module:attribute"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """constructor arguments; hidden_size is filled in from the base model where the class takes it"""


@dataclass(frozen=True)
class HeuristicSpec:
    """One static rule of the declared grid."""

    name: str
    """how tables and plots call it"""
    processors: list[dict[str, Any]] = field(default_factory=list)
    """steps {name, params}, in order; none: the base model"""


@dataclass(frozen=True)
class LabelConfig:
    """Which heuristic wins where."""

    num_generations: int = 8
    """completions of every prompt under every heuristic; rewards that compare a group need the size they are used at"""
    train_prompts: int | None = None
    """training prompts to label, drawn at random and alike from every stratum; null: all"""
    shrinkage: float = 32.0
    """samples that the mean of a prompt's stratum is worth when its best heuristic is chosen"""
    seed: int = 1000
    """keys the draws"""

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise InvalidValue("num_generations", self.num_generations, ">= 2", "headroom is measured on split halves")
        check_at_least(self, 0, "shrinkage")
        if self.train_prompts is not None and self.train_prompts < 1:
            raise InvalidValue("train_prompts", self.train_prompts, ">= 1", "null labels all training prompts")


@dataclass(frozen=True)
class CompareConfig:
    """The comparison on held-out prompts."""

    num_generations: int = 8
    """completions of every prompt under every arm"""
    stratify_by: str | None = None
    """prompt column whose values weigh the same in every mean; null: all prompts weigh the same"""
    resamples: int = 10_000
    """bootstrap resamples of the prompts"""
    level: float = 0.95
    """coverage of the intervals"""
    seed: int = 2000
    """keys the draws"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_generations", "resamples")
        if not 0 < self.level < 1:
            raise InvalidValue("level", self.level, "in (0, 1)")


@dataclass(frozen=True)
class JobConfig:
    """The whole job: distil from heuristics, improve by GRPO, compare on held-out prompts."""

    backend: BackendConfig = field(default_factory=BackendConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: tuple[RewardConfig, ...] = ()
    """reward functions, {function, weight, ...}"""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: PolicySpec = field(default_factory=PolicySpec)
    init: str | None = None
    """policy folder that GRPO starts from; null: what the distillation made"""
    reference: str | None = None
    """policy folder that the KL penalty holds to; null: where GRPO starts"""
    pipeline: str = "asn_policies:Pipeline"
    """class that makes a policy of a heuristic's processors"""
    heuristics: tuple[HeuristicSpec, ...] = ()
    """the declared grid of static rules"""
    label: LabelConfig = field(default_factory=LabelConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    threads: int | None = None
    """threads for tensor operations; null: all cores"""

    def __post_init__(self) -> None:
        names = [heuristic.name for heuristic in self.heuristics]
        for name in names:  # they become folders
            if not re.fullmatch(r"[\w=.,:+-]+( [\w=.,:+-]+)*", name) or name.startswith("."):
                raise InvalidValue("heuristic name", name, "letters, digits and = . , : + - with single spaces")
        if len(set(names)) != len(names):
            raise InvalidValue("heuristics", names, "names that differ")
        reserved = {"distilled", "rl"} & set(names)
        if reserved:
            raise InvalidValue("heuristics", sorted(reserved), "names other than those of the learned policies")
        if self.threads is not None and self.threads < 1:
            raise InvalidValue("threads", self.threads, ">= 1", "null takes all cores")
        if not self.rewards:
            raise ConfigError("rewards is empty; give at least one, for example [{function: numeric_answer}]")


class Job:
    """A configuration, its run folder, and what the stages share. Nothing heavy is loaded before it is used."""

    def __init__(self, config: JobConfig, run: str | Path) -> None:
        self.config = config
        self.run = open_run(run, config)
        self.threads = set_threads(config.threads)

    @cached_property
    def backend(self) -> LogitsBackend:
        with console.status(f"loading {self.config.backend.model}"):
            return load_backend(self.config.backend)

    @cached_property
    def rewards(self) -> RewardSuite:
        return RewardSuite(self.config.rewards)

    @cached_property
    def arms(self) -> list[Arm]:
        pipeline = load_attribute(self.config.pipeline)
        return [
            Arm(spec.name, pipeline(spec.processors), deterministic=[s["name"] for s in spec.processors] == [GREEDY])
            for spec in self.config.heuristics
        ]

    def prompts(self, split: str) -> list[Prompt]:
        return load_prompts(self.config.data, split)

    def prompts_to_label(self, split: str) -> list[Prompt]:
        """All prompts, or of the training prompts as many as `label.train_prompts` says."""
        prompts, count = self.prompts(split), self.config.label.train_prompts
        if split != "train" or count is None or count >= len(prompts):
            return prompts
        return PromptSampler(prompts, count, self.config.label.seed, self.config.compare.stratify_by).draw(0)

    def strata(self, prompts: Sequence[Prompt]) -> list[str]:
        column = self.config.compare.stratify_by
        lacking = [prompt.id for prompt in prompts if column is not None and column not in prompt.columns]
        if lacking:
            raise DataError(f"prompt {lacking[0]!r} lacks the column {column!r} that compare.stratify_by names")
        return [str(prompt.columns[column]) if column else "all" for prompt in prompts]

    def new_policy(self) -> TrainablePolicy:
        """An untrained policy, its weights drawn by `distill.seed`."""
        spec = self.config.policy
        cls, arguments = load_attribute(spec.name), dict(spec.arguments)
        if "hidden_size" in inspect.signature(cls.__init__).parameters and arguments.get("inputs"):
            arguments.setdefault("hidden_size", self.backend.hidden_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.distill.seed)
            return cls(**arguments)

    @property
    def metadata(self) -> dict[str, Any]:
        """What saved policies say about where they come from."""
        return {
            "base_model": self.config.backend.model,
            "fingerprint": self.backend.fingerprint,
            "sketch": {"head": self.config.rollout.head, "tail": self.config.rollout.tail},
        }


def label(job: Job) -> dict[str, Any]:
    """Run every heuristic on the train and selection prompts; choose a winner for each training prompt and the best
    static rule on the selection split. Writes `labels.json`."""
    path = job.run / "labels.json"
    if path.exists():
        return json.loads(path.read_text())
    config = job.config.label
    if not job.arms:
        raise ConfigError("heuristics is empty; declare a grid of static rules to distil from and compare with")
    for arm in job.arms:
        if arm.policy.initial_state(1, torch.device("cpu")) is not None:
            raise ConfigError(
                f"heuristic {arm.name!r} carries state, and a state's targets cannot be distilled; drop it"
            )
    prompts = {split: job.prompts_to_label(split) for split in ("selection", "train")}
    strata = {split: job.strata(prompts[split]) for split in prompts}
    needs = job.new_policy().needs
    results: dict[str, list[ArmResult]] = {split: [] for split in prompts}
    with progress("label", 2 * len(job.arms)) as advance:
        for split, arm in product(prompts, job.arms):
            folder = job.run / "labels" / split / arm.name
            trajectories = _stored_rollout(job, folder, arm, prompts[split], config, capture=needs)
            results[split].append(arm_result(arm.name, trajectories, job.rewards, config.num_generations))
            advance(1, f"{arm.name} on {split}")
    rewards = np.stack([result.rewards for result in results["train"]])
    oracle, static = split_half_oracle(rewards, strata["train"])
    ids = [prompt.id for prompt in prompts["train"]]
    labels = {
        "best_static": best_static(results["selection"], strata["selection"]),
        "selection": {r.name: dict(by_stratum(r.per_prompt(), strata["selection"])) for r in results["selection"]},
        "choices": dict(zip(ids, _choose(results["train"], strata["train"], config), strict=True)),
        "headroom": {"oracle": oracle, "static": static},
    }
    write_json(path, labels)
    return labels


def _choose(results: Sequence[ArmResult], strata: Sequence[str], config: LabelConfig) -> list[str]:
    """The heuristic with the best mean reward for each prompt, shrunk towards the mean of the prompt's stratum.

    A prompt whose samples are all masked under an arm counts there with the stratum's mean.
    """
    means = np.stack([result.per_prompt() for result in results])  # (arms, prompts)
    labels = np.asarray(strata)
    prior = np.stack([masked_mean(means[:, labels == stratum]) for stratum in strata], 1)
    weight = config.num_generations / (config.num_generations + config.shrinkage)
    shrunk = np.where(np.isnan(means), prior, weight * means + (1 - weight) * prior)
    return [results[i].name for i in np.where(np.isnan(shrunk), -np.inf, shrunk).argmax(0)]


def _stored_rollout(
    job: Job,
    folder: Path,
    arm: Arm,
    prompts: Sequence[Prompt],
    config: LabelConfig | CompareConfig,
    capture: frozenset[str] = frozenset(),
) -> Trajectories:
    """What `folder` holds, or a rollout that is then stored there."""
    if folder.exists():
        return load_trajectories(folder)
    samples, seed = config.num_generations, config.seed
    trajectories = run_arm(arm, job.backend, prompts, job.config.rollout, samples, seed, capture=capture)
    save_trajectories(folder, trajectories)
    return trajectories


def distil(job: Job) -> TrainablePolicy:
    """Teach the policy each training prompt's winning heuristic, on the states that all heuristics visited there.
    Writes `distilled/`."""
    folder = job.run / "distilled"
    if folder.exists():
        return load_policy(folder)
    labels = label(job)
    policy = job.new_policy()
    names = [arm.name for arm in job.arms]
    parts = [load_trajectories(job.run / "labels" / "train" / name) for name in names]
    trajectories = concatenate([part.select(_without_copies(part)) for part in parts])
    choice = [names.index(labels["choices"][prompt.id]) for prompt in trajectories.prompts]
    targets = sketch_targets([arm.policy for arm in job.arms], choice, trajectories)
    with MetricsLogger(job.run / "distill") as log:
        figures = distill(policy, trajectories, targets, job.config.distill, log=log)
    save_policy(
        folder, policy, **job.metadata, notes=f"Distilled from {', '.join(sorted(set(labels['choices'].values())))}."
    )
    write_json(job.run / "distill" / "summary.json", dict(figures))
    return policy


def _without_copies(trajectories: Trajectories) -> list[int]:
    """Indices of the different completions of each prompt; a deterministic arm repeats one."""
    seen: set[tuple[str, tuple[int, ...]]] = set()
    keep = []
    for i, (prompt, ids) in enumerate(zip(trajectories.prompts, trajectories.completion_ids, strict=True)):
        key = (prompt.id, tuple(ids))
        if key not in seen:
            seen.add(key)
            keep.append(i)
    return keep


def reinforce(job: Job) -> TrainablePolicy:
    """GRPO against an older checkpoint. Writes `policy/` and `checkpoints/`."""
    if (job.run / "policy").exists():
        return load_policy(job.run / "policy")
    start = Path(job.config.init or job.run / "distilled")
    policy = load_policy(start) if job.config.init else distil(job)
    anchor = Path(job.config.reference or start)
    spec = check_compatible(start, fingerprint=job.backend.fingerprint)
    check_compatible(anchor, fingerprint=job.backend.fingerprint, architecture=spec.policy)
    return train(
        policy,
        load_policy(anchor),
        job.backend,
        job.prompts("train"),
        job.rewards,
        job.config.rollout,
        job.config.grpo,
        job.run,
        metadata=job.metadata,
    )


def compare(job: Job) -> dict[str, Any]:
    """Greedy, T = 1, the best static rule, the distilled and the RL policy on the test prompts. Writes
    `comparison.json`, and the completions under `comparison/`."""
    path = job.run / "comparison.json"
    if path.exists():
        return json.loads(path.read_text())
    labels, config = label(job), job.config.compare
    best = labels["best_static"]
    pipeline = load_attribute(job.config.pipeline)
    static = {
        GREEDY: Arm(GREEDY, pipeline([{"name": GREEDY}]), deterministic=True),
        BASE: Arm(BASE, pipeline([])),
        **{arm.name: arm for arm in job.arms},
    }
    learned = [Arm("distilled", distil(job)), Arm("rl", reinforce(job))]
    arms = [static[name] for name in dict.fromkeys([GREEDY, BASE, best])] + learned
    prompts = job.prompts("test")
    strata = job.strata(prompts)
    results = []
    with progress("compare", len(arms)) as advance:
        for arm in arms:
            trajectories = _stored_rollout(job, job.run / "comparison" / arm.name, arm, prompts, config)
            results.append(arm_result(arm.name, trajectories, job.rewards, config.num_generations))
            advance(1, arm.name)
    options = {"resamples": config.resamples, "level": config.level, "seed": config.seed}
    comparison = {
        "prompts": len(prompts),
        "samples": config.num_generations,
        "level": config.level,
        "best_static": best,
        "grid": [arm.name for arm in job.arms],
        "headroom": labels["headroom"],
        "rows": table(results, strata, best, **options),
        "rl_against_distilled": paired_difference(results[-1], results[-2], strata, **options),
    }
    write_json(path, comparison)
    return comparison
