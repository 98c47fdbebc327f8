"""An order-statistics network that also reads what is known of single tokens: the generated text, earlier layers.

To the shift of the order-statistics network come two lines, with weights by the summary g of the step:

    shift_j += weights(g) . psi_j - strength(g) sum_l softmax_l(bias_l(g) + sharpness(g) d_l) logprob_jl.

psi holds, for tokens that occurred in the generated text, 1, the count, the recency and the log-probability: a
presence, a frequency and a repetition penalty are constant weights. logprob_jl is what the earlier layer l says and d_l
its divergence from the last one: DoLa's contrast is strength 1 at a large sharpness, and its cut by plausibility the
gate of the order-statistics network. Weights and strength start at 0: the base model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asn_policies.features import INPUTS, summary_inputs, summary_network, summary_size
from asn_policies.heuristics.layer_contrast import layer_divergences
from asn_policies.heuristics.rule import entry
from asn_policies.layers import token_inputs
from asn_policies.order_statistics import OrderStatisticsNetwork
from asn_rl.errors import InvalidValue
from asn_rl.ops.history import HISTORY
from asn_rl.types import Observation

TOKEN_INPUTS = ("history", "layer_logprobs")
HISTORY_FEATURES = ("occurred", "count", "recency", "logprob")
# Weights of order one are a few steps away, as with the slope of the order-statistics network; layers that differ by
# 0.03 nats are told apart at the start.
_STEEPNESS = 4.0
_SHARPNESS = 30.0
_LOWEST_NATS = -40.0


class TokenFeatureNetwork(OrderStatisticsNetwork):
    """Order-statistics policy with token features.

    Args:
        width: hidden units of the summary network.
        point_width: hidden units of the residual network over points.
        inputs: optional observation entries to read: "history" and "layer_logprobs", at least one of them, and
            "hidden", "prompt_embedding", "condition".
        hidden_size: the base model's hidden size, for "hidden" and "prompt_embedding".
        condition_size: length of "condition".
        layer_count: earlier layers captured, for "layer_logprobs".
        projection: units each entry of the summary is projected to.
        token_width: hidden units of the network that gives the weights of the token features.
        max_slope: bound of the log-probability slope; temperature T is slope 1/T - 1.
        hard_cut: remove points with a negative margin exactly (for inference).
    """

    paper = "Order-statistics network of asn_rl with token features: generated text and earlier layers."

    def __init__(
        self,
        width: int = 48,
        point_width: int = 16,
        inputs: tuple[str, ...] | list[str] = ("history",),
        hidden_size: int = 0,
        condition_size: int = 0,
        layer_count: int = 0,
        projection: int = 16,
        token_width: int = 32,
        max_slope: float = 8.0,
        hard_cut: bool = False,
    ) -> None:
        of_step = [name for name in inputs if name not in TOKEN_INPUTS]
        if len(of_step) == len(inputs) or len(set(inputs)) != len(inputs):
            allowed = f"different names, at least one of {TOKEN_INPUTS}, the others among {INPUTS}"
            raise InvalidValue("inputs", list(inputs), allowed, "without any there is OrderStatisticsNetwork")
        if ("layer_logprobs" in inputs) != (layer_count > 0):
            raise InvalidValue("layer_count", layer_count, ">= 1 with 'layer_logprobs', else 0")
        super().__init__(
            width, point_width, of_step, hidden_size, condition_size, projection, max_slope=max_slope, hard_cut=hard_cut
        )
        self.needs = frozenset(inputs)
        self.layer_count = layer_count
        self.reader = summary_network(summary_size(of_step, projection), token_width)
        self.weights = _zeros(token_width, len(HISTORY_FEATURES)) if "history" in inputs else None
        self.contrast = _zeros(token_width, 2 + layer_count) if layer_count else None

    def shift(self, obs: Observation) -> Tensor:
        shift = super().shift(obs)
        read = self.reader(summary_inputs(obs, self.projections))
        if self.weights is not None:
            weights = _STEEPNESS * self.weights(read)
            shift = shift + (history_point_features(obs) * weights.unsqueeze(-2)).sum(-1)
        if self.contrast is not None:
            shift = shift + self._contrasted(obs, self.contrast(read))
        return shift

    def _contrasted(self, obs: Observation, numbers: Tensor) -> Tensor:
        layers = self._layers(obs)
        strength, sharpness, bias = numbers.split([1, 1, self.layer_count], -1)
        distances = layer_divergences(obs.sketch.log_mass, layers, obs.sketch.log_count)
        choice = torch.softmax(bias + _SHARPNESS * (1 + _STEEPNESS * sharpness) * distances, -1)
        earlier = torch.where(obs.sketch.mask.unsqueeze(-1), layers.clamp_min(_LOWEST_NATS), 0.0)
        return -_STEEPNESS * strength * (earlier * choice.unsqueeze(-2)).sum(-1)

    def _layers(self, obs: Observation) -> Tensor:
        layers = entry(obs, "layer_logprobs")
        if layers.shape[-1] != self.layer_count:
            raise InvalidValue("rollout.layers", layers.shape[-1], f"{self.layer_count} layers, as the policy expects")
        return layers


def _zeros(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def history_point_features(obs: Observation) -> Tensor:
    """(..., N, 4) entries as in `HISTORY_FEATURES`: 1, count / 4, recency and log-probability / 5 of points whose token
    occurs in the generated text, zeros elsewhere."""
    history = entry(obs, "history")
    count, recency = history[..., HISTORY.index("count")], history[..., HISTORY.index("recency")]
    occurred = (count > 0) & obs.sketch.mask
    logprobs = token_inputs(obs.sketch).squeeze(-1).clamp_min(_LOWEST_NATS)
    features = torch.stack((torch.ones_like(count), count / 4, recency, logprobs / 5), -1)
    return torch.where(occurred.unsqueeze(-1), features, 0.0)
