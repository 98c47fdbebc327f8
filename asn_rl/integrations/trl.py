"""Stock `GRPOTrainer` and `RLOOTrainer` of TRL 1.15 and 1.16 on a decoding policy.

    import asn_rl.integrations.trl as asn_trl

    model = asn_trl.PolicyCausalLM.wrap(policy, BackendConfig(), max_new_tokens=64)
    trainer = GRPOTrainer(model, rewards, args=args, train_dataset=data, processing_class=model.tokenizer)
    asn_trl.check_trainer(trainer)
    trainer.train()

`check_trainer` refuses what would make the loss be of another distribution than the one that was drawn from, and then
measures it: the same completions, scored as they were generated and as TRL's loss scores them.

Reward functions of this library have TRL's signature. `with_ends` tells them which completions were truncated, as our
own rollouts do; without it, many take every completion for a finished one.

TRL differs from `asn_rl.training.grpo` in that every update runs the base model again, and that KL penalties are
estimates from the drawn tokens.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from trl import GRPOTrainer, RLOOTrainer  # type: ignore[attr-defined]  # TRL exports lazily

from asn_rl.errors import ConfigError, InvalidValue, TrainingError
from asn_rl.integrations.policy_lm import PolicyCausalLM, PolicyLMConfig, PolicyLMOutput
from asn_rl.protocols import RewardFunction
from asn_rl.replay import Mismatch

__all__ = ["PolicyCausalLM", "PolicyLMConfig", "PolicyLMOutput", "check_arguments", "check_trainer", "with_ends"]

NEUTRAL: dict[str, tuple[object, ...]] = {
    "do_sample": (True,),
    "temperature": (1.0, None),
    "top_p": (1.0, None),
    "top_k": (0, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0, None),
}
"""values of sampling settings that leave the distribution to the policy"""
HARMLESS = frozenset(
    {"max_new_tokens", "pad_token_id", "bos_token_id", "eos_token_id", "cache_implementation", "disable_compile"}
    | {"transformers_version", "_from_model_config"}
)
"""settings of a `GenerationConfig` that do not act on the distribution"""
ELSEWHERE = ("use_vllm", "use_transformers_continuous_batching")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
"""nats a token, mean absolute difference, by the base model's precision: half precision rounds a cached step and a
teacher-forced pass differently"""


def check_arguments(args: Any, model: PolicyCausalLM) -> None:
    """Refuse settings of a `GRPOConfig` or `RLOOConfig`; may be called before there is a trainer.

    Raises:
        InvalidValue: a sampling setting beside the policy, another token budget, or an engine that has no policy.
        ConfigError: a KL penalty without a reference.
    """
    for name in NEUTRAL.keys() - {"do_sample"}:
        _check_neutral(name, getattr(args, name), "")
    if args.max_completion_length != model.config.max_new_tokens:
        allowed = f"{model.config.max_new_tokens}, the max_new_tokens of the model"
        raise InvalidValue("max_completion_length", args.max_completion_length, allowed, "the policy sees what is left")
    for name in ELSEWHERE:
        if getattr(args, name):
            raise InvalidValue(name, True, "False", "that engine would draw from the base model, without the policy")
    if getattr(args, "cast_lm_head_to_fp32", False):
        raise InvalidValue("cast_lm_head_to_fp32", True, "False", "the base model's precision is that of its `base`")
    if args.beta != 0 and not model.config._name_or_path:
        raise ConfigError(
            f"beta={args.beta} needs a reference: give PolicyCausalLM.wrap(reference=FOLDER) an older model that "
            "save_pretrained wrote, or set beta=0"
        )


def check_trainer(trainer: GRPOTrainer | RLOOTrainer, *, prompts: int = 2) -> Mismatch:
    """Refuse what would train another distribution than the drawn one, and measure that they are the same.

    Completions of the first training prompts are drawn as the trainer draws them and scored by the trainer's own loss
    path. The global random state is left as it was.

    Args:
        prompts: how many training prompts to try.

    Returns:
        How far the two log-probs of the drawn tokens are apart.

    Raises:
        InvalidValue, ConfigError: see `check_arguments`; also generation settings, tools and roll-outs of one's own.
        TrainingError: the log-probs differ, or the loss gives the policy no gradient. TRL has then changed: use a
            version that this library was tested with.
    """
    model = _model_of(trainer)
    check_arguments(trainer.args, model)
    _check_placement(trainer, model)
    _check_generation(trainer.generation_config, "the trainer's generation setting")
    _check_generation(model.generation_config, "the model's generation_config")
    if trainer.beta != 0 and not isinstance(trainer.accelerator.unwrap_model(trainer.ref_model), PolicyCausalLM):
        allowed = "a PolicyCausalLM"
        raise InvalidValue("ref_model", type(trainer.ref_model).__name__, allowed, "the base model is no reference")
    rows = [row["prompt"] for row in itertools.islice(trainer.train_dataset, prompts)]  # type: ignore[arg-type]
    with torch.random.fork_rng():
        drawn, loss = _both_logprobs(trainer, model, trainer._tokenize_prompts(rows)[0])
    if not _reaches(loss, model):
        raise TrainingError("the loss of this version of TRL gives the policy no gradient; use trl 1.15 or 1.16")
    gap = (drawn - loss.detach()).abs()
    mismatch = Mismatch(gap.mean().item(), gap.max().item(), len(gap))
    if not mismatch.mean_absolute <= TOLERANCE[model.backend.model.dtype]:
        raise TrainingError(
            f"log-probs of {mismatch.tokens} drawn tokens differ by {mismatch.mean_absolute:.3g} nats a token (at most "
            f"{mismatch.largest:.3g}) from those in TRL's loss: it would train another distribution than it draws "
            "from. Use trl 1.15 or 1.16, and a policy without randomness of its own (dropout)"
        )
    return mismatch


def with_ends(function: RewardFunction, model: PolicyCausalLM) -> Callable[..., list[float | None]]:
    """The same reward function with the column `terminated`, which TRL does not give: False at the token limit."""

    @functools.wraps(function)
    def rewards(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float | None]:
        columns["terminated"] = [ids[-1] in model.backend.eos_token_ids for ids in completion_ids]
        return function(prompts, completions, completion_ids, **columns)

    return rewards


def _model_of(trainer: GRPOTrainer | RLOOTrainer) -> PolicyCausalLM:
    if not isinstance(trainer, GRPOTrainer | RLOOTrainer):
        raise InvalidValue("trainer", type(trainer).__name__, "a GRPOTrainer or RLOOTrainer")
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PolicyCausalLM):
        raise InvalidValue("trainer.model", type(model).__name__, "a PolicyCausalLM", "make it with its `wrap`")
    return model


def _check_placement(trainer: Any, model: PolicyCausalLM) -> None:
    for name in ("rollout_func", "tools", "environment_factories"):
        if getattr(trainer, name, None):
            raise InvalidValue(name, "given", "left out", "the policy's place in a completion would be unknown")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigError("DeepSpeed and FSDP would shard a policy of kilobytes; use plain data parallelism (DDP)")
    home, device = model.backend.device, trainer.accelerator.device
    if home.type != device.type or (home.index or 0) != (device.index or 0):
        raise InvalidValue("base.device", str(home), str(device), "the base model must be where the trainer computes")


def _check_generation(settings: GenerationConfig, what: str) -> None:
    for name, value in settings.to_diff_dict().items():
        if name not in HARMLESS:
            _check_neutral(name, value, f"{what} ")


def _check_neutral(name: str, value: object, what: str) -> None:
    allowed = NEUTRAL.get(name, (None,))
    if value not in allowed:
        raise InvalidValue(
            f"{what}{name}", value, " or ".join(map(str, allowed)), "the policy alone decides how to sample"
        )


def _reaches(loss: Tensor, model: PolicyCausalLM) -> bool:
    if not loss.requires_grad:
        return False
    gradients = torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True)
    return any(part is not None and bool((part != 0).any()) for part in gradients)


def _both_logprobs(trainer: Any, model: PolicyCausalLM, prompt_ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(S,) log-probs of completions of these prompts: as they were drawn, and by the loss path."""
    padded = model.tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt")
    padded = padded.to(trainer.accelerator.device)
    width = padded["input_ids"].shape[1]
    settings = copy.deepcopy(trainer.generation_config)
    settings.output_scores = settings.return_dict_in_generate = True
    out = model.generate(**padded, generation_config=settings)
    completions = out.sequences[:, width:]
    ends = torch.isin(completions, torch.tensor(trainer.eos_token_ids, device=completions.device)).long()
    mask = ends.cumsum(1) - ends == 0  # up to the first end of sequence, that one included
    scores = torch.stack(out.scores, 1).log_softmax(-1)
    drawn = scores.gather(-1, completions.unsqueeze(-1)).squeeze(-1)
    whole = torch.cat([padded["attention_mask"], mask.long()], 1)
    loss = trainer._get_per_token_logps_and_entropies(trainer.model, out.sequences, whole, completions.shape[1])[0]
    return drawn[mask], loss[mask]
