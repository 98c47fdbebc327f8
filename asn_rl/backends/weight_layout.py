"""How a frozen model's weights lie in memory.

A decoding step multiplies few rows by every weight. In fp32, MKL takes twice as long for 4 to 48 rows when the weight
lies output by output, as checkpoints store it, as when it lies input by input, and with two threads up to three times;
one row and large batches take the same time either way (RESULTS.md, "Weights in memory").
"""

from __future__ import annotations

import torch
from torch import nn


def store_by_input(model: nn.Module) -> None:
    """Turn the fp32 CPU weights of linear layers around in memory; shapes and values stay.

    An output embedding that was tied to the input embedding gets a copy of its own. Weights that already lie so are
    left alone.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and _lies_by_output(module.weight):
            turned = module.weight.detach().t().contiguous().t()
            module.weight = nn.Parameter(turned, requires_grad=module.weight.requires_grad)


def _lies_by_output(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
