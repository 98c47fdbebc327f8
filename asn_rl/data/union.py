"""Several prompt sources as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asn_rl.data import DataConfig, load_prompts
from asn_rl.errors import InvalidValue
from asn_rl.types import Prompt


def union(split: str, *, sources: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """The prompts of every source, one source after the other.

    Args:
        sources: what `data` holds for each, {source, arguments, limit}. Prompts keep their columns; those that only
            some sources have are None elsewhere for reward functions, whose setting `where` tells the tasks apart.

    Raises:
        InvalidValue: no sources, or an entry with other keys.
    """
    known = set(DataConfig.__dataclass_fields__)
    for entry in sources:
        if not set(entry) <= known:
            raise InvalidValue("sources", dict(entry), f"entries with the keys {', '.join(sorted(known))}")
    if not sources:
        raise InvalidValue("sources", [], "at least one entry {source, arguments, limit}")
    return [prompt for entry in sources for prompt in load_prompts(DataConfig(**entry), split)]
