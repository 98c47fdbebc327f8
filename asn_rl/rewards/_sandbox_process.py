"""A sandbox's process, seen from the caller: started, read from within limits, and killed with all it started."""

from __future__ import annotations

import marshal
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

START_LIMIT_S = 60.0
"""seconds the sandbox may take to stand; not counted against a program"""
END_LIMIT_S = 10.0
"""seconds the kernel may take to end a program's processes"""
READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Ended:
    """What became of a process. (Fields that a program had a hand in: `output`, and the last part of `told`.)"""

    told: bytes
    """what `_sandbox.child` tells of it"""
    output: bytes
    stopped: Literal["timeout", "output"] | None
    """the caller's reason to kill it"""
    seconds: float
    """from the time it stood"""


def run(request: Mapping[str, Any], home: str | None, wall_s: float, output_bytes: int) -> Ended:
    """Run `_sandbox.child` on a request; when this returns, by an exception too, nothing of it is left.

    Args:
        request: what it reads, but for `folder`, `parent` and `status`.
        home: the program's folder as it sees it; None: as it is known here.
    """
    folder = tempfile.mkdtemp(prefix="asn-sandbox-")
    status_r, status_w = os.pipe()
    try:
        try:
            more = {"folder": folder, "parent": os.getpid(), "status": status_w}
            process = _start({**request, **more}, folder, home or folder, status_w)
        finally:
            os.close(status_w)
        watch = _Watch(process, status_r, output_bytes)
        watch.until_the_end(wall_s)
        seconds = watch.ended - (watch.begun or watch.ended)
        return Ended(bytes(watch.told), bytes(watch.output), watch.stopped, seconds)
    finally:
        os.close(status_r)
        _remove(folder)


def _start(request: dict[str, Any], folder: str, home: str, status: int) -> subprocess.Popen[bytes]:
    # No site-packages, no variables of the caller's. Hashes are fixed: sets of strings have the same order every time.
    # One malloc arena: each further one would take 64 MiB of a thread's address space.
    environment = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    environment |= dict.fromkeys(("HOME", "TMPDIR", "PWD"), home)
    here = str(Path(__file__).parent)
    start = f"import sys; sys.path.append({here!r}); from _sandbox.child import main; sys.path.pop(); main()"
    with tempfile.TemporaryFile() as file:
        file.write(marshal.dumps(request))
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-X", "utf8", "-c", start, folder],  # the folder tells whose it is
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[status],
            env=environment,
            cwd=folder,
            start_new_session=True,
        )


class _Watch:
    """Reads what a process prints and what is told of it, and stops it at a limit."""

    def __init__(self, process: subprocess.Popen[bytes], status: int, output_bytes: int) -> None:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self.process, self.stdout, self.status, self.output_bytes = process, process.stdout, status, output_bytes
        self.output, self.told = bytearray(), bytearray()
        self.begun: float | None = None
        self.ended = time.monotonic()
        self.stopped: Literal["timeout", "output"] | None = None

    def until_the_end(self, wall_s: float) -> None:
        """Returns when all its processes are gone: by themselves, or killed at a limit."""
        try:
            self._follow(wall_s)
        finally:
            self.ended = time.monotonic()
            self._kill()
            while not self.stopped and self._read_output():
                pass
            self.stdout.close()

    def _follow(self, wall_s: float) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.stdout, selectors.EVENT_READ, self._read_output)
            waiting.register(self.status, selectors.EVENT_READ, self._read_status)
            while not self.stopped and self.status in waiting.get_map():
                events = waiting.select(max(0.0, deadline - time.monotonic()))
                for key, _ in events:
                    if key.data() == b"":
                        waiting.unregister(key.fileobj)
                if self.begun is None and b"\n" in self.told:
                    self.begun = time.monotonic()
                    deadline = self.begun + wall_s
                elif time.monotonic() >= deadline:
                    self.stopped = "timeout"

    def _kill(self) -> None:
        # Not `Popen.terminate`, which may reap the process: then its number could be another's.
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGTERM)
        # The process that was started ends last, and `status` with it.
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.status, selectors.EVENT_READ)
            deadline = time.monotonic() + END_LIMIT_S
            while waiting.select(max(0.0, deadline - time.monotonic())) and self._read_status():
                pass
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read_output(self) -> bytes | None:
        """The next piece; empty at the end, None where there is none yet."""
        try:
            piece = os.read(self.stdout.fileno(), READ_BYTES)
        except BlockingIOError:
            return None
        room = self.output_bytes - len(self.output)
        self.output += piece[:room]
        if len(piece) > room:
            self.stopped = "output"
        return piece

    def _read_status(self) -> bytes:
        piece = os.read(self.status, READ_BYTES)
        self.told += piece
        return piece


def _remove(folder: str) -> None:
    try:
        shutil.rmtree(folder)
    except RecursionError:  # nested deeper than Python goes
        subprocess.run(["rm", "-rf", "--", folder], check=True)
