"""How a frozen model's weights lie in memory.

A decoding step multiplies few rows by every weight. On x86 in fp32, oneDNN with the weight in blocks of its own takes
.4 to .9 of the time of MKL for 2 to 64 rows, and no longer for more (RESULTS.md, "Weights in memory"). Other types and
devices are left as they are.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 16
"""what oneDNN is told to expect; the blocks it chooses for 16 and for 256 rows are equally fast for both"""


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight lies in oneDNN's blocks. It has no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = _in_blocks(linear.weight.detach())
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """(out, in) a copy in plain order, for whoever reads weights; made at each call."""
        return self.packed.to_dense()

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed": self.weight}  # blocks can be neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"packed": _in_blocks(state["packed"])})


def pack_weights(model: nn.Module) -> None:
    """Put the fp32 CPU weights of linear layers into oneDNN's blocks; values stay.

    An output embedding that was tied to the input embedding gets a copy of its own. What is packed already is left
    alone.
    """
    if not _can_pack():
        return
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype == torch.float32:
                places.setdefault(id(child), []).append((parent, name))
    for shared in places.values():  # one at a time: its plain weight is freed before the next is packed
        packed = PackedLinear(getattr(*shared[0]))
        for parent, name in shared:
            setattr(parent, name, packed)


def _can_pack() -> bool:
    """x86, where it was measured, and a torch that has the operators; they are private."""
    operators = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available() and operators


def _in_blocks(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
