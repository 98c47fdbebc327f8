"""Programs that try to get out, for real."""

from __future__ import annotations

import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from _hostile_programs import HOSTILE, Hostile
from check_sandbox import Surroundings, processes_with, surroundings, trial

from asn_rl.rewards.sandbox import Program, run_program, sandbox_report


@pytest.fixture(scope="module")
def around() -> Iterator[Surroundings]:
    with warnings.catch_warnings(action="ignore"):  # of gaps: `trial` knows them
        sandbox_report()
    with surroundings() as there:
        yield there


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_it_does_not_escape(hostile: Hostile, around: Surroundings) -> None:
    _, escapes = trial(hostile, around)
    assert not escapes


def test_escapes_would_be_seen(around: Surroundings) -> None:
    harmless = Hostile("harmless", "", "passed", tests="pass")
    assert trial(harmless, around)[1] == []
    assert "ended: passed, not ['failed']" in trial(Hostile("", "", "failed", tests="pass"), around)[1][0]
    assert "it says LOOT" in trial(Hostile("", "print('LOOT')", "passed", tests="pass"), around)[1][0]
    told = trial(Hostile("", f"print('{around.secret}')", "passed", tests="pass"), around)[1]
    assert bool(told) != any("environment" in gap for gap in sandbox_report().gaps)
    with socket.create_connection(("127.0.0.1", around.port)):
        assert "a connection to" in trial(harmless, around)[1][0]
    (around.outside / "loot").touch()
    assert trial(harmless, around)[1] == ["it has changed files"]
    (around.outside / "loot").unlink()
    wait = [sys.executable, "-c", "print(flush=True); import time; time.sleep(60)", around.marker]
    with subprocess.Popen(wait, stdout=subprocess.PIPE) as left:
        assert left.stdout is not None
        left.stdout.readline()  # before, it may have no command line yet
        assert len(processes_with(around.marker)) == 1
        assert "a process is left" in trial(harmless, around)[1][0]
        left.kill()
    assert trial(harmless, around)[1] == []


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nf = sys._getframe(1).f_locals\nf['write'](f['verdict'], f['read'](f['token'], 64))\nf['leave'](0)",
        "class Agreeable(float):\n    def __sub__(self, other): return 0\ndef solve(): return Agreeable()",
        "def abs(x): return 0\ndef solve(): return 1",
    ],
)
def test_what_is_not_defended_against(code: str) -> None:
    """Program and tests share an interpreter. Here, so that what the module says of it stays true."""
    assert run_program(Program(code, "assert abs(solve() - 42) < 1e-6")).outcome == "passed"
