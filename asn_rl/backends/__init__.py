"""Where next-token distributions come from. `load_backend` makes one from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from asn_rl.protocols import LogitsBackend
from asn_rl.registry import Registry

BACKENDS = Registry(
    "backend",
    {"hf": "asn_rl.backends.hf:HFBackend", "toy": "asn_rl.backends.toy:ToyBackend"},
)


@dataclass(frozen=True)
class Example:
    """A turn that shows the base model how to answer."""

    user: str
    """what is asked"""
    assistant: str
    """how it is answered"""


@dataclass(frozen=True)
class BackendConfig:
    """The frozen base model."""

    kind: str = "hf"
    """backend: hf (transformers), toy (fixed table), or module:attribute"""
    model: str = "smollm2-135m-instruct"
    """embedded short name, hub id or folder of a causal language model"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the base model; auto: bfloat16 on GPUs and on CPUs with bf16 matrix units, else float32"""
    device: str = "cpu"
    """torch device, for example cpu, cuda, cuda:1"""
    chat_template: bool = True
    """render prompts through the tokenizer's chat template; off: prompts are raw text"""
    system_prompt: str | None = None
    """system turn put before text prompts; null leaves the template's own default"""
    examples: tuple[Example, ...] = ()
    """turns {user, assistant} put before text prompts"""


def load_backend(config: BackendConfig) -> LogitsBackend:
    """The backend a configuration describes."""
    return BACKENDS.resolve(config.kind).from_config(config)


@lru_cache(maxsize=4)
def shared_backend(config: BackendConfig) -> LogitsBackend:
    """The process-wide backend of this configuration: loaded once, however often it is asked for."""
    return load_backend(config)
