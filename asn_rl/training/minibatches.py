"""Stored tokens in minibatches of whole completions, shared by the processes that train together, and prompts that are
kept from training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asn_rl.errors import DataError
from asn_rl.training import parallel
from asn_rl.types import Trajectories


@dataclass(frozen=True)
class Numbering:
    """The completions and tokens of all processes, counted in the order of the processes; those of this one follow each
    other. A process that is alone counts its own."""

    lengths: Tensor
    """(B,) tokens of every completion"""
    drawn: Tensor
    """(B,) place of its prompt among those of the step, as they were drawn"""
    first_completion: int
    """number of this process's first one"""
    first_token: int
    """number of this process's first one"""
    tokens: int
    """how many this process has"""

    def own(self, part: Tensor) -> Tensor:
        """Of some tokens those that this process has, in their order, as it counts them itself."""
        if parallel.size() == 1:
            return part
        own = part - self.first_token
        return own[(own >= 0) & (own < self.tokens)]

    def as_drawn(self, completions: Tensor) -> Tensor:
        """The same completions in the order in which a single process would count them."""
        return completions[self.drawn[completions].argsort(stable=True)]

    def share(self, own: Tensor, part: Tensor, loss_type: str) -> float:
        """What a mean over the tokens `own` of this process counts in the mean over `part`; a mean over completions
        unless `loss_type` is "token"."""
        if parallel.size() == 1:
            return 1.0
        if loss_type == "token":
            return len(own) / len(part)
        ends = self.lengths.cumsum(0)
        mine, all_of_them = (
            len(torch.searchsorted(ends, tokens, right=True).unique()) for tokens in (own + self.first_token, part)
        )
        return mine / all_of_them


def numbered(trajectories: Trajectories) -> Numbering:
    """How the completions of this process are counted among those of all."""
    lengths, tokens = trajectories.lengths, len(trajectories.points)
    drawn = parallel.gathered(turns(trajectories) * parallel.size() + parallel.rank())
    firsts = parallel.before(len(lengths)), parallel.before(tokens)
    return Numbering(parallel.gathered(lengths), drawn, *firsts, tokens)


def turns(trajectories: Trajectories) -> Tensor:
    """(B,) int64 which of this process's prompts a completion belongs to: 0, 1, 2, ..."""
    ids = [prompt.id for prompt in trajectories.prompts]
    changes = [i > 0 and ids[i] != ids[i - 1] for i in range(len(ids))]
    return torch.tensor(changes, dtype=torch.long).cumsum(0)


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
