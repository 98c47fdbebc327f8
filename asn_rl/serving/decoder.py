"""One policy over the logits of a batch that changes from step to step."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from asn_rl.checkpoint import check_compatible, load_policy, read_policy_config
from asn_rl.errors import InvalidValue, ServingError
from asn_rl.observing import checked_needs, history_entry
from asn_rl.ops.context import context_vector
from asn_rl.ops.history import History, empty_history, remember
from asn_rl.ops.sketch import PointMap, SketchSize, build_sketch, expand, points_of
from asn_rl.placement import device_of, place
from asn_rl.protocols import Policy, TrainablePolicy
from asn_rl.rollout import checked_probs
from asn_rl.serving.table import LastLogits, Table
from asn_rl.types import Observation

SERVED_INPUTS = frozenset({"last_point", "history"})
"""optional observation entries that logits and generated tokens give; engines hand over nothing else"""


@dataclass(frozen=True)
class Row:
    """One request of a batch, before its next token."""

    key: Hashable
    """names the request, from its first token to its last"""
    tokens: Sequence[int]
    """generated so far, prompt not included"""
    budget: int
    """tokens it may generate in all"""


class PolicyDecoder:
    """What a rollout does with a policy, where somebody else runs the base model and draws the tokens.

    Requests join with no token and leave when `forget` names them; in between, each call must see one token more of
    every row it is given than the call before. Rows may be left out of calls and come back.

    Args:
        policy: moved to the device of the logits.
        size: of the sketches it was trained on.
        tracked: see `RolloutConfig.tracked`.

    Raises:
        InvalidValue: the policy reads what no engine hands over (hidden states, earlier layers, a condition).
    """

    def __init__(self, policy: Policy, *, size: SketchSize | None = None, tracked: int = 32) -> None:
        self.policy, self.size, self.tracked = policy, size or SketchSize(), tracked
        self.needs = checked_needs(policy)
        if self.needs - SERVED_INPUTS:
            raise InvalidValue(
                "policy.needs", sorted(self.needs), f"some of {sorted(SERVED_INPUTS)}",
                "inference engines hand logits and tokens to a processor, and nothing else",
            )  # fmt: skip
        self._table, self._logits = Table(), LastLogits()

    def forget(self, keys: Collection[Hashable]) -> None:
        """Release what is known of requests that have ended."""
        self._table.release(keys)
        self._logits.release(keys)

    @property
    def requests(self) -> list[Hashable]:
        """Requests that are under way."""
        return self._table.keys

    @torch.no_grad()
    def __call__(self, logits: Tensor, rows: Sequence[Row], *, in_place: bool = False) -> Tensor:
        """(B, V) fp32 log-weights of the policy's distribution, for next-token logits (B, V); -inf where it cuts.

        Args:
            in_place: fp32 logits may be overwritten with the answer; nothing is, where an error is raised.

        Raises:
            ServingError: a row whose beginning was not seen, or that has a token more or fewer than it should.
            InvalidLogits, InvalidPolicyOutput: logits or an answer that are no distribution. Nothing is remembered of
                this call then.
        """
        if device_of(self.policy) != logits.device:
            place(self.policy, logits.device)
        steps = [len(row.tokens) for row in rows]
        self._check(rows, steps)
        position = torch.tensor(steps, device=logits.device)
        left = torch.tensor([row.budget for row in rows], device=logits.device) - position
        known = self._seen(logits, rows, position)
        history = self._history(known)
        sketch, point_map = build_sketch(logits, self.size, None if history is None else history.tokens)
        obs = Observation(
            sketch,
            context_vector(sketch, position, left, known["last"], known["total"]),
            last_point=known["point"] if "last_point" in self.needs else None,
            history=None if history is None else history_entry(logits, sketch, point_map, history, position[:, None]),
        )
        state = {name.removeprefix("state/"): part for name, part in known.items() if name.startswith("state/")}
        output = self.policy(obs, state or None)
        checked_probs(self.policy, output.logprobs)
        following = known | {f"state/{name}": part for name, part in (output.state or {}).items()}
        following |= {"steps": position + 1, **_parts(point_map)}
        keys = [row.key for row in rows]
        self._table.write(keys, following)
        self._logits.write(keys, logits)
        shift = torch.where(sketch.mask, output.logprobs - sketch.log_mass, 0.0)
        return expand(logits, point_map, shift, logits if in_place and logits.dtype == torch.float32 else None)

    def _check(self, rows: Sequence[Row], steps: Sequence[int]) -> None:
        if len({row.key for row in rows}) != len(rows):
            raise ServingError("two rows of a batch have the same key; give every request a key of its own")
        for row, count in zip(rows, steps, strict=True):
            expected = self._table.steps(row.key) if count else 0
            if expected != count:
                seen = "was not seen from its first token on" if expected is None else f"should have {expected}"
                raise ServingError(f"request {row.key!r} has {count} generated tokens and {seen}; start it again")
            if row.budget <= count:
                raise InvalidValue(f"budget of request {row.key!r}", row.budget, f"> {count}, the tokens it has")

    def _seen(self, logits: Tensor, rows: Sequence[Row], position: Tensor) -> dict[str, Tensor]:
        """What is known of each row, the token it drew since the last call taken into account."""
        fresh = [row.key for row in rows if not row.tokens]
        self.forget(fresh)
        self._table.write(fresh, self._beginning(len(fresh), logits))
        known = self._table.read([row.key for row in rows])
        going = (position > 0).nonzero().squeeze(-1)
        if not len(going):
            return known
        keys = [row.key for row in rows if row.tokens]
        drawn = torch.tensor([row.tokens[-1] for row in rows if row.tokens], device=logits.device)
        before = {name: part[going] for name, part in known.items()}
        points = _point_map(before, self.size)
        base = self._logits.at(keys, drawn) - points.log_normalizer.squeeze(-1)
        known["last"][going] = -base
        known["total"][going] -= base
        if "last_point" in self.needs:
            known["point"][going] = points_of(self._logits.read(keys), drawn[:, None], points).squeeze(-1)
        history = self._history(before)
        if history is not None:
            after = remember(history, drawn, position[going] - 1)
            for name in ("tokens", "count", "last"):
                known[f"history/{name}"][going] = getattr(after, name)
        return known

    def _beginning(self, count: int, logits: Tensor) -> dict[str, Tensor]:
        zeros, device = torch.zeros(count, device=logits.device), logits.device
        history = empty_history(count, self.tracked, device) if "history" in self.needs else None
        state = self.policy.initial_state(count, device) or {}
        return {
            "steps": zeros.long(), "last": zeros, "total": zeros, "point": zeros.long() - 1,
            **{f"state/{name}": part for name, part in state.items()},
            **({} if history is None else {f"history/{name}": part for name, part in vars(history).items()}),
        }  # fmt: skip

    def _history(self, known: dict[str, Tensor]) -> History | None:
        if "history" not in self.needs:
            return None
        return History(*(known[f"history/{name}"] for name in ("tokens", "count", "last")))


def load_served(folder: Path, fingerprint: str | None) -> tuple[TrainablePolicy, SketchSize]:
    """The policy of a folder, and the size of the sketches it was trained on (the default if the folder says none).

    Args:
        fingerprint: of the base model; None: not compared.

    Raises:
        CheckpointError: the folder holds no whole policy, or one of another base model.
    """
    config = read_policy_config(folder) if fingerprint is None else check_compatible(folder, fingerprint=fingerprint)
    return load_policy(folder), SketchSize(**config.sketch or {})


_MAP = ("head_ids", "head_slot", "boundary", "log_normalizer", "own_ids", "order")


def _parts(points: PointMap) -> dict[str, Tensor]:
    return {f"map/{name}": part for name in _MAP if (part := getattr(points, name)) is not None}


def _point_map(known: dict[str, Tensor], size: SketchSize) -> PointMap:
    return PointMap(size=size, **{name: known.get(f"map/{name}") for name in _MAP})  # type: ignore[arg-type]
