"""Reward functions for label workers of the Ray engine: some end the process they run in."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any


def length(prompts: list[Any], completions: list[str], **columns: Any) -> list[float | None]:
    """Characters of a completion; None where there are none."""
    return [float(len(text)) if text else None for text in completions]


def deadly_once(
    prompts: list[Any], completions: list[str], *, marker: str, word: str, **columns: Any
) -> list[float | None]:
    """`length`, but the first process to see `word` leaves a marker and dies as by the out-of-memory killer."""
    if any(word in text for text in completions) and not Path(marker).exists():
        Path(marker).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return length(prompts, completions)


def deadly(prompts: list[Any], completions: list[str], *, word: str, **columns: Any) -> list[float | None]:
    """`length`, but no process survives `word`."""
    if any(word in text for text in completions):
        os.kill(os.getpid(), signal.SIGKILL)
    return length(prompts, completions)


def holds_gpu(prompts: list[Any], completions: list[str], *, device: str, **columns: Any) -> list[float | None]:
    """1 where Ray gave this process a GPU, real or not; else 0."""
    return [float(bool(os.environ.get("CUDA_VISIBLE_DEVICES")))] * len(completions)
