"""From the rewards of a group of completions to their advantages."""

from __future__ import annotations

import torch
from torch import Tensor

STD_EPSILON = 1e-4  # TRL's guard; groups without variance are left out before it matters


def group_advantages(rewards: Tensor, *, scale: str = "group") -> Tensor:
    """(G, n) rewards of n completions of G prompts -> advantages relative to the group mean.

    NaN rewards are masked: they get advantage 0 and count in no mean.

    Args:
        scale: "group" divides by the group's standard deviation (GRPO, Shao et al. 2024, arXiv:2402.03300, eq. 3),
            "batch" by that of all centred rewards, "none" by nothing (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).
    """
    valid = ~rewards.isnan()
    centred = torch.where(valid, rewards - _mean(rewards, valid, dim=-1), 0.0)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / (_std(centred, valid, dim=-1) + STD_EPSILON)
    return centred / (_std(centred.flatten(), valid.flatten(), dim=0) + STD_EPSILON)


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """(G, n) rewards minus the mean of the other completions of the group (RLOO, Kool et al. 2019; Ahmadian et al.
    2024, arXiv:2402.14740). A NaN reward, or one without valid companions, gets advantage 0."""
    valid = ~rewards.isnan()
    others = valid.sum(-1, keepdim=True) - 1
    total = torch.where(valid, rewards, 0.0).sum(-1, keepdim=True)
    baseline = (total - rewards) / others.clamp_min(1)
    return torch.where(valid & (others > 0), rewards - baseline, 0.0)


def has_signal(rewards: Tensor) -> Tensor:
    """(G,) True where a group's valid rewards are not all exactly equal; other groups carry no gradient."""
    low = torch.where(rewards.isnan(), torch.inf, rewards).amin(-1)
    high = torch.where(rewards.isnan(), -torch.inf, rewards).amax(-1)
    return high > low


def _mean(values: Tensor, valid: Tensor, dim: int) -> Tensor:
    total = torch.where(valid, values, 0.0).sum(dim, keepdim=True)
    return total / valid.sum(dim, keepdim=True).clamp_min(1)


def _std(centred: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Sample standard deviation of values with mean 0."""
    freedom = (valid.sum(dim, keepdim=True) - 1).clamp_min(1)
    return (torch.where(valid, centred, 0.0).square().sum(dim, keepdim=True) / freedom).sqrt()
