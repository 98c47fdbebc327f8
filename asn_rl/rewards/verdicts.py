"""What verifiers have found out, so that an equal question is not asked again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def remember(known: OrderedDict[K, V], verdicts: Mapping[K, V], entries: int) -> None:
    """Add verdicts to those known; of more than `entries` the oldest go. Failures do not belong here: a busy machine
    may be their cause."""
    for key, verdict in verdicts.items():
        known[key] = verdict
        known.move_to_end(key)
    while len(known) > entries:
        known.popitem(last=False)
