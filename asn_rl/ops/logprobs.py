"""Small operations on log-probabilities that must survive -inf."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normalize(log_weights: Tensor) -> Tensor:
    """(..., N) log-weights to log-probabilities. -inf stays -inf; at least one entry must be finite."""
    return log_weights - torch.logsumexp(log_weights, -1, keepdim=True)


def shifted(log_mass: Tensor, shift: Tensor) -> Tensor:
    """(..., N) log-probabilities of a policy that adds `shift` to the log-weight of each point (DESIGN section 2).

    Empty points may carry any finite or -inf shift, also NaN: they stay at -inf and pass no gradient.
    """
    empty = log_mass == -math.inf
    return normalize(torch.where(empty, -math.inf, log_mass + torch.where(empty, 0.0, shift)))


def expectation(logprobs: Tensor, values: Tensor) -> Tensor:
    """(...) sum_j exp(logprobs_j) values_j, where 0 * anything counts as 0, in value and in gradient."""
    used = logprobs > -math.inf
    safe = torch.where(used, logprobs, 0.0)
    return torch.where(used, safe.exp() * torch.where(used, values, 0.0), 0.0).sum(-1)


def entropy(logprobs: Tensor) -> Tensor:
    """(...) entropy over the entries, nats."""
    return -expectation(logprobs, torch.where(logprobs > -math.inf, logprobs, 0.0))
