"""Generations under way on a transformers model: what grows by a token, parts and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from asn_rl.backends.kv_cache import copy_rows, drop_rows

if TYPE_CHECKING:
    from asn_rl.backends.hf import HFBackend


class HFSession:
    """Rows under way on an `HFBackend`; see `asn_rl.protocols.Session`.

    Rows that continue one prompt by the same tokens are on one branch: the model computes it once, and its cache is
    copied when they part.

    Args:
        cache, mask, logits, states: of the S branches, as `HFBackend._prefill` gives them.
        branch: (B,) which one a row is on; every branch has a row.
    """

    def __init__(
        self,
        backend: HFBackend,
        cache: DynamicCache,
        mask: Tensor,
        logits: Tensor,
        states: Tensor,
        branch: Tensor,
        *,
        hidden: bool,
        layers: Sequence[int],
    ) -> None:
        self.backend = backend
        self.cache = cache
        self.mask = mask
        self.position = mask.sum(-1)
        self.branch = None if len(branch) == len(mask) else branch  # None: row i is branch i
        self.want_hidden, self.layers = hidden, tuple(layers)
        self._see(logits, states)

    @torch.inference_mode()
    def drop(self, finished: Tensor) -> Tensor:
        if self.branch is None:
            order = kept = drop_rows(self.cache, finished)
        else:
            rows = (~finished).nonzero().squeeze(-1)
            deserted = torch.ones_like(self.position, dtype=torch.bool)
            deserted[self.branch[rows]] = False
            kept = drop_rows(self.cache, deserted)
            place = torch.empty_like(self.position)
            place[kept] = torch.arange(len(kept), device=kept.device)
            branch, by_branch = place[self.branch[rows]].sort(stable=True)
            self.branch = None if len(branch) == len(kept) else branch
            order = rows[by_branch]
        self.mask, self.position = self.mask[kept], self.position[kept]
        self.logits = self.logits[order]
        self.hidden = None if self.hidden is None else self.hidden[order]
        self.layer_logits = None if self.layer_logits is None else self.layer_logits[order]
        return order

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> None:
        if self.branch is not None:
            tokens, self.branch = self._part(tokens, self.branch)
        self.mask = pad(self.mask, (0, 1), value=1)
        positions = self.position.unsqueeze(1)
        self._see(*self.backend.forward(tokens.unsqueeze(1), self.mask, positions, self.cache, self.layers))
        self.position = self.position + 1

    def _part(self, tokens: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """Copy a branch for every further token that its rows chose. Returns a token for each branch, and the branch
        of each row."""
        size, count = self.backend.vocab_size, len(self.position)
        pairs, pair = (branch * size + tokens).unique(return_inverse=True)
        source = pairs // size
        further = torch.zeros_like(source, dtype=torch.bool)
        further[1:] = source[1:] == source[:-1]
        copied = source[further]
        copy_rows(self.cache, copied, count, len(branch))
        self.mask = torch.cat([self.mask, self.mask[copied]])
        self.position = torch.cat([self.position, self.position[copied]])
        target = source.masked_scatter(further, torch.arange(count, len(pairs), device=source.device))
        chosen = torch.empty_like(pairs)
        chosen[target] = pairs % size
        return chosen, target[pair]

    def _see(self, logits: Tensor, states: Tensor) -> None:
        layer_logits = self.backend.layer_logits(states[:, 1:]) if self.layers else None
        self.logits = self._of_rows(logits)
        self.hidden = self._of_rows(states[:, 0].float()) if self.want_hidden else None
        self.layer_logits = None if layer_logits is None else self._of_rows(layer_logits)

    def _of_rows(self, of_branches: Tensor) -> Tensor:
        return of_branches if self.branch is None else of_branches[self.branch]
