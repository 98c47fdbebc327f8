"""The candidates of a run: one pass over the shards finds every cell, texts are then read where they are needed."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from asn_rl.labelling.grid import Grid
from asn_rl.labelling.records import CANDIDATE, as_candidate, digest, read_located, shards
from asn_rl.types import Candidate

Location = tuple[Path, int]
"""file and byte offset of a record"""


@dataclass
class CandidateStore:
    """Where each cell's candidate lies. Memory: about 30 bytes a cell, texts stay on disk."""

    grid: Grid
    folder: Path
    files: list[Path] = field(default_factory=list)
    file: np.ndarray = field(init=False)
    """(P, A, S) int32 index into `files`; -1: the cell is missing"""
    offset: np.ndarray = field(init=False)
    """(P, A, S) int64 byte offset of the cell's record"""
    empty: np.ndarray = field(init=False)
    """(P, A, S) bool: the completion is blank"""
    truncated: np.ndarray = field(init=False)
    """(P, A, S) bool: cut off by the token limit"""
    digest: np.ndarray = field(init=False)
    """(P, A, S) uint64; equal where text, tokens and way of ending are equal"""
    copies: int = 0
    """records that repeat a cell with the same text"""
    torn: int = 0
    """last lines of shards that a crash left torn: they count as not there"""
    conflicts: list[str] = field(default_factory=list)
    """cells with two different texts, in words"""

    def __post_init__(self) -> None:
        shape = self.grid.shape
        self.file, self.offset = np.full(shape, -1, np.int32), np.zeros(shape, np.int64)
        self.empty, self.truncated = np.zeros(shape, bool), np.zeros(shape, bool)
        self.digest = np.zeros(shape, np.uint64)
        for path in shards(self.folder):
            self._scan(path)

    def _scan(self, path: Path) -> None:
        self.files.append(path)
        for where, offset, record in read_located(path, CANDIDATE, self._count_torn):
            candidate = as_candidate(record, where)
            cell = self.grid.index(candidate.key, where)
            found = np.uint64(digest(candidate))
            if self.file[cell] < 0:
                self.file[cell], self.offset[cell], self.digest[cell] = len(self.files) - 1, offset, found
                self.empty[cell], self.truncated[cell] = not candidate.completion.strip(), not candidate.terminated
            elif self.digest[cell] == found:
                self.copies += 1
            else:
                first = self.files[self.file[cell]]
                self.conflicts.append(
                    f"{where}: cell {candidate.key} has another text or other tokens in {first}; remove one of them"
                )

    def _count_torn(self) -> None:
        self.torn += 1

    @property
    def present(self) -> np.ndarray:
        """(P, A, S) bool."""
        return self.file >= 0

    def without(self, heuristic: int) -> CandidateStore:
        """The same candidates but those of one heuristic, by its index in the grid."""
        rest = copy(self)
        rest.file = self.file.copy()
        rest.file[:, heuristic] = -1
        return rest

    def location(self, cell: tuple[int, int, int]) -> Location:
        return self.files[self.file[cell]], int(self.offset[cell])

    def locations(self, prompt: int) -> list[Location]:
        """Where the candidates of one prompt lie, heuristic by heuristic, then by seed."""
        cells = np.argwhere(self.present[prompt])
        return [self.location((prompt, int(j), int(k))) for j, k in cells]


def read_candidates(locations: list[Location]) -> list[Candidate]:
    """The candidates at some locations."""
    found = []
    for path, offset in locations:
        with path.open("rb") as lines:
            lines.seek(offset)
            found.append(as_candidate(json.loads(lines.readline()), f"{path}, byte {offset}"))
    return found
