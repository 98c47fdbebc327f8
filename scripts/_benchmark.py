"""What the benchmark scripts share: options, timing, and the last line that a machine can read."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable


def options(description: str, example: str, **defaults: int) -> argparse.Namespace:
    """`--quick`, `--threads` and integer options with their defaults."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under 50 seconds")
    parser.add_argument("--threads", type=int, default=None, help="threads for tensor operations (default: all cores)")
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    return parser.parse_args()


def seconds(function: Callable[[], object], repeats: int, warmup: int = 1) -> float:
    """Median wall time of a call."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def finish(name: str, ratio: float, goal: float, *, at_least: bool) -> int:
    """Print the verdict as the last line; 0 when the goal is reached, else 1."""
    ok = ratio >= goal if at_least else ratio <= goal
    print(f"{name} ratio={ratio:.3g} goal={goal:g} {'ok' if ok else 'short'}")
    return 0 if ok else 1
