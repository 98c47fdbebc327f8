"""`DistributionAwareTransform`: the local transform, told the largest log-probability and the entropy as well.

Published as SimpleDistributionAwareTransform. Deviations, all at the start, so that training begins at the base model:

- the last layer of the SwiGLU starts at 0, so the transform starts as the identity (published: PyTorch's default);
- the gate's slope is s = softplus(a) - ln 2 with a = 0 at the start (published: softplus(a), at 1): exactly 0 with a
  gradient, and bounded by -ln 2, so that the gate alone never reverses the order of tokens;
- its offset is t = softplus(b) with b = 0 at the start (published: b = 10, where 5e-5 of the gradient would remain);
- dynamic: the linear map from the globals to (a, b) starts at 0 (published: PyTorch's default).

Until the first step the gradient is 0 for everything before the SwiGLU's last weights (they are 0), for the last bias
and for b (both move all tokens alike while s = 0).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asn_policies.base import PolicyModule
from asn_policies.layers import SwiGLU, gate_slope, soft_gate, token_inputs
from asn_rl.ops.context import entropy
from asn_rl.ops.sketch import Sketch
from asn_rl.types import Observation


class DistributionAwareTransform(PolicyModule):
    """l = x + SwiGLU([silu(Linear(x)), max x, entropy]), shifted log-weight l + log sigmoid(s l + t).

    Args:
        hidden: width of the point features; 64 gives 5,805 parameters (5,801 when not dynamic).
        dynamic: s and t depend on the globals by a linear map; otherwise they are two free parameters.
    """

    paper = (
        "Architecture: SimpleDistributionAwareTransform of the Adaptive Sampling Networks project, starting at the "
        "identity."
    )

    def __init__(self, hidden: int = 64, dynamic: bool = True) -> None:
        super().__init__()
        self.features = nn.Linear(1, hidden)
        self.transform = SwiGLU(hidden + 2, hidden, 1).starting_at(0.0)
        self.gate = nn.Linear(2, 2) if dynamic else None
        self.static_gate = None if dynamic else nn.Parameter(torch.zeros(2))
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def shift(self, obs: Observation) -> Tensor:
        x, summary = token_inputs(obs.sketch), distribution_summary(obs.sketch)
        features = F.silu(self.features(x))
        spread = summary.unsqueeze(-2).expand(*features.shape[:-1], 2)
        moved_by = self.transform(torch.cat([features, spread], -1))
        gate = self.static_gate if self.gate is None else self.gate(summary).unsqueeze(-2)
        assert gate is not None
        slope, offset = gate_slope(gate[..., :1]), F.softplus(gate[..., 1:])
        return (moved_by + soft_gate(x + moved_by, slope, offset)).squeeze(-1)


@torch.no_grad()
def distribution_summary(sketch: Sketch) -> Tensor:
    """(..., 2) the largest log-probability and the entropy over the vocabulary, nats; without gradient."""
    return torch.stack([sketch.logprobs.amax(-1), entropy(sketch)], -1)
