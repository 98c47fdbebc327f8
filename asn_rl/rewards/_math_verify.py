"""What a math worker process runs. Only this module imports math-verify."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from math_verify import parse, parser, verify
from math_verify.errors import TimeoutException

from asn_rl.rewards.astronomic import is_astronomic
from asn_rl.rewards.math import ASTRONOMIC

# math-verify's own alarm, for each parse and each comparison. An integer: a float is a TypeError that it swallows,
# and then every answer is wrong.
ALARM_S = 2

_BASE = re.compile(r"\d\s*_\s*\{?\s*(\d+)")
_MARKED = re.compile(r"(?<!\\)\$|\\boxed")  # "\$18.90" is an amount of money


class _Astronomic(Exception):
    """The part of a text that is to be evaluated is not worth starting on."""


_extract = parser.extract_match


def _guarded(match: re.Match[str], target: Any) -> Any:
    # math-verify looks through a text for parts that may be its answer, the likeliest first, and evaluates each as it
    # comes to it. So a text may quote what it likes elsewhere.
    if is_astronomic(match[0]):
        raise _Astronomic(match[0])
    return _extract(match, target)


parser.extract_match = _guarded


def agree(gold: str, answer: str) -> bool | str | None:
    """Whether an answer text is mathematically equal to the gold answer; None: the gold answer is no mathematics;
    "astronomic": what the text gives as its answer is not worth computing.

    Raises:
        Exception: from math-verify, or its TimeoutException, when the answer cannot be compared.
    """
    expected = _parse_gold(gold)
    if not expected:
        return None
    if _last_base(gold) is not None and _last_base(answer) not in (None, _last_base(gold)):
        return False
    try:
        found = _parse(answer)
    except _Astronomic:
        return ASTRONOMIC
    return _any_equal(expected, found)


def _last_base(text: str) -> str | None:
    """The base that the last number of a text is written in ("40_9", "40_{9}"); math-verify drops it."""
    bases = _BASE.findall(text)
    return bases[-1] if bases else None


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> Sequence[Any]:
    """A prompt's gold answer is asked for with each of its completions; LaTeX takes up to 50 ms to parse."""
    return _parse(gold if _MARKED.search(gold) else f"${gold}$")


def _parse(text: str) -> list[Any]:
    return parse(text, parsing_timeout=ALARM_S, raise_on_error=True)


def _any_equal(expected: Sequence[Any], found: Sequence[Any]) -> bool:
    """Whether any pair agrees. A parse is an expression and its text: an error in comparing the one does not hide
    agreement of the other."""
    failure: BaseException | None = None
    for gold in expected:
        for answer in found:
            try:
                if verify(gold, answer, timeout_seconds=ALARM_S, raise_on_error=True):
                    return True
            except (Exception, TimeoutException) as error:
                failure = error
    if failure is not None:
        raise failure
    return False
