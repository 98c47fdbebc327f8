"""Triton kernels of `fused`. A program sees to one row, or to one block of it."""

# Triton compiles these; to a type checker for Python their language is a foreign one.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_peaks(rows, stride, vocab, peaks, chunks, PER_PROGRAM: tl.constexpr, CHUNK: tl.constexpr):
    """peaks (B, chunks): the largest of each 64 logits, NaN where there is one."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    x = tl.load(rows + row * stride + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
    broken = tl.max((x != x).to(tl.int32), axis=1)
    peak = tl.where(broken > 0, float("nan"), tl.max(tl.where(x != x, -float("inf"), x), axis=1))
    tl.store(peaks + row * chunks + chunk, peak, mask=chunk < chunks)


@triton.jit
def _weigh(x, v, starts, FLOOR: tl.constexpr):
    """logit - v, its exponential and the half-octave; head tokens and impossible ones are nothing."""
    shift = tl.where(x <= v, x - v, FLOOR)
    shift = tl.where(shift > FLOOR, shift, FLOOR)  # a comparison with NaN is false
    weight = tl.exp(shift)
    octave = weight.to(tl.int32, bitcast=True) >> 22
    octave = tl.maximum(octave, 1)
    octave -= (shift < tl.load(starts + octave)).to(tl.int32)
    octave += (shift >= tl.load(starts + octave + 1)).to(tl.int32)
    return shift, weight, octave


@triton.jit
def tail_sums(
    rows, stride, vocab, boundary, starts, bin_of, sums, bins,
    BLOCK: tl.constexpr, PART: tl.constexpr, BINS: tl.constexpr, OCTAVES: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Add to sums (B, 3, bins): tokens, mass relative to v, mass times shift."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.load(boundary + row)
    column = tl.arange(0, BINS)
    tokens, mass, shifted = (
        tl.zeros([BINS], tl.float64),
        tl.zeros([BINS], tl.float64),
        tl.zeros([BINS], tl.float64),
    )
    for start in range(0, BLOCK, PART):
        token = tl.program_id(1) * BLOCK + start + tl.arange(0, PART)
        x = tl.load(rows + row * stride + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
        shift, weight, octave = _weigh(x, v, starts, FLOOR)
        own = tl.where(octave >= 2, tl.load(bin_of + octave), -1)
        belongs = own[:, None] == column[None, :]
        tokens += tl.sum(belongs.to(tl.int32), axis=0).to(tl.float64)
        mass += tl.sum(tl.where(belongs, weight[:, None], 0.0), axis=0).to(tl.float64)
        shifted += tl.sum(tl.where(belongs, (weight * shift)[:, None], 0.0), axis=0).to(tl.float64)
    into = sums + row * 3 * bins + column
    tl.atomic_add(into, tokens, mask=(column < bins) & (tokens > 0))
    tl.atomic_add(into + bins, mass, mask=(column < bins) & (tokens > 0))
    tl.atomic_add(into + 2 * bins, shifted, mask=(column < bins) & (tokens > 0))


@triton.jit
def move(
    rows, stride, vocab, boundary, starts, by, out, out_stride,
    BLOCK: tl.constexpr, OCTAVES: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """out (B, V) = logit + by[row][half-octave]."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(rows + row * stride + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
    _, _, octave = _weigh(x, tl.load(boundary + row), starts, FLOOR)
    tl.store(out + row * out_stride + token, x + tl.load(by + row * OCTAVES + octave), mask=token < vocab)


@triton.jit
def _in_range(rows, stride, vocab, row, start, v, starts, low, high, BLOCK: tl.constexpr, FLOOR: tl.constexpr):
    token = start + tl.arange(0, BLOCK)
    x = tl.load(rows + row * stride + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
    _, weight, octave = _weigh(x, v, starts, FLOOR)
    return tl.where((octave >= low) & (octave < high), weight, 0.0).to(tl.float64), token


@triton.jit
def draw(
    rows, stride, vocab, boundary, starts, lows, highs, uniforms, ids,
    BLOCK: tl.constexpr, OCTAVES: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """ids (B,): a token of the half-octaves [low, high), by inverting the cumulative mass."""
    row = tl.program_id(0).to(tl.int64)
    low, high, v = tl.load(lows + row), tl.load(highs + row), tl.load(boundary + row)
    if low < high:
        total = tl.sum(tl.zeros([BLOCK], tl.float64), axis=0)
        for start in range(0, vocab, BLOCK):
            weight, _ = _in_range(rows, stride, vocab, row, start, v, starts, low, high, BLOCK, FLOOR)
            total += tl.sum(weight, axis=0)
        goal = tl.load(uniforms + row) * total
        seen = total * 0.0
        found = tl.full([], -1, tl.int64)
        last = tl.full([], 0, tl.int64)
        for start in range(0, vocab, BLOCK):
            weight, token = _in_range(rows, stride, vocab, row, start, v, starts, low, high, BLOCK, FLOOR)
            reached = seen + tl.cumsum(weight, axis=0)
            hit = tl.min(tl.where((reached > goal) & (weight > 0), token, vocab), axis=0).to(tl.int64)
            found = tl.where((found < 0) & (hit < vocab), hit, found)
            last = tl.maximum(last, tl.max(tl.where(weight > 0, token, 0), axis=0).to(tl.int64))
            seen += tl.sum(weight, axis=0)
        # u * total may round up to total: then the last token that adds weight.
        tl.store(ids + row, tl.where(found < 0, last, found))
