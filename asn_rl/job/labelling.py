"""The stages that make candidates and find what wins: generate -> verify -> label -> select."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asn_rl.errors import ConfigError, DataError, UnknownName
from asn_rl.evaluation.comparison import by_stratum
from asn_rl.evaluation.statistics import masked_mean, split_half_oracle, stratified_mean
from asn_rl.job.job import Job
from asn_rl.job.servers import generate_on_servers, publish_arms
from asn_rl.labelling import generate as generating
from asn_rl.labelling import labels as labelling
from asn_rl.labelling import select as selecting
from asn_rl.labelling.grid import Grid
from asn_rl.labelling.records import read_prompts, write_prompts
from asn_rl.labelling.store import CandidateStore, read_candidates
from asn_rl.labelling.verify import Verification
from asn_rl.labelling.verify import verify as verified
from asn_rl.rewards.compose import RewardConfig, combined, unique_names
from asn_rl.rewards.embedding_diversity import load_encoder
from asn_rl.runs import write_json
from asn_rl.training import parallel
from asn_rl.training.reward_model import RewardModelReport, train_reward_model
from asn_rl.types import Prompt

SPLITS = ("selection", "train")


def prompts(job: Job) -> dict[str, list[Prompt]]:
    """The prompts of each split that are generated for; kept in the run folder, so that later stages see the same."""
    path = job.run / "prompts.jsonl"
    if not path.exists():
        found = {split: job.prompts_to_label(split) for split in SPLITS}
        for part in found.values():
            job.strata(part)  # a missing column, and below missing rewards, show before hours of generation
        assert job.scorers
        if job.config.select.encoder:
            load_encoder(job.config.select.encoder)
        write_prompts(path, found)
    return read_prompts(path)


def stores(job: Job) -> dict[str, CandidateStore]:
    """The candidates of each split, as far as they are there; one pass over all records."""
    parallel.main_alone()
    heuristics, seeds = tuple(arm.name for arm in job.arms), job.config.generate.seeds
    grids = {split: Grid(tuple(p.id for p in part), heuristics, seeds) for split, part in prompts(job).items()}
    return {split: CandidateStore(grids[split], job.run / "candidates" / split) for split in SPLITS}


def generate(job: Job) -> dict[str, CandidateStore]:
    """Complete every prompt under every heuristic and seed. Writes `candidates/`; cells that are there are passed
    over. Returns the candidates of each split."""
    found = stores(job)
    missing = [split for split, candidates in found.items() if not candidates.present.all()]
    for split in missing:
        _generate(job, found[split], {prompt.id: prompt for prompt in prompts(job)[split]})
    return stores(job) if missing else found


def _generate(job: Job, candidates: CandidateStore, by_id: dict[str, Prompt]) -> None:
    servers, limits = job.config.generate.servers, job.config.rollout
    fixed = [arm.name for arm in job.arms if arm.deterministic]
    if servers is None:
        policies = {arm.name: arm.policy for arm in job.arms}
        source = generating.InProcess(job.backend, policies, by_id, limits, fixed)
        generating.generate(candidates, source, candidates.folder)
    elif servers.policies is not None:
        served = publish_arms(job, servers, job.arms)
        generate_on_servers(servers, candidates, by_id, job.backend, limits, fixed, served=served)
    else:
        processors = {spec.name: spec.processors for spec in job.heuristics}
        backend = None if servers.kind == "openai" else job.backend
        generate_on_servers(servers, candidates, by_id, backend, limits, fixed, processors=processors)


def verify(job: Job) -> dict[str, Verification]:
    """Check the candidates of each split against the cross product."""
    return {split: verified(candidates) for split, candidates in stores(job).items()}


def label(
    job: Job, engine: labelling.Engine = labelling.local_engine, retry: Collection[str] = ()
) -> dict[str, CandidateStore]:
    """Score every candidate. Writes `labels/`; prompts that are done are passed over. Returns the candidates of each
    split.

    Args:
        retry: labellers that are asked again for the candidates they masked; see `asn_rl.labelling.labels.label`.

    Raises:
        DataError: a cell has two different texts.
        UnknownName: `retry` names no labeller of the run.
        ConfigError: there is something to retry, and candidates are selected already by the labels as they are.
    """
    _check_retry(job, retry)
    found, texts = generate(job), prompts(job)
    for split, candidates in found.items():
        checked = verified(candidates)
        if not checked.ok:
            raise DataError(
                f"the candidates of the {split} split contradict each other:\n  " + "\n  ".join(checked.lines()) + "\n"
                "Remove the wrong lines and run the same command again"
            )
        by_id = {prompt.id: prompt for prompt in texts[split]}
        labelling.label(_scorers(job, split), candidates, by_id, job.run / "labels" / split, engine, retry)
    return found


def _check_retry(job: Job, retry: Collection[str]) -> None:
    for name in retry:
        if name not in unique_names(job.scorers):
            raise UnknownName("labeller of this run", name, unique_names(job.scorers))
    if retry and (job.run / "selected").exists():
        raise ConfigError(
            "candidates are selected already by the labels as they are; to label and select again, remove selected/ "
            f"and selection.json in {job.run}, and what was learned from them, or copy candidates/, labels/ and "
            "prompts.jsonl to a new run folder"
        )


def select(job: Job, engine: selecting.Map = map) -> dict[str, Any]:
    """Rate the heuristics on each training prompt, keep the best candidates, and find the best static rule on the
    selection split. Writes `selected/` and `selection.json`."""
    parallel.main_alone()
    path = job.run / "selection.json"
    if path.exists():
        return json.loads(path.read_text())
    found, texts = label(job), prompts(job)
    strata = {split: job.strata(texts[split]) for split in SPLITS}
    scores = {split: labels_of(job, split, found[split]) for split in SPLITS}
    names = unique_names(job.scorers)[: len(job.config.labellers or job.config.rewards)]
    weights = {name: config.weight for name, config in zip(names, job.scorers, strict=False)}
    own = {name: scores["train"][name] for name in names}
    selecting.select(found["train"], own, weights, strata["train"], job.config.select, job.run / "selected", engine)

    rewards = {split: rewards_of(job, split, found[split], scores[split]) for split in SPLITS}
    means = {arm.name: masked_mean(rewards["selection"][:, j]) for j, arm in enumerate(job.arms)}  # (P,) each
    selection = {
        "best_static": max(means, key=lambda name: stratified_mean(means[name], strata["selection"])),
        "selection": {name: dict(by_stratum(part, strata["selection"])) for name, part in means.items()},
        "headroom": _headroom(job, found["train"], scores["train"], strata["train"]),
    }
    write_json(path, selection)
    return selection


def _headroom(
    job: Job, candidates: CandidateStore, labels: dict[str, labelling.Labels], strata: Sequence[str]
) -> dict[str, float] | None:
    """What choosing by prompt could gain; None where a reward compares candidates of both halves of the seeds."""
    try:
        rewards = rewards_apart(job, "train", candidates, labels)
    except DataError:
        return None
    first, second = (masked_mean(masked_mean(rewards[..., half::2])) for half in range(2))  # (P,) each
    if not set(strata) <= {label for label, mean in zip(strata, first + second, strict=True) if not np.isnan(mean)}:
        return None
    oracle, static = split_half_oracle(rewards.swapaxes(0, 1), strata)
    return {"oracle": oracle, "static": static}


def _scorers(job: Job, split: str) -> list[RewardConfig]:
    """Static rules are chosen by reward; labels beyond that are for the training prompts."""
    return job.scorers if split == "train" else list(job.config.rewards)


def labels_of(job: Job, split: str, candidates: CandidateStore) -> dict[str, labelling.Labels]:
    names = unique_names(_scorers(job, split))
    folder = job.run / "labels" / split
    return {name: labelling.read_labels(folder / labelling.folder_name(name), name, candidates) for name in names}


def rewards_of(job: Job, split: str, candidates: CandidateStore, labels: dict[str, labelling.Labels]) -> np.ndarray:
    """(P, A, S) reward of each candidate, combined as training combines it; NaN: masked."""
    configs, scores = job.config.rewards, reward_scores(job, split, labels)
    count, heuristics, samples = candidates.grid.shape
    groups = [prompt for prompt in candidates.grid.prompts for _ in range(samples)]
    totals = [
        combined(configs, [torch.from_numpy(part[:, j].reshape(-1)) for part in scores], groups)
        for j in range(heuristics)
    ]
    return torch.stack(totals, 1).numpy().reshape(count, samples, heuristics).swapaxes(1, 2)


def rewards_apart(job: Job, split: str, candidates: CandidateStore, labels: dict[str, labelling.Labels]) -> np.ndarray:
    """As `rewards_of`, with completions compared within each half of the seeds only.

    Raises:
        DataError: a reward has no labels of halves.
    """
    apart = {name: replace(part, scores=part.apart) for name, part in labels.items()}
    for config, part in zip(job.config.rewards, reward_scores(job, split, apart), strict=True):
        if np.isnan(part).all():
            raise DataError(
                f"reward {config.function!r} compares completions over both halves of the seeds, so that neither half "
                "can choose without the other's luck; leave it out of `rewards`, or compare policies instead"
            )
    return rewards_of(job, split, candidates, apart)


def reward_scores(job: Job, split: str, labels: dict[str, labelling.Labels]) -> list[np.ndarray]:
    """(P, A, S) raw scores of each reward, in the order of the configuration."""
    scorers = _scorers(job, split)
    names = unique_names(scorers)
    places = [next(i for i, s in enumerate(scorers) if reward.scores_like(s)) for reward in job.config.rewards]
    return [labels[names[place]].scores for place in places]


def fit_reward_model(job: Job, labeller: str, folder: Path) -> RewardModelReport:
    """Fit `bradley_terry_head` to what a labeller prefers among the training candidates, and save it in `folder`.

    Raises:
        UnknownName: the run has no such labeller.
    """
    names = unique_names(job.scorers)
    if labeller not in names:
        raise UnknownName("labeller of this run", labeller, names)
    candidates = label(job)["train"]
    scores = labels_of(job, "train", candidates)[labeller].scores
    by_id = {prompt.id: prompt for prompt in prompts(job)["train"]}
    cells = [(i, j, k) for i, j, k in np.argwhere(candidates.present).tolist()]
    found = read_candidates([candidates.location(cell) for cell in cells])
    return train_reward_model(
        [by_id[candidate.prompt_id] for candidate in found],
        [candidate.completion_ids for candidate in found],
        [float(scores[cell]) for cell in cells],
        base_model=job.config.backend,
        folder=folder,
    )
