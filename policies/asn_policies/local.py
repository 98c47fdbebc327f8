"""`LocalTransform`: each token's log-probability is moved by a function of itself alone.

Published as LocalProbabilityTransform. Deviations, all at the start, so that training begins at the base model:

- the last layer of the SwiGLU starts at 0, so the transform starts as the identity (published: PyTorch's default, which
  flips the most probable token in many runs, because a SwiGLU is quadratic in raw log-probabilities of -30 to -60);
- the soft gate starts at s = 0, t = ln 2 (published: 1 and 10). With s = 0 the gate is the same for all tokens.

Until the first step the gradient is 0 for everything before the SwiGLU's last weights (they are 0), for the last bias
and for t (both move all tokens alike while s = 0).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asn_policies.base import PolicyModule
from asn_policies.layers import GATE_START, SwiGLU, soft_gate, token_inputs
from asn_rl.types import Observation


class LocalTransform(PolicyModule):
    """l = x + SwiGLU(x), shifted log-weight l + log sigmoid(s l + t); s and t are free scalars.

    Args:
        hidden: nominal width of the SwiGLU; 64 gives 213 parameters.
    """

    paper = (
        "Architecture: LocalProbabilityTransform of the Adaptive Sampling Networks project, starting at the identity."
    )

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.transform = SwiGLU(1, hidden, 1).starting_at(0.0)
        self.slope = nn.Parameter(torch.tensor(0.0))
        self.offset = nn.Parameter(torch.tensor(GATE_START))

    def shift(self, obs: Observation) -> Tensor:
        x = token_inputs(obs.sketch)
        moved_by = self.transform(x)
        return (moved_by + soft_gate(x + moved_by, self.slope, self.offset)).squeeze(-1)
