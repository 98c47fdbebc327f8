"""Reading what a reward function is handed: texts, chat messages and data columns."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from asn_rl.errors import RewardError


def completion_text(completion: Any) -> str:
    """Text of a completion (or prompt): a string as it is, chat messages as their contents joined by newlines."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and all(isinstance(message, Mapping) for message in completion):
        contents = [message.get("content") or "" for message in completion]
        if all(isinstance(content, str) for content in contents):
            return "\n".join(contents)
    raise RewardError(
        "a completion must be text or a list of messages like {'role': 'assistant', 'content': text}, got "
        f"{completion!r:.200}"
    )


def required_column(columns: Mapping[str, Any], name: str, function: str) -> Sequence[Any]:
    """A data column as a list with one cell a completion.

    Raises:
        RewardError: the data has no such column.
    """
    if columns.get(name) is None:
        given = ", ".join(sorted(columns)) or "none"
        raise RewardError(
            f"reward {function!r} needs a column {name!r} and the data has none (columns: {given}); add {name!r} to "
            "the rows it applies to, with null in the others, or remove this reward"
        )
    return columns[name]


def terminated_flags(columns: Mapping[str, Any], count: int) -> Sequence[bool]:
    """True where a completion ended by itself. Trainers that do not say (TRL) count as True everywhere."""
    flags = columns.get("terminated")
    return [True] * count if flags is None else flags


def group_keys(prompts: Sequence[Any], columns: Mapping[str, Any]) -> list[Hashable]:
    """The group of each completion: its cell of the column `group`, else of `prompt_id`, else its prompt."""
    keys: list[Hashable] = [prompt if isinstance(prompt, str) else repr(prompt) for prompt in prompts]
    for name in ("prompt_id", "group"):
        cells = columns.get(name)
        if cells is not None:
            keys = [key if cell is None else (name, cell) for key, cell in zip(keys, cells, strict=True)]
    return keys
