"""Parts of the three published architectures, on weighted points.

They come from the Adaptive Sampling Networks project (github.com/NavneelSinghal/Adaptive-Sampling-Networks, 2025),
where they act on every token of the vocabulary. Here a point stands for all of its tokens: it enters with the
log-probability of one of them, and counts as many times as it holds tokens wherever the original sums or averages over
the vocabulary. A sketch in which every token is a point of its own gives exactly the original.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asn_rl.errors import InvalidValue
from asn_rl.ops.sketch import Sketch

GATE_START = math.log(2)
"""Offset t of the soft gate at the start, softplus(0): sigmoid(-t) = 1/3 of every gradient reaches its slope s."""
# A banned token may sit at -3e38 instead of -inf; squared by a SwiGLU that would overflow.
_LOWEST_NATS = -1e3


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` with biases and inner width `int(2 * hidden / 3)` (Shazeer 2020, arXiv:2002.05202).

    Args:
        inputs: size of the last axis of `x`.
        hidden: nominal width; two thirds of it keep the parameters of a plain two-layer network.
        outputs: size of the last axis of the result.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        inner = 2 * hidden // 3
        if inner < 1:
            raise InvalidValue("SwiGLU hidden", hidden, ">= 2")
        self.gate = nn.Linear(inputs, inner)
        self.up = nn.Linear(inputs, inner)
        self.down = nn.Linear(inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def starting_at(self, value: float) -> Self:
        """The same network with output `value` for every input: last weights 0, last bias `value`."""
        nn.init.zeros_(self.down.weight)
        nn.init.constant_(self.down.bias, value)
        return self


def token_inputs(sketch: Sketch) -> Tensor:
    """(..., N, 1) log-probability of one token of each point, nats; 0 where the point is empty."""
    return torch.where(sketch.mask, sketch.logprobs.clamp_min(_LOWEST_NATS), 0.0).unsqueeze(-1)


def token_counts(sketch: Sketch) -> Tensor:
    """(..., N, 1) number of tokens in each point; 0 where the point is empty."""
    return torch.where(sketch.mask, sketch.log_count.exp(), 0.0).unsqueeze(-1)


def gate_slope(raw: Tensor) -> Tensor:
    """`softplus(raw) - ln 2`: exactly 0 at raw = 0 and still steep there, which softplus alone cannot be."""
    return F.softplus(raw) - F.softplus(torch.zeros_like(raw))


def soft_gate(logprobs: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """`log sigmoid(s l + t)`, the soft cut of the three architectures, to be added to the log-probability l.

    Above -t/s it changes little; far below it steepens the tail, p -> p^(1+s). It never gives exact zeros.
    """
    return F.logsigmoid(slope * logprobs + offset)
