"""Frozen dataclasses that travel between the parts of the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from asn_rl.ops.sketch import Sketch

Messages = list[dict[str, str]]
State = dict[str, Tensor]
"""What a stateful policy carries from step to step: tensors whose first axis is the batch."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a data set."""

    id: str
    """stable key, unique in its data set"""
    content: str | Messages
    """text (a user turn, or raw text when the backend's chat template is off), or chat messages"""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """the row's other columns, handed to reward functions by name"""

    @property
    def last_turn(self) -> str:
        """The text, or the content of the last message: what a reader takes for the prompt."""
        return self.content if isinstance(self.content, str) else self.content[-1]["content"]


Key = tuple[str, str, int]
"""(prompt id, heuristic, seed) of a candidate"""


@dataclass(frozen=True)
class Candidate:
    """One completion of a prompt under a heuristic, before anything is said of its worth."""

    prompt_id: str
    heuristic: str
    seed: int
    """keys the draws of this completion; with prompt and heuristic it decides the text"""
    completion: str
    completion_ids: Sequence[int] | None
    """as sampled, end-of-sequence token included; None: a server that returns text only"""
    terminated: bool
    """True: ended by an end-of-sequence token or a stop string; False: truncated by the token limit"""
    history: Messages | None = None
    """the messages it answers where they are its own, in a later turn of a conversation; None: those of its prompt"""

    @property
    def key(self) -> Key:
        return (self.prompt_id, self.heuristic, self.seed)


@dataclass(frozen=True)
class Observation:
    """What a policy sees before it chooses; leading axes `(...)` are free (batch, or batch and time).

    Optional entries are captured only when the policy lists them in `needs`.
    """

    sketch: Sketch
    context: Tensor
    """(..., C) fp32; entries and units in `asn_rl.ops.context.CONTEXT`"""
    hidden: Tensor | None = None
    """(..., D) fp32 last hidden state of the base model (what its output embedding reads)"""
    prompt_embedding: Tensor | None = None
    """(..., D) fp32 hidden state at the last prompt token"""
    condition: Tensor | None = None
    """(..., n) fp32 one-hot or soft choice, or numbers such as a target, that the policy is conditioned on"""
    last_point: Tensor | None = None
    """(...) int64 point that was drawn at the step before; -1 at the first"""
    history: Tensor | None = None
    """(..., N, 2) fp32, entries as in `asn_rl.ops.history.HISTORY`: what the generated text says of a point's token"""
    layer_logprobs: Tensor | None = None
    """(..., N, L) fp32 log-probability of a point's typical token at L earlier layers, through the model's own head"""

    def index(self, rows: Tensor | slice) -> Observation:
        """The same observation at some leading indices."""
        optional = {name: _at(getattr(self, name), rows) for name in OPTIONAL_INPUTS}
        return Observation(self.sketch.index(rows), self.context[rows], **optional)

    def to(self, device: torch.device | str) -> Observation:
        sketch = Sketch(*(getattr(self.sketch, f.name).to(device) for f in fields(Sketch)))
        present = {name: part for name in OPTIONAL_INPUTS if (part := getattr(self, name)) is not None}
        return Observation(sketch, self.context.to(device), **{name: part.to(device) for name, part in present.items()})


PER_TOKEN = ("hidden", "last_point", "history", "layer_logprobs")
"""optional entries of an observation that change from token to token"""
PER_COMPLETION = ("prompt_embedding", "condition")
OPTIONAL_INPUTS = frozenset(PER_TOKEN + PER_COMPLETION)


def _at(tensor: Tensor | None, rows: Tensor | slice) -> Any:
    return None if tensor is None else tensor[rows]


@dataclass(frozen=True)
class PolicyOutput:
    """A policy's answer."""

    logprobs: Tensor
    """(..., N) normalised log-probabilities over points; -inf where a point is empty or cut"""
    state: State | None = None
    """state for the next step; None for a stateless policy"""
    value: Tensor | None = None
    """(...) estimate of the return, from policies that have a critic"""


@dataclass(frozen=True)
class Trajectories:
    """Completions as they were sampled. B completions with S tokens in all, stored without padding.

    Per-token tensors have a first axis of S, ordered by completion, then by time. Nothing here is recomputed:
    `behaviour_logprobs` are those of the distribution that was drawn from.
    """

    prompts: Sequence[Prompt]
    """B prompts, one a completion (repeated within a group)"""
    sample: Sequence[int]
    """B indices of the completion within its group"""
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    completions: Sequence[str]
    terminated: Tensor
    """(B,) bool, True: ended by an end-of-sequence token or a stop string; False: truncated by the token limit"""
    observations: Observation
    """per-token observations, except `prompt_embedding` and `condition`, which are (B, ...)"""
    points: Tensor
    """(S,) int64 chosen points"""
    behaviour_logprobs: Tensor
    """(S,) fp32 log-probability of the chosen token under the policy, over the vocabulary"""
    base_logprobs: Tensor
    """(S,) fp32 log-probability of the chosen token under the base model"""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """per-token tensors that a caller asked the rollout to record"""
    recorded: bool = True
    """`behaviour_logprobs` were recorded when the tokens were drawn; False: they are those of the policy that a text of
    unknown origin was replayed under, and no propensities"""

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64 tokens per completion, the end-of-sequence token included."""
        return torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.long)

    @property
    def rows(self) -> Tensor:
        """(S,) int64 index of each token's completion."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)

    def per_token(self, which: Tensor | slice = slice(None)) -> Observation:
        """Observations of some tokens, per-completion entries spread over their tokens."""
        return self._observations(which, self.rows.to(self.points.device)[which])

    def _observations(self, tokens: Tensor | slice, rows: Tensor) -> Observation:
        """Per-token entries at `tokens`, per-completion entries at `rows`."""
        obs = self.observations
        changing = {name: _at(getattr(obs, name), tokens) for name in PER_TOKEN}
        fixed = {name: _at(getattr(obs, name), rows) for name in PER_COMPLETION}
        return Observation(obs.sketch.index(tokens), obs.context[tokens], **changing, **fixed)

    def select(self, keep: Sequence[int]) -> Trajectories:
        """Some completions, in the order given."""
        index = torch.as_tensor(list(keep), dtype=torch.long)
        lengths, starts = self.lengths, self.lengths.cumsum(0) - self.lengths
        spans = [torch.arange(int(starts[i]), int(starts[i] + lengths[i])) for i in index.tolist()]
        tokens = torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)
        rows = index.tolist()
        return Trajectories(
            prompts=[self.prompts[i] for i in rows],
            sample=[self.sample[i] for i in rows],
            prompt_ids=[self.prompt_ids[i] for i in rows],
            completion_ids=[self.completion_ids[i] for i in rows],
            completions=[str(self.completions[i]) for i in rows],
            terminated=self.terminated[index],
            observations=self._observations(tokens, index),
            points=self.points[tokens],
            behaviour_logprobs=self.behaviour_logprobs[tokens],
            base_logprobs=self.base_logprobs[tokens],
            extras={name: part[tokens] for name, part in self.extras.items()},
            recorded=self.recorded,
        )

    def to(self, device: torch.device | str) -> Trajectories:
        """The same trajectories with their tensors on another device."""
        return replace(
            self,
            terminated=self.terminated.to(device),
            observations=self.observations.to(device),
            points=self.points.to(device),
            behaviour_logprobs=self.behaviour_logprobs.to(device),
            base_logprobs=self.base_logprobs.to(device),
            extras={name: part.to(device) for name, part in self.extras.items()},
        )

    def with_logprobs(self, logprobs: Tensor) -> Trajectories:
        """The same trajectories with (S,) behaviour log-probs that were recorded elsewhere."""
        return replace(self, behaviour_logprobs=logprobs, recorded=True)

    def with_condition(self, condition: Tensor) -> Trajectories:
        """The same trajectories, seen under a (B, n) condition."""
        return replace(self, observations=replace(self.observations, condition=condition))
