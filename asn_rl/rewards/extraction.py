"""Answers taken out of a completion by a regular expression and compared as texts, as lm-evaluation-harness compares
them (its filter `regex` with `take_first`, and its metric `exact_match`).

With `pattern: '#### (-?[0-9.,]+)'`, or `pattern: '(-?[$0-9.,]{2,})|(-?[0-9]+)'` and `match: -1`, both with
`remove: [',', '\\$', '(?s).*#### ', '\\.$']` and `ignore_case`, this is the strict and the flexible score of its task
`gsm8k`. `marked_answer` takes out the answer that a mathematical text marks as such.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from asn_rl.errors import RewardError
from asn_rl.latex import closing_brace
from asn_rl.rewards.inputs import completion_text, required_column, terminated_flags

GSM8K_ANSWER = "#### (-?[0-9.,]+)"

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PHRASE = re.compile(
    r"(?P<final>final\s+)?\banswers?\b[*_]*(?:[ ](?:to|of)\b[^.\n$]{0,60}?)?[ ]?(?:\bis\b|\bare\b|:|=)[:*_\s]*",
    re.IGNORECASE,
)
"""what announces an answer: "the final answer is", "**Answer:**", "the answer to the question is" """
_BOX = re.compile(r"\\boxed[ ]*\{")
_NEXT = re.compile(r"[\s$]*(?:,|and|or|,[ ]*and|,[ ]*or)[\s$]*")
"""what may stand between boxes that are one answer"""
_FORMULA = re.compile(
    r"(?<!\\)(?:\$\$(.+?)\$\$|\$((?:\\\$|[^$\n])+?)(?<!\\)\$|\\\[(.+?)\\\]|\\\((.+?)\\\))",
    re.DOTALL,
)
_SENTENCE = re.compile(r"(?:(?!\.(?:\s|\Z)|\n).)+")
_PLAIN = re.compile(r"(?:[-+(\u2212]|\\?[$\u20ac\u00a3])*\.?\d(?:[\d\s.,+*/^()=%\u00d7\u00b7\u00f7\u2212-]*[\d)%])?")


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


def marked_answer(text: str) -> str | None:
    """The answer that a mathematical text marks as its own, the last one; None: it marks none.

    Marks are `\\boxed{}` and the phrase "final answer is"; where there are neither, "answer is" and "Answer:". A phrase
    must have a formula or number in its sentence. A formula comes back between dollar signs, a number as it stands.
    Several boxes with commas, "and" or "or" between them are one answer.
    """
    phrases = list(_PHRASE.finditer(text))
    final, others = ([p for p in phrases if bool(p["final"]) == is_final] for is_final in (True, False))
    found = [*_boxed(text), *_announced(text, final)] or _announced(text, others)
    return max(found)[1] if found else None


def _boxed(text: str) -> list[tuple[int, str]]:
    """(place, answer) of the last boxes."""
    spans = [(match.start(), match.end(), closing_brace(text, match.end())) for match in _BOX.finditer(text)]
    boxes = [(start, low, high) for start, low, high in spans if high is not None and text[low:high].strip()]
    if not boxes:
        return []
    first = len(boxes) - 1
    while first and _NEXT.fullmatch(text[boxes[first - 1][2] + 1 : boxes[first][0]]):
        first -= 1
    return [(boxes[-1][0], f"${', '.join(text[low:high].strip() for _, low, high in boxes[first:])}$")]


def _announced(text: str, phrases: Sequence[re.Match[str]]) -> list[tuple[int, str]]:
    """(place, answer) of the last phrase with a formula or number after it; none where that is in a box."""
    for phrase in reversed(phrases):
        sentence = _SENTENCE.match(text, phrase.end())
        if sentence is None:
            continue
        formula, plain = _FORMULA.search(text, phrase.end()), _PLAIN.search(text, phrase.end(), sentence.end())
        if formula is not None and formula.start() < (plain or sentence).end():
            content = next(group for group in formula.groups() if group is not None).strip()
            return [] if _BOX.search(content) else [(phrase.end(), f"${content}$")]
        if plain is not None:
            return [(phrase.end(), plain[0].strip())]
    return []


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RewardError(
            f"extracted_answer: {pattern!r} is no regular expression: {error}; mend the arguments pattern and remove"
        ) from error
