"""Programs, right when their tests pass. They run in `asn_rl.rewards.sandbox`, whose page says what it guards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from asn_rl.errors import InvalidValue, RewardError
from asn_rl.rewards.inputs import completion_text, required_column, terminated_flags
from asn_rl.rewards.sandbox import Limits, Program, run_programs

# An unclosed block ends with the text.
_BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)\b[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE | re.I)


def code_tests(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    stop: Sequence[str] = (),
    cpu_s: int = 10,
    wall_s: float = 30.0,
    memory_mb: int = 1024,
    workers: int = 2,
    **columns: Any,
) -> list[float | None]:
    """1.0 where a completion's program, followed by the row's `test_program`, runs to the end, else 0.0.

    The program is the row's `code_prefix` (what the completion continues; none where the column is missing or null)
    and `program_text` of the completion. A completion that the token limit cut off scores 0 and is not run.

    None where the row's `test_program` is None, and where the sandbox failed rather than the program (`sandbox` in
    `code_tests.counts`, which also has how the others that scored 0 ended).

    Args:
        stop: the text ends before the first of these, unless it has a Python block.
        cpu_s: whole seconds of CPU time a program may take.
        wall_s: seconds a program may take.
        memory_mb: MiB of address space.
        workers: programs at a time.

    Raises:
        RewardError: no column `test_program`, an empty one, one that is no Python, or a machine without a sandbox.
    """
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise InvalidValue("stop", stop, "a list of texts", "write [text] for one")
    limits = Limits(cpu_s=cpu_s, wall_s=wall_s, memory_mb=memory_mb)
    tests = required_column(columns, "test_program", "code_tests")
    prefixes = columns.get("code_prefix")
    prefixes = [""] * len(completions) if prefixes is None else prefixes
    ended = terminated_flags(columns, len(completions))
    programs = [
        Program(_checked_prefix(prefix) + program_text(completion_text(completion), stop), _checked_tests(test))
        for completion, test, prefix in zip(completions, tests, prefixes, strict=True)
    ]
    asked = [i for i, test in enumerate(tests) if test is not None and ended[i]]
    # Samples of one prompt are often the same.
    different = list(dict.fromkeys(programs[i] for i in asked))
    outcomes = dict(zip(different, run_programs(different, limits, workers), strict=True))
    scores: list[float | None] = [None if test is None else 0.0 for test in tests]
    for i in asked:
        outcome = outcomes[programs[i]].outcome
        scores[i] = None if outcome == "sandbox" else float(outcome == "passed")
        if outcome != "passed":
            COUNTS[outcome] += 1
    return scores


def program_text(text: str, stop: Sequence[str] = ()) -> str:
    """The first block fenced as Python of a text; without one, the text up to the first of the `stop` texts."""
    block = _BLOCK.search(text)
    if block:
        return block.group(1)
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))]


def _checked_prefix(prefix: Any) -> str:
    if prefix is not None and not isinstance(prefix, str):
        raise RewardError(f"code_tests needs text or null in the column 'code_prefix', got {prefix!r:.100}")
    return prefix or ""


def _checked_tests(tests: Any) -> str:
    if tests is None:
        return ""
    if not isinstance(tests, str) or not tests.strip():
        raise RewardError(
            f"code_tests needs Python code in the column 'test_program', got {tests!r:.100}; without tests every "
            "program passes: use null for rows that have none"
        )
    error = _syntax_error(tests)
    if error:
        raise RewardError(f"code_tests: the column 'test_program' is no Python ({error}): {tests!r:.300}")
    return tests


@lru_cache(maxsize=4096)
def _syntax_error(tests: str) -> str:
    """Empty for Python. The tests belong to the data, which is trusted; completions are compiled in the sandbox."""
    try:
        compile(tests, "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return str(error) or type(error).__name__
    return ""


COUNTS: Counter[str] = Counter()
code_tests.__dict__["counts"] = COUNTS
