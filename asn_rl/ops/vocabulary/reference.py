"""Passes over the vocabulary in torch, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asn_rl.ops.draws import invert_cdf
from asn_rl.ops.vocabulary.octaves import FLOOR_NATS, NOTHING, OCTAVES, SHIFT, Summary, half_octaves, tail_start

# Rows worked on at once: about four temporaries of this many floats then stay inside the L2/L3 cache.
_CHUNK_ELEMENTS = 1 << 18


def summarise(rows: Tensor, k: int, bin_of: Tensor, bins: int) -> Summary:
    """See `Passes`."""
    vocab = rows.shape[-1]
    top, ids = torch.topk(rows, min(k + 1, vocab), dim=-1)  # NaN sorts as the largest
    if vocab <= k:
        top = torch.nn.functional.pad(top, (0, k + 1 - vocab), value=-math.inf)
        ids = torch.nn.functional.pad(ids, (0, k + 1 - vocab))
    top = top.float()
    sums = torch.zeros(3, len(rows), OCTAVES, dtype=torch.float64, device=rows.device)
    if top[:, 0].isfinite().all():  # NaN has no half-octave; the caller refuses such rows
        _add_tail(sums, rows, ids[:, :k], top[:, :k] > top[:, k:], top[:, k:])
    folded = sums.new_zeros(*sums.shape[:-1], bins).index_add_(-1, bin_of[NOTHING:], sums[..., NOTHING:])
    return Summary(top, ids, *folded)


def move(rows: Tensor, boundary: Tensor, by: Tensor, out: Tensor | None) -> Tensor:
    """See `Passes`."""
    shift = (rows.float() - tail_start(boundary)).clamp_(FLOOR_NATS, 0.0)
    moved = by.gather(-1, half_octaves(shift.exp_()).long()).add_(rows)
    return moved if out is None else out.copy_(moved)


def draw(rows: Tensor, boundary: Tensor, low: Tensor, high: Tensor, uniforms: Tensor) -> Tensor:
    """See `Passes`."""
    # A range of half-octaves is a range of weights: the floats whose bits begin like that.
    least, limit = ((edge.int().clamp_max(255) << SHIFT).view(torch.float32).unsqueeze(-1) for edge in (low, high))
    tokens = torch.zeros_like(low, dtype=torch.int64)
    asked = (low < high).nonzero().squeeze(-1)
    for part in asked.split(_chunk(rows)):
        shift = rows[part].float() - boundary[part]
        weights = shift.clamp(min=FLOOR_NATS).exp_()
        weights.mul_((weights >= least[part]) & (weights < limit[part]) & (shift <= 0))
        tokens[part] = invert_cdf(weights, uniforms[part])
    return tokens


def _chunk(rows: Tensor) -> int:
    return min(len(rows), max(1, _CHUNK_ELEMENTS // rows.shape[-1]))


def _add_tail(sums: Tensor, rows: Tensor, head_ids: Tensor, in_head: Tensor, boundary: Tensor) -> None:
    """Add tokens, mass and weighted shift to `sums` (3, B, 256)."""
    chunk, start = _chunk(rows), tail_start(boundary)
    work = _Workspace(chunk, rows.shape[-1], rows.device)
    one = sums.new_ones(())
    for low in range(0, len(rows), chunk):
        part = slice(low, low + chunk)
        weights, shift = work.weigh(rows[part], start[part], head_ids[part], in_head[part])
        half_octave = work.half_octaves(weights)
        sums[0, part].scatter_add_(-1, half_octave, one.expand_as(weights))
        # fp32 would lose 1e-3 of the mass when 100k equal weights are added one by one.
        sums[1, part].scatter_add_(-1, half_octave, work.double(weights))
        sums[2, part].scatter_add_(-1, half_octave, work.double(shift.mul_(weights)))


class _Workspace:
    """Vocabulary-sized temporaries, allocated once per call: fresh pages cost more than the arithmetic."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self.shift = torch.empty(rows, vocab, device=device)
        self.weights = torch.empty(rows, vocab, device=device)
        self.half_octave32 = torch.empty(rows, vocab, dtype=torch.int32, device=device)
        self.half_octave = torch.empty(rows, vocab, dtype=torch.int64, device=device)
        self.wide = torch.empty(rows, vocab, dtype=torch.float64, device=device)

    def weigh(self, logits: Tensor, start: Tensor, head_ids: Tensor, in_head: Tensor) -> tuple[Tensor, Tensor]:
        """`exp(logit - v)`, 0 for head tokens, and its argument, clamped so that impossible tokens give no NaN."""
        rows = len(logits)
        shift = torch.sub(logits, start, out=self.shift[:rows]).clamp_(min=FLOOR_NATS)
        weights = torch.exp(shift, out=self.weights[:rows])
        weights.scatter_(-1, head_ids, torch.where(in_head, 0.0, weights.gather(-1, head_ids)))
        return weights, shift

    def half_octaves(self, weights: Tensor) -> Tensor:
        rows = len(weights)
        bits = torch.bitwise_right_shift(weights.view(torch.int32), SHIFT, out=self.half_octave32[:rows])
        return self.half_octave[:rows].copy_(bits)

    def double(self, values: Tensor) -> Tensor:
        return self.wide[: len(values)].copy_(values)
