"""From rewards along completions to returns and advantages; (S,) tokens stored one completion after the other."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_DEVIATION = 1e-7  # below it, advantages differ by rounding


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """(S,) generalised advantage estimates (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    A_t = sum_l (gamma lambda)^l delta_{t+l} with delta_t = r_t + gamma V_{t+1} - V_t. The value after a completion's
    last token is 0, also where the token budget ended it: the budget is observed, so nothing of value follows (Pardo
    et al. 2018, arXiv:1712.00378).

    Args:
        rewards, values: (S,), of each token and of the state in which it was chosen.
        lengths: (B,) int64 tokens of each completion.
    """
    inside = torch.arange(int(lengths.max()), device=lengths.device) < lengths.unsqueeze(-1)
    inside = inside.to(rewards.device)
    errors = rewards - values
    errors[:-1] += torch.where(_last(lengths, rewards.device)[:-1], 0.0, gamma * values[1:])
    padded = rewards.new_zeros(inside.shape).masked_scatter_(inside, errors)
    for t in reversed(range(inside.shape[1] - 1)):
        padded[:, t] += gamma * gae_lambda * padded[:, t + 1]
    return padded[inside]


def token_rewards(
    totals: Tensor,
    lengths: Tensor,
    *,
    price: float = 0.0,
    shaping: Tensor | None = None,
    following: Tensor | None = None,
) -> Tensor:
    """(S,) fp32 reward of every token: the completion's at its last one, minus a price everywhere.

    Args:
        totals: (B,) rewards of the completions; NaN, masked, counts as 0 here.
        price: reward a token costs.
        shaping: (S,) further reward of each token.
        following: (S,) cost of each state, charged to the token that led there; the first state's to nobody.
    """
    ends = _last(lengths, totals.device)
    rewards = torch.full((len(ends),), -price, device=totals.device)
    rewards[ends] += totals.nan_to_num(0.0).float()
    if shaping is not None:
        rewards = rewards + shaping
    if following is not None:
        rewards[:-1] -= torch.where(ends[:-1], 0.0, following[1:])
    return rewards


def whitened(advantages: Tensor, among: Tensor) -> tuple[Tensor, float]:
    """(S,) advantages with mean 0 and standard deviation 1 over the tokens `among` (S,) bool, 0 at the others; and the
    number that they were multiplied by. Advantages that are all equal become 0, by 1."""
    chosen = advantages[among]
    deviation = float(chosen.std(correction=0)) if len(chosen) else 0.0
    if deviation < SMALLEST_DEVIATION:
        return torch.zeros_like(advantages), 1.0
    return torch.where(among, (advantages - chosen.mean()) / deviation, 0.0), 1 / deviation


def _last(lengths: Tensor, device: torch.device) -> Tensor:
    """(S,) bool, True at the last token of each completion."""
    ends = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    ends[lengths.cpu().cumsum(0) - 1] = True
    return ends.to(device)
