"""Stored tokens in minibatches of whole completions, and prompts that are kept from training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from asn_rl.errors import DataError


def whole_completions(lengths: Tensor, kept: Tensor, tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Token indices of completions in random order, a completion's in the order of time, cut at about `tokens` each.

    Args:
        lengths: (B,) tokens of every completion, at least one, as they are stored one after the other.
        kept: (B',) indices of the completions to take.
    """
    order = kept[torch.randperm(len(kept), generator=generator)]
    sizes: list[int] = []
    for length in lengths[order].tolist():
        if sizes and sizes[-1] + length <= tokens:
            sizes[-1] += length
        else:
            sizes.append(length)
    return list(tokens_of(lengths, order).split(sizes))


def tokens_of(lengths: Tensor, completions: Tensor) -> Tensor:
    """Token indices of some completions, one completion after the other, each in the order of time.

    Args:
        lengths: (B,) tokens of every completion, as they are stored one after the other.
        completions: (B',) indices.
    """
    own = lengths[completions]
    starts = (lengths.cumsum(0) - lengths)[completions]
    before = own.cumsum(0) - own
    return torch.arange(int(own.sum())) + (starts - before).repeat_interleave(own)


def held_out_prompts(prompt_ids: Sequence[str], share: float, seed: int) -> set[str]:
    """A random share of the prompts, to measure on.

    Args:
        prompt_ids: repeated or not.

    Raises:
        DataError: none is left to train on.
    """
    ids = sorted(set(prompt_ids))
    count = round(share * len(ids))
    if count == len(ids):
        raise DataError(f"holdout {share:g} leaves none of {len(ids)} prompts to train on; lower it")
    return set(np.random.default_rng(seed).permutation(ids)[:count].tolist())
