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
    return _clipped((logprobs - old_logprobs).exp(), advantages, epsilon, epsilon_high)


def sequence_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, rows: Tensor, epsilon: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """GSPO's clipped objective, negated (Zheng et al. 2025, arXiv:2507.18071, eq. 13-14, "GSPO-token").

    All tokens of completion i share the ratio s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|); token t has
    s_it = sg[s_i] pi_t / sg[pi_t], and the objective is min(s_it A_t, clip(s_it) A_t). Where the advantage is the same
    for all tokens of a completion and `aggregate` is "sequence", value and gradient are those of GSPO itself (eq. 5).

    Args:
        logprobs, old_logprobs, advantages: (S,) tokens of whole completions.
        rows: (S,) int64 completion of each, 0, 1, 2, ...
        epsilon, epsilon_high: a mean over tokens moves little; the paper has 3e-4 and 4e-4.

    Returns:
        (S,) loss, and (S,) bool: True where clipping removed the gradient.
    """
    log_ratio = (logprobs - old_logprobs).detach()
    lengths = torch.bincount(rows)
    of_sequence = log_ratio.new_zeros(len(lengths)).index_add_(0, rows, log_ratio) / lengths
    ratio = of_sequence.exp()[rows] * (logprobs - logprobs.detach()).exp()
    return _clipped(ratio, advantages, epsilon, epsilon_high)


def _clipped(ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float) -> tuple[Tensor, Tensor]:
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(ratio * advantages, clipped * advantages), clipped * advantages < ratio * advantages


def cispo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon_high: float) -> Tensor:
    """(S,) CISPO's objective, negated: -sg[min(r_t, 1 + epsilon_high)] A_t log pi_t (MiniMax 2025, arXiv:2506.13585,
    eq. 4-5, without a lower bound, as they train it). A clipped token keeps a gradient of bounded weight."""
    weight = (logprobs - old_logprobs).detach().exp().clamp(max=1 + epsilon_high)
    return -weight * advantages * logprobs


def covariances(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """(S,) (log pi_t - mean log pi)(A_t - mean A): each token's part in the covariance that lowers the entropy (Cui et
    al. 2025, arXiv:2505.22617, section 4)."""
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def clip_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    epsilon: float,
    epsilon_high: float,
    *,
    fraction: float,
    bounds: tuple[float, ...],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Clip-Cov (Cui et al. 2025, arXiv:2505.22617, section 4): r_t A_t, but 0 on a set drawn uniformly, without
    replacement, from the tokens with low < cov_t < high; its size is floor(fraction S), at least 1.

    As in the authors' code, PPO's clipping stays, and clipped tokens are not drawn.

    Args:
        bounds: (low, high) of `covariances`.
        generator: on the CPU.

    Returns:
        (S,) loss, and (S,) bool: True where clipping, or the draw, removed the gradient.
    """
    loss, clipped = clipped_surrogate(logprobs, old_logprobs, advantages, epsilon, epsilon_high)
    cov = covariances(logprobs.detach(), advantages)
    low, high = bounds
    among = ((cov > low) & (cov < high) & ~clipped).nonzero().squeeze(-1)
    count = max(1, int(fraction * len(cov)))
    drawn = among[torch.randperm(len(among), generator=generator)[:count].to(among.device)]
    dropped = torch.zeros_like(clipped).index_fill_(0, drawn, True)
    return torch.where(dropped, 0.0, loss), clipped | dropped


def kl_cov(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, fraction: float, coefficient: float
) -> Tensor:
    """(S,) KL-Cov's objective, negated (Cui et al. 2025, arXiv:2505.22617, section 4): -r_t A_t, plus
    `coefficient` * D(pi_old, pi)_t on the floor(fraction S) tokens, at least 1, with the largest `covariances`.

    D is |log pi_t - log pi_old,t|, the estimate of the authors' code; its gradient is 0 while the policies are equal.
    """
    log_ratio = logprobs - old_logprobs
    top = covariances(logprobs.detach(), advantages).topk(max(1, int(fraction * len(logprobs)))).indices
    penalty = torch.zeros_like(log_ratio).index_fill_(0, top, coefficient) * log_ratio.abs()
    return penalty - log_ratio.exp() * advantages


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float | None) -> Tensor:
    """(S,) half the squared error of a critic. With `value_clip` the larger of that and the error of the value held
    within `value_clip` of its old one (OpenAI baselines' ppo2; Engstrom et al. 2020, arXiv:2005.12729, section 3)."""
    error = (values - returns).square()
    if value_clip is not None:
        held = old_values + (values - old_values).clamp(-value_clip, value_clip)
        error = torch.maximum(error, (held - returns).square())
    return 0.5 * error


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
