"""Landlock: a process gives up the files and signals it does not need, without privileges (landlock(7))."""

from __future__ import annotations

import ctypes
import os

from .libc import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

WRITES_FROM = 3
"""the first version that guards every way to change a file's content (truncation)"""

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_VERSION_QUERY, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE
# File rights known to versions 1, 2 (moving between folders), 3 and 4 (truncation), 5 and later (device ioctls).
_KNOWN = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP = 0b11  # bind, connect; from version 4
_SCOPES = 0b11  # abstract Unix sockets, signals; from version 6


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def version() -> int:
    """The kernel's Landlock version; 0: none, or not switched on."""
    try:
        return call("syscall", _CREATE_RULESET, None, 0, _VERSION_QUERY)
    except OSError:
        return 0


def restrict(readable: Iterable[str], scratch: str | None) -> None:
    """From now on this process reads beneath `readable` only, and writes beneath `scratch` only.

    It can neither signal nor trace what is outside, and has no TCP, as far as the kernel's version goes.

    Raises:
        OSError: the kernel refuses.
    """
    known = version()
    handled = _KNOWN[min(known, max(_KNOWN))]
    attributes = (ctypes.c_uint64 * 3)(handled, _TCP if known >= 4 else 0, _SCOPES if known >= 6 else 0)
    size = 8 * (1 + (known >= 4) + (known >= 6))
    ruleset = call("syscall", _CREATE_RULESET, attributes, size, 0)
    for path in readable:
        rights = _READ_FILE | (_WRITE_FILE if path.startswith("/dev/") else _EXECUTE | _READ_DIR)
        _allow(ruleset, path, rights)
    if scratch is not None:
        _allow(ruleset, scratch, handled & ~_EXECUTE)
    call("syscall", _RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = _PathRule(rights if os.path.isdir(path) else rights & _FILE_RIGHTS, parent)
        call("syscall", _ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(parent)
