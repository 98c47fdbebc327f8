"""Stored tokens in minibatches of whole completions."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_completions(lengths: Tensor, kept: Tensor, tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Token indices of completions in random order, a completion's in the order of time, cut at about `tokens` each.

    Args:
        lengths: (B,) tokens of every completion, as they are stored one after the other.
        kept: (B',) indices of the completions to take.
    """
    order = kept[torch.randperm(len(kept), generator=generator)]
    starts = lengths.cumsum(0) - lengths
    parts: list[list[Tensor]] = [[]]
    size = 0
    for i in order.tolist():
        if size and size + int(lengths[i]) > tokens:
            parts.append([])
            size = 0
        parts[-1].append(torch.arange(int(starts[i]), int(starts[i] + lengths[i])))
        size += int(lengths[i])
    return [torch.cat(part) for part in parts if part]
