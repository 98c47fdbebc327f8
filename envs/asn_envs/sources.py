"""What an environment is made from: JSON values, as `gym.make` and `EnvSpec.to_json` need them, or live objects."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asn_rl.backends import BACKENDS, BackendConfig, shared_backend
from asn_rl.config import from_dict
from asn_rl.data.jsonl import as_prompt
from asn_rl.errors import DataError, InvalidValue, UnknownName
from asn_rl.protocols import LogitsBackend, RewardFunction
from asn_rl.rewards import REWARDS
from asn_rl.rewards.contract import CALL_ARGUMENTS, check_signature
from asn_rl.runs import read_jsonl
from asn_rl.types import Prompt

BackendSource = LogitsBackend | BackendConfig | Mapping[str, Any] | str
PromptsSource = Sequence[Prompt | Mapping[str, Any]] | str | Path
RewardSource = RewardFunction | str
RESERVED = {*CALL_ARGUMENTS, "terminated", "prompt_id"}


def as_backend(source: BackendSource) -> LogitsBackend:
    """A backend from itself, a `BackendConfig`, a dict of its fields, or a string.

    Strings are `"kind"`, `"kind:model"` (for example `"toy:random:32:0"`), or a model alone (`"owner/name"`, a
    folder), which means `hf`. Environments of one process that name the same backend share it: it is frozen.
    """
    if isinstance(source, str):
        kind, _, model = source.partition(":")
        config = {"kind": kind} if kind in BACKENDS.entries else {"model": source}
        source = config | ({"model": model} if model and "kind" in config else {})
    if isinstance(source, Mapping):
        source = from_dict(BackendConfig, source, "backend")
    if isinstance(source, BackendConfig):
        return shared_backend(source)
    if not hasattr(source, "start"):
        raise InvalidValue("backend", source, "a backend, a BackendConfig, a dict of its fields, or a string")
    return source


def as_reward(source: RewardSource) -> RewardFunction:
    """A reward function from itself, its short name, or its "module:function" path.

    Raises:
        UnknownName, ConfigError: the name stands for nothing.
        RewardError: a function without `**columns`.
    """
    reward: RewardFunction = REWARDS.resolve(source) if isinstance(source, str) else source
    name = source if isinstance(source, str) else function_name(source)
    if not callable(reward):
        raise InvalidValue("reward", name, "a function of (prompts, completions, completion_ids, **columns)")
    check_signature(name, reward, {})
    return reward


def function_name(function: Any) -> str:
    """Name of a callable, for messages."""
    return getattr(function, "__qualname__", type(function).__name__)


def as_prompts(source: PromptsSource) -> list[Prompt]:
    """Prompts from a list of `Prompt`s or of `{"prompt", ...columns}` dicts, or from a JSONL file of such dicts.

    Without an `id`, rows are called by their number.

    Raises:
        DataError: no prompt, a row without a usable one, an id that occurs twice, a reserved column name, or a
            malformed line (named by its number).
    """
    if isinstance(source, str | Path):
        prompts = [as_prompt(row, f"{source}, line {n}", f"line-{n}") for n, row in read_jsonl(Path(source))]
    else:
        prompts = [
            row if isinstance(row, Prompt) else as_prompt(row, f"prompt {n}", f"row-{n}")
            for n, row in enumerate(source, 1)
        ]
    if not prompts:
        raise DataError("the prompt list is empty; give at least one {'prompt': ...}")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(f"prompt id {prompt.id!r} occurs twice; ids must be unique")
        seen.add(prompt.id)
        for name in RESERVED & prompt.columns.keys():
            raise DataError(f"prompt {prompt.id!r} has a column {name!r}, a name that reward functions need; rename it")
    return prompts


def find_prompt(prompts: Mapping[str, Any], name: str) -> Any:
    """The entry of `prompts` under an id; `UnknownName` lists the closest ids."""
    if name not in prompts:
        known = list(prompts)
        shown = difflib.get_close_matches(name, known, n=3) or known[:5]
        raise UnknownName("prompt id", name, shown, f"There are {len(known)} prompts in all.")
    return prompts[name]
