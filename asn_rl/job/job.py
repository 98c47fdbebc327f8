"""A configuration, its run folder, and what the stages share. Nothing heavy is loaded before it is used."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from asn_rl.backends import load_backend
from asn_rl.checkpoint import check_compatible
from asn_rl.data import load_prompts
from asn_rl.data.sampler import PromptSampler
from asn_rl.errors import CheckpointError, ConfigError, DataError
from asn_rl.evaluation.comparison import Arm
from asn_rl.job.config import HeuristicSpec, JobConfig, check_heuristic_names
from asn_rl.protocols import LogitsBackend, TrainablePolicy
from asn_rl.registry import load_attribute
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.runs import console, open_run
from asn_rl.threads import set_threads
from asn_rl.training import parallel
from asn_rl.types import Prompt

GREEDY, BASE = "greedy", "T=1"


class Job:
    """Every stage leaves its result in the run folder and is skipped when that is there, so the same command continues
    after an interruption. Policies are known by name only.

    Started by `accelerate launch` or torchrun, several processes share the stages `distil` and `reinforce`. The other
    stages are the main process's: there the others end."""

    def __init__(self, config: JobConfig, run: str | Path) -> None:
        self.config = config
        parallel.join()
        with parallel.main_first():
            self.run = open_run(run, config)
        self.threads = set_threads(config.threads or parallel.threads())

    @cached_property
    def backend(self) -> LogitsBackend:
        with console.status(f"loading {self.config.backend.model}"):
            return load_backend(self.config.backend)

    @cached_property
    def rewards(self) -> RewardSuite:
        return RewardSuite(self._reward_configs)

    @property
    def _reward_configs(self) -> Sequence[RewardConfig]:
        if not self.config.rewards:
            raise ConfigError("rewards is empty; give at least one, for example [{function: numeric_answer}]")
        return self.config.rewards

    @cached_property
    def heuristics(self) -> list[HeuristicSpec]:
        """The declared grid, that of `grid` included.

        Raises:
            ConfigError: it is empty.
        """
        specs, grid = list(self.config.heuristics), self.config.grid
        if grid is not None:
            specs += [
                HeuristicSpec(e["name"], e["processors"]) for e in load_attribute(grid.function)(**grid.arguments)
            ]
            check_heuristic_names([spec.name for spec in specs])
        if not specs:
            raise ConfigError("heuristics is empty; declare a grid of static rules to distil from and compare with")
        return specs

    @cached_property
    def arms(self) -> list[Arm]:
        """The heuristics as policies."""
        pipeline = load_attribute(self.config.pipeline)
        return [
            Arm(spec.name, pipeline(spec.processors), deterministic=[s["name"] for s in spec.processors] == [GREEDY])
            for spec in self.heuristics
        ]

    @cached_property
    def static_rules(self) -> dict[str, Arm]:
        """Greedy decoding and the base model, then the heuristics of the grid, if there is one."""
        pipeline = load_attribute(self.config.pipeline)
        declared = self.arms if self.config.heuristics or self.config.grid else []
        return {
            GREEDY: Arm(GREEDY, pipeline([{"name": GREEDY}]), deterministic=True),
            BASE: Arm(BASE, pipeline([])),
            **{arm.name: arm for arm in declared},
        }

    @property
    def scorers(self) -> list[RewardConfig]:
        """Labellers, then the rewards that are none of them: what training candidates are scored by."""
        rewards = self._reward_configs
        labellers = list(self.config.labellers or rewards)
        return labellers + [r for r in rewards if not any(map(r.scores_like, labellers))]

    def prompts(self, split: str) -> list[Prompt]:
        return load_prompts(self.config.data, split)

    def prompts_to_label(self, split: str) -> list[Prompt]:
        """The prompts of a split, as many as `generate.train_prompts` and `generate.selection_prompts` say."""
        prompts, count = self.prompts(split), getattr(self.config.generate, f"{split}_prompts")
        if count is None or count >= len(prompts):
            return prompts
        return PromptSampler(prompts, count, self.config.generate.seed, self.config.compare.stratify_by).draw(0)

    def strata(self, prompts: Sequence[Prompt]) -> list[str]:
        column = self.config.compare.stratify_by
        lacking = [prompt.id for prompt in prompts if column is not None and column not in prompt.columns]
        if lacking:
            raise DataError(f"prompt {lacking[0]!r} lacks the column {column!r} that compare.stratify_by names")
        return [str(prompt.columns[column]) if column else "all" for prompt in prompts]

    def new_policy(self) -> TrainablePolicy:
        """An untrained policy, its weights drawn by `distill.seed`."""
        return self._made(self.config.policy.name, self.config.policy.arguments)

    def new_asked_policy(self, condition: Sequence[float]) -> TrainablePolicy:
        """The untrained policy inside `condition.policy`, which asks it for a condition."""
        assert self.config.condition is not None
        spec = self.config.policy
        inner = {"policy": spec.name, "arguments": self._arguments(spec.name, spec.arguments)}
        return self._made(self.config.condition.policy, {"inner": inner, "condition": list(condition)})

    def new_mixture(self, start: str | None = None) -> TrainablePolicy:
        """A mixture of the heuristics, the same in every context, whose shares can be trained: even, or mostly the
        heuristic `start`."""
        known = inspect.signature(load_attribute(self.config.mixture).__init__).parameters
        free = {"context_free": True} if "context_free" in known else {}
        return self._made(self.config.mixture, {"start": start, **free})

    def _made(self, name: str, given: Mapping[str, Any]) -> TrainablePolicy:
        cls, arguments = load_attribute(name), self._arguments(name, given)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.distill.seed)
            return cls(**arguments)

    def _arguments(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments of a policy class, those included that the job knows."""
        arguments, known = dict(given), inspect.signature(load_attribute(name).__init__).parameters
        if "condition_size" in known and "condition" in arguments.get("inputs", ()):
            arguments.setdefault("condition_size", 1)
        if "hidden_size" in known and arguments.get("inputs"):
            arguments.setdefault("hidden_size", self.backend.hidden_size)
        if "strategies" in known:
            own = [{"name": spec.name, "processors": spec.processors} for spec in self.heuristics]
            arguments.setdefault("strategies", own)
        return arguments

    def check_policy(self, folder: str | Path) -> None:
        """`CheckpointError` where a folder holds no policy, or one of another base model or sketch size."""
        spec, size = check_compatible(folder, fingerprint=self.backend.fingerprint), self.metadata["sketch"]
        if spec.sketch not in (None, size):
            raise CheckpointError(
                f"the policy in {folder} was trained on sketches of {spec.sketch}, rollout asks for {size}; set "
                "rollout.head and rollout.tail to its own"
            )

    @property
    def metadata(self) -> dict[str, Any]:
        """What saved policies say about where they come from."""
        return {
            "base_model": self.config.backend.model,
            "fingerprint": self.backend.fingerprint,
            "sketch": {"head": self.config.rollout.head, "tail": self.config.rollout.tail},
        }
