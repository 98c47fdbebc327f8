"""What a policy costs: parameters, FLOPs a token and milliseconds a row."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from asn_policies.base import PolicyModule
from asn_rl.errors import InvalidValue
from asn_rl.ops.context import CONTEXT_SIZE
from asn_rl.ops.sketch import Sketch
from asn_rl.testing import random_entry
from asn_rl.types import Observation

_TRIALS = 5


@torch.no_grad()
def measure_cost(policy: PolicyModule, points: int = 96, rows: int = 64) -> dict[str, float]:
    """Cost of one forward pass on a random observation, on the policy's own device.

    Args:
        points: points of the sketch.
        rows: rows in the batch.

    Returns:
        `parameters`, `flops_per_token` (matrix products only; a row is one token) and `ms_per_row` (the fastest of five
        passes, divided by the rows).

    Raises:
        InvalidValue: the policy reads an optional input and does not say how large it is (attribute `hidden_size`,
            `condition_size` or `layer_count`).
    """
    device = next((parameter.device for parameter in policy.parameters()), torch.device("cpu"))
    obs = _random_observation(policy, points, rows, device)
    state = policy.initial_state(rows, device)
    with FlopCounterMode(display=False) as counter:
        policy(obs, state)
    seconds = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        policy(obs, state)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "flops_per_token": counter.get_total_flops() / rows,
        "ms_per_row": 1e3 * min(seconds) / rows,
    }


def _random_observation(policy: PolicyModule, points: int, rows: int, device: torch.device) -> Observation:
    generator = torch.Generator().manual_seed(0)

    def normal(size: int) -> Tensor:
        return torch.randn(rows, size, generator=generator).to(device)

    log_mass = torch.log_softmax(4 * normal(points), -1).sort(-1, descending=True).values
    in_tail = torch.arange(points, device=device) >= 2 * points // 3
    log_count = torch.where(in_tail, normal(points).abs() + 1, 0.0)
    sketch = Sketch(log_mass, log_count, log_count)
    optional = {
        name: random_entry(name, sketch, _input_size(policy, name), generator).to(device)
        for name in sorted(policy.needs)
    }
    return Observation(sketch, normal(CONTEXT_SIZE).abs(), **optional)


def _input_size(policy: PolicyModule, name: str) -> int:
    if name in ("last_point", "history"):
        return 0
    attribute = {"condition": "condition_size", "layer_logprobs": "layer_count"}.get(name, "hidden_size")
    size = getattr(policy, attribute, None)
    if not size:
        raise InvalidValue(f"size of input {name!r}", size, "known to the policy", f"set its attribute {attribute}")
    return int(size)
