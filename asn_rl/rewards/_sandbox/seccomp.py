"""A filter of system calls in classic BPF (seccomp(2)), for x86-64 and 64-bit ARM."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from .libc import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    PR_SET_PDEATHSIG,
    PR_SET_SECCOMP,
    call,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: (x86-64, 64-bit ARM), 0 where there is none; from the kernel's asm/unistd_64.h and asm-generic/unistd.h.
# Network and ways around it; other processes' memory and descriptors; the kernel and its settings; namespaces and
# mounts; memory and messages that no limit counts.
ALWAYS = {
    "socket": (41, 198), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "process_madvise": (440, 440), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162),
    "vhangup": (153, 58), "fanotify_init": (300, 262), "lookup_dcookie": (212, 18), "iopl": (172, 0),
    "ioperm": (173, 0), "modify_ldt": (154, 0), "uselib": (134, 0), "personality": (135, 92),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "open_tree": (428, 428),
    "mount_setattr": (442, 442), "setns": (308, 268), "unshare": (272, 97), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
# Where forks are denied. (clone() is looked at more closely: threads are clones.)
FORK = {"fork": (57, 0), "vfork": (58, 0), "execve": (59, 221), "execveat": (322, 281)}
# Where no namespace keeps other processes out of sight, and other files.
OUTSIDE = {
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "setsid": (112, 157), "setpgid": (109, 154),
    "chmod": (90, 0), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, 0), "fchown": (93, 55),
    "lchown": (94, 0), "fchownat": (260, 54), "utime": (132, 0), "utimes": (235, 0), "futimesat": (261, 0),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
# Where nothing else tells one folder from another: no file is changed at all. (open() is looked at more closely.)
WRITE = {
    "creat": (85, 0), "unlink": (87, 0), "unlinkat": (263, 35), "rename": (82, 0), "renameat": (264, 38),
    "renameat2": (316, 276), "mkdir": (83, 0), "mkdirat": (258, 34), "rmdir": (84, 0), "link": (86, 0),
    "linkat": (265, 37), "symlink": (88, 0), "symlinkat": (266, 36), "truncate": (76, 45), "mknod": (133, 0),
    "mknodat": (259, 33),
}  # fmt: skip
_CLONE, _CLONE3, _OPEN, _OPENAT, _OPENAT2 = (56, 220), (435, 435), (2, 0), (257, 56), (437, 437)
_KILL, _TGKILL, _PRLIMIT, _PRCTL = (62, 129), (234, 131), (302, 261), (157, 167)
# Later system calls are unknown here, and so they are unknown there; the C library does without them.
_FIRST_UNKNOWN = 451

_CLONE_THREAD = 1 << 16
_NEW_NAMESPACE = (
    CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | 1 << 25 | 1 << 26 | 1 << 7
)  # and cgroup, UTS, time
_ANY_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000

Instruction = tuple[int, int, int, int]
"""code, jump if true, jump if false, constant"""


def available() -> bool:
    """Whether this machine's numbers are known here, and its kernel takes filters (prctl answers EFAULT to none)."""
    if os.uname().machine not in _AUDIT_ARCH:
        return False
    try:
        call("prctl", PR_SET_SECCOMP, 2, None, 0, 0)
    except OSError as error:
        return error.errno == errno.EFAULT
    return False


def install(*, may_fork: bool, alone: bool, may_write: bool) -> None:
    """Filter this process's system calls from now on, and those of its children; what is denied fails with an error.

    Args:
        may_fork: allow other processes and programs, not threads only.
        alone: namespaces hide all other processes; otherwise it may signal none but itself.
        may_write: allow changes to files.

    Raises:
        OSError: the kernel refuses.
    """
    program = _program(may_fork, alone, may_write)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    description = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(buffer)))
    call("prctl", PR_SET_SECCOMP, 2, description, 0, 0)


def _program(may_fork: bool, alone: bool, may_write: bool) -> list[Instruction]:
    machine = os.uname().machine
    column = list(_AUDIT_ARCH).index(machine)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _FIRST_UNKNOWN),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]

    def deny(numbers: Iterable[tuple[int, int]], error: int = errno.EPERM) -> None:
        for pair in numbers:
            if pair[column]:
                program.extend([(_EQUAL, 0, 1, pair[column]), (_RETURN, 0, 0, _ERRNO | error)])

    def look(pair: tuple[int, int], argument: int, *tests: Instruction) -> None:
        """`tests` see the low half of an argument; a test that fails falls through to the next, the last allows."""
        if pair[column]:
            load = (_LOAD, 0, 0, _ARGUMENTS + 8 * argument)
            body = [load, *tests, (_RETURN, 0, 0, _ALLOW)]
            program.extend([(_EQUAL, 0, len(body), pair[column]), *body])

    def refuse(test: int, constant: int, error: int, *, when: bool) -> tuple[Instruction, Instruction]:
        return (test, 0 if when else 1, 1 if when else 0, constant), (_RETURN, 0, 0, _ERRNO | error)

    deny(ALWAYS.values())
    deny([_CLONE3], errno.ENOSYS)  # its flags lie in memory, out of a filter's sight; the C library falls back
    no_process = () if may_fork else refuse(_ANY_BIT, _CLONE_THREAD, errno.EAGAIN, when=False)
    look(_CLONE, 0, *refuse(_ANY_BIT, _NEW_NAMESPACE, errno.EPERM, when=True), *no_process)
    if not may_fork:
        deny(FORK.values(), errno.EAGAIN)
    if not alone:
        deny(OUTSIDE.values())
        look(_KILL, 0, *refuse(_EQUAL, os.getpid(), errno.EPERM, when=False))
        look(_TGKILL, 0, *refuse(_EQUAL, os.getpid(), errno.EPERM, when=False))
        look(_PRLIMIT, 0, *refuse(_EQUAL, 0, errno.EPERM, when=False))
        look(_PRCTL, 0, *refuse(_EQUAL, PR_SET_PDEATHSIG, errno.EPERM, when=True))
    if not may_write:
        deny(WRITE.values(), errno.EROFS)
        deny([_OPENAT2], errno.ENOSYS)
        look(_OPEN, 1, *refuse(_ANY_BIT, _ANY_WRITE, errno.EROFS, when=True))
        look(_OPENAT, 2, *refuse(_ANY_BIT, _ANY_WRITE, errno.EROFS, when=True))
    return [*program, (_RETURN, 0, 0, _ALLOW)]
