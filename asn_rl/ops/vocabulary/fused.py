"""Passes over the vocabulary as Triton kernels, for GPUs; TRITON_INTERPRET=1 runs them on a CPU, for tests.

The k + 1 largest logits are found by the peaks of chunks of 64: they lie in the k + 1 chunks with the largest peaks.
That is one kernel that reads every logit, and two `topk` on a sixtieth of them. The tail takes a second kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from asn_rl.ops.vocabulary.octaves import FLOOR_NATS, OCTAVES, Summary, half_octave_starts, tail_start

CHUNK = 64
_BLOCK = 4096
_SUMS_BLOCK = 512


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run here."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def summarise(rows: Tensor, k: int, bin_of: Tensor, bins: int) -> Summary:
    """See `Passes`."""
    rows = _plain(rows)
    top, ids = _largest(rows, k + 1)
    boundary = tail_start(top[:, k])
    sums = torch.zeros(len(rows), 3, bins, dtype=torch.float64, device=rows.device)
    programs = -(-rows.shape[1] // _BLOCK)
    _kernels().tail_sums[(len(rows), programs)](
        rows, rows.stride(0), rows.shape[1], boundary, half_octave_starts(rows.device), bin_of, sums, bins,
        _BLOCK, _SUMS_BLOCK, max(16, _power_of_two(bins)), OCTAVES, FLOOR_NATS,
    )  # fmt: skip
    return Summary(top, ids, *sums.unbind(1))


def move(rows: Tensor, boundary: Tensor, by: Tensor, out: Tensor | None) -> Tensor:
    """See `Passes`."""
    rows = _plain(rows)
    to = torch.empty(rows.shape, device=rows.device) if out is None else out
    _kernels().move[(len(rows), -(-rows.shape[1] // _BLOCK))](
        rows, rows.stride(0), rows.shape[1], tail_start(boundary).contiguous(), half_octave_starts(rows.device),
        by.contiguous(), to, to.stride(0), _BLOCK, OCTAVES, FLOOR_NATS,
    )  # fmt: skip
    return to


def draw(rows: Tensor, boundary: Tensor, low: Tensor, high: Tensor, uniforms: Tensor) -> Tensor:
    """See `Passes`."""
    rows = _plain(rows)
    ids = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    _kernels().draw[(len(rows),)](
        rows, rows.stride(0), rows.shape[1], tail_start(boundary).contiguous(), half_octave_starts(rows.device),
        low.int(), high.int(), uniforms.double(), ids, _BLOCK, OCTAVES, FLOOR_NATS,
    )  # fmt: skip
    return ids


def _largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(B, k) fp32 largest values in descending order, -inf where there are no more, and their ids."""
    count, vocab = rows.shape
    chunks = -(-vocab // CHUNK)
    peaks = torch.empty(count, chunks, device=rows.device)
    per_program = _BLOCK // CHUNK
    _kernels().chunk_peaks[(count, -(-chunks // per_program))](
        rows, rows.stride(0), vocab, peaks, chunks, per_program, CHUNK
    )
    best = peaks.topk(min(k, chunks)).indices  # NaN sorts as the largest
    ids = (best.unsqueeze(-1) * CHUNK + torch.arange(CHUNK, device=rows.device)).flatten(1)
    inside = ids < vocab
    values = torch.where(inside, rows.gather(-1, ids.clamp_max(vocab - 1)).float(), -math.inf)
    top, at = values.topk(min(k, values.shape[1]))
    ids = torch.where(top > -math.inf, ids.gather(-1, at), 0)
    missing = (0, k - top.shape[1])
    return torch.nn.functional.pad(top, missing, value=-math.inf), torch.nn.functional.pad(ids, missing)


def _plain(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _kernels() -> Any:
    """Imported late: Triton is there only with GPU builds of torch."""
    from asn_rl.ops.vocabulary import _fused_kernels

    return _fused_kernels
