"""What a wrapped model is configured by, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.generic import ModelOutput

from asn_rl.rollout import RolloutConfig

CUT = -50.0
"""nats; the log-prob reported for a token that the policy cuts: ratios and entropies computed from -inf would be NaN"""


class PolicyLMConfig(PreTrainedConfig):
    """What `config.json` of a wrapped model says."""

    model_type = "asn_policy"
    base: dict[str, Any] | None = None
    """the base model: `BackendConfig` as plain values"""
    max_new_tokens: int = 28
    """token budget of a completion; the policy sees what is left of it"""
    head: int = 64
    tail: int = 32
    tracked: int = 32
    """see `RolloutConfig`"""
    auto_map: dict[str, str] = field(default_factory=dict)
    """empty; TRL reads it of every class outside transformers"""

    @property
    def rollout(self) -> RolloutConfig:
        return RolloutConfig(self.max_new_tokens, self.head, self.tail, tracked=self.tracked)


@dataclass
class PolicyLMOutput(ModelOutput):
    """What a wrapped model's `forward` returns; nats, fp32."""

    loss: Tensor | None = None
    """() mean negative log-prob of the labelled tokens"""
    logits: Tensor | None = None
    """(B, T, V) log-probs of the token after each column, `CUT` where it cuts; 0 where there is no completion"""
    log_probs: Tensor | None = None
    """(B, T - 1) log-prob of each labelled token, the first column left out; 0 elsewhere"""
    entropy: Tensor | None = None
    """(B, T - 1) entropy over the vocabulary where each of them was drawn"""
