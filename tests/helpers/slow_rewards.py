"""Functions for worker processes to import: good, hanging, dying and contract-breaking ones. Imports nothing heavy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from asn_rl.errors import RewardError
from asn_rl.rewards.contract import Estimate

calls = 0


def double(x: Any) -> Any:
    return 2 * x


def hang_on(x: int, hang: int) -> int:
    """Returns x, except for one value."""
    while x == hang:
        time.sleep(3600)
    return x


def die_on(x: int, die: int) -> int:
    if x == die:
        os._exit(3)
    return x


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_on(x: int, fail: int) -> int:
    if x == fail:
        raise ZeroDivisionError(f"{x} is not wanted")
    return x


def refuse(x: int) -> int:
    raise RewardError(f"{x} can never work")


def leave() -> None:
    sys.exit("enough")


def unsendable() -> Any:
    return lambda: None


def process_id() -> int:
    return os.getpid()


def heavy_modules() -> list[str]:
    return sorted({"torch", "transformers", "numpy"} & set(sys.modules))


def hang_with_child() -> None:
    subprocess.Popen(["sleep", "3600"])
    time.sleep(3600)


def adder(n: int) -> Any:
    """A factory."""
    return lambda x: x + n


def length(prompts: Any, completions: Any, completion_ids: Any = None, *, scale: float = 1.0, **columns: Any) -> Any:
    return [scale * len(completion) for completion in completions]


def hanging(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    while True:
        pass


def dying(completions: Any, **columns: Any) -> list[float]:
    os._exit(3)


def raising(completions: Any, **columns: Any) -> list[float]:
    raise ZeroDivisionError("no such score")


def raising_once(completions: Any, **columns: Any) -> list[float]:
    global calls
    calls += 1
    if calls % 2:
        completions.clear()  # what a failed attempt spoils must not reach the next
        raise ZeroDivisionError("the first time")
    return [1.0] * len(completions)


def refusing(completions: Any, **columns: Any) -> list[float]:
    raise RewardError("the judge has no key")


def masking(completions: Any, **columns: Any) -> list[None]:
    return [None] * len(completions)


def masking_short(completions: Any, **columns: Any) -> list[float | None]:
    return [1.0 if len(completion) > 1 else None for completion in completions]


def too_few(completions: Any, **columns: Any) -> list[float]:
    return [1.0] * (len(completions) - 1)


def nan(completions: Any, **columns: Any) -> list[float]:
    return [float("nan")] * len(completions)


def infinite(completions: Any, **columns: Any) -> list[float]:
    return [float("-inf")] * len(completions)


def words(completions: Any, **columns: Any) -> list[str]:
    return ["good"] * len(completions)


def single(completions: Any, **columns: Any) -> float:
    return 1.0


def columnless(prompts: Any, completions: Any) -> list[float]:
    return [1.0] * len(completions)


def greedy_for_inputs(completions: Any, **columns: Any) -> list[float]:
    scores = [1.0 for _ in completions]
    completions.clear()
    return scores


def guessed(prompts: list[Any], completions: list[str], **columns: Any) -> list[float | None]:
    """Characters, give or take two."""
    return [Estimate(len(text), 2.0) for text in completions]


def hang_on_prompt(prompts: list[str], completions: list[str], *, prompt: str, **columns: Any) -> list[float | None]:
    """1 for everything, unless one prompt is among them: then it does not return."""
    while prompt in prompts:
        time.sleep(60)
    return [1.0] * len(completions)
