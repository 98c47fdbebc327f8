"""Several reward functions as one: weights, normalisation, and containment of those that fail."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from asn_rl.config import OPERATIONAL
from asn_rl.errors import AsnError, ConfigError, InvalidValue, RewardError
from asn_rl.ops.advantages import group_advantages
from asn_rl.rewards import REWARDS
from asn_rl.rewards.contract import CALL_ARGUMENTS, checked_scores, load_function
from asn_rl.rewards.waiting import told_while_it_takes
from asn_rl.rewards.workers import Failure, WorkerPool, describe
from asn_rl.types import Prompt, Trajectories

Normalize = Literal["none", "group", "batch"]
Isolation = Literal["inline", "process"]
Inputs = dict[str, Any]
"""keyword arguments of one call of a reward function"""


@dataclass(frozen=True)
class RewardConfig:
    """One reward function and how it counts."""

    function: str
    """short name of `asn_rl.rewards.REWARDS` (numeric_answer, math_answer, ifeval, distinct_valid, ...), or
    module:function"""
    weight: float = 1.0
    """factor of the normalised score in the sum; negative: a penalty"""
    normalize: Normalize = "none"
    """none: raw scores; group: minus the mean of the prompt's completions, over their standard deviation; batch: the
    same over all completions"""
    time_limit: float | None = field(default=None, metadata=OPERATIONAL)
    """wall seconds a call on one batch may take; null: no limit. Needs isolation: process, because a thread that hangs
    cannot be stopped"""
    retries: int = field(default=0, metadata=OPERATIONAL)
    """further attempts after an exception or a time-out, before the batch's scores are masked"""
    isolation: Isolation = field(default="inline", metadata=OPERATIONAL)
    """inline: called in this process; process: in a worker process, which is killed and replaced when it hangs or
    dies"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of the function, for example {budget: 64}"""
    where: dict[str, Any] = field(default_factory=dict)
    """prompts it applies to, {column: value}, for example {task: arithmetic}; the others are masked. {}: all"""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise InvalidValue("weight", self.weight, "a finite number")
        if self.normalize not in get_args(Normalize):
            raise InvalidValue("normalize", self.normalize, "none, group or batch")
        if self.isolation not in get_args(Isolation):
            raise InvalidValue("isolation", self.isolation, "inline or process")
        if self.retries < 0:
            raise InvalidValue("retries", self.retries, ">= 0")
        if self.time_limit is not None and not self.time_limit > 0:
            raise InvalidValue("time_limit", self.time_limit, "> 0 seconds, or null for no limit")
        if self.time_limit is not None and self.isolation != "process":
            raise ConfigError(
                f"reward {self.function!r}: time_limit {self.time_limit:g} needs isolation: process, because a "
                "function that hangs in this process cannot be stopped; set that, or time_limit: null"
            )

    @property
    def compares(self) -> str | None:
        """Among what the function compares completions; see `asn_rl.protocols.RewardFunction`."""
        return getattr(REWARDS.resolve(self.function), "compares", None)

    def scores_like(self, other: RewardConfig) -> bool:
        """Whether raw scores are the same, be they weighted as they may."""
        return (self.function, self.arguments, self.where) == (other.function, other.arguments, other.where)


@dataclass(frozen=True)
class RewardResult:
    """Scores of B completions; NaN means masked."""

    total: Tensor
    """(B,) float64 weighted sum over the components that apply; NaN where none does"""
    components: dict[str, Tensor]
    """(B,) float64 raw scores by component: neither normalised nor weighted"""
    counts: dict[str, int]
    """by "component/event": `masked` completions; `error` and `timeout` attempts, `retry` attempts after those; and
    what functions with a `counts` Counter of their own added to it"""


@dataclass(frozen=True)
class RawScores:
    """What reward functions said of B completions, by component: neither normalised nor weighted."""

    values: dict[str, list[float | None]]
    """B scores; None where masked"""
    reasons: dict[str, list[str | None]]
    """B times in words why a score is masked; None where there is one"""
    counts: dict[str, int]
    """see `RewardResult`"""

    def why_masked(self) -> str:
        """The reasons of each component, with the number of completions."""
        return "; ".join(
            f"{name}: " + ", ".join(f"{reason} ({n} completions)" for reason, n in Counter(filter(None, why)).items())
            for name, why in self.reasons.items()
        )


class RewardSuite:
    """Reward functions composed as their configurations say. A context manager; closing ends its worker processes.

    A function that raises or exceeds its time limit is tried again `retries` times; then all its scores of that call
    are masked, counted, and a warning is given once. A function that breaks its contract (wrong number of values,
    values that are no numbers, NaN), or raises an error of `asn_rl.errors`, ends the call with a RewardError: trying
    again would not mend it.

    Args:
        configs: at least one. A function that occurs twice appears as "name" and "name#2" in results.

    Raises:
        ConfigError: no configurations, or a module that cannot be imported.
        UnknownName: no such reward function, or no such argument.
        RewardError: a function without `**columns`.
    """

    def __init__(self, configs: Sequence[RewardConfig]) -> None:
        if not configs:
            raise ConfigError("no reward functions; give at least one, for example [{function: numeric_answer}]")
        self._components = [
            _Component(name, config) for name, config in zip(unique_names(configs), configs, strict=True)
        ]

    @property
    def configs(self) -> list[RewardConfig]:
        """As given, one a function."""
        return [component.config for component in self._components]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. The suite can be used again and then starts new ones."""
        for component in self._components:
            component.close()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        *,
        terminated: Sequence[bool],
    ) -> RewardResult:
        """Score B completions.

        Args:
            prompts: B prompts, one a completion; equal neighbours are a group.
            completions: B texts; functions get them as messages where the prompt is messages.
            completion_ids: B lists of token ids.
            terminated: B flags, False where the token limit cut the completion off.

        Raises:
            RewardError: a broken contract, or every score of the call is masked.
        """
        raw = self.scores(prompts, completions, completion_ids, terminated=terminated)
        scores = {name: scores_tensor(values) for name, values in raw.values.items()}
        if all(bool(part.isnan().all()) for part in scores.values()):
            raise RewardError(
                f"every score of this call is masked, there is nothing to learn from. {raw.why_masked()}. Mend it, and "
                "the same command resumes from the last checkpoint"
            )
        total = combined(self.configs, list(scores.values()), [prompt.id for prompt in prompts])
        return RewardResult(total, scores, raw.counts)

    def scores(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int] | None],
        *,
        terminated: Sequence[bool],
    ) -> RawScores:
        """What `__call__` does before it normalises and adds up; here a call may be masked as a whole."""
        inputs = call_inputs(prompts, completions, completion_ids, terminated)
        counts: Counter[str] = Counter()
        raw = RawScores({}, {}, counts)
        for component in self._components:
            raw.values[component.name], raw.reasons[component.name] = component.scores(inputs, counts)
        return raw


def score(rewards: RewardSuite, trajectories: Trajectories) -> RewardResult:
    """Score completions as they were rolled out; see `RewardSuite.__call__`."""
    return rewards(
        trajectories.prompts,
        trajectories.completions,
        trajectories.completion_ids,
        terminated=trajectories.terminated.tolist(),
    )


class _Component:
    """One configured function: where it runs and what becomes of its failures."""

    def __init__(self, name: str, config: RewardConfig) -> None:
        self.name, self.config = name, config
        self._warned: set[str] = set()
        self._pool: WorkerPool | None = None
        self._own_counts: Counter[str] = Counter()
        target = REWARDS.path(config.function)
        if config.isolation == "process":
            self._pool = _pool(name, target, config)
            self._pool.start()  # a module that cannot be imported shows now, not after the first rollout
        else:
            self._function = load_function(target, config.arguments)
            counts = getattr(self._function.func, "counts", None)
            self._own_counts = counts if isinstance(counts, Counter) else self._own_counts

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def scores(self, inputs: Inputs, counts: Counter[str]) -> tuple[list[float | None], list[str | None]]:
        """Checked scores, and in words why there is none."""
        rows = len(inputs["completions"])
        chosen = [i for i in range(rows) if _applies(self.config.where, inputs, i)]
        before = self._own_counts.copy()
        values: list[float | None] = [None] * rows
        reasons: list[str | None] = [f"the prompt has not {self.config.where}"] * rows
        picked = {name: [column[i] for i in chosen] for name, column in inputs.items()}
        answer = self._attempts(picked, counts) if chosen else []
        if isinstance(answer, Failure):
            self._warn(answer, len(chosen))
            for i in chosen:
                reasons[i] = f"{answer.reason}, {answer.detail}"
        else:
            for i, value in zip(chosen, checked_scores(self.name, answer, len(chosen)), strict=True):
                values[i], reasons[i] = value, None if value is not None else "the function returned None"
        counts.update({f"{self.name}/{event}": n for event, n in (self._own_counts - before).items()})
        counts[f"{self.name}/masked"] += sum(value is None for value in values)
        return values, reasons

    def _attempts(self, inputs: Inputs, counts: Counter[str]) -> Any | Failure:
        for event in ("error", "timeout", "retry"):
            counts[f"{self.name}/{event}"] += 0
        answer = self._attempt(inputs)
        for _ in range(self.config.retries):
            if not isinstance(answer, Failure):
                break
            self._count(answer, counts)
            counts[f"{self.name}/retry"] += 1
            answer = self._attempt(inputs)
        if isinstance(answer, Failure):
            self._count(answer, counts)
        return answer

    def _attempt(self, inputs: Inputs) -> Any | Failure:
        # Lists of its own for every attempt; a column that an argument sets is the argument's.
        mine = {name: list(column) for name, column in inputs.items() if name not in self.config.arguments}
        with told_while_it_takes(f"reward {self.name!r} on {len(inputs['completions'])} completions"):
            answer = _call(self._function, mine) if self._pool is None else self._pool.map([mine])[0]
        if isinstance(answer, Failure) and answer.reason == "refused":
            raise RewardError(f"reward {self.name!r}: {answer.detail}")
        return answer

    def _count(self, failure: Failure, counts: Counter[str]) -> None:
        counts[f"{self.name}/{'timeout' if failure.reason == 'timeout' else 'error'}"] += 1

    def _warn(self, failure: Failure, rows: int) -> None:
        if failure.reason not in self._warned:
            self._warned.add(failure.reason)
            warnings.warn(
                f"reward {self.name!r} failed ({failure.reason}: {failure.detail}); its scores of these {rows} "
                "completions are masked. Mend the function, or give it more time_limit or retries; the same "
                "command resumes. Further failures of this kind are only counted",
                RuntimeWarning,
                stacklevel=4,
            )


def _applies(where: Mapping[str, Any], inputs: Inputs, row: int) -> bool:
    return all(name in inputs and inputs[name][row] == value for name, value in where.items())


def call_inputs(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int] | None],
    terminated: Sequence[bool],
) -> Inputs:
    """Keyword arguments for reward functions, as TRL passes them, with `terminated` and `prompt_id`.

    A column that only some prompts have is None for the others.

    Raises:
        RewardError: nothing to score, lists of different lengths, or a data column with a reserved name.
    """
    lengths = [len(part) for part in (prompts, completions, completion_ids, terminated)]
    if len(set(lengths)) != 1 or not prompts:
        raise RewardError(
            "prompts, completions, completion_ids and terminated must have one entry a completion, at least one; got "
            + ", ".join(map(str, lengths))
        )
    own = {"terminated": [bool(flag) for flag in terminated], "prompt_id": [prompt.id for prompt in prompts]}
    names = {name: None for prompt in prompts for name in prompt.columns}
    for name in (*CALL_ARGUMENTS, *own):
        if name in names:
            raise RewardError(f"the data has a column {name!r}, a name reward functions use; rename the column")
    return {
        "prompts": [prompt.content for prompt in prompts],
        "completions": [
            text if isinstance(prompt.content, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ],
        "completion_ids": [None if ids is None else list(ids) for ids in completion_ids],
        **{name: [prompt.columns.get(name) for prompt in prompts] for name in names},
        **own,
    }


def normalised(scores: Tensor, how: Normalize, spans: Sequence[tuple[int, int]]) -> Tensor:
    """(B,) scores minus mean, over sample standard deviation + 1e-4, within spans of rows or the batch.

    As TRL's `normalize_then_sum` (GDPO, arXiv:2601.05242). NaN scores stay NaN and count in no mean.
    """
    if how == "none":
        return scores
    parts = spans if how == "group" else [(0, len(scores))]
    scaled = torch.cat([group_advantages(scores[None, low:high])[0] for low, high in parts])
    return torch.where(scores.isnan(), torch.nan, scaled)


def combined(configs: Sequence[RewardConfig], scores: Sequence[Tensor], prompt_ids: Sequence[str]) -> Tensor:
    """(B,) weighted sum of the normalised (B,) scores of each function; NaN where none applies.

    Args:
        prompt_ids: B ids; equal neighbours are a group.
    """
    spans = _group_spans(prompt_ids)
    pairs = zip(configs, scores, strict=True)
    return _sum_applicable([config.weight * normalised(part, config.normalize, spans) for config, part in pairs])


def _sum_applicable(parts: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(parts))
    return torch.where(stacked.isnan().all(0), torch.nan, stacked.nansum(0))


def _group_spans(ids: Sequence[str]) -> list[tuple[int, int]]:
    """(start, end) of runs of equal ids."""
    starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1]]
    return list(pairwise([*starts, len(ids)]))


def scores_tensor(values: Sequence[float | None]) -> Tensor:
    """(B,) float64 scores, NaN where masked."""
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _call(function: Callable[..., Any], inputs: Inputs) -> Any | Failure:
    try:
        return function(**inputs)
    except AsnError:
        raise
    except Exception as error:
        return Failure("error", describe(error))


def _pool(name: str, target: str, config: RewardConfig) -> WorkerPool:
    if target.startswith("__main__:"):
        raise RewardError(f"a worker process cannot import {target!r}; move the function to a module of its own")
    arguments: Mapping[str, Any] = {"target": target, "arguments": config.arguments}
    loader = "asn_rl.rewards.contract:load_function"
    return WorkerPool(loader, arguments, time_limit=config.time_limit, name=name)


def unique_names(configs: Sequence[RewardConfig]) -> list[str]:
    """What results call each function: its name, then name#2 and so on."""
    seen: Counter[str] = Counter()
    names = []
    for config in configs:
        seen[config.function] += 1
        times = seen[config.function]
        names.append(config.function if times == 1 else f"{config.function}#{times}")
    return names
