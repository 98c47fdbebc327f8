"""Controls of a comparison: what a policy does without the context it was trained to read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from asn_rl.protocols import Policy
from asn_rl.types import Observation, PolicyOutput, State

_CONTEXT = ("hidden", "prompt_embedding", "condition")


def mixed_order(count: int, seed: int) -> list[int]:
    """Indices of `count` prompts, shuffled."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


class ShuffledContext(nn.Module):
    """The policy, but every completion sees the context vector, hidden state, prompt embedding and condition of another
    one of its batch, drawn anew at each token; the sketch is its own.

    A policy that does as well like this owes nothing to its context. A batch of one is left as it is. Prompts of a kind
    often lie together: complete them in `mixed_order`, or contexts are exchanged within a kind only.

    Args:
        seed: keys the exchange.
    """

    def __init__(self, policy: Policy, seed: int = 0) -> None:
        super().__init__()
        self.policy, self.needs = policy, policy.needs
        self._generator = torch.Generator().manual_seed(seed)

    def initial_state(self, batch_size: int, device: torch.device) -> State | None:
        return self.policy.initial_state(batch_size, device)

    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        other = self._others(len(obs.context)).to(obs.context.device)
        foreign = {name: part[other] for name in _CONTEXT if (part := getattr(obs, name)) is not None}
        return self.policy(replace(obs, context=obs.context[other], **foreign), state)

    def _others(self, rows: int) -> Tensor:
        """(B,) another row for every row: a random cycle."""
        order = torch.randperm(rows, generator=self._generator)
        return torch.empty_like(order).scatter_(0, order, order.roll(1))
