"""Programs that try to leave the sandbox, outlive it, exhaust the machine, or pass without passing their tests.

In a program, `OUTSIDE` is a folder anybody may write in, with a file `victim`; `PORT` a listening TCP port and
`UNIX` a listening Unix socket; `CALLER` the process id of the caller, whose environment has `SECRET`; `MARKER` is
unique and lies in the command line of all that outlives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hostile:
    """A program, and how it may end."""

    name: str
    code: str
    outcomes: str
    """outcomes that are no escape, separated by spaces"""
    tests: str = "assert solve() == 42"
    limits: tuple[tuple[str, Any], ...] = ()


def _hostile(name: str, outcomes: str, code: str, tests: str = "assert solve() == 42", **limits: Any) -> Hostile:
    return Hostile(name, code.strip("\n"), outcomes, tests, tuple(limits.items()))


HOSTILE = [
    # Processes
    _hostile("fork bomb", "failed", "import os\nwhile True: os.fork()"),
    _hostile(
        "fork bomb where forks are allowed",
        "failed timeout",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        may_fork=True,
        tasks=8,
        wall_s=0.5,
    ),
    _hostile(
        "grandchild in a session of its own",
        "failed",
        """
import os, signal, time
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        os.closerange(0, 64)
        time.sleep(600)
    os._exit(0)
raise SystemExit(0)
""",
        may_fork=True,
    ),
    _hostile(
        "another program in the background",
        "failed",
        "import subprocess\nsubprocess.Popen(['/bin/sleep', '600', '--', 'MARKER'], start_new_session=True)\n1 / 0",
        may_fork=True,
    ),
    _hostile(
        "threads without end",
        "failed memory timeout crashed",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(600,)).start()",
        wall_s=5.0,
        memory_mb=512,
    ),
    _hostile(
        "kills its parent and all others",
        "failed crashed timeout",
        """
import os, signal
for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP, signal.SIGSEGV):
    for process in (os.getppid(), 1, CALLER, -1, -CALLER, -os.getppid()):
        try: os.kill(process, number)
        except OSError: pass
raise SystemExit(0)
""",
    ),
    _hostile("stops itself", "timeout", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", wall_s=0.3),
    _hostile("ends by a signal without a name", "crashed", "import os\nos.kill(os.getpid(), 40)"),
    # Time
    _hostile("loop", "timeout", "while True: pass", cpu_s=1),
    _hostile("sleeps", "timeout", "import time\ntime.sleep(600)", wall_s=0.3),
    _hostile(
        "ignores all signals and exceptions",
        "timeout",
        """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True:
    try:
        while True: pass
    except BaseException: pass
""",
        cpu_s=1,
    ),
    _hostile("a number that takes for ever", "timeout", "x = 9 ** 9 ** 9", wall_s=0.3),
    _hostile(
        "raises its own CPU limit",
        "timeout",
        """
import resource
try: resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
except ValueError: pass
while True: pass
""",
        cpu_s=1,
    ),
    # Memory
    _hostile("one large object", "memory", "x = bytearray(10 ** 12)"),
    _hostile("many small objects", "memory", "x = []\nwhile True: x.append([0] * 1000)", memory_mb=128),
    _hostile("anonymous map", "failed memory", "import mmap\nx = mmap.mmap(-1, 1 << 40)"),
    _hostile("memory file", "failed", "import os\nx = os.memfd_create('x')"),
    _hostile(
        "memory in many processes",
        "memory failed",
        "import os\nfor _ in range(8):\n    try: os.fork()\n    except OSError: pass\nx = bytearray(10 ** 9)",
        may_fork=True,
        tasks=4,
        memory_mb=64,
    ),
    # Output and files
    _hostile("prints for ever", "output", "while True: print('x' * 1000)"),
    _hostile("writes errors for ever", "output", "import os\nwhile True: os.write(2, b'x' * 65536)"),
    _hostile("large file", "failed", "with open('x', 'wb') as f:\n    while True: f.write(bytes(1 << 20))"),
    _hostile("sparse file", "failed", "import os\nos.truncate(os.open('x', os.O_CREAT | os.O_RDWR), 1 << 50)"),
    _hostile(
        "many files", "failed timeout", "i = 0\nwhile True:\n    open(str(i), 'x').close()\n    i += 1", wall_s=5.0
    ),
    _hostile(
        "writes outside",
        "failed",
        """
import os, shutil
paths = ['OUTSIDE/loot', 'OUTSIDE/victim', '/tmp/loot-MARKER', '/dev/shm/loot-MARKER', '/var/tmp/loot-MARKER',
         '/usr/loot-MARKER', os.path.dirname(os.__file__) + '/loot-MARKER', '../loot-MARKER', '/loot-MARKER']
os_calls = [lambda p: open(p, 'w').write('x'), lambda p: open(p, 'a').write('x'), lambda p: os.mkdir(p),
            lambda p: os.symlink('/etc', p), lambda p: os.truncate(p, 0), lambda p: os.unlink(p),
            lambda p: os.chmod(p, 0), lambda p: os.utime(p), lambda p: os.mkfifo(p), lambda p: os.rename(p, 'y'),
            lambda p: os.rename('x', p), lambda p: os.link('x', p)]
done = []
for path in paths:
    for number, attempt in enumerate(os_calls):
        try:
            attempt(path)
            done.append((path, number))
        except OSError: pass
shutil.rmtree('OUTSIDE', ignore_errors=True)
print('LOOT', done) if done else None
1 / 0
""",
    ),
    _hostile(
        "writes outside through a link",
        "failed",
        "import os\nos.symlink('OUTSIDE/victim', 'link')\nopen('link', 'w').write('x')\nprint('LOOT')",
    ),
    # The caller
    _hostile(
        "reads environments",
        "failed",
        """
import os, glob
print(dict(os.environ))
for path in ['/proc/self/environ', '/proc/CALLER/environ', *glob.glob('/proc/[0-9]*/environ')]:
    try: print(open(path, 'rb').read())
    except OSError: pass
1 / 0
""",
    ),
    _hostile(
        "writes into other processes",
        "failed",
        """
import os, ctypes
libc = ctypes.CDLL(None, use_errno=True)
for process in (os.getppid(), 1, CALLER):
    for mode in ('r+b', 'rb'):
        try:
            open(f'/proc/{process}/mem', mode)
            print('SPOILS' if mode == 'rb' else 'LOOT', 'memory of', process)
        except OSError: pass
    if libc.ptrace(16, process, 0, 0) != -1:
        print('LOOT: traces', process)
    if libc.process_vm_readv(process, None, 0, None, 0, 0) != -1:
        print('LOOT: reads', process)
1 / 0
""",
    ),
    # The network
    _hostile(
        "connects",
        "failed",
        """
import socket
for family, kind, place in [(socket.AF_INET, socket.SOCK_STREAM, ('127.0.0.1', PORT)),
                            (socket.AF_INET, socket.SOCK_DGRAM, ('127.0.0.1', PORT)),
                            (socket.AF_INET6, socket.SOCK_STREAM, ('::1', PORT)),
                            (socket.AF_UNIX, socket.SOCK_STREAM, 'UNIX')]:
    try:
        with socket.socket(family, kind) as s:
            s.connect(place)
            s.send(b'x')
            print('LOOT', place)
    except OSError: pass
1 / 0
""",
    ),
    _hostile(
        "other privileges",
        "failed",
        """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for name, arguments in [('unshare', (0x10000000,)), ('unshare', (0x20000,)), ('mount', (b'x', b'/', b'tmpfs', 0, None)),
                        ('chroot', (b'.',)), ('setuid', (0,)), ('setgid', (0,)), ('umount2', (b'/usr', 2)),
                        ('syscall', (425, 8, None)), ('syscall', (321, 0, None, 0)), ('reboot', (0,)),
                        ('syscall', (304, -100, None, 0)), ('shmget', (0, 4096, 0o1600)), ('personality', (0x40000,))]:
    if getattr(libc, name)(*arguments) != -1 and not (name.startswith('set') and os.getuid() == 0 == os.geteuid()):
        print('LOOT', name, arguments)
try: libc.setns(os.open('/proc/1/ns/net', os.O_RDONLY), 0) == -1 or print('LOOT')
except OSError: pass
1 / 0
""",
    ),
    # Passing without passing
    _hostile("exit status 0", "failed", "import os\nos._exit(0)"),
    _hostile("exit in the tests", "failed", "import os\ndef solve(): os._exit(0)"),
    _hostile("sys.exit", "failed", "import sys\nsys.exit(0)"),
    _hostile("sys.exit in the tests", "failed", "import sys\ndef solve(): sys.exit(0)"),
    _hostile("exit at a clean-up", "failed", "import atexit, os\natexit.register(os._exit, 0)\ndef solve(): return 1"),
    _hostile("becomes true(1)", "failed", "import os\nos.execv('/bin/true', ['true'])"),
    _hostile(
        "becomes true(1) where programs are allowed",
        "failed",
        """
import os
os.execv('/bin/true', ['true'])
""",
        may_fork=True,
    ),
    _hostile(
        "says that it passed",
        "failed",
        """
import sys
print('passed'); print('ready'); print('0 0.0 1 ', file=sys.stderr)
def solve(): return 1
""",
    ),
    _hostile(
        "says so everywhere",
        "failed",
        """
import os
for fd in range(64):
    for text in (b'passed', b'1', b'0 0.0 1 ', b'0' * 32, b'ready\\n0 0.0 1 '):
        try: os.write(fd, text)
        except OSError: pass
os._exit(0)
""",
    ),
    _hostile("closes everything", "failed", "import os\nos.closerange(0, 64)\nos._exit(0)"),
    _hostile(
        "replaces builtins",
        "failed",
        """
import builtins, sys, os
builtins.AssertionError = builtins.Exception = builtins.BaseException = KeyError
builtins.compile = builtins.exec = builtins.eval = builtins.__import__ = lambda *a, **k: None
builtins.abs = builtins.len = builtins.sum = lambda *a: 42
os._exit = os.write = os.read = sys.exit = lambda *a: None
__builtins__ = {}
def solve(): return [1]
""",
        "assert len(solve()) == 42",
    ),
    _hostile(
        "replaces the tests' hooks",
        "failed",
        """
import sys
sys.excepthook = lambda *a: None
sys.settrace(lambda *a: None)
def check(f): pass
def solve(): return 1
""",
        "def check(f): assert f() == 42\ncheck(solve)",
    ),
    _hostile("leaves a string open around the tests", "failed", "def solve(): return 1\nx = '''"),
    _hostile("leaves a condition open around the tests", "failed", "def solve(): return 1\nif False:\n  pass\n\\"),
    _hostile(
        "an exception that does not end",
        "timeout",
        """
class E(Exception):
    def __str__(self):
        while True: pass
raise E
""",
        wall_s=0.3,
    ),
    _hostile(
        "an exception that exits",
        "failed",
        """
import os
class E(Exception):
    def __str__(self): os._exit(0)
raise E
""",
    ),
    # The interpreter
    _hostile("recursion", "failed", "def f(): f()\nf()"),
    _hostile(
        "recursion without limit",
        "memory crashed failed timeout",
        """
import sys
sys.setrecursionlimit(10 ** 9)
def f(): f()
f()
""",
        memory_mb=128,
        cpu_s=1,
    ),
    _hostile(
        "recursion in C",
        "crashed failed memory",
        """
import sys
sys.setrecursionlimit(10 ** 9)
x = []
for _ in range(2 * 10 ** 5): x = [x]
repr(x)
""",
    ),
    _hostile("null pointer", "crashed", "import ctypes\nctypes.string_at(0)"),
    _hostile("nested source", "failed memory crashed", "x = " + "(" * 100_000),
    _hostile("null character", "failed", "x = 1\0"),
    _hostile("half of a surrogate pair", "failed", "x = '\ud800'"),
]
