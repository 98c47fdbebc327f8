"""Is the set of candidates whole? Nothing is scored before it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from asn_rl.labelling.store import CandidateStore
from asn_rl.types import Key

SHOWN = 20
"""missing cells and conflicts written out"""


@dataclass(frozen=True)
class Verification:
    """What a pass over all candidates found. Malformed records and unknown cells stop that pass with an error."""

    cells: int
    present: int
    missing: list[Key]
    conflicts: list[str]
    """cells with two different texts, in words"""
    copies: int
    """records that repeat a cell with the same text; harmless"""
    empty: int
    """blank completions"""
    truncated: int
    """completions cut off by the token limit"""
    torn: int
    """last lines that a crash left torn, and that were dropped"""

    @property
    def ok(self) -> bool:
        """Every cell of the cross product is there, with one text."""
        return not self.missing and not self.conflicts

    def lines(self) -> Iterator[str]:
        """The findings as text."""
        yield f"{self.present} of {self.cells} cells present, {self.empty} blank, {self.truncated} cut off, " + (
            f"{self.copies} repeated records" + (f", {self.torn} torn lines dropped" if self.torn else "")
        )
        for what, items in (("missing", self.missing), ("conflict", self.conflicts)):
            for item in items[:SHOWN]:
                yield f"{what}: {item if isinstance(item, str) else _named(item)}"
            if len(items) > SHOWN:
                yield f"{what}: {len(items) - SHOWN} more"


def verify(store: CandidateStore) -> Verification:
    """Check a store against the cross product of its grid."""
    present = store.present
    return Verification(
        cells=store.grid.size,
        present=int(present.sum()),
        missing=list(store.grid.keys(~present)),
        conflicts=list(store.conflicts),
        copies=store.copies,
        empty=int(store.empty.sum()),
        truncated=int(store.truncated.sum()),
        torn=store.torn,
    )


def _named(key: Key) -> str:
    prompt, heuristic, seed = key
    return f"prompt {prompt!r}, heuristic {heuristic!r}, seed {seed}"
