"""Half-octaves of tail tokens, and what is summed over them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

OCTAVES = 256
NOTHING = 2
"""half-octaves below this one hold no probability"""
SHIFT = 22
"""bits below exponent and first mantissa bit of an fp32 number"""
FLOOR_NATS = -88.0
"""exp of this is subnormal in fp32"""


@dataclass(frozen=True)
class Summary:
    """What one pass over logits (B, V) finds out."""

    top: Tensor
    """(B, k + 1) fp32 largest logits in descending order, the last one is `v`; missing ones are -inf. A row with NaN
    begins with NaN"""
    ids: Tensor
    """(B, k + 1) int64 their tokens; anything where the logit is -inf"""
    count: Tensor
    """(B, bins) float64 tokens of the tail in each bin of half-octaves"""
    mass: Tensor
    """(B, bins) float64 sum of w = exp(logit - v)"""
    weighted_shift: Tensor
    """(B, bins) float64 sum of w * (logit - v)"""


@functools.cache
def half_octave_starts(device: torch.device) -> Tensor:
    """(257,) fp32: `logit - v` lies in half-octave h exactly if it is in [starts[h], starts[h + 1]).

    Found by bisection on this device's own fp32 exponential, so that comparing with these numbers is the same as
    looking at the bits of what it returns.
    """
    octave = torch.arange(NOTHING, OCTAVES - 1, dtype=torch.int32, device=device)
    near = (octave << SHIFT).view(torch.float32).double().log().abs().float()
    # Magnitudes of negative floats are ordered as their bits are.
    inside, outside = ((near * (1 - 1e-5)).view(torch.int32), (near * (1 + 1e-5) + 1e-6).view(torch.int32))
    for _ in range(32):
        middle = inside + (outside - inside) // 2
        belongs = half_octaves((-middle.view(torch.float32)).exp()) >= octave
        inside, outside = torch.where(belongs, middle, inside), torch.where(belongs, outside, middle)
    starts = torch.full((OCTAVES + 1,), -math.inf, device=device)
    starts[NOTHING : OCTAVES - 1] = -inside.view(torch.float32)
    starts[OCTAVES - 1 :] = math.inf
    return starts


def half_octaves(weights: Tensor) -> Tensor:
    """int32 half-octave of each fp32 weight."""
    return weights.view(torch.int32) >> SHIFT


def tail_start(boundary: Tensor) -> Tensor:
    """`v`, or +inf where there is no tail, so that every tail weight is nothing."""
    return torch.where(boundary > -math.inf, boundary, math.inf)
