"""A word about reward functions that take long: what hangs in this process cannot be stopped, but it can be named."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from asn_rl.runs import console

FIRST_S = 60.0
"""seconds until something is said; then twice as many until the next time, and so on"""


@contextmanager
def told_while_it_takes(what: str, first_s: float = FIRST_S) -> Iterator[None]:
    """Say on the console that `what` is still running, and what can be done, while the block takes long."""
    done = threading.Event()
    begin = time.monotonic()

    def tell() -> None:
        wait = first_s
        while not done.wait(wait):
            console.print(
                f"{what} has taken {time.monotonic() - begin:.0f} s so far. If it hangs: Ctrl-C, give it isolation: "
                "process and a time_limit, and the same command resumes",
                markup=False,
            )
            wait *= 2

    thread = threading.Thread(target=tell, name="told_while_it_takes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
