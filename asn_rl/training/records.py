"""What a training step leaves of its completions: rewards, metrics and JSONL records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from asn_rl.errors import RewardError
from asn_rl.rewards.compose import RewardResult, RewardSuite, combined, score, scores_tensor
from asn_rl.training import parallel
from asn_rl.training.minibatches import turns
from asn_rl.types import Trajectories


def scored(rewards: RewardSuite, trajectories: Trajectories) -> RewardResult:
    """Scores of this process's completions, composed with those of the others where a reward is normalised over the
    batch. Every process calls the functions on its own prompts; a function sees whole groups, and nothing beyond them.

    Raises:
        RewardError: a broken contract, or every score of all processes is masked.
        TrainingError: another process failed.
    """
    if parallel.size() == 1:
        return score(rewards, trajectories)
    columns = dict.fromkeys(name for part in parallel.gathered_json(_columns(trajectories)) for name in part)
    prompts = [replace(prompt, columns=columns | dict(prompt.columns)) for prompt in trajectories.prompts]
    with parallel.together():
        terminated = trajectories.terminated.tolist()
        texts = (trajectories.completions, trajectories.completion_ids)
        raw = rewards.scores(prompts, *texts, terminated=terminated)
    own = {name: scores_tensor(values) for name, values in raw.values.items()}
    everyone = {name: parallel.gathered(values) for name, values in own.items()}
    if all(bool(values.isnan().all()) for values in everyone.values()):
        raise RewardError(
            f"every score of this step is masked, there is nothing to learn from: {parallel.summed(raw.counts)}. "
            "Mend the reward functions, and the same command resumes"
        )
    ids = [name for part in parallel.gathered_json([p.id for p in trajectories.prompts]) for name in part]
    total = combined(rewards.configs, list(everyone.values()), ids)
    first = parallel.before(len(trajectories))
    return RewardResult(total[first : first + len(trajectories)], own, raw.counts)


def _columns(trajectories: Trajectories) -> list[str]:
    return list(dict.fromkeys(name for prompt in trajectories.prompts for name in prompt.columns))


def rollout_metrics(trajectories: Trajectories, result: RewardResult) -> dict[str, float]:
    """What a batch of completions, those of all processes, looks like beside its gradient."""
    metrics = {
        "reward/total": float(np.nanmean(parallel.gathered(result.total).numpy())),
        "policy/length": mean_length(trajectories),
        "policy/truncated": float((~parallel.gathered(trajectories.terminated)).float().mean()),
        "policy/surprise": float(-parallel.gathered(trajectories.base_logprobs).mean()),
    }
    for name, own in result.components.items():
        values = parallel.gathered(own)
        if not values.isnan().all():
            metrics[f"reward/{name}"] = float(np.nanmean(values.numpy()))
    return metrics | {f"reward/{name}": float(count) for name, count in parallel.summed(result.counts).items()}


def mean_length(trajectories: Trajectories) -> float:
    """Tokens of a completion, in the mean over all processes."""
    return float(parallel.gathered(trajectories.lengths).float().mean())


def of_all(metrics: Mapping[str, float], weight: float) -> dict[str, float]:
    """Metrics of all processes from those of each: counts (int) are added up, others averaged by `weight`."""
    if parallel.size() == 1:
        return dict(metrics)
    share = weight / parallel.summed({"weight": weight})["weight"]
    return parallel.summed({name: v if isinstance(v, int) else share * v for name, v in metrics.items()})


def records(trajectories: Trajectories, result: RewardResult, step: int) -> list[dict[str, Any]]:
    """Completions of all processes as JSONL records, keyed by (step, prompt_id, sample)."""
    own = [
        {
            "schema": "asn_rl/rollout-1",
            "step": step,
            "prompt_id": prompt.id,
            "sample": trajectories.sample[i],
            "completion": trajectories.completions[i],
            "reward": None if result.total[i].isnan() else round(result.total[i].item(), 6),
            "tokens": len(trajectories.completion_ids[i]),
            "terminated": bool(trajectories.terminated[i]),
        }
        for i, prompt in enumerate(trajectories.prompts)
    ]
    if parallel.size() == 1:
        return own
    parts = parallel.gathered_json(list(zip(turns(trajectories).tolist(), own, strict=True)))
    dealt = [(turn, rank, record) for rank, part in enumerate(parts) for turn, record in part]
    return [record for _, _, record in sorted(dealt, key=lambda entry: entry[:2])]
