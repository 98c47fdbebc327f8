"""A policy's answers along stored trajectories: at once where it is stateless, step by step where it carries state."""

from __future__ import annotations

import torch
from torch import Tensor

from asn_rl.errors import InvalidValue
from asn_rl.placement import device_of
from asn_rl.protocols import Policy
from asn_rl.types import PolicyOutput, Trajectories


def unroll(policy: Policy, trajectories: Trajectories, tokens: Tensor) -> PolicyOutput:
    """Log-probs (S', N), and values (S',) from a policy that has them, with gradients through the state.

    Args:
        trajectories: on the policy's device.
        tokens: (S',) int64 indices of tokens; for a policy that carries state those of whole completions, in the order
            of time, one completion after the other.

    Raises:
        InvalidValue: parts of completions for a policy that carries state.
    """
    if policy.initial_state(1, torch.device("cpu")) is None:
        return policy(trajectories.per_token(tokens))
    lengths = _whole_lengths(trajectories, tokens)
    longest_first = torch.argsort(lengths, descending=True, stable=True)
    starts = (lengths.cumsum(0) - lengths)[longest_first]
    remaining = lengths[longest_first]
    state = policy.initial_state(len(lengths), tokens.device)
    logprobs, values, where = [], [], []
    for t in range(int(remaining.max())):
        active = int((remaining > t).sum())
        state = {name: part[:active] for name, part in (state or {}).items()}
        at = starts[:active] + t
        output = policy(trajectories.per_token(tokens[at]), state)
        state = output.state
        logprobs.append(output.logprobs)
        values += [] if output.value is None else [output.value]
        where.append(at)
    order = torch.argsort(torch.cat(where))
    return PolicyOutput(torch.cat(logprobs)[order], None, torch.cat(values)[order] if values else None)


@torch.no_grad()
def recorded_logprobs(policy: Policy, trajectories: Trajectories, tokens: Tensor | None = None) -> Tensor:
    """(S', N) log-probs of a policy on stored trajectories, computed on its device, back on the CPU; see `unroll`.

    Args:
        tokens: (S',) default all.
    """
    everything = torch.arange(len(trajectories.points)) if tokens is None else tokens
    device = device_of(policy)
    return unroll(policy, trajectories.to(device), everything.to(device)).logprobs.cpu()


def _whole_lengths(trajectories: Trajectories, tokens: Tensor) -> Tensor:
    """(B',) tokens of each completion that `tokens` goes through."""
    rows = trajectories.rows.to(tokens.device)[tokens]
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = rows[1:] != rows[:-1]
    first = begins.nonzero().squeeze(-1)
    lengths = torch.diff(first, append=torch.tensor([len(rows)], device=tokens.device))
    full = trajectories.lengths.to(tokens.device)
    offsets = (full.cumsum(0) - full)[rows[first]]
    place = torch.arange(len(rows), device=tokens.device) - first.repeat_interleave(lengths)
    expected = offsets.repeat_interleave(lengths) + place
    if not torch.equal(lengths, full[rows[first]]) or not torch.equal(tokens, expected):
        allowed = "those of whole completions, in the order of time"
        raise InvalidValue("tokens", f"{len(tokens)} of {int(full.sum())}", allowed, "state begins at the first token")
    return lengths
