"""Mathematical answers, compared by math-verify (https://github.com/huggingface/Math-Verify) in worker processes.

math-verify guards itself with `signal.alarm`: that fails off the main thread, cancels the caller's own alarm, and
does not interrupt everything. So it runs in processes of its own, which are killed at a wall time limit.

It evaluates expressions: an answer that only repeats "7 + 8" is right for 15. For arithmetic use `numeric_answer`.
"""

from __future__ import annotations

import importlib.util
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Any, Self

from asn_rl.errors import RewardError
from asn_rl.rewards.astronomic import is_astronomic
from asn_rl.rewards.inputs import completion_text, required_column, terminated_flags
from asn_rl.rewards.verdicts import remember
from asn_rl.rewards.workers import Failure, WorkerPool

TAIL_CHARACTERS = 2000
"""only the end of a completion is read: that is where the answer is"""
CACHE_ENTRIES = 20_000
ASTRONOMIC = "astronomic"
"""what a worker says of an answer that would take an astronomic number to compare"""


def math_answer(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
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
        time_limit: wall seconds a comparison may take (most take a millisecond).
        workers: processes.

    Raises:
        RewardError: no column `answer`, or math-verify is not installed.
    """
    answers = required_column(columns, "answer", "math_answer")
    ended = terminated_flags(columns, len(completions))
    texts = [completion_text(completion) for completion in completions]
    asked = [i for i, answer in enumerate(answers) if answer is not None and ended[i]]
    verdicts = shared_verifier(workers, time_limit).verdicts([(str(answers[i]), texts[i]) for i in asked])
    scores: list[float | None] = [None if answer is None else 0.0 for answer in answers]
    for i, verdict in zip(asked, verdicts, strict=True):
        scores[i] = None if verdict is None else float(verdict)
    return scores


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
