"""The stages that learn, and the one that says what it was worth: distil -> RL -> compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asn_rl.checkpoint import check_compatible, load_policy, save_policy
from asn_rl.data.store import load_trajectories, save_trajectories
from asn_rl.errors import ConfigError, DataError
from asn_rl.evaluation.comparison import Arm, arm_result, paired_difference, run_arm, table
from asn_rl.evaluation.controls import ShuffledContext, run_mixed
from asn_rl.job.conditioning import lesson_of
from asn_rl.job.config import CONTROLS, DISTILLED, RL, SHUFFLED, CompareConfig
from asn_rl.job.job import BASE, GREEDY, Job
from asn_rl.job.labelling import label, labels_of, prompts, reward_scores, select
from asn_rl.labelling.selected import read_targets
from asn_rl.labelling.store import read_candidates
from asn_rl.metrics import MetricsLogger
from asn_rl.ops.preference import Pairs, choose_pairs
from asn_rl.protocols import Policy, TrainablePolicy
from asn_rl.replay import replay
from asn_rl.rewards.compose import combined
from asn_rl.runs import console, progress, write_json
from asn_rl.training import grpo, lpo, parallel, ppo
from asn_rl.training.distill import distill, sketch_targets
from asn_rl.training.on_policy import Sampler
from asn_rl.training.served import served_sampler
from asn_rl.types import Candidate, Prompt, Trajectories


def distil(job: Job) -> TrainablePolicy:
    """Teach the policy, on the states of the selected candidates, each training prompt's target (its winning heuristic,
    or a mixture of heuristics) or the candidates' own tokens. Writes `distilled/`."""
    folder = job.run / DISTILLED
    if parallel.from_main(folder.exists()):
        return load_policy(folder)
    _select_first(job)
    lesson = lesson_of(job)
    policy = lesson.policy
    trajectories = _replayed(job, policy, lesson.candidates, job.run / "selected" / "trajectories")
    if lesson.condition is not None:
        trajectories = trajectories.with_condition(lesson.condition)
    targets, source = _targets(job, trajectories)
    with MetricsLogger(job.run / "distill") if parallel.is_main() else nullcontext() as log:
        figures = distill(lesson.pupil, trajectories, targets, job.config.distill, log=log)
    with parallel.main_first():
        if parallel.is_main():
            save_policy(folder, policy, **job.metadata, notes=f"Distilled from {source}.")
            write_json(job.run / "distill" / "summary.json", dict(figures))
    return policy


def _select_first(job: Job) -> None:
    """`select`; where several processes train, it must have been done by one."""
    if parallel.size() == 1:
        select(job)
    elif not parallel.from_main((job.run / "selection.json").exists()):
        raise ConfigError(
            f"{job.run} holds no selection, and {parallel.size()} processes were started to train; candidates are made "
            "and labelled by one: run `asn-rl select` with this configuration and run folder first"
        )


def _targets(job: Job, trajectories: Trajectories) -> tuple[Tensor, str]:
    """What each token teaches, as `distill` takes it, and where it comes from."""
    if job.config.distill.target == "tokens":
        return trajectories.points, f"the tokens of {len(trajectories)} candidates"
    names, by_prompt = [arm.name for arm in job.arms], read_targets(job.run / "selected")
    weights = torch.tensor([[by_prompt[p.id].get(name, 0.0) for name in names] for p in trajectories.prompts])
    taught = sorted(names[i] for i in weights.sum(0).nonzero().squeeze(-1).tolist())
    return sketch_targets([arm.policy for arm in job.arms], weights, trajectories), ", ".join(taught)


def _replayed(job: Job, policy: Policy, candidates: Sequence[Candidate], folder: Path) -> Trajectories:
    """Training candidates, replayed once, by the main process, through the base model with what `policy` reads; kept in
    `folder`."""
    with parallel.main_first():
        if folder.exists() or not parallel.is_main():
            return load_trajectories(folder)
        trajectories = _replay(job, policy, candidates)
        save_trajectories(folder, trajectories)
    return trajectories


def _replay(job: Job, policy: Policy, candidates: Sequence[Candidate]) -> Trajectories:
    by_id = {prompt.id: prompt for prompt in prompts(job)["train"]}
    textual = [candidate.key for candidate in candidates if not candidate.completion_ids]
    if textual:
        raise DataError(
            f"candidate {textual[0]} has no token ids, so the states it visited cannot be recovered; generate with a "
            "kind of server that returns them"
        )
    with console.status(f"replaying {len(candidates)} candidates"):
        trajectories, _ = replay(
            policy,
            job.backend,
            [by_id[candidate.prompt_id] for candidate in candidates],
            [list(candidate.completion_ids or ()) for candidate in candidates],
            job.config.rollout,
        )
    return trajectories


def _pairs(job: Job, policy: Policy, folder: Path) -> tuple[Trajectories, Pairs]:
    """The better and the worse training candidate of each pair, one after the other; kept in `folder`. Rewards are
    combined over all candidates of a prompt: heuristics are compared with each other."""
    found, config = label(job)["train"], job.config.lpo
    grid, labels = found.grid, labels_of(job, "train", found)
    groups = [prompt for prompt in grid.prompts for _ in range(grid.size // len(grid.prompts))]
    scores = [torch.from_numpy(part.reshape(-1)) for part in reward_scores(job, "train", labels)]
    rewards = combined(job.config.rewards, scores, groups).reshape(len(grid.prompts), -1)
    pairs = choose_pairs(rewards, config.group_size, config.seed)
    ends = torch.stack([pairs.chosen, pairs.rejected], 1).flatten()
    cells = torch.stack(torch.unravel_index(ends, grid.shape), 1).tolist()
    candidates = read_candidates([found.location((i, j, k)) for i, j, k in cells])
    places = torch.arange(len(ends)).reshape(-1, 2)
    return _replayed(job, policy, candidates, folder), replace(pairs, chosen=places[:, 0], rejected=places[:, 1])


def reinforce(job: Job) -> TrainablePolicy:
    """RL, or preference optimisation, against an older checkpoint. Writes `policy/` and `checkpoints/`."""
    if parallel.from_main((job.run / "policy").exists()):
        return load_policy(job.run / "policy")
    if job.config.algorithm == "lpo" and parallel.size() > 1:
        raise ConfigError(f"lpo trains in one process, {parallel.size()} were started; run `asn-rl reinforce` itself")
    start = _start(job)
    anchor = Path(job.config.reference or start)
    spec = check_compatible(start, fingerprint=job.backend.fingerprint)
    check_compatible(anchor, fingerprint=job.backend.fingerprint, architecture=spec.policy)
    return _train(job, load_policy(start), load_policy(anchor), job.run)


def _start(job: Job) -> Path:
    """Folder of the policy that RL begins at."""
    if job.config.init:
        return Path(job.config.init)
    if job.config.warm_start:
        distil(job)
        return job.run / DISTILLED
    folder = job.run / "start"
    with parallel.main_first():
        if not folder.exists():
            save_policy(folder, job.new_policy(), **job.metadata)
    return folder


def _train(job: Job, policy: TrainablePolicy, reference: Policy, run: Path) -> TrainablePolicy:
    config = job.config
    if config.algorithm == "lpo":
        pairs = _pairs(job, policy, run / "pairs")
        return lpo.train(policy, reference, *pairs, config.lpo, run, metadata=job.metadata)
    arguments = (job.backend, job.prompts("train"), job.rewards, config.rollout)
    with _sampler(job) as sample:
        if config.algorithm == "ppo":
            return ppo.train(policy, reference, *arguments, config.ppo, run, metadata=job.metadata, sample=sample)
        return grpo.train(policy, reference, *arguments, config.grpo, run, metadata=job.metadata, sample=sample)


def _sampler(job: Job) -> AbstractContextManager[Sampler | None]:
    """Where RL's completions come from; None: this process."""
    if job.config.serve is None:
        return nullcontext()
    return served_sampler(job.config.serve, job.backend, job.config.rollout, job.metadata)


def compare(job: Job) -> dict[str, Any]:
    """Greedy, T = 1, the best static rule, what was learned, and the controls if asked for, on the test prompts.
    Writes `comparison.json`, and the completions under `comparison/`."""
    if parallel.size() > 1:
        reinforce(job)
        parallel.main_alone()
    path = job.run / "comparison.json"
    if path.exists():
        return json.loads(path.read_text())
    selection, config = select(job), job.config.compare
    best = selection["best_static"]
    static = [job.static_rules[name] for name in dict.fromkeys([GREEDY, BASE, best])]
    arms = [*static, *_learned_arms(job), *(_controls(job, best) if config.controls else [])]
    prompts = job.prompts("test")
    strata = job.strata(prompts)
    results = []
    with progress("compare", len(arms)) as advance:
        for arm in arms:
            trajectories = _stored_rollout(job, job.run / "comparison" / arm.name, arm, prompts, config)
            results.append(arm_result(arm.name, trajectories, job.rewards, config.num_generations))
            advance(1, arm.name)
    options = {"resamples": config.resamples, "level": config.level, "seed": config.seed}
    by_name = {result.name: result for result in results}
    others = [name for name in (DISTILLED, *CONTROLS) if name in by_name]
    comparison = {
        "prompts": len(prompts),
        "samples": config.num_generations,
        "level": config.level,
        "best_static": best,
        "grid": [arm.name for arm in job.arms],
        "headroom": selection["headroom"],
        "rows": table(results, strata, best, **options),
        "rl_against": {name: paired_difference(by_name[RL], by_name[name], strata, **options) for name in others},
    }
    write_json(path, comparison)
    return comparison


def _learned_arms(job: Job) -> list[Arm]:
    distilled = [Arm(DISTILLED, distil(job))] if job.config.warm_start and not job.config.init else []
    return [*distilled, Arm(RL, reinforce(job))]


def _controls(job: Job, best_static: str) -> list[Arm]:
    """What the policy has to beat for its context to have mattered. Writes `controls/`.

    The context-free mixture begins at the best static rule, so that it need not find in a few steps what the policy was
    given by its warm start.
    """
    folder = job.run / "controls" / "context-free"
    if not (folder / "policy").exists():
        _train(job, job.new_mixture(best_static), job.new_mixture(best_static), folder)
    shuffled = ShuffledContext(reinforce(job), seed=job.config.compare.seed)
    policies = (job.new_mixture(), load_policy(folder / "policy"), shuffled)
    return [Arm(name, policy) for name, policy in zip(CONTROLS, policies, strict=True)]


def _stored_rollout(
    job: Job,
    folder: Path,
    arm: Arm,
    prompts: Sequence[Prompt],
    config: CompareConfig,
) -> Trajectories:
    """What `folder` holds, or a rollout that is then stored there."""
    if folder.exists():
        return load_trajectories(folder)
    samples, seed = config.num_generations, config.seed
    run = run_mixed if arm.name == SHUFFLED else run_arm
    trajectories = run(arm, job.backend, prompts, job.config.rollout, samples, seed)
    save_trajectories(folder, trajectories)
    return trajectories
