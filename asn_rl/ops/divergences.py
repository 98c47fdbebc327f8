"""Divergences between policies on the same state.

Inside a point every policy keeps the base model's proportions, so the KL divergence over the vocabulary equals the one
over points (DESIGN section 2): the functions here are exact, not estimates. The sampled estimators k1, k2 and k3 are
there for comparison and for text whose sketches are gone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asn_rl.ops.logprobs import expectation


def kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(...) exact KL(pi || pi_ref) over points (..., N), nats; +inf where pi uses a point that pi_ref forbids."""
    forbidden = (ref_logprobs == -math.inf) & (logprobs > -math.inf)
    safe_ref = torch.where(ref_logprobs > -math.inf, ref_logprobs, 0.0)
    value = expectation(logprobs, torch.where(logprobs > -math.inf, logprobs, 0.0) - safe_ref)
    return torch.where(forbidden.any(-1), math.inf, value)


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi(a) - log pi_ref(a) for draws a from pi: unbiased, any sign (Schulman 2020, "Approximating KL")."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio: biased, low variance (Schulman 2020)."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r - 1 - log r with r = pi_ref(a) / pi(a) for draws a from pi: unbiased and non-negative (Schulman 2020).

    With the ratio the other way round it would estimate a chi-square divergence instead.
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio
