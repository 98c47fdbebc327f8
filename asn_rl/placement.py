"""Which device a policy computes on, and what of it is trained. Rollouts bring it to the base model's device; updates
run where it is; records are on the CPU."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from asn_rl.errors import TrainingError
from asn_rl.protocols import Policy, TrainablePolicy


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


def trainable_parameters(policy: TrainablePolicy) -> list[nn.Parameter]:
    """What an optimiser changes.

    Raises:
        TrainingError: nothing, or weights of less than 32 bits: updates would be lost in their rounding.
    """
    found = [p for p in policy.parameters() if p.requires_grad]
    if not found:
        raise TrainingError(f"{type(policy).__name__} has no trainable parameter; heuristics cannot be trained")
    for parameter in found:
        if torch.finfo(parameter.dtype).bits < 32:
            raise TrainingError(
                f"{type(policy).__name__} has weights in {parameter.dtype}, whose rounding loses small updates; call "
                "policy.float() before training (the base model may stay in bfloat16)"
            )
    return found
