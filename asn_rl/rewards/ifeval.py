"""Verifiable instructions of IFEval (arXiv:2311.07911) and IFBench (arXiv:2507.02833), checked by if-verifiable.

The checks are the published ones but for two things. Where IFEval asks for a symbol ('#' in key 1122, '!' in key 1129)
the original code counts a letter it draws at random; here the symbol is counted. And langdetect, which is random, is
seeded. As in the original, an empty response follows nothing and text before `</think>` is not read.

Checks run in worker processes: some of the patterns take quadratic time (6,000 square brackets: a second), and the
checkers draw from the global state of `random` and seed langdetect for the whole process.

A response that the token limit cut off is judged like any other, as in the benchmark: whether an instruction is
followed can be seen from what is there, and those about length or ending fail by themselves.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

from asn_rl.errors import InvalidValue, RewardError
from asn_rl.rewards.inputs import completion_text, required_column
from asn_rl.rewards.verdicts import remember
from asn_rl.rewards.workers import Failure, WorkerPool

Verdict = tuple[bool, bool] | None
"""(strict, loose): whether an instruction is followed; None: not known"""
MODES = ("strict", "loose")
CACHE_ENTRIES = 200_000
_known: OrderedDict[bytes, Verdict] = OrderedDict()
"""by check: benchmarks report four scores of the same checks"""


def ifeval(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    level: Literal["prompt", "instruction"] = "prompt",
    mode: Literal["strict", "loose"] = "strict",
    time_limit: float = 5.0,
    workers: int = 2,
    **columns: Any,
) -> list[float | None]:
    """Whether a completion follows the instructions of its row's `instruction_id_list` with their `kwargs`.

    An instruction is masked when it cannot be checked; `ifeval.counts` has how often and why: `timeout`, `died`,
    `error` (the checker failed on this response), `nltk_data` (it needs nltk data that this machine lacks: IFBench's
    stop words and verbs), `unspecified` (`kwargs` lack an argument, for which the checker draws a random value).

    Args:
        level: "prompt": 1.0 if all instructions are followed, 0.0 if one is not, None if none is known to be broken
            but one is masked. "instruction": the share followed of those not masked, None if all are.
        mode: "strict", or "loose": also right if it is without its first line, its last line or its asterisks.
        time_limit: wall seconds a check may take (most take a millisecond).
        workers: processes.

    Returns:
        One score a completion; None where the row's `instruction_id_list` is None or empty.

    Raises:
        RewardError: a column is missing, a row's two lists do not belong together, an instruction is unknown or does
            not take its arguments, or if-verifiable is not installed.
    """
    if level not in ("prompt", "instruction"):
        raise InvalidValue("level", level, "'prompt' or 'instruction'")
    if mode not in MODES:
        raise InvalidValue("mode", mode, "'strict' or 'loose'")
    instructions = required_column(columns, "instruction_id_list", "ifeval")
    kwargs = required_column(columns, "kwargs", "ifeval")
    rows = instruction_verdicts(completions, instructions, kwargs, time_limit=time_limit, workers=workers)
    score = _all_followed if level == "prompt" else _share_followed
    return [score(_in_mode(row, mode)) for row in rows]


def evaluate_ifeval(
    completions: Sequence[Any],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[Mapping[str, Any]]],
    *,
    time_limit: float = 5.0,
    workers: int = 2,
) -> dict[str, float]:
    """The four accuracies of IFEval, named as in lm-eval: prompt level and instruction level, strict and loose.

    Means over prompts and over all instructions. What cannot be checked is left out and counted in `ifeval.counts`.

    Raises:
        RewardError: as `ifeval`; or nothing could be checked.
    """
    rows = instruction_verdicts(completions, instruction_id_list, kwargs, time_limit=time_limit, workers=workers)
    accuracies = {}
    for mode in MODES:
        followed = [_in_mode(row, mode) for row in rows]
        accuracies[f"prompt_level_{mode}_acc"] = _mean([_all_followed(row) for row in followed])
        accuracies[f"inst_level_{mode}_acc"] = _mean([verdict for row in followed for verdict in row])
    return accuracies


def instruction_verdicts(
    completions: Sequence[Any],
    instruction_id_list: Sequence[Sequence[str] | None],
    kwargs: Sequence[Sequence[Mapping[str, Any] | None] | None],
    *,
    time_limit: float = 5.0,
    workers: int = 2,
) -> list[list[Verdict]]:
    """For each completion, the verdict on each of its instructions; no verdicts where the row has no instructions."""
    rows = [_checks(*row) for row in zip(completions, instruction_id_list, kwargs, strict=True)]
    checks = [check for row in rows for check in row]
    keys = [_key(check) for check in checks]
    asked = {key: check for key, check in zip(keys, checks, strict=True) if key not in _known}
    answers = dict(zip(asked, _shared_pool(workers, time_limit).map(list(asked.values())), strict=True))
    answers |= {key: _known[key] for key in keys if key in _known}
    found_out = {key: answer for key, answer in answers.items() if isinstance(answer, tuple)}
    remember(_known, found_out, CACHE_ENTRIES)
    found = iter(_verdict(answers[key]) for key in keys)
    return [[next(found) for _ in row] for row in rows]


def _key(check: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(check, sort_keys=True, default=str).encode()).digest()


def _checks(
    completion: Any, instructions: Sequence[str] | None, kwargs: Sequence[Mapping[str, Any] | None] | None
) -> list[dict[str, Any]]:
    if not instructions:
        return []
    if kwargs is None or len(kwargs) != len(instructions):
        raise RewardError(
            "ifeval: a row must have one dict in 'kwargs' for each entry of 'instruction_id_list' (an empty one where "
            f"there are no arguments), got {kwargs!r:.200} for {instructions!r:.200}"
        )
    response = completion_text(completion)
    # Columnar copies of the data hold the arguments of all instructions, with None for those of others.
    given = [{name: value for name, value in (entry or {}).items() if value is not None} for entry in kwargs]
    return [
        {"response": response, "instruction": instruction, "kwargs": entry}
        for instruction, entry in zip(instructions, given, strict=True)
    ]


def _verdict(answer: Any) -> Verdict:
    if isinstance(answer, tuple):
        return answer
    if isinstance(answer, Failure) and answer.reason == "refused":
        raise RewardError(f"ifeval: {answer.detail}")
    COUNTS[answer.reason if isinstance(answer, Failure) else answer] += 1
    return None


def _in_mode(row: Sequence[Verdict], mode: str) -> list[bool | None]:
    return [None if verdict is None else verdict[MODES.index(mode)] for verdict in row]


def _all_followed(row: Sequence[bool | None]) -> float | None:
    if False in row:
        return 0.0
    return None if None in row or not row else 1.0


def _share_followed(row: Sequence[bool | None]) -> float | None:
    known = [verdict for verdict in row if verdict is not None]
    return sum(known) / len(known) if known else None


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    if not known:
        raise RewardError(f"ifeval: nothing could be checked ({dict(COUNTS)}); there must be a row with instructions")
    return sum(known) / len(known)


@cache
def _shared_pool(workers: int, time_limit: float) -> WorkerPool:
    if importlib.util.find_spec("if_verifiable") is None:
        raise RewardError("ifeval needs the package if-verifiable: pip install 'asn_rl[ifeval]'")
    target = "asn_rl.rewards._if_verifiable:instruction_checker"
    return WorkerPool(target, {}, workers=workers, time_limit=time_limit, name="ifeval")


COUNTS: Counter[str] = Counter()
ifeval.__dict__["counts"] = COUNTS
