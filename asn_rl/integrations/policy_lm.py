"""A frozen language model with a decoding policy as one causal LM of transformers; the policy alone is trained.

    model = PolicyCausalLM.wrap(policy, BackendConfig(), max_new_tokens=64, reference="runs/older")
    GRPOTrainer(model, rewards, args=GRPOConfig(...), train_dataset=..., processing_class=model.tokenizer)

The base model is no submodule: it is not among the parameters, is not saved, averaged or cast, and runs without
autograd. Copies of one base model share its weights. The policy sees of a text what `asn_rl.replay` shows it, from the
first completion token on; padding may lie on either side. Policies may carry state and read the history. What
`generate` of transformers cannot show them (hidden states, earlier layers, a condition) is refused.

TRL 1.15 and later replace `forward` of the model they are given by one that multiplies hidden states by `lm_head`, past
any policy, with gradients of zero. This class keeps its own `forward`, which answers the same question
(`fused_lm_head=True`) from sketches, so that nothing of size (tokens, V) is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from asn_rl.backends import BackendConfig, shared_backend
from asn_rl.backends.hf import HFBackend
from asn_rl.checkpoint import WEIGHTS, check_compatible, load_policy, save_policy
from asn_rl.config import from_dict, to_dict
from asn_rl.errors import InvalidValue, TrainingError, UnknownName
from asn_rl.integrations._policy_lm_types import CUT, PolicyLMConfig, PolicyLMOutput
from asn_rl.integrations._teacher_forcing import score_texts, texts
from asn_rl.ops.sketch import SketchSize
from asn_rl.protocols import TrainablePolicy
from asn_rl.serving.decoder import PolicyDecoder
from asn_rl.serving.transformers import decoding

__all__ = ["CUT", "PolicyCausalLM", "PolicyLMConfig", "PolicyLMOutput"]

POLICY = "policy"
UNUSED_OPTIONS = frozenset({"device_map", "attn_implementation", "trust_remote_code", "revision", "adapter_kwargs"})
"""of transformers' loaders: they say how layers are loaded, of which there are none"""


class PolicyCausalLM(PreTrainedModel):
    """See the module; made by `wrap`, or `from_pretrained` of a folder that `save_pretrained` wrote."""

    config_class = PolicyLMConfig
    config: PolicyLMConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: PolicyLMConfig, policy: TrainablePolicy, backend: HFBackend) -> None:
        super().__init__(config)
        if not isinstance(policy, nn.Module) or not any(p.requires_grad for p in policy.parameters()):
            raise TrainingError(f"{type(policy).__name__} has no trainable parameter; heuristics cannot be trained")
        PolicyDecoder(policy, size=config.rollout.size)  # refuses what `generate` cannot show
        self.policy: Any = policy
        self.backend = backend  # a plain object: nn.Module does not look into it
        self.generation_config = GenerationConfig(
            eos_token_id=sorted(backend.eos_token_ids), pad_token_id=backend.tokenizer.pad_token_id
        )

    @classmethod
    def wrap(
        cls,
        policy: TrainablePolicy,
        base: BackendConfig,
        *,
        max_new_tokens: int,
        size: SketchSize | None = None,
        tracked: int = 32,
        reference: str | Path | None = None,
    ) -> Self:
        """A policy on a base model.

        Args:
            max_new_tokens: TRL's `max_completion_length`.
            size: of the sketches the policy was trained on.
            reference: folder of an older one, written by `save_pretrained`; TRL's KL penalty (beta > 0) loads it.

        Raises:
            InvalidValue: a policy that reads what transformers does not show, or a backend without a model.
            TrainingError: a policy without parameters.
        """
        size = size or SketchSize()
        config = PolicyLMConfig(
            base=to_dict(base), max_new_tokens=max_new_tokens, head=size.head, tail=size.tail, tracked=tracked
        )
        config.architectures = [cls.__name__]
        config._name_or_path = "" if reference is None else str(reference)
        return cls(config, policy, _loaded(base))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        config: PolicyLMConfig | None = None,
        base: BackendConfig | None = None,
        dtype: Any = None,
        **options: Any,
    ) -> Self:
        """A wrapped model from its folder; the base model is found again by its name, and must be the same one.

        Args:
            base: the base model elsewhere: another path, precision or device.
            options: of `AutoModel` and TRL, those that change nothing here (`UNUSED_OPTIONS`).

        Raises:
            CheckpointError: a damaged folder, or another base model.
            InvalidValue: `dtype` other than float32.
            UnknownName: any other option.
        """
        for name in options.keys() - UNUSED_OPTIONS:
            raise UnknownName("option of from_pretrained", name, {"base", "dtype", *UNUSED_OPTIONS})
        if dtype not in (None, "auto", "float32", torch.float32):
            raise InvalidValue("dtype", dtype, "float32", "policies compute in it; `base` sets the base model's")
        config = config or PolicyLMConfig.from_pretrained(folder)
        config._name_or_path = str(folder)
        if base is not None:
            config.base = to_dict(base)
        backend = _loaded(from_dict(BackendConfig, config.base or {}))
        check_compatible(Path(folder) / POLICY, fingerprint=backend.fingerprint)
        return cls(config, load_policy(Path(folder) / POLICY), backend)

    def save_pretrained(  # type: ignore[override]
        self, folder: str | Path, is_main_process: bool = True, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write the policy and how to find the base model: kilobytes.

        `policy/` is a policy folder like any other; `model.safetensors` holds the same weights under the names that
        `Trainer` resumes from.
        """
        if not is_main_process:
            return
        folder = Path(folder)
        self.config.save_pretrained(folder)
        tensors = self.state_dict() if state_dict is None else state_dict
        save_file({name: part.contiguous() for name, part in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
        sketch = {"head": self.config.head, "tail": self.config.tail}
        base_model = (self.config.base or {})["model"]
        save_policy(
            folder / POLICY, self.policy, base_model=base_model, fingerprint=self.backend.fingerprint, sketch=sketch
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.backend.tokenizer

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        fused_lm_head: bool = False,
    ) -> PolicyLMOutput:
        """Teacher forcing along completions, differentiable in the policy.

        Args:
            input_ids: (B, T) padded on either side.
            attention_mask: (B, T) 0 at padding.
            labels: (B, T) -100 at tokens that are not scored. A completion begins at its first label; None: at the
                second token of each row.
            fused_lm_head: TRL's word for log-probs and entropies instead of logits.

        Raises:
            DataError: a completion over the token budget, or without a prompt; see `asn_rl.replay.replay`.
        """
        found = texts(input_ids, attention_mask, labels)
        # Mixed precision is meant for the layers of a model in training; the base model has a precision of its own.
        with torch.autocast(self.backend.device.type, enabled=False):
            return score_texts(self.policy, self.backend, found, self.config.rollout, logits=not fused_lm_head)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Any:
        """`generate` of the base model, drawing as the policy says; settings of the base model's own
        `generation_config` do not act.

        Raises:
            ServingError: another sampler beside the policy.
            InvalidValue: another token budget than the policy's.
        """
        given = generation_config or self.generation_config
        budget = options.get("max_new_tokens", given.max_new_tokens)
        if budget != self.config.max_new_tokens:
            raise InvalidValue(
                "max_new_tokens", budget, f"{self.config.max_new_tokens}, as the model was wrapped",
                "the policy sees the tokens that are left; TRL calls it max_completion_length",
            )  # fmt: skip
        config = self.config
        base: Any = self.backend.model
        with (
            _own_settings(base, self.generation_config),
            decoding(base, self.policy, size=config.rollout.size, tracked=config.tracked),
        ):
            return base.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=given, **options)

    def activation_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Nothing: there are no activations of the base model to recompute."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep `forward` where TRL would put its own in its place.

        Raises:
            InvalidValue: TRL was asked to divide logits by a temperature.
        """
        if name == "forward" and is_fused_forward(value):
            temperature = inspect.getclosurevars(value.__func__).nonlocals["temperature"]
            if temperature != 1.0:
                raise InvalidValue(
                    "temperature", temperature, "1.0", "the policy alone decides how to sample; build a temperature "
                    "into it"
                )  # fmt: skip
            return
        super().__setattr__(name, value)


def is_fused_forward(value: Any) -> bool:
    """Whether this is the `forward` that `trl.trainer.utils.add_fused_lm_head` puts on a model."""
    function = getattr(value, "__func__", None)
    code, home = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    # Its name and module are made those of the model's class; code and globals stay its own.
    return home.get("__name__") == "trl.trainer.utils" and code is not None and code.co_name == "_fused_forward"


def _loaded(base: BackendConfig) -> HFBackend:
    backend = shared_backend(base)
    if not isinstance(backend, HFBackend):
        raise InvalidValue("base.kind", base.kind, "hf", "transformers generates with a model of its own")
    return backend


@contextmanager
def _own_settings(base: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Inside, `base` fills what a call leaves out from `settings`."""
    before = base.generation_config
    base.generation_config = settings
    try:
        yield
    finally:
        base.generation_config = before


AutoConfig.register(PolicyLMConfig.model_type, PolicyLMConfig)
AutoModelForCausalLM.register(PolicyLMConfig, PolicyCausalLM)
