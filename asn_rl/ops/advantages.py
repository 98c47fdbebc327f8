"""From the rewards of a group of completions to their advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from asn_rl.errors import InvalidValue

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


def pass_at_k_advantages(rewards: Tensor, k: int | Tensor) -> Tensor:
    """(G, n) rewards of 0 or 1 -> advantages whose policy gradient raises pass@k (Chen et al. 2025, arXiv:2508.10751,
    "analytical derivation").

    All k-subsets of a group, each worth 1 where any of its members is right, have mean rho = 1 - C(w, k) / C(n, k) and
    standard deviation s = sqrt(rho (1 - rho)), with w wrong completions of n. A completion's advantage is that of the
    subsets it belongs to: (1 - rho) / s if it is right, (1 - rho - C(w - 1, k - 1) / C(n - 1, k - 1)) / s if wrong.
    0 where s is 0. NaN rewards are masked: they get advantage 0 and count in no group.

    Args:
        k: one for all groups, or (G,).

    Raises:
        InvalidValue: a reward other than 0 and 1, or k not in [1, n].
    """
    valid = ~rewards.isnan()
    ks = torch.as_tensor(k, device=rewards.device).expand(len(rewards)).unsqueeze(-1)
    if not bool(((ks >= 1) & (ks <= rewards.shape[-1])).all()):
        raise InvalidValue("pass_k", k, f"in [1, {rewards.shape[-1]}], the completions of a group")
    if not bool(((rewards == 0) | (rewards == 1) | ~valid).all()):
        wrong_one = rewards[valid & (rewards != 0) & (rewards != 1)][0].item()
        raise InvalidValue("reward", wrong_one, "0 or 1", "pass@k needs completions that are right or wrong")
    count, right = valid.sum(-1, keepdim=True).double(), valid & (rewards == 1)
    wrong = count - right.sum(-1, keepdim=True)
    none_right = _binomial_ratio(wrong, count, ks)
    scale = (none_right * (1 - none_right)).sqrt()
    others_wrong = _binomial_ratio(wrong - 1, count - 1, ks - 1)
    advantages = torch.where(right, none_right, none_right - others_wrong) / scale
    return torch.where(valid & (scale > 0), advantages, 0.0)


def _binomial_ratio(wrong: Tensor, count: Tensor, k: Tensor) -> Tensor:
    """C(wrong, k) / C(count, k), elementwise; 0 where wrong < k."""
    ratio = torch.ones_like(count)
    for i in range(int(k.max())):
        factor = ((wrong - i) / (count - i).clamp_min(1)).clamp_min(0)
        ratio = torch.where(i < k, ratio * factor, ratio)
    return ratio


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
