"""Answers taken out of a completion by a regular expression and compared as texts, as lm-evaluation-harness compares
them (its filter `regex` with `take_first`, and its metric `exact_match`).

With `pattern: '#### (-?[0-9.,]+)'`, or `pattern: '(-?[$0-9.,]{2,})|(-?[0-9]+)'` and `match: -1`, both with
`remove: [',', '\\$', '(?s).*#### ', '\\.$']` and `ignore_case`, this is the strict and the flexible score of its task
`gsm8k`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from asn_rl.errors import RewardError
from asn_rl.rewards.inputs import completion_text, required_column, terminated_flags

GSM8K_ANSWER = "#### (-?[0-9.,]+)"

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def extracted_answer(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    pattern: str = GSM8K_ANSWER,
    match: int = 0,
    remove: Sequence[str] = (),
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    unfinished: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1.0 where what a pattern finds in a completion is the row's `answer`, else 0.0; None where `answer` is None.

    A pattern with nested repetition can take exponential time; give such a reward `isolation: process` and a
    `time_limit`.

    Args:
        pattern: regular expression; the answer is its first group that holds anything, or the match where it has no
            groups, without spaces around it. A completion without a match, or with a match of nothing, scores 0.
        match: which of the matches, from 0; -1 is the last one.
        remove: regular expressions; what they match is taken out of the found and the row's answer, one after another.
        ignore_case: compare in lower case.
        ignore_punctuation: compare without ASCII punctuation.
        unfinished: read a completion that the token limit cut off, too, as lm-eval does. Otherwise it scores 0.

    Raises:
        RewardError: no column `answer`, or something that is no regular expression.
    """
    answers = required_column(columns, "answer", "extracted_answer")
    ended = terminated_flags(columns, len(completions))
    compiled, removed = _compiled(pattern), [_compiled(part) for part in remove]

    def plain(text: str) -> str:
        for part in removed:
            text = part.sub("", text)
        text = text.lower() if ignore_case else text
        return text.translate(_NO_PUNCTUATION) if ignore_punctuation else text

    def score(completion: Any, answer: Any, whole: bool) -> float:
        found = extract(completion_text(completion), compiled, match) if whole or unfinished else None
        return float(found is not None and plain(found) == plain(str(answer)))

    rows = zip(completions, answers, ended, strict=True)
    return [None if answer is None else score(completion, answer, whole) for completion, answer, whole in rows]


def extract(text: str, pattern: re.Pattern[str], match: int = 0) -> str | None:
    """What one of the matches of a pattern holds: its first group that is not empty, or all of it; None: nothing."""
    found = list(pattern.finditer(text))
    if not -len(found) <= match < len(found):
        return None
    chosen = found[match]
    groups = chosen.groups(default="") if pattern.groups else (chosen[0],)
    return next((group.strip() for group in groups if group), None)


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RewardError(
            f"extracted_answer: {pattern!r} is no regular expression: {error}; mend the arguments pattern and remove"
        ) from error
