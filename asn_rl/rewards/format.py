"""A regular expression that the completion must match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from asn_rl.errors import RewardError
from asn_rl.rewards.inputs import completion_text

THINK_FORMAT = r"<think>(?!.*<think>).*?</think>.*"
"""one reasoning block, then the answer"""


def format_match(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    pattern: str = THINK_FORMAT,
    search: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1.0 where a completion matches the pattern, else 0.0.

    A pattern with nested repetition can take exponential time; give such a reward `isolation: process` and a
    `time_limit`.

    Args:
        pattern: regular expression in Python's syntax; `.` matches newlines, `^` and `$` match at every line.
        search: False: the whole completion must match; True: a match anywhere will do.

    Raises:
        RewardError: the pattern is not a regular expression.
    """
    compiled = _compile(pattern)
    match = compiled.search if search else compiled.fullmatch
    return [float(match(completion_text(completion)) is not None) for completion in completions]


@lru_cache(maxsize=64)
def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL | re.MULTILINE)
    except re.error as error:
        raise RewardError(
            f"format_match: {pattern!r} is no regular expression: {error}; mend `arguments: {{pattern: ...}}`"
        ) from error
