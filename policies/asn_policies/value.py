"""The critic of PPO: an estimate of the return that does not depend on the order of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asn_policies.features import input_projections, summary_inputs, summary_network, summary_size
from asn_policies.order_statistics import POINT_FEATURES, point_features
from asn_rl.types import Observation


class ValueNetwork(nn.Module):
    """Deep Sets (Zaheer et al. 2017, arXiv:1703.06114, theorem 2) over points, each weighted by its probability:

        V = rho(g, sum_j p_j phi(features_j))

    with g a summary of the distribution, the context and the optional entries that are read. 0 at the start; empty
    points, whose probability is 0, change nothing.

    Args:
        width: hidden units of rho.
        point_width: hidden units of phi, and length of the pooled vector.
        inputs: optional observation entries to read: "hidden", "prompt_embedding", "condition".
        hidden_size: the base model's hidden size, for "hidden" and "prompt_embedding".
        condition_size: length of "condition".
        projection: units each optional entry is projected to.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        width: int = 48,
        point_width: int = 16,
        inputs: tuple[str, ...] | list[str] = (),
        hidden_size: int = 0,
        condition_size: int = 0,
        projection: int = 16,
    ) -> None:
        super().__init__()
        self.needs = frozenset(inputs)
        self.projections = input_projections(inputs, hidden_size, condition_size, projection)
        self.of_point = nn.Sequential(nn.Linear(len(POINT_FEATURES), point_width), nn.SiLU())
        self.summary = summary_network(summary_size(inputs, projection) + point_width, width)
        self.value = nn.Linear(width, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, obs: Observation) -> Tensor:
        """(...) expected return, in units of the reward."""
        shares = obs.sketch.log_mass.exp().unsqueeze(-1)
        pooled = (shares * self.of_point(point_features(obs))).sum(-2)
        summary = torch.cat([summary_inputs(obs, self.projections), pooled], -1)
        return self.value(self.summary(summary)).squeeze(-1)
