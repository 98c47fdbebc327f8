"""Completions under way on one backend: rows begin and end independently, one step draws a token in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asn_envs.cohorts import Cohorts
from asn_envs.scoring import Episode
from asn_envs.spaces import resolve_points
from asn_rl.observing import history_entry, layer_entry
from asn_rl.ops.context import context_vector
from asn_rl.ops.history import HISTORY, empty_history, remember
from asn_rl.ops.sketch import PointMap, Sketch, build_sketch, choose_tokens
from asn_rl.protocols import LogitsBackend
from asn_rl.rollout import RolloutConfig, captured_layers
from asn_rl.types import Observation, Prompt


@dataclass(frozen=True)
class Drawn:
    """What one step did, for all R rows; tensors (R,) on the backend's device."""

    moved: Tensor
    """bool, the row was under way and drew a token; where it was not, the other entries mean nothing"""
    tokens: Tensor
    """int64 token ids"""
    base_logprobs: Tensor
    """fp32 nats, log-probability of the token under the base model"""
    empty_point: Tensor
    """bool, the action was an empty point and another point was drawn from"""
    terminated: Tensor
    """bool, the token ended the sequence"""
    truncated: Tensor
    """bool, the token was the last of the budget and did not end the sequence"""


class Generation:
    """R completions under way on a backend. The policy is elsewhere: it reads `observation` and hands in points.

    Args:
        limits: sketch size and token budget, the end-of-sequence token included; `budgets` may lower a row's after
            `begin`. With "history" among the needs a sketch has `tracked` points more.
        needs: optional observation entries to capture, among `asn_envs.task.NEEDS`.
    """

    def __init__(
        self, backend: LogitsBackend, limits: RolloutConfig, rows: int, needs: frozenset[str] = frozenset()
    ) -> None:
        self.backend, self.size, self.budget, self.needs = backend, limits.size, limits.max_new_tokens, needs
        budget, tracked, self._layers = limits.max_new_tokens, limits.tracked, captured_layers(needs, limits)
        self.points = self.size.points + (tracked if "history" in needs else 0)
        self.prompts: list[Prompt | None] = [None] * rows
        self.completion_ids: list[list[int]] = [[] for _ in range(rows)]
        reads_hidden = bool(needs & {"hidden", "prompt_embedding"})
        self.cohorts = Cohorts(backend, hidden=reads_hidden, layers=self._layers)
        device = backend.device
        self._history = empty_history(rows, tracked, device) if "history" in needs else None
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        self.budgets = torch.full((rows,), budget, device=device)
        self._position = torch.zeros(rows, dtype=torch.long, device=device)
        self._last_surprise = torch.zeros(rows, device=device)
        self._surprise_sum = torch.zeros(rows, device=device)
        self._embedding = torch.zeros(rows, backend.hidden_size, device=device)
        self._eos = torch.tensor(sorted(backend.eos_token_ids), device=device)
        self._now: tuple[Tensor, Tensor, Sketch, PointMap] | None = None

    @torch.no_grad()
    def begin(self, rows: Sequence[int], prompts: Sequence[Prompt], prompt_ids: Sequence[Sequence[int]]) -> None:
        """Start completions in some rows, abandoning what is under way there; one prefill for all of them."""
        index = torch.tensor(rows, device=self.active.device)
        fresh = torch.zeros_like(self.active).index_fill_(0, index, True)
        self.cohorts.drop(fresh)
        session = self.cohorts.add(index, prompt_ids)
        if "prompt_embedding" in self.needs and session.hidden is not None:
            self._embedding[index] = session.hidden
        for row, prompt in zip(rows, prompts, strict=True):
            self.prompts[row], self.completion_ids[row] = prompt, []
        self.active = self.active | fresh
        self.budgets[index] = self.budget
        if self._history is not None:
            self._history = self._history.put(
                index, empty_history(len(rows), self._history.tokens.shape[-1], index.device)
            )
        self._position[index] = 0
        self._last_surprise[index] = 0.0
        self._surprise_sum[index] = 0.0
        self._now = None

    @torch.no_grad()
    def advance(self, actions: Tensor, uniforms: Tensor) -> Drawn:
        """Draw one token in every row under way, then run the base model on those that go on.

        Args:
            actions: (R,) int64 points; empty ones are replaced as `resolve_points` says.
            uniforms: (R,) float64 in [0, 1).
        """
        rows, logits, sketch, point_map = self._sketched()
        points, replaced = resolve_points(actions[rows], sketch.mask)
        chosen = choose_tokens(logits, point_map, points, uniforms[rows])
        base = (logits.gather(-1, chosen.unsqueeze(-1)).float() - point_map.log_normalizer).squeeze(-1)

        if self._history is not None:
            self._history = self._history.put(rows, remember(self._history.index(rows), chosen, self._position[rows]))
        self._position[rows] += 1
        self._last_surprise[rows] = -base
        self._surprise_sum[rows] -= base
        for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
            self.completion_ids[row].append(token)

        moved, tokens = self.active, self._spread(rows, chosen)
        terminated = moved & torch.isin(tokens, self._eos)
        truncated = moved & ~terminated & (self._position >= self.budgets)
        ended = terminated | truncated
        self.active = moved & ~ended
        self.cohorts.drop(ended)
        self.cohorts.step(tokens)
        self._now = None
        return Drawn(moved, tokens, self._spread(rows, base), self._spread(rows, replaced), terminated, truncated)

    @torch.no_grad()
    def observation(self) -> Observation:
        """What a policy sees, for all R rows; those that have ended see what `last_observation` says."""
        if not len(self.cohorts):
            return self.last_observation()
        rows, logits, sketch, point_map = self._sketched()
        seen, entries = (logits, sketch, point_map), dict[str, Tensor]()
        if "hidden" in self.needs:
            entries["hidden"] = self.cohorts.hidden
        if self._history is not None:
            past = self._history.index(rows)
            entries["history"] = history_entry(*seen, past, self._position[rows].unsqueeze(-1))
        if self._layers:
            entries["layer_logprobs"] = layer_entry(*seen, self.cohorts.layer_logits)
        spread = {name: self._spread(rows, part) for name, part in entries.items()}
        return self._observe(_overwritten(self._certain(), rows, sketch), **spread)

    @torch.no_grad()
    def last_observation(self) -> Observation:
        """What is seen after the last token, for all R rows: one point of probability 1, and the final counts.

        No base-model forward is spent on it, and a distribution it is, so that no policy meets NaN.
        """
        rest = {"hidden": (self._embedding.shape[-1],), "history": (self.points, len(HISTORY))}
        rest["layer_logprobs"] = (self.points, len(self._layers))
        zeros = {name: self._embedding.new_zeros(len(self.active), *rest[name]) for name in rest.keys() & self.needs}
        return self._observe(self._certain(), **zeros)

    def episode(self, row: int, terminated: bool) -> Episode:
        """The completion of a row that has ended."""
        prompt, ids = self.prompts[row], self.completion_ids[row]
        assert prompt is not None
        return Episode(prompt, tuple(ids), self.backend.decode(ids), terminated)

    def text(self, row: int) -> str:
        """Prompt and text so far of a row; empty before its first prompt."""
        prompt = self.prompts[row]
        if prompt is None:
            return ""
        content = prompt.content
        if not isinstance(content, str):
            content = "\n".join(f"{message['role']}: {message['content']}" for message in content)
        return f"{content}\n{self.backend.decode(self.completion_ids[row])}"

    def clear(self) -> None:
        """Abandon all rows and free the base model's caches."""
        self.cohorts.clear()
        self.active = torch.zeros_like(self.active)
        self._now = None

    def _sketched(self) -> tuple[Tensor, Tensor, Sketch, PointMap]:
        """(B,) rows under way, their logits (B, V), sketch and point map."""
        if self._now is None:
            logits = self.cohorts.logits
            rows = self.cohorts.rows
            own = None if self._history is None else self._history.tokens[rows]
            self._now = (rows, logits, *build_sketch(logits, self.size, own))
        return self._now

    def _observe(self, sketch: Sketch, **entries: Tensor) -> Observation:
        left = self.budgets - self._position
        context = context_vector(sketch, self._position, left, self._last_surprise, self._surprise_sum)
        embedding = self._embedding.clone() if "prompt_embedding" in self.needs else None
        return Observation(sketch, context, prompt_embedding=embedding, **entries)

    def _certain(self) -> Sketch:
        log_mass = torch.full((len(self.active), self.points), -torch.inf, device=self.active.device)
        log_mass[:, 0] = 0.0
        return Sketch(log_mass, torch.zeros_like(log_mass), torch.zeros_like(log_mass))

    def _spread(self, rows: Tensor, values: Tensor) -> Tensor:
        """(B, ...) values of the rows under way -> (R, ...), zero elsewhere."""
        return values.new_zeros(len(self.active), *values.shape[1:]).index_copy_(0, rows, values)


def _overwritten(sketch: Sketch, rows: Tensor, news: Sketch) -> Sketch:
    return Sketch(
        sketch.log_mass.index_copy(0, rows, news.log_mass),
        sketch.log_count.index_copy(0, rows, news.log_count),
        sketch.inner_entropy.index_copy(0, rows, news.inner_entropy),
    )
