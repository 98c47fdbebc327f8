"""Several policies in one batch: the base model's step is paid once, whatever decodes a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from asn_rl.errors import InvalidValue
from asn_rl.protocols import Policy
from asn_rl.types import Observation, PolicyOutput, State

_MEMBER = "member"


class MixedBatch(nn.Module):
    """Row i of a batch is decoded by `policies[member[i]]`; the assignment travels as state, so rows may leave.

    Args:
        member: index into `policies`, one a row of the batch that will be started.

    Raises:
        InvalidValue: no policies, or an index outside them.
    """

    def __init__(self, policies: Sequence[Policy], member: Sequence[int]) -> None:
        super().__init__()
        if not policies or not all(0 <= i < len(policies) for i in member):
            raise InvalidValue("member", list(member), f"indices of the {len(policies)} policies, at least one")
        self.policies = list(policies)
        for i, policy in enumerate(self.policies):
            if isinstance(policy, nn.Module):
                self.add_module(str(i), policy)  # moves along to the base model's device
        self.member = list(member)
        self.needs = frozenset(name for policy in self.policies for name in policy.needs)

    def initial_state(self, batch_size: int, device: torch.device) -> State:
        if batch_size != len(self.member):
            raise InvalidValue("batch size", batch_size, f"{len(self.member)}, the rows that were assigned")
        state: State = {_MEMBER: torch.tensor(self.member, device=device)}
        for i in sorted(set(self.member)):
            own = self.policies[i].initial_state(batch_size, device) or {}
            state |= {f"{i}/{name}": value for name, value in own.items()}
        return state

    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        if state is None:
            raise InvalidValue("state", None, "what initial_state() or the last step returned")
        member, following = state[_MEMBER], dict(state)
        logprobs = torch.empty_like(obs.sketch.log_mass)
        for i in member.unique().tolist():
            rows, prefix = (member == i).nonzero().squeeze(-1), f"{i}/"
            own = {name.removeprefix(prefix): part[rows] for name, part in state.items() if name.startswith(prefix)}
            output = self.policies[i](obs.index(rows), own or None)
            logprobs[rows] = output.logprobs
            for name, part in (output.state or {}).items():
                following[prefix + name] = following[prefix + name].index_put((rows,), part)
        return PolicyOutput(logprobs, following)
