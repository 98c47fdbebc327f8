"""Passes over the vocabulary: all of the work on a sketch that touches every token.

Three implementations, equal to one another: `reference` (torch, anywhere), `native` (C, on CPUs with a C compiler) and
`fused` (Triton, on GPUs). `passes` takes the fastest one that runs; ASN_RL_PASSES=reference, native or fused insists.

Tail tokens are told apart by their *half-octave*: exponent and first mantissa bit of exp(logit - v) in fp32, `v` the
logit at which the tail begins. 254 is [1, 3/2), 253 [3/4, 1), 252 [1/2, 3/4) and so on; below 2 the weight is zero or
subnormal and the token counts as nothing.
"""

from __future__ import annotations

import os
from typing import Protocol

from torch import Tensor

from asn_rl.errors import InvalidValue
from asn_rl.ops.vocabulary import reference
from asn_rl.ops.vocabulary.octaves import NOTHING, OCTAVES, Summary

VARIABLE = "ASN_RL_PASSES"
IMPLEMENTATIONS = ("reference", "native", "fused")

__all__ = ["IMPLEMENTATIONS", "NOTHING", "OCTAVES", "VARIABLE", "Passes", "Summary", "passes", "reference"]


class Passes(Protocol):
    """What an implementation offers. Rows are (B, V) logits of any float type but float64."""

    def summarise(self, rows: Tensor, k: int, bin_of: Tensor, bins: int) -> Summary:
        """The k + 1 largest logits, and sums over the tokens at or below the smallest of those, half-octave h in bin
        `bin_of[h]` of int32 `bin_of` (256,)."""
        ...

    def move(self, rows: Tensor, boundary: Tensor, by: Tensor, out: Tensor | None) -> Tensor:
        """(B, V) fp32 `rows + by[half-octave]` for tail tokens, `by` (B, 256); head tokens hold anything. `out`
        is contiguous and may be the rows themselves."""
        ...

    def draw(self, rows: Tensor, boundary: Tensor, low: Tensor, high: Tensor, uniforms: Tensor) -> Tensor:
        """(B,) int64 tail token of the half-octaves [low, high), by inverting their cumulative probability at float64
        `uniforms` (B,) in [0, 1); anything where low = high."""
        ...


def passes(rows: Tensor) -> Passes:
    """The implementation for these logits.

    Raises:
        InvalidValue: the environment insists on one that there is not, or that does not run here.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is not None and wanted not in IMPLEMENTATIONS:
        raise InvalidValue(f"the environment's {VARIABLE}", wanted, f"one of {', '.join(IMPLEMENTATIONS)}")
    found = _fastest(rows, wanted)
    if found is None:
        raise InvalidValue(
            f"the environment's {VARIABLE}", wanted, f"one that runs on {rows.device.type}",
            "native needs a CPU and a C compiler, fused a GPU and Triton",
        )  # fmt: skip
    return found


def _fastest(rows: Tensor, wanted: str | None) -> Passes | None:
    if wanted in (None, "native") and rows.device.type == "cpu":
        from asn_rl.ops.vocabulary import native

        if native.available():
            return native
    if wanted == "fused" or (wanted is None and rows.is_cuda):
        from asn_rl.ops.vocabulary import fused

        if fused.available(rows.device):
            return fused
    return reference if wanted in (None, "reference") else None
