"""Life of a sandbox's processes: one sets it up and watches (trusted), one runs the program (not trusted).

With namespaces there are three: the one the library started, process 1 of the new process namespace, which watches,
and the program. When process 1 ends the kernel ends everything in its namespace, whatever it did to stay.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]  (`signal` imports enum, which takes as long as all the rest)
import builtins
import marshal
import os
import resource
import sys

from . import landlock, libc, namespaces, seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

NOBODY = 65534
SEPARATOR, LIST_SEPARATOR = "\x1e", "\x1f"
MAX_DETAIL = 500
"""characters of what a program says of its failure"""


def main() -> None:
    """Read a request from standard input, run its program, and tell the pipe `status` how it ended.

    What is told: a line "ready", with the guards and what they leave open, or "refused", with the reason; then the exit
    status as `os.wait4` has it, CPU seconds, 1 or 0 for whether the program gave the token back, and what it said of a
    failure.
    """
    libc.die_with_parent()
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # a program may send it to the process that watches
    request = marshal.load(sys.stdin.buffer)
    status = request["status"]
    if os.getppid() != request["parent"]:  # it ended before it could be watched
        os._exit(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        tests = compile(request["tests"], "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        _leave(status, f"the tests cannot be compiled: {error}")
    if not request["namespaces"]:
        _watch(request, tests)
        os._exit(0)
    try:
        namespaces.enter(request["folder"], request["disk_bytes"])
    except (OSError, KeyError) as error:
        _leave(status, f"no namespaces ({error})")
    first = _fork_first()
    if first == 0:
        _watch(request, tests)
        os._exit(0)
    _pass_on_terminate(first)
    # Process 1 can be waited for only when its namespace is empty (pid_namespaces(7)). Until then `status` is open.
    os.waitpid(first, 0)
    os._exit(0)


def _leave(status: int, reason: str) -> NoReturn:
    os.write(status, f"refused{SEPARATOR}{reason}\n".encode(errors="replace"))
    os._exit(1)


def _fork_first() -> int:
    """Fork process 1 of the new namespace so that it cannot outlive this one."""
    (theirs_r, theirs_w), (ours_r, ours_w) = os.pipe(), os.pipe()
    child = os.fork()
    if child:
        os.close(theirs_w)
        os.close(ours_r)
        os.read(theirs_r, 1)
        os.write(ours_w, b".")
        os.close(theirs_r)
        os.close(ours_w)
        return child
    os.close(ours_w)
    os.close(theirs_r)
    libc.die_with_parent()
    os.write(theirs_w, b".")
    if not os.read(ours_r, 1):  # the other ended before it could be watched
        os._exit(1)
    os.close(ours_r)
    os.close(theirs_w)
    return 0


def _pass_on_terminate(child: int) -> None:
    def end(*_: object) -> None:
        try:
            os.kill(child, _signal.SIGKILL)
        except ProcessLookupError:
            return

    _signal.signal(_signal.SIGTERM, end)


def _watch(request: dict[str, Any], tests: Any) -> None:
    """Run the program in a process of its own and tell how it ended."""
    libc.call("prctl", libc.PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody reads or writes this process through /proc
    status, watcher = request["status"], os.getpid()
    (token_r, token_w), (verdict_r, verdict_w) = os.pipe(), os.pipe()
    program = os.fork()
    if program == 0:
        os.close(token_w)
        os.close(verdict_r)
        try:
            guards, gaps = _confine(request, watcher)
        except OSError as error:
            _leave(status, f"cannot be confined: {error}")
        told = SEPARATOR.join(["ready", LIST_SEPARATOR.join(guards), LIST_SEPARATOR.join(gaps)])
        os.write(status, f"{told}\n".encode())
        os.close(status)
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
        _run(request["code"], tests, token_r, verdict_w)
    if not request["namespaces"]:
        _pass_on_terminate(program)
    token = os.urandom(16).hex().encode()  # made after the fork: the program's memory never had it
    os.write(token_w, token)  # while this end is open here: the program may have ended already
    os.close(token_r)
    os.close(verdict_w)
    while True:
        process, ended, usage = os.wait4(-1, 0)
        if process == program:
            break
    os.set_blocking(verdict_r, False)
    try:
        said = os.read(verdict_r, 4 * MAX_DETAIL)
    except BlockingIOError:  # its children have the pipe
        said = b""
    seconds = usage.ru_utime + usage.ru_stime
    detail = b"" if said == token else said
    os.write(status, f"{ended} {seconds:.3f} {int(said == token)} ".encode() + detail)


def _confine(request: dict[str, Any], watcher: int) -> tuple[list[str], list[str]]:
    """Give up all that the program does not need. Returns the guards there are, and what they leave open, in words.

    Raises:
        OSError: what must not be left open cannot be closed.
    """
    alone, filtered, known = request["namespaces"], seccomp.available(), landlock.version()
    confines_files = known >= (1 if alone else landlock.WRITES_FROM)
    scratch = namespaces.SCRATCH if alone else request["folder"]
    was_root = os.geteuid() == 0
    is_root = was_root and not _become_nobody(scratch)
    counted = alone and not is_root and _count_tasks_apart()
    if not alone and not filtered:
        raise OSError("neither namespaces nor seccomp to contain processes")
    if request["may_fork"] and not counted:
        raise OSError("forks are allowed only where namespaces contain and count processes")
    _set_limits(request, counted)
    libc.die_with_parent()  # again: the change of user cancels it
    if os.getppid() != watcher:
        os._exit(1)
    libc.drop_capabilities()
    if confines_files:
        landlock.restrict(namespaces.readable_paths(), scratch)
    if filtered:
        seccomp.install(may_fork=request["may_fork"], alone=alone, may_write=alone or confines_files)
    guards = {
        "namespaces": alone,
        f"Landlock {known}": confines_files,
        "seccomp": filtered,
        "a user of their own": was_root and not is_root,
        "a count of tasks": counted,
    }
    gaps = {
        "system calls are not filtered (no seccomp, or an unknown machine)": not filtered,
        "the size of all files that a program writes is not limited, only that of each": not alone and confines_files,
        "programs cannot write any file, not even in their folder": not alone and not confines_files,
        "programs can read the files of their user, and its processes' environment": not alone and not confines_files,
        "programs run as root, without its capabilities": is_root,
        "threads are limited by memory only": not counted,
    }
    return [name for name, there in guards.items() if there], [name for name, there in gaps.items() if there]


def _become_nobody(scratch: str) -> bool:
    """From root to another user, where there is one and it can read the library."""
    try:
        os.chown(scratch, NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, 0)
    except OSError:  # a user namespace, or a container, that knows no other user
        return False
    if os.access(os.__file__, os.R_OK) and os.access(scratch, os.W_OK | os.X_OK):
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return True
    os.setresuid(0, 0, 0)
    os.setresgid(0, 0, 0)
    os.chown(scratch, 0, 0)
    return False


def _count_tasks_apart() -> bool:
    """In a user namespace of its own only the program's own tasks count for RLIMIT_NPROC, not all of this user's."""
    try:
        libc.call("unshare", libc.CLONE_NEWUSER)
    except OSError:
        return False
    return True


def _set_limits(request: dict[str, Any], counted: bool) -> None:
    limits = {
        resource.RLIMIT_CPU: request["cpu_s"],
        resource.RLIMIT_AS: request["memory_bytes"],
        resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_NOFILE: request["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if counted:
        limits[resource.RLIMIT_NPROC] = request["tasks"]
    for what, most in limits.items():
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # Soft and hard alike: at the CPU limit comes SIGKILL, which cannot be ignored, and not SIGXCPU.
        resource.setrlimit(what, (most, most))


def _run(code: str, tests: Any, token: int, verdict: int) -> NoReturn:
    """Run the program, then its tests, then give the token back. It is read last: before, no memory here has it."""
    read, write, leave, names, run = os.read, os.write, os._exit, builtins.__dict__, exec
    module = type(sys)("__main__")
    sys.modules["__main__"], sys.argv = module, ["program.py"]
    space = vars(module)
    pristine = dict(names)
    try:
        run(compile(code, "<program>", "exec", dont_inherit=True), space)
        names.update(pristine)
        space["__builtins__"] = builtins
        run(tests, space)
    except MemoryError:
        write(verdict, b"memory")
    except BaseException as error:
        write(verdict, _described(error))
    else:
        _flush()
        write(verdict, read(token, 64))
        leave(0)
    _flush()
    leave(1)


def _described(error: BaseException) -> bytes:
    try:
        return f"{type(error).__name__}: {error}"[:MAX_DETAIL].encode(errors="replace")
    except BaseException:  # the program's own exceptions may do anything
        return b"an exception without a description"


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BaseException:  # closed or replaced by the program
        return
