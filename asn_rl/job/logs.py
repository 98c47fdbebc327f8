"""A job's candidates and labels as a logged reward tensor, and what it says about adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from asn_rl.checkpoint import atomic_folder, load_state, save_state
from asn_rl.errors import DataError, UnknownName
from asn_rl.evaluation.headroom import HeadroomReport
from asn_rl.evaluation.headroom import headroom as measured
from asn_rl.evaluation.reward_log import RewardLog, load_reward_log, save_reward_log
from asn_rl.evaluation.statistics import Resampling
from asn_rl.job.job import Job
from asn_rl.job.labelling import SPLITS, label, labels_of, prompts, rewards_apart, rewards_of
from asn_rl.labelling.labels import Labels
from asn_rl.labelling.store import CandidateStore, read_candidates
from asn_rl.protocols import LogitsBackend
from asn_rl.rollout import encoded_prompts
from asn_rl.runs import console, write_json
from asn_rl.training import parallel
from asn_rl.types import Prompt


def reward_log(job: Job, split: str) -> RewardLog:
    """R[prompt, heuristic, seed] of a split's candidates, with the prompts' embeddings as features. What is missing is
    generated and labelled first. Writes `logs/SPLIT/`.

    Raises:
        UnknownName: a split without candidates.
    """
    _check_split(split)
    parallel.main_alone()
    folder = job.run / "logs" / split
    if folder.exists():
        return load_reward_log(folder)
    candidates = label(job)[split]
    return _recorded(job, split, candidates, labels_of(job, split, candidates))


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UnknownName("split of candidates", split, SPLITS)


def _recorded(job: Job, split: str, candidates: CandidateStore, labels: dict[str, Labels]) -> RewardLog:
    """What `logs/SPLIT/` holds, or a log that is then stored there."""
    folder, texts = job.run / "logs" / split, prompts(job)[split]
    if folder.exists():
        return load_reward_log(folder)
    log = RewardLog(
        rewards=rewards_of(job, split, candidates, labels),
        tokens=_token_counts(candidates),
        actions=candidates.grid.heuristics,
        prompt_ids=candidates.grid.prompts,
        strata=tuple(job.strata(texts)),
        features=embeddings(job, split).numpy(),
    )
    save_reward_log(folder, log)
    return log


def headroom(job: Job, split: str = "train") -> HeadroomReport:
    """Whether choosing the heuristic by prompt can help on a split's prompts. Writes `headroom.json`.

    Rewards that compare the completions of a group compare those of a half of the seeds, so that one half's luck does
    not show in the other one's rewards.

    Raises:
        DataError: a reward that compares completions has no labels of halves (a judge, for example).
    """
    compare = job.config.compare
    how = Resampling(compare.resamples, compare.level, compare.seed)
    _check_split(split)
    parallel.main_alone()
    candidates = label(job)[split]
    labels = labels_of(job, split, candidates)
    log = replace(_recorded(job, split, candidates, labels), rewards=rewards_apart(job, split, candidates, labels))
    report = measured(log, job.config.bandit, how)
    write_json(job.run / "headroom.json", {"split": split, **report.as_dict()})
    return report


def embeddings(job: Job, split: str) -> Tensor:
    """(P, D) fp32 hidden state of the base model at the last token of each prompt; kept in `embeddings/SPLIT/`.

    Raises:
        DataError: those that are kept belong to other prompts or another base model.
    """
    folder, texts = job.run / "embeddings" / split, prompts(job)[split]
    ids = [prompt.id for prompt in texts]
    if not folder.exists():
        with console.status(f"embedding {len(texts)} prompts"):
            found = prompt_embeddings(job.backend, texts, job.config.rollout.max_batch)
        with atomic_folder(folder) as scratch:
            save_state(scratch, {"prompt_ids": ids, "embeddings": found})
    state = load_state(folder)
    if state["prompt_ids"] != ids:
        raise DataError(f"{folder} holds embeddings of other prompts; remove that folder, they are then made again")
    return state["embeddings"]


@torch.no_grad()
def prompt_embeddings(backend: LogitsBackend, texts: Sequence[Prompt], batch: int) -> Tensor:
    """(P, D) fp32 hidden states at the last prompt token, on the CPU: what a rollout records as `prompt_embedding`."""
    ids, parts = encoded_prompts(backend, texts, max_new_tokens=1), []
    for low in range(0, len(ids), batch):
        hidden = backend.start(ids[low : low + batch], hidden=True).hidden
        assert hidden is not None
        parts.append(hidden.float().cpu().clone())
    return torch.cat(parts)


def _token_counts(candidates: CandidateStore) -> np.ndarray:
    """(P, A, S) int64; -1: the server returned no token ids."""
    counts = np.zeros(candidates.grid.shape, np.int64)
    for i, j, k in np.argwhere(candidates.present).tolist():
        (candidate,) = read_candidates([candidates.location((i, j, k))])
        counts[i, j, k] = -1 if candidate.completion_ids is None else len(candidate.completion_ids)
    return counts
