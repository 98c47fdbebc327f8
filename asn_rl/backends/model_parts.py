"""Where a transformers model keeps its parts, and what passes through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asn_rl.errors import BackendError, InvalidValue


class CaptureHidden:
    """The input of the output embedding, the hidden state as the language-model head reads it, for any model; behind it
    the outputs of some earlier layers. `value` is (B, keep, 1 + L, D) after a forward pass."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int] = ()) -> None:
        self.head = output_embedding(model)
        self.layers = [decoder_layer(model, layer) for layer in layers]
        self.outputs: list[Tensor] = []
        self.value = torch.empty(0)

    def __enter__(self) -> CaptureHidden:
        self.handles = [layer.register_forward_hook(self._keep_layer) for layer in self.layers]
        self.handles.append(self.head.register_forward_pre_hook(self._keep))
        return self

    def _keep_layer(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.outputs.append(output[0] if isinstance(output, tuple) else output)

    def _keep(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        keep = inputs[0].shape[1]
        self.value = torch.stack([inputs[0], *(output[:, -keep:] for output in self.outputs)], 2)

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()


def decoder_layer(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    """The `layer`-th decoder layer, counted from 1; the last one is no earlier layer."""
    count = model.config.get_text_config().num_hidden_layers
    stacks = [m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not stacks:
        raise BackendError(f"{type(model).__name__} has no list of {count} decoder layers; leave rollout.layers empty")
    if not 1 <= layer < count:
        raise InvalidValue("layer", layer, f"in [1, {count - 1}], the earlier layers of {type(model).__name__}")
    return stacks[0][layer - 1]


def final_norm(model: PreTrainedModel) -> torch.nn.Module:
    """What stands between the last decoder layer and the output embedding."""
    for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm"):
        module = getattr(model.base_model, name, None)
        if isinstance(module, torch.nn.Module):
            return module
    raise BackendError(f"{type(model).__name__} has no final norm of a known name; leave rollout.layers empty")


def output_embedding(model: PreTrainedModel) -> torch.nn.Module:
    head = model.get_output_embeddings()
    if head is None:
        raise BackendError(f"{type(model).__name__} has no output embedding; give a causal language model")
    return head
