"""What lm-eval's model `asn` is told: names to objects, and what a task's generation settings may ask for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from asn_rl.checkpoint import check_compatible, load_policy
from asn_rl.errors import InvalidValue, UnknownName
from asn_rl.protocols import LogitsBackend, Policy
from asn_rl.registry import load_attribute
from asn_rl.rollout import RolloutConfig

RULES: dict[str, list[dict[str, Any]]] = {"greedy": [{"name": "greedy"}], "T=1": []}
"""static rules that need no file; T=1 is the base model"""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""what tasks call the token limit; the first one given counts, as in lm-eval's own models"""
NEUTRAL: dict[str, tuple[float, ...]] = {
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "num_beams": (1,),
}
"""values of sampling settings that leave the distribution to the policy; temperature 0 is how tasks say greedy"""

logger = logging.getLogger("lm_eval.asn")  # below lm-eval's own, whose handler and level it shares


@dataclass(frozen=True)
class AsnArguments:
    """What `--model_args` takes."""

    policy: str
    """policy folder; greedy; T=1; or the name of a pipeline in `pipelines`"""
    pipelines: str | None = None
    """YAML file of static rules, as `asn-rl grid` writes it"""
    model: str = "smollm2-135m-instruct"
    """base model: embedded short name, hub id or folder"""
    backend: str = "hf"
    """hf (transformers), toy, or module:attribute"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the base model"""
    device: str = "cpu"
    """torch device; also `--device`"""
    seed: int = 0
    """keys the draws, with task, row and repeat; lm-eval's `--seed` does not act on them"""
    batch_size: int = 64
    """completions decoded at a time; also `--batch_size`, which is 1 where nobody says"""
    max_gen_toks: int = 256
    """token limit of tasks that name none, as in lm-eval's own models"""
    head: int | None = None
    """sketch points of their own; null: as the policy was trained, else 64"""
    tail: int | None = None
    """bins below the head; null: as the policy was trained, else 32"""
    layers: tuple[int, ...] = ()
    """earlier layers that the policy reads, for example layers=[8,16]"""


def load_named_policy(arguments: AsnArguments, backend: LogitsBackend) -> tuple[Policy, dict[str, int]]:
    """A policy by name, and the size of the sketch it reads."""
    given = {name: size for name in ("head", "tail") if (size := getattr(arguments, name)) is not None}
    name = arguments.policy
    if Path(name).is_dir():
        trained = check_compatible(name, fingerprint=backend.fingerprint)
        return load_policy(name), {**(trained.sketch or {}), **given}
    rules = {rule: load_attribute("asn_policies:Pipeline")(steps) for rule, steps in RULES.items()}
    if arguments.pipelines is not None:
        read = load_attribute("asn_policies.heuristics:read_pipelines")
        rules |= {pipeline.title: pipeline for pipeline in read(arguments.pipelines)}
    if name not in rules:
        advice = "Or give the folder of a policy, or a file that names it: pipelines=FILE."
        raise UnknownName("policy", name, rules, advice)
    return rules[name], given


def lm_eval_options(additional: Mapping[str, Any]) -> dict[str, Any]:
    """What lm-eval hands on of its own options: the batch size as text, and cuda:0 where no device was named."""
    given = {name: value for name, value in additional.items() if value is not None}
    size = given.get("batch_size")
    if size is not None:
        if not str(size).isdecimal():
            raise InvalidValue("batch_size", size, "a whole number", "trying out sizes ('auto') is not offered")
        given["batch_size"] = int(size)
    if str(given.get("device")).startswith("cuda") and not torch.cuda.is_available():
        logger.warning("there is no CUDA device; decoding on the CPU")
        del given["device"]
    return given


def decoding(config: RolloutConfig, gen_kwargs: Mapping[str, Any]) -> RolloutConfig:
    """The decoding that a task asks for: its limit and its stop strings, beside those of `config`.

    Raises:
        UnknownName, InvalidValue: it asks for sampling, which is the policy's.
    """
    kwargs = dict(gen_kwargs)
    until = kwargs.pop("until", None) or []
    lengths = [value for name in LENGTHS if (value := kwargs.pop(name, None)) is not None]
    kwargs.pop("do_sample", None)
    for name, value in kwargs.items():
        if name not in NEUTRAL:
            known = ("until", *LENGTHS, "do_sample", *NEUTRAL)
            raise UnknownName("generation setting", name, known, "Only the policy decides how tokens are drawn.")
        if value not in NEUTRAL[name]:
            allowed = " or ".join(map(str, NEUTRAL[name]))
            advice = f"only the policy samples: pass --gen_kwargs {name}={NEUTRAL[name][-1]}, or a pipeline with it"
            raise InvalidValue(f"gen_kwargs {name}", value, allowed, advice)
    return replace(
        config,
        max_new_tokens=int(lengths[0]) if lengths else config.max_new_tokens,
        stop=tuple(dict.fromkeys([*config.stop, *([until] if isinstance(until, str) else until)])),
    )


def asks_for_greedy(gen_kwargs: Mapping[str, Any]) -> bool:
    """Whether a task wants the most probable tokens."""
    return gen_kwargs.get("do_sample") is False or gen_kwargs.get("temperature") == 0
