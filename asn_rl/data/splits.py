"""Train, selection and test: three parts of a prompt set that never overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from asn_rl.errors import UnknownName

T = TypeVar("T")
SPLITS = {"train": 0.5, "selection": 0.2, "test": 0.3}
"""share of each split where a source divides its items itself"""


def check_split(split: str) -> None:
    """`UnknownName` unless it is one of `SPLITS`."""
    if split not in SPLITS:
        raise UnknownName("split", split, SPLITS)


def split_slice(items: Sequence[T], split: str) -> Sequence[T]:
    """The part of `items` that belongs to a split, in order, without overlap."""
    check_split(split)
    low = 0.0
    for name, share in SPLITS.items():
        if name == split:
            break
        low += share
    return items[round(low * len(items)) : round((low + SPLITS[split]) * len(items))]
