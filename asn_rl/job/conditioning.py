"""What distillation teaches whom: the selected candidates, each under its own score where the policy is conditioned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asn_rl.errors import ConfigError, DataError
from asn_rl.job.config import ConditionConfig
from asn_rl.job.job import Job
from asn_rl.labelling.selected import read_normalised, read_selected
from asn_rl.protocols import TrainablePolicy
from asn_rl.types import Candidate


@dataclass(frozen=True)
class Lesson:
    """An untrained policy, and what it is taught."""

    policy: TrainablePolicy
    """what is saved, run and improved by RL"""
    pupil: TrainablePolicy
    """what learns: the policy, or the conditioned one inside it"""
    candidates: Sequence[Candidate]
    condition: Tensor | None = None
    """(B, 1) fp32 normalised scores of the candidates; None: not conditioned"""


def lesson_of(job: Job) -> Lesson:
    """The lesson of a run whose candidates are selected.

    Raises:
        UnknownName: no labeller of the name that `condition.label` gives.
        DataError: it masked every candidate that was kept, or gave all the same score.
        ConfigError: `condition.policy` holds no policy.
    """
    folder, config = job.run / "selected", job.config.condition
    candidates = read_selected(folder)
    if config is None:
        policy = job.new_policy()
        return Lesson(policy, policy, candidates)
    scores = read_normalised(folder, config.label)
    known = [i for i, score in enumerate(scores) if score is not None]
    condition = torch.tensor([scores[i] for i in known], dtype=torch.float32)
    if len(condition.unique()) < 2:
        raise DataError(
            f"of the {len(scores)} candidates that were kept, {len(known)} have a score of {config.label!r}, and not "
            "two that differ: there is nothing to ask for. Raise select.top_k, so that worse candidates are kept, too"
        )
    policy = job.new_asked_policy([_normalised(job, config)])
    pupil = getattr(policy, "inner", None)
    if not isinstance(pupil, TrainablePolicy):
        raise ConfigError(f"condition.policy {config.policy!r} has no attribute `inner` that is a policy")
    return Lesson(policy, pupil, [candidates[i] for i in known], condition.unsqueeze(-1))


def _normalised(job: Job, config: ConditionConfig) -> float:
    """What is asked for, in the units in which candidates were compared."""
    summary = json.loads((job.run / "selected" / "summary.json").read_text())
    scale = summary["labellers"][config.label]["scale"]
    return config.ask if scale["how"] == "none" else (config.ask - scale["centre"]) / scale["scale"]
