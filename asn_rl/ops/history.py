"""What the generated text says of a token: how often it occurs there, and how long ago."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HISTORY = ("count", "recency")
"""entries of `Observation.history`: occurrences in the generated text; 1 / steps since the last one; both 0 if never"""


@dataclass(frozen=True)
class History:
    """The most recent distinct tokens of B generated texts, P at most."""

    tokens: Tensor
    """(B, P) int64, -1 where free"""
    count: Tensor
    """(B, P) int64 occurrences since the token was taken up"""
    last: Tensor
    """(B, P) int64 step of the last occurrence, -1 where free"""

    def index(self, rows: Tensor) -> History:
        return History(self.tokens[rows], self.count[rows], self.last[rows])

    def put(self, rows: Tensor, news: History) -> History:
        """The same history with that of some texts replaced."""
        return History(
            self.tokens.index_copy(0, rows, news.tokens),
            self.count.index_copy(0, rows, news.count),
            self.last.index_copy(0, rows, news.last),
        )


def empty_history(batch: int, bound: int, device: torch.device | str) -> History:
    """Nothing generated yet; at most `bound` distinct tokens will be known."""
    nothing = torch.full((batch, bound), -1, dtype=torch.long, device=device)
    return History(nothing, torch.zeros_like(nothing), nothing)


def remember(history: History, tokens: Tensor, step: int | Tensor) -> History:
    """Take up the tokens (B,) of a step, or of (B,) steps; where the table is full, the one not seen for longest is
    forgotten."""
    same = history.tokens == tokens.unsqueeze(-1)
    known = same.any(-1, keepdim=True)
    slot = torch.where(known, same.int().argmax(-1, keepdim=True), history.last.argmin(-1, keepdim=True))
    count = torch.where(known, history.count.gather(-1, slot) + 1, 1)
    return History(
        history.tokens.scatter(-1, slot, tokens.unsqueeze(-1)),
        history.count.scatter(-1, slot, count),
        history.last.scatter(-1, slot, torch.as_tensor(step, device=slot.device).expand(len(slot)).unsqueeze(-1)),
    )


def history_features(history: History, points: Tensor, step: int | Tensor, size: int) -> Tensor:
    """(B, N, 2) fp32 features of every point, entries as in `HISTORY`.

    Args:
        points: (B, P) int64 point of each known token, which is its only token; below 0: none.
        step: tokens generated so far, at least one more than any `last`.
        size: N.
    """
    known = (history.tokens >= 0) & (points >= 0)
    since = (torch.as_tensor(step, device=points.device) - history.last).clamp_min(1)
    values = torch.stack((history.count.float(), 1.0 / since.float()), -1)
    where = torch.where(known, points, size).unsqueeze(-1).expand_as(values)
    return values.new_zeros(len(points), size + 1, 2).scatter(1, where, values)[:, :size]
