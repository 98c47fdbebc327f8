"""Do programs leave the sandbox? Every hostile program of `_hostile_programs.py`, for real, with limits.

An escape is: an outcome that is not one of the expected ones, a process or folder left, a connection seen, a file
changed outside, the caller's environment or memory read, or words of success from the program itself. `--without` takes
features of the kernel away first, as where they are not allowed: what the sandbox then says it leaves open is no
escape, and programs that fork must be refused.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from _hostile_programs import HOSTILE, Hostile

from asn_rl.rewards._sandbox import libc, seccomp
from asn_rl.rewards.sandbox import Limits, Program, SandboxResult, run_program, sandbox_report

VICTIM = "as it was"
FEATURES = {"namespaces": {"unshare": (272, 97)}, "landlock": {"landlock_create_ruleset": (444, 444)}}
"""feature: its system call's name and numbers on x86-64 and 64-bit ARM"""


@dataclass(frozen=True)
class Surroundings:
    """What a hostile program is after; see `_hostile_programs`."""

    outside: Path
    listeners: tuple[socket.socket, ...]
    unix: Path
    secret: str
    marker: str

    @property
    def port(self) -> int:
        return self.listeners[0].getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python scripts/check_sandbox.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="without the programs that run into a limit of time")
    parser.add_argument("--without", nargs="*", choices=FEATURES, default=[], help="features the kernel is to refuse")
    arguments = parser.parse_args()
    take_away(arguments.without)
    with warnings.catch_warnings(action="ignore"):  # it is printed
        report = sandbox_report()
    print(f"guards: {', '.join(report.guards)}\ngaps: {'; '.join(report.gaps) or 'none'}\n")
    programs = [hostile for hostile in HOSTILE if not (arguments.quick and hostile.limits)]
    escapes = 0
    print(f"{'program':46} {'ended':9} {'seconds':>7}  escape")
    with surroundings() as around:
        for hostile in programs:
            result, found = trial(hostile, around)
            escapes += bool(found)
            print(f"{hostile.name:46} {result.outcome:9} {result.seconds:7.2f}  {'; '.join(found) or '-'}")
    print(f"check_sandbox escapes={escapes} programs={len(programs)} goal=0 {'short' if escapes else 'ok'}")
    return int(bool(escapes))


def take_away(features: list[str]) -> None:
    """Have the kernel refuse these features to this process and its children, from now on."""
    if features:
        seccomp.ALWAYS.clear()
        for feature in features:
            seccomp.ALWAYS.update(FEATURES[feature])
        libc.call("prctl", libc.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        seccomp.install(may_fork=True, alone=True, may_write=True)


@contextmanager
def surroundings() -> Iterator[Surroundings]:
    """A folder anybody may write in, listeners, and a secret in the environment of this process."""
    marker, secret = f"marker-{secrets.token_hex(8)}", secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix=marker) as folder, socket.socket() as tcp, _unix_listener(folder) as unix:
        outside = Path(folder, "outside")
        outside.mkdir()
        Path(folder).chmod(0o755)
        outside.chmod(0o777)
        tcp.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(tcp.getsockname())
            tcp.listen()
            for listener in (tcp, udp, unix):
                listener.setblocking(False)
            before, os.environ["ASN_RL_SECRET"] = tempfile.tempdir, secret
            tempfile.tempdir = folder  # the sandbox's folder, too: it is in the command line of its processes
            try:
                yield Surroundings(outside, (tcp, udp, unix), Path(unix.getsockname()), secret, marker)
            finally:
                tempfile.tempdir = before
                del os.environ["ASN_RL_SECRET"]


@contextmanager
def _unix_listener(folder: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder, "socket")
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()
        yield listener


def trial(hostile: Hostile, around: Surroundings) -> tuple[SandboxResult, list[str]]:
    """Run a program and look around. Returns how it ended, and its escapes in words."""
    report = sandbox_report()
    victim = around.outside / "victim"
    victim.write_text(VICTIM)
    victim.chmod(0o666)
    limits = replace(Limits(), **dict(hostile.limits))
    result = run_program(Program(_aimed(hostile.code, around), hostile.tests), limits)
    refused = limits.may_fork and "a count of tasks" not in report.guards
    expected = ["sandbox"] if refused else hostile.outcomes.split()
    escapes = [] if result.outcome in expected else [f"ended: {result.outcome}, not {expected}: {result.detail}"]
    if "LOOT" in result.output:
        escapes.append(f"it says {result.output:.200}")
    said_so = any("environment" in gap for gap in report.gaps)
    if not said_so and (around.secret in result.output + result.detail or "SPOILS" in result.output):
        escapes.append("it has read the environment or memory of other processes")
    if not victim.exists() or victim.read_text() != VICTIM or len(list(around.outside.iterdir())) != 1:
        escapes.append("it has changed files")
    escapes += [f"a connection to {listener.getsockname()}" for listener in around.listeners if _was_reached(listener)]
    escapes += [f"a process is left: {left}" for left in processes_with(around.marker)]
    escapes += [f"a folder is left: {left}" for left in Path(tempfile.gettempdir()).glob("asn-sandbox-*")]
    return result, escapes


def _aimed(code: str, around: Surroundings) -> str:
    aims = {"OUTSIDE": around.outside, "PORT": around.port, "UNIX": around.unix, "CALLER": os.getpid()}
    for word, aim in {**aims, "MARKER": around.marker}.items():
        code = code.replace(word, str(aim))
    return code


def _was_reached(listener: socket.socket) -> bool:
    try:
        listener.recv(1) if listener.type is socket.SOCK_DGRAM else listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def processes_with(marker: str) -> list[str]:
    """Processes with a text in their command line or environment, other than this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        text = b""
        for name in ("cmdline", "environ"):
            with suppress(OSError):  # it has just ended, or is another user's
                text += (folder / name).read_bytes()
        if marker.encode() in text:
            found.append(f"{folder.name} {text[:100]!r}")
    return found


if __name__ == "__main__":
    sys.exit(main())
