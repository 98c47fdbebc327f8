"""A policy with a memory: a GRU over the summaries of the steps drives temperature and cut.

The head is that of the order-statistics network without its residual,

    shift_j = slope(h) * logprob_j + log sigmoid(margin_j),    margin_j = bias(h) + weights(h) . phi_j,

with h the hidden state of a gated recurrent unit (Cho et al. 2014, arXiv:1406.1078) after this step's summary. The
slope is a temperature, a weight on the log-probability cuts by surprise as Mirostat does, one on the gap cuts as min-p
does. At the start slope and weights are 0 and the bias is the same for all points: the base model.

A policy that holds a requested mean surprise r also reads its balance D, the sum of (surprise - r) so far, which the
context gives exactly, into the unit and beside h: Mirostat's mu is 2 r - eta D, so its control is a line in D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asn_policies.base import PolicyModule
from asn_policies.features import input_projections, summary_inputs, summary_size
from asn_policies.heuristics.rule import entry
from asn_policies.layers import token_inputs
from asn_policies.order_statistics import POINT_FEATURES, point_features
from asn_rl.errors import InvalidValue
from asn_rl.ops.context import CONTEXT
from asn_rl.ops.logprobs import shifted
from asn_rl.types import Observation, PolicyOutput, State

# Margin and slope in units that few steps of training reach, as in the order-statistics network.
_START_MARGIN, _SHARPNESS, _STEEPNESS = 2.0, 10.0, 4.0
BALANCE = ("near", "far", "needed")
_NAMES = [known.name for known in CONTEXT]
_POSITION, _LEFT, _MEAN = (_NAMES.index(name) for name in ("position", "tokens_left", "mean_surprise"))


class RecurrentPolicy(PolicyModule):
    """Temperature and soft cut from a GRU over the steps of a completion.

    Args:
        width: units of the GRU.
        inputs: optional observation entries to read: "hidden", "prompt_embedding", "condition".
        hidden_size: the base model's hidden size, for "hidden" and "prompt_embedding".
        condition_size: length of "condition", for example 1 for a requested surprise.
        projection: units each optional entry is projected to.
        max_slope: bound of the log-probability slope; temperature T is slope 1/T - 1.
        holds_surprise: the first number of the condition is a mean surprise to hold, nats a token; read the balance.
    """

    paper = "Architecture: a gated recurrent unit over the summaries of the steps; order-statistics head."

    def __init__(
        self,
        width: int = 24,
        inputs: tuple[str, ...] | list[str] = (),
        hidden_size: int = 0,
        condition_size: int = 0,
        projection: int = 8,
        max_slope: float = 8.0,
        holds_surprise: bool = False,
    ) -> None:
        super().__init__()
        if holds_surprise and "condition" not in inputs:
            raise InvalidValue("inputs", list(inputs), "with 'condition'", "its first number is the surprise to hold")
        self.needs = frozenset(inputs)
        self.hidden_size, self.condition_size = hidden_size, condition_size
        self.width, self.max_slope, self.holds_surprise = width, max_slope, holds_surprise
        self.projections = input_projections(inputs, hidden_size, condition_size, projection)
        beside = len(BALANCE) if holds_surprise else 0
        self.cell = nn.GRUCell(summary_size(inputs, projection) + beside, width)
        self.slope = nn.Linear(width + beside, 1)
        self.margin = nn.Linear(width + beside, 1 + len(POINT_FEATURES))
        for layer in (self.slope, self.margin):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.margin.bias.data[0] = _START_MARGIN / _SHARPNESS

    def initial_state(self, batch_size: int, device: torch.device) -> State:
        return {"h": torch.zeros(batch_size, self.width, device=device)}

    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        """One step: observations have one leading axis, the batch.

        Raises:
            InvalidValue: no state, or one of another batch.
        """
        h = self._checked(state, obs)
        beside = [balance_features(obs)] if self.holds_surprise else []
        h = self.cell(torch.cat([summary_inputs(obs, self.projections), *beside], -1), h)
        read = torch.cat([h, *beside], -1)
        slope = self.max_slope * torch.tanh(_STEEPNESS * self.slope(read) / self.max_slope)
        margin = _SHARPNESS * self.margin(read)
        margin = margin[..., :1] + (point_features(obs) * margin[..., None, 1:]).sum(-1)
        shift = slope * token_inputs(obs.sketch).squeeze(-1) + nn.functional.logsigmoid(margin)
        return PolicyOutput(shifted(obs.sketch.log_mass, shift), {"h": h})

    def _checked(self, state: State | None, obs: Observation) -> Tensor:
        shape = (*obs.context.shape[:-1], self.width)
        if state is None or state["h"].shape != shape:
            given = None if state is None else tuple(state["h"].shape)
            advice = "begin with initial_state() of the batch's size, go on with what the last step returned"
            raise InvalidValue("state", given, f"{{'h': (batch, {self.width})}}, here {shape}", advice)
        return state["h"]


def balance_features(obs: Observation) -> Tensor:
    """(..., 3) of the balance D, the sum of (surprise - requested) so far, in nats: tanh(D / 5), tanh(D / 30), and
    tanh(D / tokens left), by how much the tokens left have to lie below the request."""
    condition = entry(obs, "condition")
    position, left = (torch.exp2(obs.context[..., i]) - 1 for i in (_POSITION, _LEFT))
    balance = (obs.context[..., _MEAN] - condition[..., 0]) * position
    return torch.tanh(torch.stack((balance / 5, balance / 30, balance / left.clamp_min(1)), -1))
