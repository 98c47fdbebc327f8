"""System calls that the standard library does not have, through ctypes."""

from __future__ import annotations

import ctypes
import os

_LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CAPABILITY_VERSION_3 = 0x20080522


def call(name: str, *arguments: int | str | ctypes.Array | ctypes.Structure | None) -> int:
    """A function of the C library ("syscall" for those it does not wrap); integers go as long.

    Raises:
        OSError: it returned -1.
    """
    result = getattr(_LIBC, name)(*map(_converted, arguments))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _converted(argument: int | str | ctypes.Array | ctypes.Structure | None) -> object:
    if isinstance(argument, int):
        return ctypes.c_long(argument)
    if isinstance(argument, str):
        return os.fsencode(argument)
    return None if argument is None else ctypes.byref(argument)


def die_with_parent() -> None:
    """SIGKILL for this process when its parent ends. (A change of user or of capabilities cancels it.)"""
    call("prctl", PR_SET_PDEATHSIG, 9, 0, 0, 0)


def drop_capabilities() -> None:
    """No capability in any namespace, and none to be had from a setuid program (capset(2), prctl(2))."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
