"""A conditioned policy that is asked for the same thing at every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from asn_policies.base import PolicyModule
from asn_policies.fallback import build_inner
from asn_rl.errors import InvalidValue
from asn_rl.protocols import TrainablePolicy
from asn_rl.types import Observation, PolicyOutput, State


class Asked(PolicyModule):
    """The inner policy under one condition, so that it runs wherever a policy without a condition does: a target that
    is asked for (reward-conditioned policies, Kumar et al. 2019, arXiv:1912.13465), or a style.

    Args:
        inner: the conditioned policy, {"policy": "module:attribute", "arguments": {...}} as in a policy folder's
            `config.json`.
        condition: the n numbers that it is asked for.

    Raises:
        InvalidValue: an inner policy that reads no condition, or no condition.
        ConfigError: `inner` is no policy.
    """

    paper = "A conditioned policy (arXiv:1912.13465) under one condition."

    inner: TrainablePolicy
    condition: Tensor

    def __init__(self, inner: Mapping[str, Any], condition: Sequence[float]) -> None:
        super().__init__()
        self.inner = build_inner(inner)
        if "condition" not in self.inner.needs:
            raise InvalidValue("inner", inner["policy"], "a policy that reads the condition", "inputs: [condition]")
        if not condition or not torch.tensor(condition).isfinite().all():
            raise InvalidValue("condition", list(condition), "at least one finite number")
        self.needs = self.inner.needs - {"condition"}
        self.register_buffer("condition", torch.tensor(condition, dtype=torch.float32), persistent=False)

    def initial_state(self, batch_size: int, device: torch.device) -> State | None:
        return self.inner.initial_state(batch_size, device)

    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        asked = self.condition.to(obs.context.device).expand(*obs.context.shape[:-1], -1)
        return self.inner(replace(obs, condition=asked), state)
