"""Which device a policy computes on. Rollouts bring it to the base model's; updates run where it is; records are on the
CPU."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from asn_rl.protocols import Policy


def device_of(policy: Policy) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a policy without any."""
    if not isinstance(policy, nn.Module):
        return torch.device("cpu")
    tensor = next(chain(policy.parameters(), policy.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def place(policy: Policy, device: torch.device) -> None:
    """Move a policy, in place."""
    if isinstance(policy, nn.Module):
        policy.to(device)
