"""The cross product of prompts, heuristics and seeds, and dense arrays over it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from asn_rl.errors import DataError
from asn_rl.types import Key


@dataclass(frozen=True)
class Grid:
    """P prompts x A heuristics x S seeds; a cell is one candidate, and arrays over cells are (P, A, S)."""

    prompts: tuple[str, ...]
    """prompt ids"""
    heuristics: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.prompts), len(self.heuristics), len(self.seeds)

    @property
    def size(self) -> int:
        return len(self.prompts) * len(self.heuristics) * len(self.seeds)

    @cached_property
    def _positions(self) -> tuple[Mapping[str, int], Mapping[str, int], Mapping[int, int]]:
        prompts, heuristics, seeds = ({name: i for i, name in enumerate(axis)} for axis in self._axes)
        return prompts, heuristics, seeds  # type: ignore[return-value]

    @property
    def _axes(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
        return self.prompts, self.heuristics, self.seeds

    def index(self, key: Key, where: str) -> tuple[int, int, int]:
        """Position of a cell.

        Raises:
            DataError: the prompt, heuristic or seed is not of this grid; the message begins with `where`.
        """
        try:
            i, j, k = (positions[part] for positions, part in zip(self._positions, key, strict=True))  # type: ignore[index]
        except KeyError:
            pass
        else:
            return i, j, k
        for what, part, axis in zip(("prompt id", "heuristic", "seed"), key, self._axes, strict=True):
            if part not in axis:
                close = difflib.get_close_matches(str(part), [str(known) for known in axis], n=1)
                guess = f"; did you mean {close[0]!r}?" if close else ""
                raise DataError(
                    f"{where}: {what} {part!r} is not one of the {len(axis)} of this run{guess}. The record belongs to "
                    "another configuration: remove it, or run with the configuration that made it"
                )
        raise AssertionError(key)

    def key(self, index: tuple[int, int, int]) -> Key:
        i, j, k = index
        return self.prompts[i], self.heuristics[j], self.seeds[k]

    def keys(self, which: np.ndarray) -> Iterator[Key]:
        """Keys of the cells where a (P, A, S) array is True, prompt by prompt."""
        for i, j, k in zip(*(axis.tolist() for axis in which.nonzero()), strict=True):
            yield self.key((i, j, k))
