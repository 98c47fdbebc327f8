"""Our policy: a small network on value and order statistics of each point.

Every classical rule reads one number of a token: temperature its log-probability, top-k its rank, top-p the mass above
it, min-p and top-n-sigma its gap to the maximum, epsilon its probability, eta that against the entropy, typical
sampling its distance from the entropy. The network gets exactly these numbers, so that each rule is a straight line:

    shift_j = slope(g) * logprob_j + residual(phi_j, g) + log sigmoid(margin_j),
    margin_j = bias(g) + weights(g) . phi_j

with phi the point features and g a summary of the distribution, the context and whatever else the policy reads. In
training the margin is a soft gate; asked for a hard cut at inference, points with a negative margin are removed
exactly. At the start slope, residual and weights are 0 and the bias is the same for all points: the base model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from asn_policies.base import PolicyModule
from asn_policies.features import (
    GLOBAL_FEATURES,
    global_features,
    input_projections,
    summary_inputs,
    summary_network,
    summary_size,
)
from asn_policies.layers import token_inputs
from asn_rl.ops.context import entropy
from asn_rl.ops.truncation import exclusive_cumsum
from asn_rl.types import Observation

__all__ = ["GLOBAL_FEATURES", "POINT_FEATURES", "OrderStatisticsNetwork", "global_features", "point_features"]

POINT_FEATURES = ("logprob", "gap", "mass_above", "log_rank", "entropy_distance", "typical_mass", "log_count")
_START_MARGIN = 2.0
# A rule that cuts needs margins of tens, greedy decoding a slope of several: these units let few steps reach them.
_SHARPNESS = 10.0
_STEEPNESS = 4.0


class OrderStatisticsNetwork(PolicyModule):
    """Order-statistics policy.

    The condition is read as it is given. Checkpoints of versions that normalised it have the same parameters and still
    load, but were trained on other numbers: where they list "condition" in `inputs`, train them again.

    Args:
        width: hidden units of the summary network.
        point_width: hidden units of the residual network over points.
        inputs: optional observation entries to read: "hidden", "prompt_embedding", "condition".
        hidden_size: the base model's hidden size, for "hidden" and "prompt_embedding".
        condition_size: length of "condition".
        projection: units each optional entry is projected to.
        max_slope: bound of the log-probability slope; temperature T is slope 1/T - 1.
        hard_cut: remove points with a negative margin exactly (for inference).
    """

    paper = "Order-statistics network of asn_rl: value and rank features of each point, a soft gate that can cut."

    def __init__(
        self,
        width: int = 48,
        point_width: int = 16,
        inputs: tuple[str, ...] | list[str] = (),
        hidden_size: int = 0,
        condition_size: int = 0,
        projection: int = 16,
        max_slope: float = 8.0,
        hard_cut: bool = False,
    ) -> None:
        super().__init__()
        self.needs = frozenset(inputs)
        self.hidden_size, self.condition_size = hidden_size, condition_size
        self.max_slope, self.hard_cut = max_slope, hard_cut
        self.projections = input_projections(inputs, hidden_size, condition_size, projection)
        self.summary = summary_network(summary_size(inputs, projection), width)
        self.slope = nn.Linear(width, 1)
        self.margin = nn.Linear(width, 1 + len(POINT_FEATURES))
        self.to_point = nn.Linear(width, point_width)
        self.from_features = nn.Linear(len(POINT_FEATURES), point_width)
        self.residual = nn.Linear(point_width, 1)
        for layer in (self.slope, self.margin, self.residual):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.margin.bias.data[0] = _START_MARGIN / _SHARPNESS

    def shift(self, obs: Observation) -> Tensor:
        features = point_features(obs)
        summary = self.summary(summary_inputs(obs, self.projections))
        slope = self.max_slope * torch.tanh(_STEEPNESS * self.slope(summary) / self.max_slope)
        margin = _SHARPNESS * self.margin(summary)
        margin = margin[..., :1] + (features * margin[..., None, 1:]).sum(-1)
        hidden = nn.functional.silu(self.from_features(features) + self.to_point(summary).unsqueeze(-2))
        gate = nn.functional.logsigmoid(margin)
        if self.hard_cut:
            # The most probable point survives whatever its margin, as in every truncation rule.
            first = obs.sketch.mask & (obs.sketch.mask.cumsum(-1) == 1)
            gate = torch.where((margin < 0) & ~first, -math.inf, gate)
        logprobs = token_inputs(obs.sketch).squeeze(-1)
        return slope * logprobs + self.residual(hidden).squeeze(-1) + gate


@torch.no_grad()
def point_features(obs: Observation) -> Tensor:
    """(..., N, F) features of the points, each of order one; zeros where a point is empty.

    logprob / 10, gap to the most probable point / 5, mass above, log10 of the number of tokens above, signed distance
    of the surprise from the entropy / 5, mass of all points closer to the entropy (typical sampling's order), and
    log10 of the tokens in the point.
    """
    sketch = obs.sketch
    mask, mass = sketch.mask, sketch.log_mass.exp()
    logprobs = token_inputs(sketch).squeeze(-1)
    top = sketch.logprobs.amax(-1, keepdim=True)
    counts = torch.where(mask, sketch.log_count.exp(), 0.0)
    distance = -logprobs - entropy(sketch).unsqueeze(-1)
    order = torch.argsort(torch.where(mask, distance.abs(), math.inf), dim=-1, stable=True)
    closer = torch.empty_like(mass).scatter_(-1, order, exclusive_cumsum(mass.gather(-1, order)).float())
    features = torch.stack(
        (
            logprobs / 10,
            (logprobs - top) / 5,
            exclusive_cumsum(mass).float(),
            torch.log10(1 + exclusive_cumsum(counts).float()),
            distance / 5,
            closer,
            sketch.log_count / math.log(10),
        ),
        -1,
    )
    return torch.where(mask.unsqueeze(-1), features, 0.0)
