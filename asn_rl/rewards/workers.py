"""Worker processes that can be killed.

A function that hangs, in Python or in C, holds its thread until it returns; only a process can be stopped from
outside. Workers are fresh interpreters (no fork: torch's threads do not survive one) that import the function by
name. They do not import the caller's `__main__`, as `multiprocessing` would: a script that imports torch does not
cost every worker that import, and needs no `if __name__ == "__main__"`. POSIX only.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Literal, Self

from asn_rl.errors import AsnError, InvalidValue, RewardError
from asn_rl.registry import load_attribute

START_LIMIT_S = 300.0
"""seconds a worker may take to import its function; not counted against an item's time limit"""
GRACE_S = 1.0
"""seconds between the caller's end and that of a busy worker"""
AHEAD_S, AHEAD_ITEMS = 0.05, 32
"""a worker is given items for so many seconds in advance: on a busy machine, waiting to be woken for each item takes
longer than a short item itself"""


Task = tuple[int, Mapping[str, Any]]
"""(place among the results, item)"""


@dataclass(frozen=True)
class Failure:
    """What takes the place of a result."""

    reason: Literal["timeout", "died", "error", "refused"]
    """timeout: killed at the time limit; died: the process ended by itself; error: the function raised; refused: it
    raised one of this library's errors, which trying again will not mend"""
    detail: str


class WorkerPool:
    """Worker processes that apply one function to items, each within a time limit.

    A worker that exceeds the limit or dies is replaced. Workers start when first needed, stay for later calls and
    ignore Ctrl-C. They end when the pool is closed or the caller ends, even by kill -9 (a C function that never lets
    go of the interpreter lock delays that last case), and killed workers take the processes they started along. The
    pool may be shared by threads; their calls take turns.

    Args:
        target: function as "module:attribute", called with an item's entries as keyword arguments.
        arguments: when given, `target` is a factory instead, called once with these to make the function.
        workers: most processes at a time.
        time_limit: wall seconds an item may take; None: no limit.
        name: what error messages call the function; by default its target.
    """

    def __init__(
        self,
        target: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        workers: int = 1,
        time_limit: float | None = None,
        name: str | None = None,
    ) -> None:
        if workers < 1:
            raise InvalidValue("workers", workers, ">= 1")
        if time_limit is not None and not time_limit > 0:
            raise InvalidValue("time_limit", time_limit, "> 0 seconds, or None for no limit")
        self.target, self.arguments, self.name = target, arguments, name or target
        self.size, self.time_limit = workers, time_limit
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _shut_down, self._workers, self._owner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers. The pool can be used again and then starts new ones."""
        with self._lock:
            _shut_down(self._workers, self._owner)

    def start(self) -> None:
        """Start a worker now and wait until it has imported the function.

        Raises:
            RewardError: it cannot.
        """
        with self._lock:
            self._abandon_after_fork()
            self._recruit(1)
            try:
                while any(worker.state == "starting" for worker in self._workers):
                    self._collect([], deque())
            except BaseException:
                self._dismiss([worker for worker in self._workers if worker.state == "starting"])
                raise

    def map(self, items: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Results in the order of the items, a `Failure` where there is none.

        Raises:
            RewardError: a worker cannot start or cannot import the function, or an item cannot be pickled.
        """
        results: list[Any] = [None] * len(items)
        todo = deque(enumerate(items))
        with self._lock:
            self._abandon_after_fork()
            self._dismiss([worker for worker in self._workers if worker.process.poll() is not None])
            try:
                while todo or self._busy():
                    self._recruit(len(todo) + len(self._busy()))
                    self._hand_out(todo)
                    self._collect(results, todo)
            except BaseException:
                # Ctrl-C, an alarm: the answers under way must not be taken for those of the next call.
                self._dismiss(self._busy())
                raise
        return results

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.state == "busy"]

    def _hand_out(self, todo: deque[Task]) -> None:
        while todo:
            hungry = [worker for worker in self._workers if len(worker.tasks) < worker.appetite]
            if not hungry:
                return
            min(hungry, key=lambda worker: len(worker.tasks)).give(todo.popleft(), self.time_limit)

    def _recruit(self, wanted: int) -> None:
        while len(self._workers) < min(self.size, wanted):
            self._workers.append(_Worker(self.target, self.arguments))

    def _dismiss(self, workers: Sequence[_Worker]) -> None:
        for worker in workers:
            self._workers.remove(worker)
            worker.kill()

    def _collect(self, results: list[Any], todo: deque[Task]) -> None:
        """Wait for answers, deaths and deadlines; note what they say. What a lost worker had not begun goes back."""
        active = [worker for worker in self._workers if worker.state != "idle"]
        next_deadline = min(worker.deadline for worker in active)
        patience = None if next_deadline == float("inf") else max(0.0, next_deadline - time.monotonic())
        ready = wait([worker.connection for worker in active], patience)
        for worker in active:
            if worker.connection in ready:
                self._receive(worker, results, todo)
            elif time.monotonic() >= worker.deadline:
                self._dismiss([worker])
                if worker.state == "starting":
                    raise RewardError(f"worker for {self.name!r} was not ready within {START_LIMIT_S:g} s")
                results[worker.tasks.popleft()[0]] = Failure("timeout", f"no answer within {self.time_limit:g} s")
                todo.extendleft(reversed(worker.tasks))

    def _receive(self, worker: _Worker, results: list[Any], todo: deque[Task]) -> None:
        try:
            verdict, value = worker.connection.recv()
        except (EOFError, OSError):
            self._dismiss([worker])
            detail = f"its worker process ended with {worker.exit_status()}"
            if worker.state == "starting":
                raise RewardError(f"worker for {self.name!r}: {detail} while importing it") from None
            results[worker.tasks.popleft()[0]] = Failure("died", detail)
            todo.extendleft(reversed(worker.tasks))
            return
        except Exception as error:  # an answer of a class that this process cannot import
            verdict, value = "error", f"answer cannot be read: {describe(error)}"
        if worker.state == "starting":
            if verdict != "ok":
                self._dismiss([worker])
                raise RewardError(f"worker for {self.name!r} could not start: {value}")
        else:
            results[worker.tasks[0][0]] = value if verdict == "ok" else Failure(verdict, value)
        worker.answered(self.time_limit)

    def _abandon_after_fork(self) -> None:
        # A forked child shares the parent's sockets: it would read the parent's answers.
        if self._owner != os.getpid():
            self._owner = os.getpid()
            self._workers = []
            self._finalizer = weakref.finalize(self, _shut_down, self._workers, self._owner)


def describe(error: BaseException) -> str:
    """Type, message and place of an exception, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


class _Worker:
    """One process, seen from the caller."""

    def __init__(self, target: str, arguments: Mapping[str, Any] | None) -> None:
        self.state: Literal["starting", "idle", "busy"] = "starting"
        self.tasks: deque[Task] = deque()
        """in hand; the first is being worked on"""
        self.pace: float | None = None
        """seconds an item takes, a running mean"""
        self.begun = time.monotonic()
        self.deadline = time.monotonic() + START_LIMIT_S
        self.connection, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            start = (
                f"import sys; sys.path[:] = {sys.path!r}; import asn_rl.rewards.workers as w; w._serve({descriptor})"
            )
            # A process group of its own: Ctrl-C does not reach it, and a kill takes its children along.
            self.process = subprocess.Popen(
                [sys.executable, "-c", start], stdin=subprocess.DEVNULL, pass_fds=[descriptor], process_group=0
            )
        self._send((target, arguments), "arguments")

    @property
    def appetite(self) -> int:
        """Items it should have in hand: one, and as many as it does in a moment."""
        if self.state == "starting":
            return 0
        return 1 if self.pace is None else 1 + min(AHEAD_ITEMS, int(AHEAD_S / max(self.pace, 1e-6)))

    def give(self, task: Task, time_limit: float | None) -> None:
        self.tasks.append(task)
        if len(self.tasks) == 1:
            self._begin(time_limit)
        self._send(task[1], "item")

    def answered(self, time_limit: float | None) -> None:
        """Ready for the first task, or done with one: the next, if it has one, begins now."""
        if self.tasks:
            self.tasks.popleft()
            took = time.monotonic() - self.begun
            self.pace = took if self.pace is None else 0.8 * self.pace + 0.2 * took
        if self.tasks:
            self._begin(time_limit)
        else:
            self.state, self.deadline = "idle", float("inf")

    def _begin(self, time_limit: float | None) -> None:
        self.state, self.begun = "busy", time.monotonic()
        self.deadline = float("inf") if time_limit is None else self.begun + time_limit

    def _send(self, value: Any, what: str) -> None:
        try:
            message = pickle.dumps(value)
        except Exception as error:
            self.kill()
            raise RewardError(
                f"the {what} cannot be sent to a worker process: {describe(error)}; use plain values (numbers, text, "
                "lists, dicts) in columns and arguments"
            ) from error
        # A worker that has died since it was last heard of shows as end of file when its answer is awaited.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(message)

    def exit_status(self) -> str:
        code = self.process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        """End the process and those it started, at once."""
        self.connection.close()
        if self.process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _shut_down(workers: list[_Worker], owner: int) -> None:
    """End workers: idle ones leave by themselves once their connection is gone, the others are killed."""
    if os.getpid() != owner:
        return
    for worker in workers:
        if worker.state == "idle":
            worker.connection.close()
        else:
            worker.kill()
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=2 * GRACE_S)
        worker.kill()
    workers.clear()


def _serve(descriptor: int) -> None:
    """Life of a worker process: import the function, then answer items until the caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    # The main thread computes (signal.alarm works only there); this one notices when the caller is gone.
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    try:
        target, arguments = pickle.loads(inbox.get() or b"")
        function = load_attribute(target) if arguments is None else load_attribute(target)(**arguments)
    except BaseException as error:
        _reply(connection, "error", str(error) if isinstance(error, AsnError) else describe(error))
        return
    _reply(connection, "ok", None)
    while (message := inbox.get()) is not None:
        _reply(connection, *_answer(function, message))


def _listen(connection: Connection, inbox: queue.SimpleQueue[bytes | None]) -> None:
    try:
        while True:
            inbox.put(connection.recv_bytes())
    except (EOFError, OSError):
        inbox.put(None)
        time.sleep(GRACE_S)
        os.killpg(0, signal.SIGKILL)


def _answer(function: Callable[..., Any], message: bytes) -> tuple[str, Any]:
    try:
        return "ok", function(**pickle.loads(message))
    except AsnError as error:
        return "refused", str(error)
    except BaseException as error:  # sys.exit() in a reward, time-outs that derive from BaseException
        return "error", describe(error)


def _reply(connection: Connection, verdict: str, value: Any) -> None:
    try:
        message = pickle.dumps((verdict, value))
    except Exception as error:
        message = pickle.dumps(("error", f"answer cannot be sent: {describe(error)}"))
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.send_bytes(message)
