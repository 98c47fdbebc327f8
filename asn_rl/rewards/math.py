"""Mathematical answers, compared by math-verify (https://github.com/huggingface/Math-Verify) in worker processes.

math-verify guards itself with `signal.alarm`: that fails off the main thread, cancels the caller's own alarm, and
does not interrupt everything. So it runs in processes of its own, which are killed at a wall time limit.

It evaluates expressions wherever they stand: a text that only repeats "7 + 8" is right for 15, and so are many problems
that are handed back as they are. With `marked` a completion must say what its answer is, and have worked it out. For
arithmetic use `numeric_answer`.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Any, Self

from asn_rl.errors import RewardError
from asn_rl.rewards.astronomic import is_astronomic
from asn_rl.rewards.extraction import marked_answer
from asn_rl.rewards.inputs import completion_text, required_column, terminated_flags
from asn_rl.rewards.verdicts import remember
from asn_rl.rewards.workers import Failure, WorkerPool

TAIL_CHARACTERS = 2000
"""only the end of a completion is read: that is where the answer is"""
CACHE_ENTRIES = 20_000
ASTRONOMIC = "astronomic"
"""what a worker says of an answer that would take an astronomic number to compare"""

_LOOKS = re.compile(
    r"\\(?:left|right|displaystyle|q?quad|[!,;: ])|\^\{?\\circ\}?|\\(?:text|mbox|math)[a-z]*\{[^{}]*\}|\\?[$%]|[\s~]"
)
"""what changes the looks of a formula, or gives its unit"""
_NUMBER = re.compile(r"-?[\d.,]*\d(?:/\d+)?|-?\d*\\frac(?:\d|\{\d+\}){2}")
_FRACTION = re.compile(r"[-+]?\d*?(?:\\frac(\d|\{\d+\})(\d|\{\d+\})|(\d+)/(\d+))")
_POWER = re.compile(r"[-+]?(?:\d[\d.]*(?:\\times|\\cdot|[*\u00d7\u00b7]))?\d+\^(?:\d|\{-?\d+\})")
_OPERATION = re.compile(r"(?<=.)[-+\u2212]|[*/^!\u00d7\u00b7\u00f7]|\\(?!pi|infty)[A-Za-z]+|\)\(|[\d)]\(|\)\d")


def math_answer(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    marked: bool = False,
    time_limit: float = 5.0,
    workers: int = 2,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the last mathematical answer of a completion equals the row's `answer`, else 0.0.

    None where the row's `answer` is None or no mathematics, and where the comparison was killed, failed, or would
    compute an astronomic number: what is not known is not scored. A text that only quotes such a number, and ends in
    another answer, is scored. `math_answer.counts` has how often each happened. An answer that the token limit cut off
    scores 0.

    Args:
        marked: an answer must be marked (`extraction.marked_answer`) and worked out (`only_repeats`), else it scores 0;
            `math_answer.counts` has how many were `unmarked` and, of those that would be right, how many `repeated`.
        time_limit: wall seconds a comparison may take (most take a millisecond).
        workers: processes.

    Raises:
        RewardError: no column `answer`, or math-verify is not installed.
    """
    answers = required_column(columns, "answer", "math_answer")
    ended = terminated_flags(columns, len(completions))
    texts = [completion_text(completion) for completion in completions]
    verifier = shared_verifier(workers, time_limit)
    asked = [i for i, answer in enumerate(answers) if answer is not None and ended[i]]
    if marked:
        found = {i: marked_answer(texts[i][-TAIL_CHARACTERS:]) for i in asked}
        COUNTS["unmarked"] += sum(answer is None for answer in found.values())
        texts = [found.get(i) or "" for i in range(len(texts))]
        asked = [i for i in asked if texts[i]]
    verdicts = verifier.verdicts([(str(answers[i]), texts[i]) for i in asked])
    scores: list[float | None] = [None if answer is None else 0.0 for answer in answers]
    for i, verdict in zip(asked, verdicts, strict=True):
        if verdict and marked and only_repeats(texts[i], str(answers[i]), completion_text(prompts[i])):
            COUNTS["repeated"] += 1
            continue
        scores[i] = None if verdict is None else float(verdict)
    return scores


def only_repeats(answer: str, gold: str, prompt: str) -> bool:
    """Whether an answer that equals the gold answer leaves the work undone: it stands in the prompt as it is, or the
    gold answer is a number and it is none.

    A number, a fraction in lowest terms and what is written with the gold answer's symbols are answers wherever they
    stand. A power, or a number times a power, is a way to write a number, unless it stands in the prompt.
    """
    value = re.split(r"[=\u2248]|\\approx", answer)[-1]
    plain, expected = plain_formula(value), plain_formula(gold.split("=")[-1])
    if not _OPERATION.search(plain) or _symbols(plain) == _symbols(expected):
        return False
    fraction = _FRACTION.fullmatch(plain)
    if fraction and math.gcd(*(int(part.strip("{}")) for part in fraction.groups() if part)) == 1:
        return False
    is_number = _POWER.fullmatch(plain) or not _NUMBER.fullmatch(expected)
    return plain in plain_formula(prompt) or not is_number


def plain_formula(formula: str) -> str:
    """A formula without spaces, units, braces around one character and what else only changes its looks."""
    return re.sub(r"\{(.)\}", r"\1", _LOOKS.sub("", re.sub(r"\\[dt]frac", r"\\frac", formula)))


def _symbols(formula: str) -> list[str]:
    """What a formula is written with, in any order: `1+x` and `x+1`, `\\frac{a}{b}` and `a/b` are the same."""
    return sorted(re.sub(r"\\frac|\\cdot|[{}()+*/]", "", formula))


class MathVerifier:
    """math-verify behind worker processes and a cache. A context manager; workers start with the first question.

    Args:
        workers: most processes at a time.
        time_limit: wall seconds a comparison may take before its process is killed.
        counts: counter of the comparisons without a verdict: `timeout`, `died`, `error`, `astronomic` (not tried),
            `gold` (the gold answer is no mathematics).
    """

    def __init__(self, workers: int = 2, time_limit: float = 5.0, counts: Counter[str] | None = None) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise RewardError("math_answer needs the package math-verify: pip install 'asn_rl[math]'")
        self.pool = WorkerPool("asn_rl.rewards._math_verify:agree", workers=workers, time_limit=time_limit)
        self.counts = Counter() if counts is None else counts
        self._known: OrderedDict[tuple[str, str], bool | None] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.close()

    def verdicts(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Whether each (gold answer, text) agrees; None where that could not be found out."""
        keys = [(gold, text[-TAIL_CHARACTERS:]) for gold, text in pairs]
        found = {key: self._known[key] for key in keys if key in self._known}
        failed = {key: ASTRONOMIC for key in keys if is_astronomic(key[0])}
        asked = [key for key in dict.fromkeys(keys) if key not in found and key not in failed]
        answers = self.pool.map([{"gold": gold, "answer": tail} for gold, tail in asked])
        for key, answer in zip(asked, answers, strict=True):
            if isinstance(answer, Failure):
                failed[key] = answer.reason
            elif answer == ASTRONOMIC:
                failed[key] = ASTRONOMIC
            else:
                found[key] = answer
        remember(self._known, found, CACHE_ENTRIES)
        for key in keys:
            if found.get(key) is None:
                self.counts[failed.get(key, "gold")] += 1
        return [found.get(key) for key in keys]


@cache
def shared_verifier(workers: int, time_limit: float) -> MathVerifier:
    """The process-wide verifier of these settings; its workers end with this process."""
    return MathVerifier(workers, time_limit, COUNTS)


COUNTS: Counter[str] = Counter()
math_answer.__dict__["counts"] = COUNTS
