"""A policy inside vLLM: one logits processor for all requests and for both model runners.

    vllm serve MODEL --logits-processors asn_rl.serving.vllm:PolicyLogitsProcessor --logprobs-mode processed_logprobs
        --middleware asn_rl.serving.reports.PolicyReports

(`python -m asn_rl.serving.vllm_server` sets the rest too.) A request names its policy in `vllm_xargs`:
{"asn_policy": "math"}; one without is left alone. Written for vLLM 0.32. Requests carry names and numbers, never code.

vLLM says neither which request a row belongs to nor why a row goes. Rows are followed from joining to leaving; one that
leaves before its end may have been preempted, is remembered for a while, and found again by its name and tokens. The
V1 runner shows a preempted request that is recomputed in several chunks at every chunk: it fails then, for the client
to send it again.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, process_dict_updates  # type: ignore[import-not-found]
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor  # type: ignore[import-not-found]
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState  # type: ignore[import-not-found]
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor  # type: ignore[import-not-found]

from asn_rl.errors import ConfigError
from asn_rl.serving.arguments import Arguments, check_params
from asn_rl.serving.host import PolicyHost, ServedRequest, process_host
from asn_rl.serving.status import LOG

_REMEMBERED = 256
"""requests that left before their end and may come back"""
_NO_TOKENS = (
    "vLLM hands over placeholders instead of the tokens; start it with --logits-processors "
    "asn_rl.serving.vllm:PolicyLogitsProcessor (an entry point alone does not do with asynchronous scheduling)"
)


@dataclass(frozen=True, eq=False)
class _Followed:
    """A request with a policy, while vLLM has it."""

    key: str
    arguments: Arguments
    tokens: list[int]
    """generated so far; in the V1 runner vLLM's own list, which grows"""
    stops: frozenset[int]

    @property
    def ended(self) -> bool:
        return len(self.tokens) >= self.arguments.budget or self.tokens[-1:] in ([stop] for stop in self.stops)


def _served(request: _Followed) -> ServedRequest:
    return ServedRequest(request.key, request.tokens, request.arguments.budget, request.arguments.policy)


class _Requests:
    """Requests under way in one engine."""

    def __init__(self, host: PolicyHost) -> None:
        self.host, self._numbers = host, itertools.count()
        self._left: OrderedDict[str, _Followed] = OrderedDict()

    def joined(self, params: Any, tokens: list[int]) -> _Followed | None:
        """A request that is new; None: it has no policy."""
        arguments = Arguments.of(params)
        if arguments is None:
            return None
        key = f"{arguments.label}#{next(self._numbers)}"
        return _Followed(key, arguments, tokens, frozenset(params.all_stop_token_ids))

    def left(self, request: _Followed) -> None:
        if request.ended:
            self.host.forget([request.key])
            return
        self._left[request.key] = request
        while len(self._left) > _REMEMBERED:
            self.host.forget([self._left.popitem(last=False)[0]])

    def back(self, new: _Followed, is_same: Callable[[_Followed], bool]) -> _Followed:
        """The request with its former key, if it is one that left."""
        for key, old in self._left.items():
            if old.arguments.label == new.arguments.label and is_same(old):
                del self._left[key]
                return replace(new, key=key)
        return new

    def give_up(self, requests: Collection[_Followed], error: Exception) -> None:
        """Fail requests whose rows are no longer known for certain."""
        LOG.error("the rows of vLLM's batch are lost", exc_info=error)
        for request in requests:
            reason = f"its row was lost: {type(error).__name__}: {error}; send the request again"
            self.host.fail(_served(request), reason, transient=True)

    def apply(self, logits: Tensor, index: Sequence[int], requests: Sequence[_Followed]) -> Tensor:
        """The rows `index` of logits (B, V) replaced by their policies' log-weights."""
        if not index:
            return logits
        served = [_served(request) for request in requests]
        for request in served:
            if request.tokens and request.tokens[-1] < 0:
                self.host.fail(request, _NO_TOKENS)
        if list(index) == list(range(len(logits))):
            return self.host(logits, served)[0]
        rows = torch.tensor(index, device=logits.device)
        logits[rows] = self.host(logits[rows], served)[0].to(logits.dtype)
        return logits


class _BatchRows:
    """Rows of the V1 runner, which tells what joins, leaves and moves."""

    def __init__(self, host: PolicyHost) -> None:
        self.requests = _Requests(host)
        self.rows: dict[int, _Followed] = {}

    def update(self, batch_update: BatchUpdate | None) -> None:
        before = {request.key: request for request in self.rows.values()}
        if batch_update is not None:  # those that leave first: one may join again at once
            joining = {index for index, *_ in batch_update.added}
            for index in sorted({*batch_update.removed, *joining} & self.rows.keys()):
                self.requests.left(before.pop(self.rows[index].key))
        process_dict_updates(self.rows, batch_update, self._joined)
        now = {request.key for request in self.rows.values()}
        for key in before.keys() - now:  # overwritten by a move
            self.requests.left(before[key])

    def _joined(self, params: Any, _prompt: list[int] | None, tokens: list[int]) -> _Followed | None:
        new = self.requests.joined(params, tokens)
        if new is None or not tokens:
            return new
        return self.requests.back(new, lambda old: _agree(old.tokens, tokens))

    def apply(self, logits: Tensor) -> Tensor:
        index = sorted(self.rows)
        return self.requests.apply(logits, index, [self.rows[i] for i in index])


class _SlotRows:
    """Rows of the V2 runner: requests have slots, and the tokens are on the device."""

    def __init__(self, host: PolicyHost, states: LogitsProcRequestState) -> None:
        self.requests, self._states = _Requests(host), states
        self.slots: dict[int, _Followed] = {}

    def add(self, slot: int, params: Any) -> bool:
        if slot in self.slots:
            self.requests.left(self.slots.pop(slot))
        request = self.requests.joined(params, [])
        if request is not None:
            self.slots[slot] = request
        return request is not None

    def apply(self, logits: Tensor, context: LogitsContext) -> Tensor:
        slots, lengths = context.idx_mapping_np.tolist(), context.seq_lens_upper_bound_np.tolist()
        prompts, filled = self._states.prompt_len.np, self._states.prefill_len.np
        # A prompt that is not yet read to its end gets a row too, and no token.
        index = [i for i, slot in enumerate(slots) if slot in self.slots and lengths[i] >= filled[slot]]
        if not index:
            return logits
        fed: list[int] = context.input_ids.tolist()
        for i in index:
            self._feed(slots[i], fed[i], int(lengths[i] - prompts[slots[i]]), slots)
        return self.requests.apply(logits, index, [self.slots[slots[i]] for i in index])

    def _feed(self, slot: int, token: int, count: int, scheduled: Collection[int]) -> None:
        """Add the token that was drawn last, of `count` generated ones."""
        request = self.slots[slot]
        if count - len(request.tokens) > 1:  # back after a preemption
            start = int(self._states.prompt_len.np[slot])
            tokens = self._states.all_token_ids.gpu[slot, start : start + count - 1].tolist()
            self._vacate(request, tokens, scheduled)
            request = self.requests.back(request, lambda old: old.tokens == tokens)
            self.slots[slot] = request = replace(request, tokens=tokens)
        if count:
            request.tokens.append(token)

    def _vacate(self, request: _Followed, tokens: list[int], scheduled: Collection[int]) -> None:
        """Free the slot that a preempted request had before: vLLM says nothing until somebody else gets it. Two that
        could be it (completions of one request may agree so far) are left alone."""
        label = request.arguments.label
        found = [
            slot
            for slot, old in self.slots.items()
            if slot not in scheduled and old.arguments.label == label and old.tokens == tokens
        ]
        if len(found) == 1:
            self.requests.left(self.slots.pop(found[0]))


class PolicyLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """What vLLM makes of `--logits-processors` and of the entry point, in either runner."""

    def __init__(
        self, vllm_config: Any, where: torch.device | LogitsProcRequestState, is_pin_memory: bool | None = None
    ) -> None:
        """V1: (config, device, is_pin_memory); V2: (config, request states)."""
        self._batch: _BatchRows | None = None
        self._slots: _SlotRows | None = None
        host = _host_of(vllm_config)
        if host is None:
            return
        if is_pin_memory is not None:
            self._batch = _BatchRows(host)
            return
        assert not isinstance(where, torch.device)
        if vllm_config.speculative_config is not None:
            raise ConfigError("policies do not go with speculative decoding; start vLLM without --speculative-config")
        self._slots = _SlotRows(host, where)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Answer a request that cannot be served with an error (HTTP 400). See `check_params`."""
        check_params(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if self._batch is not None:
            with self._alive(self._batch.requests, self._batch.rows):
                self._batch.update(batch_update)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        if self._slots is not None:
            with self._alive(self._slots.requests, self._slots.slots):
                return self._slots.add(req_idx, sampling_params)
        return False

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """(B, V) log-weights of the policies for logits (B, V); rows without a policy as they were."""
        if self._slots is not None and ctx is not None:
            with self._alive(self._slots.requests, self._slots.slots):
                return self._slots.apply(logits, ctx)
        if self._batch is not None:
            with self._alive(self._batch.requests, self._batch.rows):
                return self._batch.apply(logits)
        return logits

    @contextmanager
    def _alive(self, requests: _Requests, rows: dict[int, _Followed]) -> Iterator[None]:
        """An exception here would end the engine for all its users."""
        try:
            yield
        except Exception as error:
            requests.give_up(rows.values(), error)
            rows.clear()


_configs: list[weakref.ref[Any]] = []


def _host_of(vllm_config: Any) -> PolicyHost | None:
    """The host of this process; None where no policies are configured, or where another processor of this engine has
    them: with both the entry point and the flag, vLLM makes two, and a policy must act once."""
    if any(known() is vllm_config for known in _configs):
        return None
    try:
        host = process_host()
    except ConfigError as error:
        LOG.info("no policies are served: %s", error)
        return None
    _configs.append(weakref.ref(vllm_config))
    return host


def _agree(old: Sequence[int], new: Sequence[int]) -> bool:
    """Whether tokens are the same; those below 0 are not known."""
    return len(old) == len(new) and all(a == b or a < 0 for a, b in zip(old, new, strict=True))
