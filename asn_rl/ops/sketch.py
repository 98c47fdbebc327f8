"""The sketch: a next-token distribution over V tokens, summarised exactly by N = head + tail points.

A permutation-equivariant decoding policy treats tokens with equal numbers alike, so it can act on groups of
tokens ("points") instead of on the vocabulary. With `v` the (head + 1)-th largest logit:

- **head**: every token above `v`, one point each. Tied tokens share the point of the first of them.
- **tail**: all other tokens, binned by their probability relative to that of `v`, finely where the mass is: the first
  half of the bins are half-octaves (a factor of 4/3 or 3/2 in probability), then come a quarter of octaves (a factor of
  2) and a quarter of double octaves; the last bin also takes everything below.

A policy shifts the log-weight of each point. Inside a point the base model's proportions stay as they are, so
probabilities, importance ratios, KL divergences and entropies over the vocabulary follow exactly from the points
(DESIGN section 2). Points are ordered by descending probability of their tokens.

Tokens that a caller has something to say of (they occurred in the generated text) can be given points of their own,
wherever they lie; they then belong to neither head nor tail.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asn_rl.errors import InvalidLogits, InvalidValue
from asn_rl.ops.vocabulary import NOTHING, OCTAVES, Summary, passes, reference
from asn_rl.ops.vocabulary.octaves import FLOOR_NATS, half_octaves, tail_start


@dataclass(frozen=True)
class SketchSize:
    """How many points a sketch has."""

    head: int = 64
    """most probable tokens that are points of their own"""
    tail: int = 32
    """bins of probability below the head, wider and wider; the last one takes everything below"""

    def __post_init__(self) -> None:
        if self.head < 1:
            raise InvalidValue("sketch head", self.head, ">= 1", "64 is a good default")
        if not 1 <= self.tail <= 120:
            raise InvalidValue("sketch tail", self.tail, "in [1, 120]", "32 bins resolve 22 nats below the head")

    @property
    def points(self) -> int:
        return self.head + self.tail


@dataclass(frozen=True)
class Sketch:
    """Points of a next-token distribution; every tensor is fp32 of shape (..., N).

    `log_mass` is the log of the summed base probability (-inf: the point is empty), `log_count` the log of the
    number of tokens (0 where empty), `inner_entropy` the base model's entropy inside the point, in nats.
    """

    log_mass: Tensor
    log_count: Tensor
    inner_entropy: Tensor

    @property
    def mask(self) -> Tensor:
        """(..., N) bool, True where the point holds tokens."""
        return self.log_mass > -math.inf

    @property
    def logprobs(self) -> Tensor:
        """(..., N) log-probability of a typical token of the point: `log_mass - log_count`; -inf where empty."""
        return self.log_mass - self.log_count

    def index(self, rows: Tensor | slice | tuple) -> Sketch:
        """The same sketch at some leading indices."""
        return Sketch(self.log_mass[rows], self.log_count[rows], self.inner_entropy[rows])


@dataclass(frozen=True)
class PointMap:
    """Which token lies in which point, for the logits a sketch was built from. Not stored with trajectories."""

    head_ids: Tensor
    """(..., K) int64 token ids by descending logit; meaningful where `head_slot` >= 0"""
    head_slot: Tensor
    """(..., K) int64 point of each head id (the first of its tie group), -1 where the id belongs to the tail"""
    boundary: Tensor
    """(..., 1) fp32 logit `v` at which the tail begins; -inf when there is no tail"""
    log_normalizer: Tensor
    """(..., 1) fp32 logsumexp of the logits"""
    size: SketchSize
    own_ids: Tensor | None = None
    """(..., P) int64 tokens with points of their own, -1 where free; None: nobody asked for any"""
    order: Tensor | None = None
    """(..., N) int64, given with `own_ids`: which point of (head, tail, own) is the j-th most probable"""

    def index(self, rows: Tensor | slice | tuple) -> PointMap:
        optional = (None if part is None else part[rows] for part in (self.own_ids, self.order))
        return PointMap(
            self.head_ids[rows],
            self.head_slot[rows],
            self.boundary[rows],
            self.log_normalizer[rows],
            self.size,
            *optional,
        )

    def ranked(self, points: Tensor) -> Tensor:
        """(..., n) points of (head, tail, own) -> their places in the sketch; -1 stays -1."""
        if self.order is None:
            return points
        place = torch.empty_like(self.order).scatter_(
            -1, self.order, torch.arange(self.order.shape[-1], device=points.device).expand_as(self.order)
        )
        return torch.where(points >= 0, place.gather(-1, points.clamp_min(0)), -1)


def build_sketch(logits: Tensor, size: SketchSize, own: Tensor | None = None) -> tuple[Sketch, PointMap]:
    """Sketch next-token logits.

    Args:
        logits: (..., V) of any float type. `-inf` marks impossible tokens (masks, vocabulary padding); such
            tokens count nowhere, nor do tokens more than 87 nats below `v`. Adding a constant changes nothing.
        size: number of head and tail points.
        own: (..., P) int64 distinct tokens that are points of their own, -1 where free; P more points.

    Raises:
        InvalidLogits: a row holds NaN or +inf, or no finite entry; or there is no row at all.
    """
    if logits.ndim == 0 or logits.numel() == 0:
        raise InvalidLogits(
            f"logits of shape {tuple(logits.shape)} are empty, need (..., V) with V >= 1; drop empty batches before "
            "sketching"
        )
    if own is not None and own.shape[-1]:
        return _with_own_points(logits, size, own)
    rows = _rows(logits)
    summary = passes(rows).summarise(rows, size.head, _bins(size, logits.device), size.tail)
    _check_finite_maximum(summary.top[:, 0])
    head, head_ids, boundary = summary.top[:, :-1], summary.ids[:, :-1], summary.top[:, -1:]
    in_head = head > boundary
    starts = torch.ones_like(in_head)
    starts[:, 1:] = head[:, 1:] != head[:, :-1]
    slots = torch.arange(size.head, device=head.device).expand_as(head)
    first = torch.where(starts, slots, 0).cummax(-1).values
    head_slot = torch.where(in_head, first, -1)
    head_count = torch.zeros_like(head).scatter_add_(-1, first, in_head.to(head.dtype))

    # The head is summed relative to the peak, the tail relative to v: exp(peak - v) may overflow.
    peak = torch.maximum(head[:, :1], boundary)
    tail_mass, tail_count, tail_entropy = _tail_points(summary)
    tail_offset = torch.where(boundary > -math.inf, boundary - peak, -math.inf)
    total = torch.where(in_head, (head - peak).exp(), 0.0).sum(-1, keepdim=True)
    total += tail_mass.sum(-1, keepdim=True) * tail_offset.exp()
    log_total = total.log()

    head_log_count = head_count.clamp_min(1.0).log()
    head_log_mass = torch.where(head_count > 0, head - peak - log_total + head_log_count, -math.inf)
    sketch = (
        torch.cat([head_log_mass, tail_mass.log() + tail_offset - log_total], -1),
        torch.cat([head_log_count, tail_count.clamp_min(1.0).log()], -1),
        torch.cat([head_log_count, tail_entropy], -1),
    )
    points = (head_ids, head_slot, boundary, log_total + peak)
    shape = logits.shape[:-1]
    return (
        Sketch(*(part.reshape(*shape, -1) for part in sketch)),
        PointMap(*(part.reshape(*shape, -1) for part in points), size=size),
    )


def _with_own_points(logits: Tensor, size: SketchSize, own: Tensor) -> tuple[Sketch, PointMap]:
    values = torch.where(own >= 0, logits.gather(-1, own.clamp_min(0)).float(), -math.inf)
    rest = without_tokens(logits, own)
    # Where they are all there is, the most probable one stays behind: the head gives it a point of its own too.
    alone = (rest.amax(-1, keepdim=True) == -math.inf) & (values == values.amax(-1, keepdim=True))
    alone &= alone.int().cumsum(-1) == 1
    _check_finite_maximum(torch.maximum(rest.amax(-1), values.amax(-1)).flatten())
    if alone.any():
        own, values = torch.where(alone, -1, own), torch.where(alone, -math.inf, values)
        rest = without_tokens(logits, own)
    sketch, points = build_sketch(rest, size)
    total = torch.logaddexp(points.log_normalizer, values.logsumexp(-1, keepdim=True))
    zeros = torch.zeros_like(values)
    log_mass = torch.cat([sketch.log_mass + points.log_normalizer - total, values - total], -1)
    log_count = torch.cat([sketch.log_count, zeros], -1)
    inner_entropy = torch.cat([sketch.inner_entropy, zeros], -1)
    order = torch.argsort(log_mass - log_count, dim=-1, descending=True, stable=True)
    parts = (part.gather(-1, order) for part in (log_mass, log_count, inner_entropy))
    return Sketch(*parts), replace(points, log_normalizer=total, own_ids=own, order=order)


def without_tokens(logits: Tensor, tokens: Tensor | None) -> Tensor:
    """Logits (..., V) with -inf for `tokens` (..., P); entries below 0 are none."""
    if tokens is None:
        return logits
    vocab = logits.shape[-1]
    padded = torch.nn.functional.pad(logits, (0, 1))
    return padded.scatter_(-1, torch.where(tokens >= 0, tokens, vocab), -math.inf)[..., :vocab]


@functools.cache
def _bins(size: SketchSize, device: torch.device) -> Tensor:
    """(256,) int32 tail bin of each half-octave."""
    return _tail_bin(torch.arange(OCTAVES, device=device, dtype=torch.int32), size.tail)


def _tail_bin(half_octave: Tensor, bins: int) -> Tensor:
    """Half-octave of a weight relative to `v` -> bin in [0, bins)."""
    below = (253 - half_octave).clamp_min(0)  # 0: [3/4, 1], 1: [1/2, 3/4), 2: [3/8, 1/2), ...
    octaves, doubles = bins // 4 * 2, bins // 4 * 3  # the first bin that is an octave, a double octave
    rest = below - octaves  # half-octaves below the half-octave bins
    wide = torch.where(
        rest < 2 * (doubles - octaves), octaves + rest // 2, doubles + (rest // 2 - doubles + octaves) // 2
    )
    return torch.where(rest < 0, below, wide).clamp_max(bins - 1)


def token_points(logits: Tensor, points: PointMap) -> Tensor:
    """(..., V) int64: the point of every token, -1 for impossible tokens."""
    tail = _as_tail_point(logits.float(), points)
    head = torch.full_like(tail, -1).scatter_reduce_(-1, points.head_ids, points.head_slot, "amax")
    found = torch.where(head >= 0, head, tail)
    if points.own_ids is not None:
        padded, vocab = torch.nn.functional.pad(found, (0, 1)), found.shape[-1]
        found = padded.scatter_(-1, torch.where(points.own_ids >= 0, points.own_ids, vocab), _own_points(points))
        found = torch.where(logits > -math.inf, found[..., :vocab], -1)
    return points.ranked(found)


def points_of(logits: Tensor, ids: Tensor, points: PointMap) -> Tensor:
    """(..., n) int64: the point of each token id of `ids` (..., n), -1 for impossible tokens."""
    tail = _as_tail_point(logits.gather(-1, ids).float(), points)
    slot = points.head_slot.unsqueeze(-2)
    hit = (ids.unsqueeze(-1) == points.head_ids.unsqueeze(-2)) & (slot >= 0)
    head = torch.where(hit, slot, -1).amax(-1)
    found = torch.where(head >= 0, head, tail)
    if points.own_ids is not None:
        same = ids.unsqueeze(-1) == points.own_ids.unsqueeze(-2)
        own = torch.where(same, _own_points(points).unsqueeze(-2), -1).amax(-1)
        possible = logits.gather(-1, ids) > -math.inf
        found = torch.where(own >= 0, torch.where(possible, own, -1), found)
    return points.ranked(found)


def _own_points(points: PointMap) -> Tensor:
    """(..., P) number of each own point, counted on from the tail."""
    assert points.own_ids is not None
    return (points.size.points + torch.arange(points.own_ids.shape[-1], device=points.own_ids.device)).expand_as(
        points.own_ids
    )


def choose_tokens(logits: Tensor, points: PointMap, chosen: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token inside each chosen point, in proportion to the base model.

    Args:
        logits: (B, V), the logits the point map was built from.
        chosen: (B,) int64 non-empty points.
        uniforms: (B,) float64 in [0, 1), one draw a row.

    Returns:
        (B,) int64 token ids. Only rows that chose a tail point touch the vocabulary.
    """
    if points.order is not None:
        chosen = points.order.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    head_point = chosen.clamp_max(points.size.head - 1).unsqueeze(-1)
    members = points.head_slot == head_point
    nth = (uniforms.unsqueeze(-1) * members.sum(-1, keepdim=True)).long()
    tokens = points.head_ids.gather(-1, (members.int().argmax(-1, keepdim=True) + nth)).squeeze(-1)
    in_tail = (chosen >= points.size.head) & (chosen < points.size.points)
    if in_tail.any():
        belongs = points.size.head + _bins(points.size, logits.device) == chosen.unsqueeze(-1)  # a range
        belongs[:, :NOTHING] = False
        low = belongs.int().argmax(-1)
        rows = _rows(without_tokens(logits, points.own_ids))
        drawn = passes(rows).draw(rows, points.boundary, low, low + belongs.sum(-1), uniforms)
        tokens = torch.where(in_tail, drawn, tokens)
    if points.own_ids is not None:
        own = (chosen - points.size.points).clamp_min(0).unsqueeze(-1)
        tokens = torch.where(chosen >= points.size.points, points.own_ids.gather(-1, own).squeeze(-1), tokens)
    return tokens


def expand(logits: Tensor, points: PointMap, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """Full log-weights (..., V) of a policy that shifts the points' log-weights by `shift` (..., N).

    `log_softmax` of the result is the policy's distribution over the vocabulary. Impossible tokens stay -inf.

    Args:
        out: fp32 tensor of the logits' shape that takes the result; may be the logits themselves.
    """
    if points.order is not None:  # back to the order head, tail, own
        shift = torch.empty_like(shift).scatter_(-1, points.order, shift)
    moved_by = shift - points.log_normalizer
    head = points.head_slot.clamp_min(0)
    head_values = logits.gather(-1, points.head_ids).float() + moved_by.gather(-1, head)
    own = None if points.own_ids is None else points.own_ids.clamp_min(0)
    own_values = None if own is None else logits.gather(-1, own).float() + moved_by[..., points.size.points :]
    table = moved_by[..., points.size.head + _bins(points.size, logits.device)]
    table[..., :NOTHING] = -math.inf
    rows = _rows(logits)
    boundary = points.boundary.reshape(len(rows), 1)
    differentiable = torch.is_grad_enabled() and shift.requires_grad
    implementation = reference if differentiable else passes(rows)  # the compiled ones have no backward pass
    to = _rows(out) if out is not None and out.is_contiguous() and out.dtype == torch.float32 else None
    moved = implementation.move(rows, boundary, table.reshape(len(rows), -1), to)
    moved = moved.reshape(logits.shape)
    moved = _put(moved, points.head_ids, head_values, points.head_slot >= 0)
    if points.own_ids is not None and own is not None and own_values is not None:
        moved = _put(moved, own, own_values, points.own_ids >= 0)
    return moved if out is None or to is not None else out.copy_(moved)


def _put(into: Tensor, ids: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """`into` (..., V) with `values` at the valid ones of different `ids` (..., n); in place where no gradient is asked
    for. Invalid entries repeat what the first valid one sets, or nothing new: no shape depends on the values, so that a
    GPU need not be waited for."""
    first = valid.int().argmax(-1, keepdim=True)
    anchor = ids.gather(-1, first)
    value = torch.where(valid.gather(-1, first), values.gather(-1, first), into.gather(-1, anchor))
    scatter = into.scatter if into.requires_grad else into.scatter_
    return scatter(-1, torch.where(valid, ids, anchor), torch.where(valid, values, value))


def _as_tail_point(values: Tensor, points: PointMap) -> Tensor:
    """Point of tail tokens with these logits, -1 for impossible ones; meaningless for head tokens."""
    half_octave = half_octaves((values - tail_start(points.boundary)).clamp_(min=FLOOR_NATS).exp())
    bins = points.size.head + _tail_bin(half_octave, points.size.tail)
    return torch.where(half_octave >= NOTHING, bins, -1).long()


def _rows(logits: Tensor) -> Tensor:
    """(B, V), float64 rounded once for all, so that every token keeps its point."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows.float() if rows.dtype == torch.float64 else rows


def _tail_points(summary: Summary) -> tuple[Tensor, Tensor, Tensor]:
    """Mass relative to `v`, count and inner entropy (nats) of the tail bins; each (rows, bins)."""
    count, mass, weighted_shift = summary.count, summary.mass, summary.weighted_shift
    safe_mass = torch.where(mass > 0, mass, 1.0)
    entropy = (safe_mass.log() - weighted_shift / safe_mass).clamp_min(0.0)
    return mass.float(), count.float(), torch.where(mass > 0, entropy, 0.0).float()


def _check_finite_maximum(peak: Tensor) -> None:
    bad = ~torch.isfinite(peak)
    if bad.any():
        row = int(bad.nonzero()[0])
        value = float(peak[row])
        cause = {math.inf: "+inf", -math.inf: "no finite entry"}.get(value, "NaN")
        raise InvalidLogits(
            f"logits row {row} holds {cause}; a next-token distribution needs finite logits, -inf for banned tokens. "
            "Check the model's dtype (float16 overflows) and that masks leave at least one token"
        )
