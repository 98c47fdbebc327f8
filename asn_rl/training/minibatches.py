"""Stored tokens in minibatches of whole completions."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_completions(lengths: Tensor, kept: Tensor, tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Token indices of completions in random order, a completion's in the order of time, cut at about `tokens` each.

    Args:
        lengths: (B,) tokens of every completion, at least one, as they are stored one after the other.
        kept: (B',) indices of the completions to take.
    """
    order = kept[torch.randperm(len(kept), generator=generator)]
    own = lengths[order]
    sizes: list[int] = []
    for length in own.tolist():
        if sizes and sizes[-1] + length <= tokens:
            sizes[-1] += length
        else:
            sizes.append(length)
    starts = (lengths.cumsum(0) - lengths)[order]
    before = own.cumsum(0) - own
    flat = torch.arange(int(own.sum())) + (starts - before).repeat_interleave(own)
    return list(flat.split(sizes))
