"""`SamplingNetwork`: tokens look at each other through linear attention before their log-probabilities are moved.

Published under the same name. Deviations:

- the last layers of the transform, of the gate and of the multiplier start at 0 (the multiplier's bias at ln(e - 1),
  where softplus is 1), so that training begins at the base model (published: PyTorch's default, up to 1.3 nats away);
- the gate's slope is s = softplus(a) - ln 2 (published: softplus(a)): exactly 0 at the start with a gradient, and
  bounded by -ln 2, so that the gate alone never reverses the order of tokens;
- `scale=False` means a multiplier of exactly 1. The published code passes a placeholder of 1 through softplus and
  multiplies by 1.3133, which sharpens every distribution to a temperature of 0.76;
- impossible tokens are left out of attention and mean (published: one `-inf` makes every output NaN).

Until the first step the gradient is 0 for everything before the last layers' weights (they are 0), for the transform's
last bias and for t (both move all tokens alike while s = 0).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asn_policies.base import PolicyModule
from asn_policies.layers import SwiGLU, gate_slope, soft_gate, token_counts, token_inputs
from asn_rl.errors import InvalidValue
from asn_rl.types import Observation

_SOFTPLUS_ONE = math.log(math.e - 1)


class SamplingNetwork(PolicyModule):
    """l = mu (x + m), shifted log-weight l + log sigmoid(s l + t). m sees the token after attention and the mean over
    all tokens; mu, s and t see the mean alone.

    Args:
        width: size of a token's state.
        feed_forward: nominal width of the blocks' SwiGLU.
        blocks: number of attention blocks.
        heads: attention heads; must divide `width`.
        scale: learn the multiplier mu; otherwise it is 1. The defaults give 38,893 parameters, 38,222 without.
    """

    paper = "Architecture: SamplingNetwork of the Adaptive Sampling Networks project, starting at the identity."

    def __init__(
        self, width: int = 32, feed_forward: int = 64, blocks: int = 4, heads: int = 4, scale: bool = True
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise InvalidValue("heads", heads, f"a divisor of width = {width}")
        self.encoder = SwiGLU(1, width, width)
        self.blocks = nn.ModuleList(Block(width, feed_forward, heads) for _ in range(blocks))
        self.transform = SwiGLU(2 * width, width, 1).starting_at(0.0)
        self.gate = SwiGLU(width, width // 2, 2).starting_at(0.0)
        self.multiplier = SwiGLU(width, width // 2, 1).starting_at(_SOFTPLUS_ONE) if scale else None

    def shift(self, obs: Observation) -> Tensor:
        x, counts = token_inputs(obs.sketch), token_counts(obs.sketch)
        tokens = self.encoder(x)
        for block in self.blocks:
            tokens = block(tokens, counts)
        mean = (counts * tokens).sum(-2, keepdim=True) / counts.sum(-2, keepdim=True)
        moved_by = self.transform(torch.cat([tokens, mean.expand_as(tokens)], -1))
        gate = self.gate(mean)
        slope, offset = gate_slope(gate[..., :1]), F.softplus(gate[..., 1:])
        if self.multiplier is not None:
            multiplier = F.softplus(self.multiplier(mean))
            moved_by = (multiplier - 1) * x + multiplier * moved_by
        return (moved_by + soft_gate(x + moved_by, slope, offset)).squeeze(-1)


class Block(nn.Module):
    """Attention, then SwiGLU, each added to its input and layer-normalised afterwards."""

    def __init__(self, width: int, feed_forward: int, heads: int) -> None:
        super().__init__()
        self.attention = LinearAttention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = SwiGLU(width, feed_forward, width)
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        tokens = self.attention_norm(tokens + self.attention(tokens, counts))
        return self.feed_forward_norm(tokens + self.feed_forward(tokens))


class LinearAttention(nn.Module):
    """Non-causal linear attention with feature map phi = elu + 1 (Katharopoulos et al. 2020, arXiv:2006.16236, eq. 5).

    Every point attends to every point, as many times as that holds tokens; cost is linear in the points.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """(..., N, D) from `tokens` (..., N, D) and `counts` (..., N, 1)."""
        query = self._split(feature_map(self.query(tokens)))
        key = self._split(feature_map(self.key(tokens)) * counts)
        memory = key.transpose(-1, -2) @ self._split(self.value(tokens))
        seen = query @ key.sum(-2).unsqueeze(-1)
        attended = (query @ memory) / (seen + 1e-6)
        return self.output(attended.transpose(-2, -3).flatten(-2))

    def _split(self, tokens: Tensor) -> Tensor:
        """(..., N, D) -> (..., heads, N, D / heads)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


def feature_map(x: Tensor) -> Tensor:
    """`elu(x) + 1`, without the cancellation that would round exp(x) to multiples of 6e-8."""
    return torch.where(x > 0, x + 1, x.clamp_max(0.0).exp())
