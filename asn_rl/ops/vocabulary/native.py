"""Passes over the vocabulary in C (native.c), compiled for this processor the first time they are needed.

One fused pass where the reference makes about ten. The compiler is $CC, or the first of cc, gcc and clang; without one,
or where it fails, `available` is false and says why in the log.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from asn_rl.files import cache_dir
from asn_rl.ops.vocabulary.octaves import Summary, half_octave_starts

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC")
_SCRATCH = 64
_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether the compiled passes can be used."""
    return _library() is not None


def summarise(rows: Tensor, k: int, bin_of: Tensor, bins: int) -> Summary:
    """See `Passes`."""
    count, k = len(rows), k + 1
    top, ids = torch.empty(count, k), torch.empty(count, k, dtype=torch.int64)
    sums = torch.empty(count, 3, bins, dtype=torch.float64)
    _run("summarise", rows, (k, bins), (bin_of.int(),), (), (top, ids, sums))
    return Summary(top, ids, *sums.unbind(1))


def move(rows: Tensor, boundary: Tensor, by: Tensor, out: Tensor | None) -> Tensor:
    """See `Passes`."""
    to = torch.empty(rows.shape) if out is None else out
    _run("move", rows, (), (), (boundary.contiguous(), by.contiguous()), (to,))
    return to


def draw(rows: Tensor, boundary: Tensor, low: Tensor, high: Tensor, uniforms: Tensor) -> Tensor:
    """See `Passes`."""
    ids = torch.empty(len(rows), dtype=torch.int64)
    _run("draw", rows, (), (), (boundary.contiguous(), low.int(), high.int(), uniforms.double()), (ids,))
    return ids


def _run(
    name: str,
    rows: Tensor,
    sizes: tuple[int, ...],
    tables: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
) -> None:
    """Call a function of the library on the rows, a share of them in each of torch's threads."""
    library = _library()
    assert library is not None, "ask `available` first"
    if rows.dtype not in (torch.float32, torch.bfloat16):
        rows = rows.float()
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    count, vocab = rows.shape
    starts = half_octave_starts(rows.device)

    def share(low: int, high: int) -> None:
        scratch = torch.empty(2 * vocab + _SCRATCH)
        shape = (rows.stride(0), high - low, vocab, *sizes)
        getattr(library, name)(
            _at(rows, low),
            ctypes.c_int(rows.dtype == torch.bfloat16),
            *map(ctypes.c_int64, shape),
            *(_at(table, 0) for table in (starts, scratch, *tables)),
            *(_at(part, low) for part in (*inputs, *outputs)),
        )

    _in_threads(share, count, min(count, torch.get_num_threads()))


def _at(tensor: Tensor, row: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size())


def _in_threads(share: Callable[[int, int], None], count: int, threads: int) -> None:
    edges = [count * i // threads for i in range(threads + 1)]
    waiting = [_pool(os.getpid()).submit(share, low, high) for low, high in pairwise(edges[1:])]
    share(edges[0], edges[1])
    for result in waiting:
        result.result()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process; a forked one makes its own."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="asn_rl-vocabulary")


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        _log.warning(
            "no C compiler (cc, gcc, clang or $CC): sketches are made in torch, which takes several times as long"
        )
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        _log.warning("%s could not compile %s; sketches are made in torch. It said: %s", compiler, _SOURCE.name, said)
        return None


def _compiled(compiler: str) -> Path:
    """The shared library, from the cache or made now. Its name holds all that it depends on."""
    made_of = "\n".join((_SOURCE.read_text(), compiler, *_FLAGS, _processor()))
    path = cache_dir() / "native" / f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            part = Path(scratch) / "passes.so"
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(part), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            part.replace(path)
    return path


def _processor() -> str:
    """What -march=native depends on: home folders are shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return platform.machine() + next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )
