"""A policy inside transformers: `generate` and continuous batching.

    with decoding(model, "runs/demo/policy"):
        model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=64)

Continuous batching (`model.generate_batch`) needs `ContinuousBatchingConfig(per_request_processors=True)`.

The policy's distribution is sampled, not another one made of it: a temperature, top-k or penalty beside it, be it from
the call or from the model's `generation_config.json`, is refused by name. Processors that the caller passes itself
(`logits_processor=`, a grammar) come first; what they ban, the policy does not see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    CLASSIC_TO_CB_PROCESSORS_MAP,
    ContinuousBatchingLogitsProcessor,
)

from asn_rl.backends.fingerprint import fingerprint
from asn_rl.errors import InvalidValue, ServingError
from asn_rl.ops.sketch import SketchSize
from asn_rl.protocols import Policy
from asn_rl.serving.decoder import PolicyDecoder, Row, load_served

__all__ = ["decoding"]

_HOOK = "_get_logits_processor"


@dataclass(frozen=True)
class _Served:
    """A policy, and what its decoders are told."""

    policy: Policy
    size: SketchSize
    tracked: int

    def decoder(self) -> PolicyDecoder:
        return PolicyDecoder(self.policy, size=self.size, tracked=self.tracked)


class _PolicyProcessor(LogitsProcessor):
    """The policy in one call of `generate`. A processor sees no other samplers: only `decoding`, which does, makes it.

    Args:
        prompt_length: tokens of the padded prompts.
        budget: tokens each completion may have.
    """

    def __init__(self, served: _Served, *, prompt_length: int, budget: int) -> None:
        self.decoder = served.decoder()
        self.prompt_length, self.budget = prompt_length, budget

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) log-weights of the policy for next-token logits (B, V) after `input_ids` (B, T)."""
        texts = input_ids[:, self.prompt_length :].tolist()
        return self.decoder(scores, [Row(i, ids, self.budget) for i, ids in enumerate(texts)])


class _Placeholder(LogitsProcessor):
    """Stands for the policy until continuous batching asks for its own kind of processor."""

    supports_continuous_batching = True  # else it would be dropped with a warning, and plain sampling be the result

    def __init__(self, served: _Served) -> None:
        self.served = served

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise ServingError(
            "continuous batching shows processors of this kind no requests; pass "
            "continuous_batching_config=ContinuousBatchingConfig(per_request_processors=True)"
        )


class _ContinuousPolicyProcessor(ContinuousBatchingLogitsProcessor):
    """The policy in continuous batching, where requests join and leave. Not for captured CUDA graphs."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012  (declared so by transformers)
    ignored_kwargs = ()

    def __init__(self, made_for: _Placeholder) -> None:
        self.decoder = made_for.served.decoder()
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


CLASSIC_TO_CB_PROCESSORS_MAP[_Placeholder] = _ContinuousPolicyProcessor


@contextmanager
def decoding(
    model: PreTrainedModel,
    policy: str | Path | Policy,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    any_base_model: bool = False,
    size: SketchSize | None = None,
    tracked: int = 32,
) -> Iterator[None]:
    """Inside, `model.generate` and the model's continuous batching sample as the policy says.

    Every call of `generate` begins anew, also for policies that carry state.

    Args:
        policy: the folder of a saved policy; or a policy in memory, whose base model is not known here.
        tokenizer: the model's, which belongs to its fingerprint; None: the one beside the model (`name_or_path`).
        any_base_model: do not compare a folder's base model with this one.
        size: of the sketches that a policy in memory was trained on; a folder says it itself.
        tracked: see `RolloutConfig.tracked`.

    Raises:
        CheckpointError: the folder holds no whole policy, or one of another base model.
        InvalidValue: `size` is missing, or given with a folder; the policy reads what a processor does not see.
        ServingError: the tokenizer cannot be found; inside, a call that would sample otherwise: greedy or beam search,
            or another sampler.
    """
    if isinstance(policy, str | Path):
        if size is not None:
            raise InvalidValue("size", size, "left out with a saved policy", "its folder says it")
        policy, size = load_served(Path(policy), None if any_base_model else _fingerprint(model, tokenizer))
    elif size is None:
        advice = "a sketch of another size is another input; or give the folder of the saved policy, which says it"
        raise InvalidValue("size", size, "the SketchSize that the policy was trained on", advice)
    served = _Served(policy, size, tracked)
    served.decoder()  # refuses a policy that cannot be served
    own = getattr(model, _HOOK)

    def hook(
        generation_config: GenerationConfig, input_ids_seq_length: int | None = None, *args: Any, **kw: Any
    ) -> Any:
        given = list(kw.get("logits_processor") or [])
        built = own(generation_config, input_ids_seq_length, *args, **kw)
        _check(generation_config, [p for p in built if not any(p is mine for mine in given)])
        if input_ids_seq_length is None:
            return LogitsProcessorList([*built, _Placeholder(served)])
        budget = generation_config.max_length - input_ids_seq_length
        last = _PolicyProcessor(served, prompt_length=input_ids_seq_length, budget=budget)
        return LogitsProcessorList([*built, last])

    vars(model)[_HOOK] = hook  # nn.Module's own __setattr__ does nothing else with a function
    try:
        yield
    finally:
        del vars(model)[_HOOK]


def _fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is not None:
        return fingerprint(model.config, tokenizer)
    try:
        return fingerprint(model.config, AutoTokenizer.from_pretrained(model.name_or_path))
    except (OSError, ValueError) as error:
        raise ServingError(
            f"the policy's base model cannot be compared with this one, whose tokenizer is not at "
            f"{model.name_or_path!r} ({error}); give tokenizer=, or any_base_model=True"
        ) from error


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
