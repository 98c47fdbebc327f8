from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from asn_rl.errors import InvalidValue
from asn_rl.rewards import _sandbox_process
from asn_rl.rewards.sandbox import Limits, Program, run_program, run_programs, sandbox_report

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def known_gaps() -> None:
    """A warning tells of them once, where there are any; `test_what_is_left_open_is_said` looks at them."""
    with warnings.catch_warnings(action="ignore"):
        sandbox_report()


@pytest.mark.parametrize(
    ("code", "outcome", "detail"),
    [
        ("x = 1", "passed", ""),
        ("x = 2", "failed", "AssertionError: it is 2"),
        ("y = 1", "failed", "NameError: name 'x' is not defined"),
        ("x = ", "failed", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("raise SystemExit(0)", "failed", "SystemExit: 0"),
        ("raise ValueError('a\\nb' + 'c' * 10_000)", "failed", "ValueError: a b" + "c" * 485),
        ("import os; os._exit(3)", "failed", "ended with exit status 3 before its tests had run"),
        ("import os; os.abort()", "crashed", "ended by signal SIGABRT"),
        ("x = bytes(1 << 40)", "memory", "more than 256 MiB"),
        ("print('a' * 5001)", "output", "more than 5000 bytes"),
        ("import time; time.sleep(60)", "timeout", "0.5 s of wall time"),
        ("input()", "failed", "EOFError: EOF when reading a line"),
        ("import torch", "failed", "ModuleNotFoundError: No module named 'torch'"),
    ],
)
def test_outcomes(code: str, outcome: str, detail: str) -> None:
    limits = Limits(wall_s=0.5 if "sleep" in code else 30.0, memory_mb=256, output_bytes=5000)
    result = run_program(Program(code, "assert x == 1, f'it is {x}'"), limits)
    assert (result.outcome, result.detail) == (outcome, detail)


def test_output_is_kept_to_the_limit() -> None:
    result = run_program(
        Program("import sys; print('\\xe4' * 10, flush=True); print('no', file=sys.stderr)"), Limits(output_bytes=24)
    )
    assert (result.outcome, result.output) == ("passed", "ä" * 10 + "\nno\n")
    result = run_program(Program("print('\\xe4' * 10)"), Limits(output_bytes=3))
    assert (result.outcome, result.output) == ("output", "ä\ufffd")


def test_the_standard_library_and_threads_are_there() -> None:
    code = """
import asyncio, ctypes, decimal, hashlib, json, pathlib, random, sqlite3, ssl, tempfile, unittest, zoneinfo
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
@dataclass
class A:
    x: int
async def f(): return 3
with ThreadPoolExecutor(8) as threads:
    x = [asyncio.run(f()), sum(threads.map(lambda a: a.x, [A(1)] * 8))]
"""
    result = run_program(Program(code, "assert x == [3, 8] and __name__ == '__main__'"))
    assert (result.outcome, result.detail) == ("passed", "")


def test_files_of_their_own_where_they_can_be_told_from_others() -> None:
    code = "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as file: x = file.write('abc')"
    result = run_program(Program(code, "assert x == 3"))
    cannot = any("cannot write any file" in gap for gap in sandbox_report().gaps)
    assert result.outcome == ("failed" if cannot else "passed"), result.detail


def test_programs_are_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the caller's variables, nor each other's files; nothing is left of them. The order is kept."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("ASN_RL_SECRET", "hidden")
    code = "import os\nprint(os.listdir('.'), *os.environ)\nif {} and os.getcwd() == os.environ['HOME']: open('x', 'x')"
    results = run_programs([Program(code.format(number % 2)) for number in range(6)], workers=3)
    assert {result.output for result in results} == {"[] PYTHONHASHSEED MALLOC_ARENA_MAX LANG PATH HOME TMPDIR PWD\n"}
    assert not list(tmp_path.iterdir())
    numbered = run_programs([Program(f"print({number})") for number in range(6)], workers=3)
    assert [result.output for result in numbered] == [f"{number}\n" for number in range(6)]


def test_sets_have_the_same_order_every_time() -> None:
    results = run_programs([Program("print(set('abcdefgh'), hash('a'))")] * 3)
    assert len({result.output for result in results}) == 1


def test_programs_may_start_programs_only_where_they_are_contained() -> None:
    code = "import subprocess; print(subprocess.run(['/bin/echo', 'hi'], capture_output=True).stdout)"
    result = run_program(Program(code), Limits(may_fork=True))
    if "a count of tasks" in sandbox_report().guards:
        assert (result.outcome, result.output) == ("passed", "b'hi\\n'\n")
    else:
        assert (result.outcome, "forks are allowed only where" in result.detail) == ("sandbox", True)


def test_tests_that_are_no_python_say_nothing_about_the_program() -> None:
    result = run_program(Program("x = 1", "assert ("))
    assert (result.outcome, result.detail) == (
        "sandbox",
        "the tests cannot be compiled: '(' was never closed (<tests>, line 1)",
    )


def test_a_sandbox_that_does_not_stand_is_not_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sandbox_process, "START_LIMIT_S", 0.0)
    result = run_program(Program("while True: pass"))
    assert (result.outcome, result.detail) == ("sandbox", "it did not stand within 0 s")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("cpu_s", 0),
        ("cpu_s", 1.5),
        ("wall_s", 0.0),
        ("wall_s", float("nan")),
        ("memory_mb", 32),
        ("tasks", 0),
        ("file_mb", 0),
        ("disk_mb", 0),
        ("open_files", 3),
        ("output_bytes", -1),
    ],
)
def test_refused_limits(option: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=f"{option} must be"):
        Limits(**{option: value})


def test_refused_workers() -> None:
    with pytest.raises(InvalidValue, match="workers must be >= 1"):
        run_programs([], workers=0)


def test_what_is_left_open_is_said() -> None:
    report = sandbox_report()
    assert (
        report.with_namespaces
        == ("namespaces" in report.guards)
        == (not report.gaps or "namespaces" not in report.gaps[0])
    )
    assert ("seccomp" in report.guards) != any("system calls are not filtered" in gap for gap in report.gaps)
    assert ("a count of tasks" in report.guards) != ("threads are limited by memory only" in report.gaps)


def test_interrupted_call_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            run_program(Program("while True: pass"))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not list(tmp_path.iterdir())
    assert not processes_in(tmp_path)


def test_programs_end_when_the_caller_is_killed(tmp_path: Path) -> None:
    caller = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys, tempfile; sys.path[:] = {sys.path!r}; tempfile.tempdir = {str(tmp_path)!r}\n"
            "from asn_rl.rewards import sandbox\n"
            "print(sandbox.sandbox_report().guards, flush=True)\n"
            "sandbox.run_program(sandbox.Program('while True: pass'))",
        ],
        stdout=subprocess.PIPE,
    )
    with caller:
        assert caller.stdout is not None
        caller.stdout.readline()
        while not list(tmp_path.glob("asn-sandbox-*")) or not processes_in(tmp_path):
            time.sleep(0.02)
        caller.kill()
    patience = time.monotonic() + 30
    while processes_in(tmp_path) and time.monotonic() < patience:
        time.sleep(0.02)
    assert not processes_in(tmp_path)


def processes_in(folder: Path) -> list[str]:
    """Processes whose command line has a folder in it; a sandbox's processes have theirs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(f"{folder}/asn-sandbox-") in (process / "cmdline").read_bytes():
                found.append(process.name)
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.parametrize(
    ("features", "gap"),
    [("namespaces", "the size of all files that a program writes"), ("namespaces landlock", "cannot write any file")],
)
def test_without_features_of_the_kernel_it_says_so_and_contains(features: str, gap: str) -> None:
    """The hostile programs again, in a process to which the kernel refuses these features."""
    script = ROOT / "scripts" / "check_sandbox.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--without", *features.split()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "escapes=0" in done.stdout
    gaps = done.stdout.splitlines()[1]
    assert "no namespaces (" in gaps
    assert gap in gaps


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (
            "check_sandbox.take_away(['namespaces'])",
            "RuntimeWarning: the sandbox for programs has gaps: no namespaces (",
        ),
        ("libc.call('personality', 8)", "RewardError: programs cannot be run in a sandbox here: no namespaces"),
    ],
)
def test_gaps_are_warned_of_and_uncontained_programs_refused(first: str, said: str) -> None:
    """Personality 8 is a 32-bit machine, whose system calls are not known here."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:] = {[*sys.path, str(ROOT / 'scripts')]!r}\n"
            "import check_sandbox\nfrom asn_rl.rewards._sandbox import libc\n"
            f"{first}\nfor _ in range(2): check_sandbox.run_program(check_sandbox.Program('pass'))",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.count(said) == 1, done.stderr
