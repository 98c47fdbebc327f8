"""Plain answers: a number at the end of the text, or the text itself.

An answer that the token limit cut off scores 0, whatever it says: a policy must not be paid for stopping in
mid-sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from asn_rl.errors import RewardError
from asn_rl.rewards.inputs import completion_text, required_column, terminated_flags

# Minus sign, small and full-width hyphen, en dash: all written for "-" by models and data sets.
_TO_ASCII = str.maketrans({"\u2212": "-", "\ufe63": "-", "\uff0d": "-", "\u2013": "-"})

# Not inside a word or a dotted sequence (H2O, 1.2.3).
_NUMBER = re.compile(
    r"""(?<![A-Za-z0-9_]) (?<![0-9]\.)
        (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) (?:\.[0-9]+)?
          | [0-9]+ (?:\.[0-9]+)?
          | (?<!\.) \.[0-9]+ )
        (?: [eE][+-]?[0-9]{1,3} (?![A-Za-z0-9_]) )?""",
    re.VERBOSE,
)
# What makes a number negative: a minus right before it or its currency, or after an equals sign; but one that follows a
# number, word or closing bracket subtracts.
_SIGN = re.compile(r"(?: (?<![0-9A-Za-z_)\]}]) (?<![0-9)\]}][ ]) - | =[ ]*-[ ]* ) \\?[$\u20ac\u00a3]? \Z", re.VERBOSE)


def numeric_answer(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
) -> list[float | None]:
    """1.0 where the last plain number of a completion equals the row's `answer`, else 0.0.

    Only numbers are read, expressions are not evaluated: "7 + 8" is 8, not 15. Use `math_answer` for fractions and
    formulas. Rows whose `answer` is None do not apply.

    Raises:
        RewardError: no column `answer`, or an answer that is not a number.
    """
    answers = required_column(columns, "answer", "numeric_answer")
    ended = terminated_flags(columns, len(completions))
    return [
        None if answer is None else float(done and last_number(completion_text(text)) == _gold_number(answer))
        for text, answer, done in zip(completions, answers, ended, strict=True)
    ]


def exact_answer(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
) -> list[float | None]:
    """1.0 where a completion is the row's `answer` up to case, spaces and surrounding punctuation, else 0.0.

    Rows whose `answer` is None do not apply.

    Raises:
        RewardError: no column `answer`.
    """
    answers = required_column(columns, "answer", "exact_answer")
    ended = terminated_flags(columns, len(completions))
    return [
        None if answer is None else float(done and normalised(completion_text(text)) == normalised(str(answer)))
        for text, answer, done in zip(completions, answers, ended, strict=True)
    ]


def last_number(text: str) -> Decimal | None:
    """The last number written in a text ("-5", "1,234", ".5", "2e3"), or None."""
    text = text.translate(_TO_ASCII).replace("{,}", ",")
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007  (only the last one counts)
        pass
    if last is None:
        return None
    value = Decimal(last.group().replace(",", ""))
    # Not -value: arithmetic rounds to 28 digits, and very long wrong answers could then agree.
    return value.copy_negate() if _SIGN.search(text[max(0, last.start() - 16) : last.start()]) else value


def normalised(text: str) -> str:
    """Case, runs of spaces and surrounding punctuation removed; a text of punctuation only stays as it is."""
    plain = " ".join(text.casefold().split())
    # Signs and symbols that carry meaning (-, +, %, $, #) are left on.
    return plain.strip(" .,;:!?\"'`*_()[]{}\u201c\u201d\u2018\u2019\u2026") or plain


def _gold_number(answer: Any) -> Decimal:
    gold = last_number(str(answer)) if isinstance(answer, str | int | float) else None
    if gold is None or isinstance(answer, bool):
        raise RewardError(
            f"numeric_answer needs a number in the column 'answer', got {answer!r:.100}; use null for rows it does not "
            "apply to, exact_answer for words, math_answer for formulas"
        )
    return gold
