"""Preference losses of "Adaptive Decoding via Latent Preference Optimization" (arXiv:2411.09661), and their pairs.

Per-token tensors are stored without padding: (S,) tokens; `rows` (S,) names the completion of each. Sums over the
tokens of a completion are not divided by its length, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from asn_rl.errors import DataError, InvalidValue
from asn_rl.ops.advantages import has_signal


@dataclass(frozen=True)
class Pairs:
    """The best and the worst completion of each group that has both."""

    chosen: Tensor
    """(P,) int64 completion with the highest reward of its group; the first of several"""
    rejected: Tensor
    """(P,) int64 completion with the lowest"""
    tied: int
    """groups skipped because their rewards are all equal"""
    masked: int
    """groups skipped because fewer than two rewards are numbers"""


def best_worst_pairs(rewards: Tensor) -> Pairs:
    """Pairs of groups of completions; completion g of group i has number i * n + g.

    Args:
        rewards: (G, n), NaN where masked: such completions are never in a pair.

    Raises:
        InvalidValue: groups of fewer than two completions.
    """
    if rewards.ndim != 2 or rewards.shape[-1] < 2:
        raise InvalidValue("rewards", tuple(rewards.shape), "(G, n) with n >= 2", "a pair takes two completions")
    enough = (~rewards.isnan()).sum(-1) >= 2
    used = enough & has_signal(rewards)
    offsets = torch.arange(len(rewards), device=rewards.device) * rewards.shape[-1]
    best = torch.where(rewards.isnan(), -torch.inf, rewards).argmax(-1)
    worst = torch.where(rewards.isnan(), torch.inf, rewards).argmin(-1)
    return Pairs(
        chosen=(offsets + best)[used],
        rejected=(offsets + worst)[used],
        tied=int((enough & ~used).sum()),
        masked=int((~enough).sum()),
    )


def choose_pairs(rewards: Tensor, group_size: int | None = None, seed: int = 0) -> Pairs:
    """The best and the worst candidate of groups drawn at random; candidate c of prompt p has number p * n + c.

    Which one of equal rewards is taken is random too: candidates lie in the order of their heuristics, and of rewards
    of 0 and 1 the first heuristic would win most pairs.

    Args:
        rewards: (P, n), NaN where masked.
        group_size: candidates in a group, each candidate in one at most; None: n.

    Raises:
        InvalidValue: a prompt has fewer candidates than a group, or one alone.
        DataError: no group has two different rewards.
    """
    prompts, count = rewards.shape
    size = count if group_size is None else group_size
    if not 2 <= size <= count:
        advice = "generate more, or lower group_size"
        raise InvalidValue("group_size", size, f"in [2, {count}], the candidates of a prompt", advice)
    order = torch.rand(rewards.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    order = order[:, : count // size * size]
    pairs = best_worst_pairs(rewards.gather(-1, order).reshape(-1, size))
    if not len(pairs.chosen):
        raise DataError(
            f"no candidates to prefer: in {pairs.tied} groups all rewards are equal, in {pairs.masked} fewer than two "
            "are known; check the rewards, or generate more candidates"
        )
    numbers = (order + count * torch.arange(prompts).unsqueeze(-1)).flatten()
    return Pairs(numbers[pairs.chosen], numbers[pairs.rejected], pairs.tied, pairs.masked)


def separate_loss(gate_logprobs: Tensor, rows: Tensor, pairs: Pairs, beta: float) -> Tensor:
    """-log sigmoid(beta sum log P(tau_chosen) - beta sum log P(tau_rejected)), the paper's "separate" loss.

    It trains the strategies that were drawn, whatever tokens came of them, and has no reference.

    Args:
        gate_logprobs: (S,) log-probability of the strategy drawn at each token.

    Returns:
        (P,) loss of each pair.
    """
    return _preference(gate_logprobs, rows, pairs, beta)


def latent_loss(logprobs: Tensor, ref_logprobs: Tensor, rows: Tensor, pairs: Pairs, beta: float) -> Tensor:
    """DPO (arXiv:2305.18290, eq. 7) on the marginal token probability sum_tau P(tau) P(y | tau), the "latent" loss.

    Args:
        logprobs: (S,) log-probability of each token, the strategies summed out.
        ref_logprobs: (S,) the same under the reference (in the paper the gate at its start).

    Returns:
        (P,) loss of each pair.
    """
    return _preference(logprobs - ref_logprobs, rows, pairs, beta)


def margins(values: Tensor, rows: Tensor, pairs: Pairs) -> Tensor:
    """(P,) sum of the values (S,) of the chosen completion minus that of the rejected one."""
    completions = int(torch.cat([rows, pairs.chosen, pairs.rejected]).max()) + 1
    sums = values.new_zeros(completions).index_add(0, rows, values)
    return sums[pairs.chosen] - sums[pairs.rejected]


def _preference(values: Tensor, rows: Tensor, pairs: Pairs, beta: float) -> Tensor:
    if not beta > 0:
        raise InvalidValue("beta", beta, "> 0")
    return F.softplus(-beta * margins(values, rows, pairs))
