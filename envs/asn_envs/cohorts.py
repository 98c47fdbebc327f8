"""Base-model sessions behind rows that begin and end independently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asn_rl.protocols import LogitsBackend, Session


@dataclass
class _Cohort:
    rows: Tensor
    session: Session


class Cohorts:
    """One session for each time that some rows began.

    A `Session` takes no new rows, so a step costs one base-model forward per cohort, not one in all. Rows that begin
    together share a cohort until they end.
    """

    def __init__(self, backend: LogitsBackend, *, hidden: bool = False, layers: Sequence[int] = ()) -> None:
        self.backend = backend
        self._wanted: dict[str, Any] = {"hidden": hidden, "layers": layers}
        self._parts: list[_Cohort] = []

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def rows(self) -> Tensor:
        """(B,) int64 rows under way, in the order of `logits`."""
        none = torch.empty(0, dtype=torch.long, device=self.backend.device)
        return torch.cat([none, *(part.rows for part in self._parts)])

    @property
    def logits(self) -> Tensor:
        """(B, V) next-token logits."""
        return _cat([part.session.logits for part in self._parts])

    @property
    def hidden(self) -> Tensor:
        """(B, D) hidden states, in the order of `rows`."""
        return _cat([part.session.hidden for part in self._parts if part.session.hidden is not None])

    @property
    def layer_logits(self) -> Tensor:
        """(B, L, V) logits of the earlier layers, in the order of `rows`."""
        return _cat([part.session.layer_logits for part in self._parts if part.session.layer_logits is not None])

    def add(self, rows: Tensor, prompt_ids: Sequence[Sequence[int]]) -> Session:
        """Prefill prompts (len(rows)) in one batch and begin their rows."""
        self._parts.append(_Cohort(rows, self.backend.start(prompt_ids, **self._wanted)))
        return self._parts[-1].session

    def drop(self, ended: Tensor) -> None:
        """Remove rows where `ended` (R,) is True; a cohort without rows is freed."""
        self._parts = [part for part in self._parts if not ended[part.rows].all()]
        for part in self._parts:
            gone = ended[part.rows]
            if gone.any():
                part.rows = part.rows[part.session.drop(gone)]

    def step(self, tokens: Tensor) -> None:
        """Append its token of `tokens` (R,) to every row under way."""
        for part in self._parts:
            part.session.step(tokens[part.rows])

    def clear(self) -> None:
        self._parts = []


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
