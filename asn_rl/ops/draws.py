"""Draws by inversion: one uniform number in, one index out."""

from __future__ import annotations

import torch
from torch import Tensor


def invert_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """(B,) index drawn from unnormalised `weights` (B, n) >= 0 by inverting their CDF at `uniforms` (B,) in [0, 1).

    Entries of weight zero are never drawn, whatever the rounding.
    """
    cumulative = weights.double().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, uniforms.double().unsqueeze(-1) * total, right=True)
    # u * total may round up to total; the last entry that adds weight is then meant.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(index, last).squeeze(-1)
