"""A view of the machine with no network, no other process and a file system of its own (namespaces(7)).

Root needs no user namespace and gives the program to another user later. Anybody else gets one that maps only this
user, where the kernel allows that (`kernel.unprivileged_userns_clone`, `user.max_user_namespaces`, AppArmor).
"""

from __future__ import annotations

import ctypes
import os
import sys

from .libc import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, call

SCRATCH = "/sandbox"
"""the program's folder, as it sees it"""
SCRATCH_FILES = 4096

_OWN = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/nix/store")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 1 << 12, 1 << 14, 1 << 18
_MNT_DETACH = 2
_MOUNT_SETATTR, _PIVOT_ROOT = 442, {"x86_64": 155, "aarch64": 41}
_AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = -100, 0x8000, 1, 2


def readable_paths() -> list[str]:
    """The interpreter, its library and the system's: what a program may read. None lies inside another."""
    wanted = [*_SYSTEM, sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.__file__), *sys.path]
    there = sorted({path.rstrip("/") for path in wanted if path.startswith("/") and os.path.exists(path)} - {""})
    kept: list[str] = []
    for path in there:
        if not any(path.startswith(f"{above}/") for above in kept):
            kept.append(path)
    return kept + [path for path in _DEVICES if os.path.exists(path)]


def enter(root: str, scratch_bytes: int) -> None:
    """New namespaces for this process's file system, network and IPC, and for its children's process ids.

    The new root is a tmpfs over the folder `root`: `readable_paths` read-only, `SCRATCH` of `scratch_bytes` writable,
    nothing else. /proc is not there. The working folder becomes `SCRATCH`.

    Raises:
        OSError: the kernel refuses. The process may be half inside then, and should end.
    """
    _unshare()
    call("mount", None, "/", None, _MS_REC | _MS_PRIVATE, None)
    call("mount", "tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    for path in readable_paths():
        _show(path, root + path)
    os.makedirs(root + SCRATCH)
    options = f"mode=1777,size={scratch_bytes},nr_inodes={SCRATCH_FILES}"
    call("mount", "tmpfs", root + SCRATCH, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
    _make_read_only(root, 0)
    os.chdir(root)
    # The old root ends on top of the new one and is taken off there: pivot_root(2), "pivot_root(".", ".")".
    call("syscall", _PIVOT_ROOT[os.uname().machine], ".", ".")
    call("umount2", ".", _MNT_DETACH)
    os.chdir(SCRATCH)


def _unshare() -> None:
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        try:
            call("unshare", _OWN)
            return
        except OSError:  # root of a container, say
            pass
    call("unshare", _OWN | CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _show(path: str, target: str) -> None:
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "x").close()
    call("mount", os.path.realpath(path), target, None, _MS_BIND | _MS_REC, None)
    _make_read_only(target, _AT_RECURSIVE)


def _make_read_only(path: str, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
    call("syscall", _MOUNT_SETATTR, _AT_FDCWD, path, flags, attributes, ctypes.sizeof(attributes))
