"""Expressions that are not worth starting on, told by their text. Nothing is evaluated."""

from __future__ import annotations

import math
import re

MAX_DIGITS = 5
"""exponents and factorials with more decimal digits are not computed"""
MAX_DEPTH = 20
"""open brackets at a time; fractions nested 25 deep take seconds"""

_LARGE_POWER = re.compile(rf"(?:\^|\*\*)[\s{{(]*-?\d{{{MAX_DIGITS + 1},}}")
_TOWER = re.compile(r"(?:\^|\*\*)[\s{(]*(\d{1,6})\s*(?:\^|\*\*)[\s{(]*(\d{1,6})")
_LARGE_FACTORIAL = re.compile(rf"\d{{{MAX_DIGITS + 1},}}[\s)}}]*!")
_FACTORIAL_TOWER = re.compile(r"\d{2,}\s*!\s*[)}\]]\s*!|(?:!\s*[)}\]]\s*){2}!")
_NO_BRACKET = re.compile(r"[^()\[\]{}]+")


def is_astronomic(text: str) -> bool:
    """True for a text with a power, factorial or nesting that is not worth starting on (10**10**10, 99999999!)."""
    if any(pattern.search(text) for pattern in (_LARGE_POWER, _LARGE_FACTORIAL, _FACTORIAL_TOWER)):
        return True
    if _depth(text) > MAX_DEPTH:
        return True
    return any(int(exponent) * math.log10(max(1, int(base))) >= MAX_DIGITS for base, exponent in _TOWER.findall(text))


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in _NO_BRACKET.sub("", text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest
