"""What is remembered of requests that come and go: rows of tensors by key."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

import torch
from torch import Tensor

_FEWEST = 16


class Table:
    """Tensors that share a first axis of slots, one slot a key. Slots are reused; the tensors grow by doubling."""

    def __init__(self) -> None:
        self._slots: dict[Hashable, int] = {}
        self._free: list[int] = []
        self._columns: dict[str, Tensor] = {}
        self._steps: dict[Hashable, int] = {}

    @property
    def keys(self) -> list[Hashable]:
        return list(self._slots)

    def steps(self, key: Hashable) -> int | None:
        """The entry `steps` of a key, kept on the host; None: an unknown key."""
        return self._steps.get(key)

    def release(self, keys: Collection[Hashable]) -> None:
        """Forget keys; unknown ones are none."""
        for key in keys:
            if key in self._slots:
                self._free.append(self._slots.pop(key))
                self._steps.pop(key, None)

    def read(self, keys: Sequence[Hashable]) -> dict[str, Tensor]:
        """Copies of the rows (len(keys), ...) of every column."""
        index = self._index(keys)
        return {name: column[index] for name, column in self._columns.items()}

    def write(self, keys: Sequence[Hashable], values: Mapping[str, Tensor]) -> None:
        """Set rows; new keys get slots, new names columns."""
        if not keys:
            return
        self._claim(keys)
        index = self._index(keys, next(iter(values.values())).device)
        for name, part in values.items():
            if name not in self._columns:
                self._columns[name] = self._grown(None, part)
            column = self._columns[name]
            column[index] = part.to(column.dtype)
        if "steps" in values:
            self._steps |= dict(zip(keys, values["steps"].tolist(), strict=True))

    @property
    def _capacity(self) -> int:
        return len(self._slots) + len(self._free)

    def _claim(self, keys: Sequence[Hashable]) -> None:
        new = [key for key in keys if key not in self._slots]
        if len(new) > len(self._free):
            more = max(_FEWEST, self._capacity, len(new))
            self._free += range(self._capacity, self._capacity + more)
            self._columns = {name: self._grown(column, column) for name, column in self._columns.items()}
        for key in new:
            self._slots[key] = self._free.pop()

    def _grown(self, column: Tensor | None, like: Tensor) -> Tensor:
        grown = like.new_zeros(self._capacity, *like.shape[1:])
        if column is not None:
            grown[: len(column)] = column
        return grown

    def _index(self, keys: Sequence[Hashable], device: torch.device | None = None) -> Tensor:
        device = next(iter(self._columns.values())).device if device is None else device
        return torch.tensor([self._slots[key] for key in keys], dtype=torch.long, device=device)


class LastLogits:
    """The logits of every key's last call, in one buffer: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._batch: Tensor | None = None
        self._rows: dict[Hashable, int] = {}
        self._apart: dict[Hashable, Tensor] = {}
        """of keys that were not in the last call"""

    def release(self, keys: Collection[Hashable]) -> None:
        for key in keys:
            self._rows.pop(key, None)
            self._apart.pop(key, None)

    def write(self, keys: Sequence[Hashable], logits: Tensor) -> None:
        """Remember logits (len(keys), V)."""
        if self._batch is not None:
            self._apart |= {key: self._batch[self._rows[key]].clone() for key in self._rows.keys() - set(keys)}
        for key in keys:
            self._apart.pop(key, None)
        if self._batch is None or len(self._batch) < len(keys):
            self._batch = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        self._batch[: len(keys)].copy_(logits)
        self._rows = {key: i for i, key in enumerate(keys)}

    def at(self, keys: Sequence[Hashable], tokens: Tensor) -> Tensor:
        """(len(keys),) logits of one token a key, `tokens` (len(keys),)."""
        if self._batch is not None and self._rows.keys() >= set(keys):
            return self._batch[torch.tensor([self._rows[key] for key in keys], device=tokens.device), tokens]
        return self.read(keys).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    def read(self, keys: Sequence[Hashable]) -> Tensor:
        """(len(keys), V) copies."""
        assert self._batch is not None
        return torch.stack([self._apart[key] if key in self._apart else self._batch[self._rows[key]] for key in keys])
