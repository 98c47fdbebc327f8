"""DoLa: what the last layer says beyond an earlier one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asn_policies.heuristics.rule import Rule, cut, entry, require
from asn_rl.errors import InvalidValue
from asn_rl.ops.divergences import kl
from asn_rl.ops.logprobs import normalize
from asn_rl.ops.truncation import token_logprobs
from asn_rl.types import Observation, State


@dataclass(frozen=True)
class LayerContrast(Rule):
    """log q_last - log q_layer over the tokens with q_last >= alpha max q_last, renormalised (Chuang et al. 2023,
    arXiv:2309.03883, equations 3 to 6).

    `layer` counts the captured ones (`rollout.layers`) from 0; null takes at each step the one farthest from the last
    layer in Jensen-Shannon divergence. The divergence is that over points, at most the one over the vocabulary, so
    where two layers are about equally far another one may be taken.
    """

    alpha: float = 0.1
    layer: int | None = None
    name: ClassVar[str] = "layer_contrast"
    needs: ClassVar[frozenset[str]] = frozenset({"layer_logprobs"})

    def __post_init__(self) -> None:
        require(0 < self.alpha <= 1, self.name, "alpha", self.alpha, "in (0, 1]")
        ok = self.layer is None or (isinstance(self.layer, int) and self.layer >= 0)
        require(ok, self.name, "layer", self.layer, "an integer >= 0, or null for the farthest one")

    @property
    def layer_count(self) -> int:
        return 1 + (self.layer or 0)

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        layers, log_count = entry(obs, "layer_logprobs"), obs.sketch.log_count
        if layers.shape[-1] < self.layer_count:
            allowed = f"below {layers.shape[-1]}, the number of captured layers"
            raise InvalidValue(f"{self.name}.layer", self.layer, allowed, "name more in rollout.layers")
        tokens = token_logprobs(logprobs, log_count)
        keep = tokens >= math.log(self.alpha) + tokens.amax(-1, keepdim=True)
        return cut(tokens - self._earlier(logprobs, layers, log_count) + log_count, keep)

    def _earlier(self, logprobs: Tensor, layers: Tensor, log_count: Tensor) -> Tensor:
        if self.layer is not None:
            return layers[..., self.layer]
        distances = layer_divergences(logprobs, layers, log_count)
        farthest = distances.argmax(-1)[..., None, None].expand_as(layers[..., :1])
        return layers.gather(-1, farthest).squeeze(-1)


def layer_divergences(logprobs: Tensor, layers: Tensor, log_count: Tensor) -> Tensor:
    """(..., L) Jensen-Shannon divergence over points between a distribution (..., N) and each earlier layer, nats.

    Args:
        layers: (..., N, L) log-probability of a point's typical token.
    """
    possible = (logprobs > -math.inf).unsqueeze(-2)
    earlier = torch.where(possible, (layers + log_count.unsqueeze(-1)).mT, -math.inf)
    earlier, last = normalize(earlier), logprobs.unsqueeze(-2).expand_as(earlier)
    middle = torch.logaddexp(earlier, last) - math.log(2)
    return (kl(last, middle) + kl(earlier, middle)) / 2
