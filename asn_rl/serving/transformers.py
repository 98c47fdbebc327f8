"""A policy inside transformers: `generate` and continuous batching.

    with decoding(model, policy):
        model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=64)

Continuous batching (`model.generate_batch`) needs `ContinuousBatchingConfig(per_request_processors=True)`.

The policy's distribution is sampled, not another one made of it: a temperature, top-k or penalty beside it, be it from
the call or from the model's `generation_config.json`, is refused by name. Processors that the caller passes itself
(`logits_processor=`, a grammar) come first; what they ban, the policy does not see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import (
    CLASSIC_TO_CB_PROCESSORS_MAP,
    ContinuousBatchingLogitsProcessor,
)

from asn_rl.errors import ServingError
from asn_rl.ops.sketch import SketchSize
from asn_rl.protocols import Policy
from asn_rl.serving.decoder import PolicyDecoder, Row

_HOOK = "_get_logits_processor"


class PolicyLogitsProcessor(LogitsProcessor):
    """The policy in one call of `generate`.

    Args:
        prompt_length: tokens of the padded prompts.
        budget: tokens each completion may have.
    """

    def __init__(
        self, policy: Policy, *, prompt_length: int, budget: int, size: SketchSize | None = None, tracked: int = 32
    ) -> None:
        self.decoder = PolicyDecoder(policy, size=size, tracked=tracked)
        self.prompt_length, self.budget = prompt_length, budget

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) log-weights of the policy for next-token logits (B, V) after `input_ids` (B, T)."""
        texts = input_ids[:, self.prompt_length :].tolist()
        return self.decoder(scores, [Row(i, ids, self.budget) for i, ids in enumerate(texts)])


class _Placeholder(LogitsProcessor):
    """Stands for the policy until continuous batching asks for its own kind of processor."""

    supports_continuous_batching = True  # else it would be dropped with a warning, and plain sampling be the result

    def __init__(self, policy: Policy, size: SketchSize | None, tracked: int) -> None:
        self.policy, self.size, self.tracked = policy, size, tracked

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise ServingError(
            "continuous batching shows processors of this kind no requests; pass "
            "continuous_batching_config=ContinuousBatchingConfig(per_request_processors=True)"
        )


class ContinuousPolicyProcessor(ContinuousBatchingLogitsProcessor):
    """The policy in continuous batching, where requests join and leave. Not for captured CUDA graphs."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012  (declared so by transformers)
    ignored_kwargs = ()

    def __init__(self, made_for: _Placeholder) -> None:
        self.decoder = PolicyDecoder(made_for.policy, size=made_for.size, tracked=made_for.tracked)
        self._rows: list[Row] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        states = [request.state for request in requests_with_new_token]
        self._rows = [Row(s.request_id, list(s.generated_tokens), s.max_new_tokens) for s in states]
        self.decoder.forget(set(self.decoder.requests) - {row.key for row in self._rows})
        return torch.zeros(len(states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """(R, V) log-weights of the policy, for the rows that get a token; padding rows stay as they are."""
        count = len(self._rows)
        return torch.cat([self.decoder(scores[:count], self._rows).to(scores.dtype), scores[count:]])


CLASSIC_TO_CB_PROCESSORS_MAP[_Placeholder] = ContinuousPolicyProcessor


@contextmanager
def decoding(
    model: PreTrainedModel, policy: Policy, *, size: SketchSize | None = None, tracked: int = 32
) -> Iterator[None]:
    """Inside, `model.generate` and the model's continuous batching sample as the policy says.

    Every call of `generate` begins anew, also for policies that carry state.

    Args:
        size: of the sketches the policy was trained on (`sketch` in its config.json).

    Raises:
        ServingError: inside, on a call that would sample otherwise: greedy or beam search, or another sampler.
    """
    own = getattr(model, _HOOK)

    def hook(
        generation_config: GenerationConfig, input_ids_seq_length: int | None = None, *args: Any, **kw: Any
    ) -> Any:
        given = list(kw.get("logits_processor") or [])
        built = own(generation_config, input_ids_seq_length, *args, **kw)
        _check(generation_config, [p for p in built if not any(p is mine for mine in given)])
        if input_ids_seq_length is None:
            return LogitsProcessorList([*built, _Placeholder(policy, size, tracked)])
        budget = generation_config.max_length - input_ids_seq_length
        last = PolicyLogitsProcessor(
            policy, prompt_length=input_ids_seq_length, budget=budget, size=size, tracked=tracked
        )
        return LogitsProcessorList([*built, last])

    vars(model)[_HOOK] = hook  # nn.Module's own __setattr__ does nothing else with a function
    try:
        yield
    finally:
        del vars(model)[_HOOK]


def _check(config: GenerationConfig, others: Sequence[Any]) -> None:
    if not config.do_sample or (config.num_beams or 1) > 1:
        raise ServingError(
            f"generate was asked for do_sample={config.do_sample}, num_beams={config.num_beams}: a policy is a "
            "distribution to draw from. Pass do_sample=True, num_beams=1; a greedy policy then decodes greedily"
        )
    names = [type(other).__name__ for other in others]
    if names:
        raise ServingError(
            f"beside the policy, the generation config asks for {', '.join(names)}: the policy alone decides how to "
            "sample. Pass temperature=1.0, top_k=0, top_p=1.0 and no penalties (what a call leaves out, the model's "
            "generation_config.json sets), or put a step into the policy's own pipeline"
        )
