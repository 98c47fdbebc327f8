"""Prompt sources. A source is a function `(split, **arguments) -> list[Prompt]`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from asn_rl.errors import ConfigError, DataError, InvalidValue
from asn_rl.registry import Registry
from asn_rl.types import Prompt

SOURCES = Registry(
    "prompt source",
    {
        "arithmetic": "asn_rl.data.arithmetic:arithmetic",
        "open_ended": "asn_rl.data.open_ended:open_ended",
        "mixture": "asn_rl.data.open_ended:mixture",
        "union": "asn_rl.data.union:union",
        "jsonl": "asn_rl.data.jsonl:jsonl",
        "reasoning_gym": "asn_rl.data.procedural:reasoning_gym",
        "ifeval": "asn_rl.data.ifeval:ifeval",
        "benchmark": "asn_rl.data.benchmark:benchmark",
    },
)


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from."""

    source: str = "mixture"
    """prompt source: arithmetic, open_ended, mixture, union, jsonl, reasoning_gym, ifeval, benchmark, or
    module:function"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of the source, for example {path: prompts.jsonl}"""
    limit: int | None = None
    """prompts a split at most, evenly spaced; null: all"""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InvalidValue("limit", self.limit, ">= 1", "null takes all prompts")


def load_prompts(config: DataConfig, split: str) -> list[Prompt]:
    """The prompts of one split.

    Raises:
        DataError: the split is empty, or two prompts share an id.
        ConfigError: the source does not take these arguments.
    """
    source = SOURCES.resolve(config.source)
    try:
        prompts = source(split, **config.arguments)
    except TypeError as error:
        raise ConfigError(f"prompt source {config.source!r}: {error}; check data.arguments") from error
    if not prompts:
        raise DataError(f"the {split!r} split of source {config.source!r} holds no prompts; check data.arguments")
    twice = [key for key, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if twice:
        raise DataError(f"prompt id {twice[0]!r} occurs twice in the {split!r} split; ids must be unique")
    if config.limit is not None and config.limit < len(prompts):
        prompts = [prompts[i * len(prompts) // config.limit] for i in range(config.limit)]
    return prompts
