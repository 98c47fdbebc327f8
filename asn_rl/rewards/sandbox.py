"""Python programs that nobody has read, run in a process of their own that can do little.

A program gets: a fresh interpreter with the standard library only; no network; a folder of its own that is removed
afterwards, and no other to write in; an environment without the caller's variables; nothing on standard input; limits
on CPU time, wall time, memory, tasks, files and output. At a limit, and at its end, everything that it started is
killed. How far this goes depends on the kernel (namespaces, Landlock, seccomp: Linux only): `sandbox_report` says what
there is and what is left open, and a warning says the latter once. Where processes cannot be contained at all,
nothing is run.

Whether a program passed is told by a token that the process around it makes, and that comes back only from behind the
last line of the tests: exit statuses, output, exceptions and replaced builtins cannot say so. Three things are not
defended against, because tests and program share an interpreter: a program that looks for its runner's descriptors
there and answers in its stead, one that returns objects which claim to equal everything, and one that defines names
the tests rely on (`def abs(x)`). Nor is a bug in the kernel; to run programs by an adversary, use a virtual machine.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Literal

from asn_rl.errors import InvalidValue, RewardError, check_at_least, check_positive
from asn_rl.rewards import _sandbox_process

Outcome = Literal["passed", "failed", "timeout", "memory", "output", "crashed", "sandbox"]


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    `may_fork` allows processes (threads always are); memory then counts for each of them.
    """

    cpu_s: int = 10
    """seconds of CPU time of each process; whole seconds, as the kernel counts them"""
    wall_s: float = 30.0
    memory_mb: int = 1024
    """address space in MiB, interpreter included (about 30)"""
    tasks: int = 32
    """threads and processes at a time"""
    file_mb: int = 16
    disk_mb: int = 64
    open_files: int = 64
    output_bytes: int = 1 << 16
    """standard output and error together"""
    may_fork: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "wall_s")
        check_at_least(self, 1, "cpu_s", "tasks", "file_mb", "disk_mb")
        check_at_least(self, 0, "output_bytes")
        check_at_least(self, 16, "open_files")
        check_at_least(self, 64, "memory_mb")
        if self.cpu_s != int(self.cpu_s):
            raise InvalidValue("cpu_s", self.cpu_s, "a whole number of seconds")


@dataclass(frozen=True)
class Program:
    """Code, and the tests that run after it in the same namespace; it passes when all of them have run."""

    code: str
    tests: str = ""


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended."""

    outcome: Outcome
    """passed: ran to the end of its tests; failed: an exception, or an end before that; timeout: CPU or wall; memory:
    a MemoryError; output: more than allowed; crashed: ended by a signal; sandbox: it was not run, or not watched to its
    end, which says nothing about the program"""
    detail: str
    """the exception, limit, signal or failure, in one line; written by the program where it failed"""
    output: str
    """what it printed, up to the limit"""
    seconds: float
    """wall time, without the sandbox's own start"""


@dataclass(frozen=True)
class SandboxReport:
    """What this machine's kernel allows, in words."""

    guards: tuple[str, ...]
    gaps: tuple[str, ...]
    """what is left open; empty where all guards are there"""
    with_namespaces: bool


def run_program(program: Program, limits: Limits | None = None) -> SandboxResult:
    """Run one program to its end, or to a limit.

    Raises:
        RewardError: this machine cannot contain processes.
    """
    return _run(program, limits or Limits(), sandbox_report().with_namespaces)[0]


def run_programs(programs: Sequence[Program], limits: Limits | None = None, workers: int = 2) -> list[SandboxResult]:
    """Run programs, `workers` at a time; results in their order.

    Raises:
        RewardError: this machine cannot contain processes.
    """
    if workers < 1:
        raise InvalidValue("workers", workers, ">= 1")
    sandbox_report()
    threads = ThreadPoolExecutor(workers)
    try:
        return list(threads.map(lambda program: run_program(program, limits), programs))
    finally:
        threads.shutdown(cancel_futures=True)  # Ctrl-C waits for those that run, not for all


@cache
def sandbox_report() -> SandboxReport:
    """Try out what this kernel allows, once. Warns of what is left open.

    Raises:
        RewardError: processes cannot be contained, so that nothing may run.
    """
    result, guards, gaps = _run(Program("pass"), Limits(), with_namespaces=True)
    if result.outcome == "passed":
        report = SandboxReport(guards, gaps, with_namespaces=True)
    else:
        why = result.detail
        result, guards, gaps = _run(Program("pass"), Limits(), with_namespaces=False)
        if result.outcome != "passed":
            raise RewardError(
                f"programs cannot be run in a sandbox here: {why}; without namespaces: {result.detail}; run in Linux "
                "on x86-64 or 64-bit ARM, in a container or virtual machine if need be"
            )
        report = SandboxReport(guards, (why, *gaps), with_namespaces=False)
    if report.gaps:
        warnings.warn(f"the sandbox for programs has gaps: {'; '.join(report.gaps)}", RuntimeWarning, stacklevel=2)
    return report


def _run(
    program: Program, limits: Limits, with_namespaces: bool
) -> tuple[SandboxResult, tuple[str, ...], tuple[str, ...]]:
    """(result, guards, gaps)."""
    request = {
        "code": program.code,
        "tests": program.tests,
        "namespaces": with_namespaces,
        "cpu_s": int(limits.cpu_s),
        "memory_bytes": limits.memory_mb << 20,
        "tasks": limits.tasks,
        "file_bytes": limits.file_mb << 20,
        "disk_bytes": limits.disk_mb << 20,
        "open_files": limits.open_files,
        "may_fork": limits.may_fork,
    }
    home = "/sandbox" if with_namespaces else None
    ended = _sandbox_process.run(request, home, limits.wall_s, limits.output_bytes)
    first, _, told = ended.told.partition(b"\n")
    output = ended.output.decode(errors="replace")
    word, *said = first.decode(errors="replace").split("\x1e")
    if word != "ready":
        reason = said[0] if said else output or f"it did not stand within {_sandbox_process.START_LIMIT_S:g} s"
        return SandboxResult("sandbox", _one_line(reason), output, ended.seconds), (), ()
    outcome, detail = _verdict(ended.stopped, told, limits)
    guards, gaps = (tuple(filter(None, part.split("\x1f"))) for part in said)
    return SandboxResult(outcome, _one_line(detail), output, ended.seconds), guards, gaps


def _verdict(stopped: str | None, told: bytes, limits: Limits) -> tuple[Outcome, str]:
    """Outcome and detail of a program that was run; `told` is explained in `_sandbox.child.main`."""
    if stopped == "output":
        return "output", f"more than {limits.output_bytes} bytes"
    if stopped == "timeout":
        return "timeout", f"{limits.wall_s:g} s of wall time"
    if not told:
        return "sandbox", "the process that watches was killed (short of memory?)"
    status, cpu_s, token_is_back, message = told.split(b" ", 3)
    if os.WIFSIGNALED(int(status)):
        number = os.WTERMSIG(int(status))
        # The kernel's limit counts in ticks: the time it reports is not quite the same.
        if number == signal.SIGKILL and float(cpu_s) > limits.cpu_s / 2:
            return "timeout", f"{limits.cpu_s} s of CPU time"
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)  # real-time signals
        return "crashed", f"ended by signal {name}"
    code = os.WEXITSTATUS(int(status))
    if token_is_back == b"1" and code == 0:
        return "passed", ""
    if message == b"memory":
        return "memory", f"more than {limits.memory_mb} MiB"
    return "failed", message.decode(errors="replace") or f"ended with exit status {code} before its tests had run"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1000]
