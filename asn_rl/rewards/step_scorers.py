"""Step scorers: how good a completion looks while it is being written. Particle filtering asks one after every step.

A step scorer is `f(prompts, partials) -> list[float]`: for each partial completion one score strictly between 0 and 1,
to be read as the probability that it ends well (Puri et al. 2025, arXiv:2502.01618, score the last step with a process
reward model).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Protocol

from asn_rl.errors import InvalidValue
from asn_rl.types import Prompt

RIGHT, WRONG, UNINFORMATIVE = 0.95, 0.05, 0.5
"""scores of arithmetic: every equation that was read holds; one does not; there was none to read. The log-odds of 0.5
are 0: what cannot be read moves a particle neither up nor down."""

_TO_ASCII = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u22c5": "*", "\u00f7": "/"})
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_LETTER_TIMES = re.compile(r"(?<=[0-9])[ ]*[xX][ ]*(?=[0-9])")
_FULL_STOP = re.compile(r"\.(?![0-9])")
_STRETCH = re.compile(r"[0-9.+\-*/= ]+")
# What may touch a stretch; at a letter, power or percent sign the number belongs to something that is not read here.
_NEIGHBOUR = re.compile(r"[\s:;,()\"'`\[\]$?!]")
_NUMBER = r"-?[0-9]{1,30}(?:\.[0-9]{1,30})?"
_SIDE = re.compile(rf"[ ]*{_NUMBER}(?:[ ]*[-+*/][ ]*{_NUMBER})*[ ]*")
_TERM = re.compile(rf"[ ]*({_NUMBER})[ ]*([-+*/]?)")


class StepScorer(Protocol):
    """One score strictly between 0 and 1 for each partial completion."""

    def __call__(self, prompts: Sequence[Prompt], partials: Sequence[str]) -> list[float]: ...


def arithmetic_chain(prompts: Sequence[Prompt], partials: Sequence[str]) -> list[float]:
    """Checks every equation that was written so far: `3 + 4 = 7`, also `3 + 4 - 2 = 7 - 2 = 5`.

    `RIGHT` where all hold, `WRONG` where one does not, `UNINFORMATIVE` where none could be read: brackets, variables,
    percentages and unfinished or garbled equations are not taken for wrong. A decimal result may be rounded to the
    digits it has. The last number of a text that could still grow into the right one is not judged yet.

    Whether an equation has to do with the question is not checked: this knows nothing of the prompt.
    """
    return [_verdict(list(_comparisons(text))) for text in partials]


def corrupted(scorer: StepScorer, rate: float, seed: int = 0) -> StepScorer:
    """The same scorer, wrong and confident about it: score r becomes 1 - r for this share of texts.

    Which ones depends on seed, prompt and text only.

    Raises:
        InvalidValue: a rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise InvalidValue("rate", rate, "in [0, 1]")

    def score(prompts: Sequence[Prompt], partials: Sequence[str]) -> list[float]:
        scores = scorer(prompts, partials)
        keys = [f"{seed}/{prompt.id}/{text}" for prompt, text in zip(prompts, partials, strict=True)]
        return [1 - r if _uniform(key) < rate else r for r, key in zip(scores, keys, strict=True)]

    return score


def _uniform(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]) / 2**56


def _verdict(checks: list[bool]) -> float:
    if not checks:
        return UNINFORMATIVE
    return RIGHT if all(checks) else WRONG


def _comparisons(text: str) -> Iterator[bool]:
    """Whether each pair of neighbouring sides agrees, where both can be read and one of them computes something."""
    text = _FULL_STOP.sub("\n", text.translate(_TO_ASCII))
    text = _LETTER_TIMES.sub(" * ", _THOUSANDS.sub("", text))
    for stretch in _STRETCH.finditer(text):
        if "=" not in stretch.group():
            continue
        sides: list[str | None] = list(stretch.group().split("="))
        before, after = text[: stretch.start()][-1:], text[stretch.end() :][:1]
        if before and not stretch.group().startswith(" ") and not _NEIGHBOUR.match(before):
            sides[0] = None
        if after and not stretch.group().endswith(" ") and not _NEIGHBOUR.match(after):
            sides[-1] = None
        for i, (left, right) in enumerate(pairwise(sides)):
            if left is None or right is None or not (_computes(left) or _computes(right)):
                continue
            expected, found = _value(left), _value(right)
            if expected is None or found is None:
                continue
            agree = _agree(expected, found, right)
            unfinished = not after and i == len(sides) - 2 and right[-1:].isdigit()
            if agree or not (unfinished and _may_become(right, expected)):
                yield agree


def _computes(side: str) -> bool:
    return any(operation for _, operation in _TERM.findall(side))


def _value(side: str) -> Fraction | None:
    """Value of `a op b op c ...`, products before sums; None: not of that form, or a division by zero."""
    if not _SIDE.fullmatch(side):
        return None
    total, product, sign, pending = Fraction(0), Fraction(1), 1, "*"
    for number, following in _TERM.findall(side):
        if pending == "/" and Fraction(number) == 0:
            return None
        product = product / Fraction(number) if pending == "/" else product * Fraction(number)
        if following in ("+", "-", ""):
            total, product, sign = total + sign * product, Fraction(1), -1 if following == "-" else 1
        pending = following if following == "/" else "*"
    return total


def _agree(expected: Fraction, found: Fraction, side: str) -> bool:
    """Equal; or equal when rounded to the decimals of a result that is a plain number with decimals."""
    _, point, decimals = side.strip().partition(".")
    if not point or _computes(side):
        return expected == found
    return abs(expected - found) <= Fraction(1, 2 * 10 ** len(decimals))


def _may_become(side: str, expected: Fraction) -> bool:
    """Could more digits turn the plain number at the end of a text into the expected one?"""
    return expected.denominator > 1 or str(expected).startswith(side.strip())
