"""Controls of a comparison: what a policy does without the context it was trained to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from asn_rl.evaluation.comparison import Arm, run_arm
from asn_rl.protocols import LogitsBackend, Policy
from asn_rl.rollout import RolloutConfig
from asn_rl.types import Observation, PolicyOutput, Prompt, State, Trajectories

_CONTEXT = ("hidden", "prompt_embedding", "condition")


def mixed_order(count: int, seed: int) -> list[int]:
    """Indices of `count` prompts, shuffled."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def run_mixed(
    arm: Arm, backend: LogitsBackend, prompts: Sequence[Prompt], config: RolloutConfig, samples: int, seed: int
) -> Trajectories:
    """`comparison.run_arm`, with the prompts completed in `mixed_order` and returned in their own: in a batch, prompts
    of all kinds meet."""
    order = mixed_order(len(prompts), seed)
    drawn = run_arm(arm, backend, [prompts[i] for i in order], config, samples, seed)
    places = np.argsort(order).tolist()
    return drawn.select([place * samples + k for place in places for k in range(samples)])


class ShuffledContext(nn.Module):
    """The policy, but every completion sees the context vector, hidden state, prompt embedding and condition of another
    one of its batch, drawn anew at each token; the sketch is its own.

    A policy that does as well like this owes nothing to its context. A batch of one is left as it is. Prompts of a kind
    often lie together: complete them by `run_mixed`, or contexts are exchanged within a kind only.

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
