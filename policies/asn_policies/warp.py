"""Warps: a few bounded numbers a step, and what they do to every logit alike.

`TwoSlopeWarp` follows the LogitMLP head of a class project (UC Berkeley, May 2026, "LogitMLP"), `TemperatureTopP` the
heads of AutoDeco (arXiv:2510.26697). Deviations, for both:
- they act on points: a point's typical log-probability stands for its tokens' logits;
- the network reads the summary of `asn_policies.features` (no hidden state unless asked), one trunk for all heads;
- the last layers start at 0, so that training begins at the base model, or next to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asn_policies.base import PolicyModule
from asn_policies.features import input_projections, logit_spread, summary_inputs, summary_network, summary_size
from asn_policies.layers import token_inputs
from asn_rl.errors import InvalidValue
from asn_rl.ops.logprobs import shifted
from asn_rl.ops.truncation import exclusive_cumsum
from asn_rl.types import Observation

LARGEST_SLOPE = 4.0
_WINDOW = 4.0
_LOWEST_TEMPERATURE = 1e-3


class _Warp(PolicyModule):
    """Reads the summary of a step into `width` numbers."""

    def __init__(
        self, width: int, inputs: Sequence[str], hidden_size: int, condition_size: int, projection: int
    ) -> None:
        super().__init__()
        self.needs = frozenset(inputs)
        self.hidden_size, self.condition_size = hidden_size, condition_size
        self.projections = input_projections(inputs, hidden_size, condition_size, projection)
        self.summary = summary_network(summary_size(inputs, projection), width)

    def _read(self, obs: Observation) -> Tensor:
        return self.summary(summary_inputs(obs, self.projections))


class TwoSlopeWarp(_Warp):
    """l -> s1 l + (s2 - s1) relu(l - b): slope s1 below the bend b, s2 above it; both in (1/4, 4).

    It rises, so the order of tokens stays. The bend lies in (max l - 4 std l, max l), the deviation being that of all
    logits. The paper draws the last layer from N(0, 1e-3); here it is 0, exactly the base model, and the bend gets no
    gradient until the slopes differ.

    Args:
        width: units of the network.
        inputs: optional observation entries to read: "hidden", "prompt_embedding", "condition".
        hidden_size: the base model's hidden size, for "hidden" and "prompt_embedding".
        condition_size: length of "condition".
        projection: units each optional entry is projected to.
    """

    paper = "Architecture: two-slope monotone warp of LogitMLP on points, starting at the identity."

    def __init__(
        self,
        width: int = 48,
        inputs: tuple[str, ...] | list[str] = (),
        hidden_size: int = 0,
        condition_size: int = 0,
        projection: int = 16,
    ) -> None:
        super().__init__(width, inputs, hidden_size, condition_size, projection)
        self.head = _starting_at(nn.Linear(width, 3), 0.0)

    def shift(self, obs: Observation) -> Tensor:
        low, high, bend = self.warp_parameters(obs).unsqueeze(-2).unbind(-1)
        logprobs = token_inputs(obs.sketch).squeeze(-1)
        return (low - 1) * logprobs + (high - low) * torch.relu(logprobs - bend)

    def warp_parameters(self, obs: Observation) -> Tensor:
        """(..., 3) slope below the bend, slope above it, and the bend, in nats of log-probability."""
        low, high, place = self.head(self._read(obs)).unbind(-1)
        slopes = [torch.exp(math.log(LARGEST_SLOPE) * (2 * torch.sigmoid(raw) - 1)) for raw in (low, high)]
        bend = obs.sketch.logprobs.amax(-1) - _WINDOW * logit_spread(obs.sketch) * torch.sigmoid(place)
        return torch.stack([*slopes, bend], -1)


class TemperatureTopP(_Warp):
    """A temperature in (0, 2) and a top-p threshold P in (0, 1) for every step, by the base model's state.

    In training the cut is soft: a point with mass c above it (after the temperature) is damped by
    exp(-sharpness relu(c - P)). The paper's c includes the token itself; without it the limit of a large sharpness is
    top-p as everywhere else, and the most probable point is never damped. The start is T = 1 and P = `start_top_p`:
    at the default within 2e-5 nats of the base model.

    Args:
        width: units of the network.
        inputs: optional observation entries to read: "hidden", "prompt_embedding", "condition".
        hidden_size: the base model's hidden size, for "hidden" and "prompt_embedding".
        condition_size: length of "condition".
        projection: units each optional entry is projected to.
        sharpness: the paper's alpha.
        start_top_p: P at the start.
        hard_cut: top-p itself (for inference); it passes no gradient to P.
    """

    paper = "Architecture: AutoDeco's temperature and soft top-p heads on points."

    def __init__(
        self,
        width: int = 48,
        inputs: tuple[str, ...] | list[str] = (),
        hidden_size: int = 0,
        condition_size: int = 0,
        projection: int = 16,
        sharpness: float = 30.0,
        start_top_p: float = 0.995,
        hard_cut: bool = False,
    ) -> None:
        super().__init__(width, inputs, hidden_size, condition_size, projection)
        if not 0 < sharpness < math.inf:
            raise InvalidValue("sharpness", sharpness, "in (0, inf)", "30 is the paper's; hard_cut cuts exactly")
        if not 0 < start_top_p < 1:
            raise InvalidValue("start_top_p", start_top_p, "in (0, 1)", "at 1 no gradient would reach the threshold")
        self.sharpness, self.hard_cut = sharpness, hard_cut
        self.temperature = _starting_at(nn.Linear(width, 1), 0.0)
        self.top_p = _starting_at(nn.Linear(width + 1, 1), math.log(start_top_p / (1 - start_top_p)))

    def shift(self, obs: Observation) -> Tensor:
        temperature, top_p = self.warp_parameters(obs).unsqueeze(-2).unbind(-1)
        heat = (1 / temperature - 1) * token_inputs(obs.sketch).squeeze(-1)
        above = exclusive_cumsum(shifted(obs.sketch.log_mass, heat).exp())
        if self.hard_cut:
            # Nothing lies above the most probable point, and it stays however small P is.
            return heat.masked_fill((above >= top_p) & (above > 0), -math.inf)
        return heat - self.sharpness * torch.relu(above - top_p).float()

    def warp_parameters(self, obs: Observation) -> Tensor:
        """(..., 2) temperature and top-p threshold."""
        read = self._read(obs)
        # Below this floor the draw is greedy anyway, and 1 / T would overflow.
        temperature = (2 * torch.sigmoid(self.temperature(read))).clamp_min(_LOWEST_TEMPERATURE)
        return torch.cat([temperature, torch.sigmoid(self.top_p(torch.cat([read, temperature], -1)))], -1)


def _starting_at(layer: nn.Linear, bias: float) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, bias)
    return layer
