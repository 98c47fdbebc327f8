"""What a training step leaves of its completions: metrics and JSONL records."""

from __future__ import annotations

from typing import Any

import numpy as np

from asn_rl.rewards.compose import RewardResult
from asn_rl.types import Trajectories


def rollout_metrics(trajectories: Trajectories, result: RewardResult) -> dict[str, float]:
    """What a batch of completions looks like, beside its gradient."""
    lengths = trajectories.lengths.float()
    metrics = {
        "reward/total": float(np.nanmean(result.total.numpy())),
        "policy/length": float(lengths.mean()),
        "policy/truncated": float((~trajectories.terminated).float().mean()),
        "policy/surprise": float(-trajectories.base_logprobs.mean()),
    }
    for name, values in result.components.items():
        if not values.isnan().all():
            metrics[f"reward/{name}"] = float(np.nanmean(values.numpy()))
    return metrics | {f"reward/{name}": float(count) for name, count in result.counts.items()}


def records(trajectories: Trajectories, result: RewardResult, step: int) -> list[dict[str, Any]]:
    """Completions as JSONL records, keyed by (step, prompt_id, sample)."""
    return [
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
