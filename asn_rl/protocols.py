"""What a plug-in must provide: policies, backends and reward functions are known by these alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from asn_rl.types import Messages, Observation, PolicyOutput, State


@runtime_checkable
class Policy(Protocol):
    """Maps an observation to a distribution over points. Usually an `nn.Module` in fp32."""

    needs: frozenset[str]
    """optional observation entries it reads, a subset of `asn_rl.types.OPTIONAL_INPUTS`"""

    def initial_state(self, batch_size: int, device: torch.device) -> State | None:
        """State before the first token; None for a stateless policy."""
        ...

    def __call__(self, obs: Observation, state: State | None = None) -> PolicyOutput: ...


@runtime_checkable
class TrainablePolicy(Policy, Protocol):
    """A policy with parameters that can be saved: an `nn.Module` with `save_pretrained`."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor], /) -> Any: ...

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        base_model: str | None = None,
        fingerprint: str | None = None,
        sketch: dict[str, int] | None = None,
        notes: str = "",
    ) -> None:
        """Write `config.json` and `model.safetensors` (see `asn_rl.checkpoint`) into an existing or new folder."""
        ...


class Session(Protocol):
    """A batch of generations under way on a backend. Rows leave as they end."""

    logits: Tensor
    """(B, V) next-token logits of the active rows"""
    hidden: Tensor | None
    """(B, D) last hidden state of the active rows, or None when it was not asked for"""
    layer_logits: Tensor | None
    """(B, L, V) logits of the earlier layers that were asked for, through the model's own head; None: of none"""

    def drop(self, finished: Tensor) -> Tensor:
        """Remove rows where `finished` (B,) is True. Returns the (B',) old indices of the remaining rows, in their
        new order, which need not be ascending."""
        ...

    def step(self, tokens: Tensor) -> None:
        """Append one token (B,) to every active row and compute the next `logits`."""
        ...


@dataclass(frozen=True)
class Scored:
    """What teacher forcing says of one completion of T tokens."""

    index: int
    logits: Tensor
    """(T, V) that predict each of its tokens"""
    hidden: Tensor | None
    """(T, D) hidden states, if asked for"""
    layer_logits: Tensor | None
    """(T, L, V) of the earlier layers that were asked for"""


class LogitsBackend(Protocol):
    """Where next-token distributions come from: a frozen base model and its tokenizer."""

    vocab_size: int
    """length of a logits row, vocabulary padding included"""
    max_context: int
    """largest number of prompt and completion tokens together"""
    eos_token_ids: frozenset[int]
    hidden_size: int
    device: torch.device
    fingerprint: str
    """hash of configuration and vocabulary: policies trained on one base model are refused on another"""
    batch_invariant: bool
    """True: a row's logits do not depend, bit for bit, on the other rows of its batch"""

    def encode(self, content: str | Messages) -> list[int]:
        """Prompt content to token ids, through the chat template where one is used."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Completion ids to text, special tokens left out."""
        ...

    def start(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        repeats: int = 1,
        hidden: bool = False,
        layers: Sequence[int] = (),
    ) -> Session:
        """Prefill; row i * repeats + g is the g-th generation of prompt i. `layers` count from 1."""
        ...

    def score_many(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        hidden: bool = False,
        layers: Sequence[int] = (),
    ) -> Iterator[Scored]:
        """Teacher forcing, in any order. A completion without tokens is passed over."""
        ...


class RewardFunction(Protocol):
    """TRL's signature. `None` means not applicable: masked, never scored as a number.

    `columns` holds the data set's columns as lists, and from our rollouts also `terminated` (list of bool). Prompts
    and completions are strings, or message lists where the data set has message lists.

    An attribute `compares` says that scores depend on other completions of the call: "group" (of the column `group`,
    else the prompt) or "prompt". Where labelling chooses on some seeds and scores on others, such scores know of each
    other: a group's halves are then scored by themselves, too.
    """

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]: ...
