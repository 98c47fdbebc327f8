"""Thread policy. torch's OpenMP threads spin while they wait; on cores that other work uses too, a decoding step with
two threads then takes ten to fifty times as long. A thread that sleeps at once is woken late, which costs as much on
idle cores. This spin, about a millisecond, bridges the pauses within a step and no more."""

from __future__ import annotations

import os
import sys

SPIN_COUNT = "20000"


def limit_spinning() -> None:
    """Make OpenMP threads sleep soon when they wait. Call before torch is imported; the user's own setting wins."""
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int | None) -> int:
    """Use `count` threads for tensor operations; None: OMP_NUM_THREADS, or as many as this process may run on. Returns
    the number."""
    import torch

    wished = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(count or (int(wished) if wished.isdecimal() else 0) or available_cores())
    return torch.get_num_threads()
