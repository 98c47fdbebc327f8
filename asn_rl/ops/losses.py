"""Losses on per-token tensors stored without padding: (S,) tokens; `rows` (S,) names the completion of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asn_rl.ops.logprobs import expectation


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective, negated (Schulman et al. 2017, arXiv:1707.06347, eq. 7), with separate bounds
    (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 10).

    Args:
        logprobs, old_logprobs, advantages: (S,).

    Returns:
        (S,) loss, and (S,) bool: True where clipping removed the gradient.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(ratio * advantages, clipped * advantages), clipped * advantages < ratio * advantages


def aggregate(values: Tensor, rows: Tensor, completions: int, how: str, constant: int = 1) -> Tensor:
    """Per-token values to one number.

    "token": mean over all tokens (DAPO); "sequence": mean of each completion's mean (GRPO); "constant": sum divided by
    `completions * constant`, with the token budget as the constant (Dr. GRPO).
    """
    if how == "token":
        return values.mean()
    if how == "constant":
        return values.sum() / (completions * constant)
    lengths = torch.bincount(rows, minlength=completions).clamp_min(1)
    return (values / lengths[rows]).sum() / completions


def truncated_kl(target: Tensor, logprobs: Tensor, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Distillation of a truncated target: KL(target || policy) and the mass the policy leaks outside its support.

    The reference project's TruncatedLogitsLoss on points. Over the vocabulary both terms are the same numbers, when
    the target too keeps the base model's proportions inside points.

    Args:
        target: (..., N) normalised log-probabilities, -inf where cut.
        logprobs: (..., N) those of the policy. Where the policy forbids a point that the target uses, the KL
            divergence is infinite; a policy is therefore trained with a soft gate.
        gamma: weight of the leak. It only reweights: with the right shape the KL is already -log(1 - leak).

    Returns:
        (...) KL in nats, and (...) gamma * leaked mass.

    Raises:
        ValueError: a target row is not a distribution (all -inf, or NaN).
    """
    if not torch.isfinite(torch.logsumexp(target, -1)).all():
        raise ValueError("a target row is no distribution (all -inf or NaN); check the heuristic that made it")
    kept = target > -math.inf
    entropy_term = torch.where(kept, target, 0.0)
    cross_term = torch.where(kept, logprobs, 0.0)
    divergence = expectation(target, entropy_term - cross_term)
    leak = torch.where(kept, 0.0, logprobs.exp()).sum(-1)
    return divergence, gamma * leak
