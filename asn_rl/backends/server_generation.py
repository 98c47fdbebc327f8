"""Completions from inference servers under heuristics that the servers' own sampling can express.

A server applies its rules in an order of its own. A pipeline of heuristics is translated where the two are the same
distribution and refused where they are not; nothing is approximated. Read in the servers' sources and held by
`tests/unit/test_server_generation.py`:

- SGLang 0.5.23: temperature, then top-p, top-k and min-p. Top-p and top-k each look at the untruncated distribution,
  but one after the other as soon as any request of the batch uses min-p on a GPU; so one request may not use both.
- vLLM 0.32: temperature, min-p, top-k, top-p, each on what the one before left, renormalised.
- OpenAI's chat completions: temperature, top-p. Defaults of the server for all other settings stay in force and
  cannot be seen from here (transformers' server, for one, takes them from the model's generation_config.json and
  decodes greedily unless that says `do_sample`).

Two fine differences remain. Servers apply the rules to every token; in process a tail point is heated or cut as a
whole (`ops/sketch.py`). And of tokens exactly as probable as the last one kept, in process all stay; SGLang, and top-p
in vLLM, keep as many as their sort puts first.

A seed makes vLLM and transformers reproducible as far as their arithmetic is; SGLang heeds it only when started with
--enable-deterministic-inference (which in 0.5.23 ends with an assertion on the first request that uses min-p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, Self, get_args

from asn_rl.backends.servers import RequestFailure, ServerPool, ServersConfig
from asn_rl.errors import ConfigError, InvalidValue, UnknownName
from asn_rl.stopping import before_stop
from asn_rl.types import Messages

Kind = Literal["sglang", "vllm", "openai"]

ORDERS: Mapping[str, tuple[str, ...]] = {
    "sglang": ("temperature", "top_p", "top_k", "min_p"),
    "vllm": ("temperature", "min_p", "top_k", "top_p"),
    "openai": ("temperature", "top_p"),
}
"""what a server applies, in its order"""
TEMPERATURES: Mapping[str, tuple[float, float]] = {
    "sglang": (1e-6, math.inf),  # below, it decodes greedily
    "vllm": (0.01, 2.0),  # below, it raises the temperature to 0.01; above, it refuses
    "openai": (0.01, 2.0),
}
"""smallest and largest temperature that a server applies as given"""
NEUTRAL: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}
"""values that change nothing"""
COMMUTING = ({"temperature", "top_k"}, {"top_k", "min_p"})
"""pairs with the same result in either order: the k most probable tokens stay the same when all others' ratios do"""
TOKEN_IDS = 2**31
"""token ids lie below: engines hold them in 32 bits"""
PASSING = ("abort", "error", None)
"""what an engine says of a completion that it gave up on; another attempt may end well"""
PATHS: Mapping[str, str] = {"sglang": "/generate", "vllm": "/v1/completions", "openai": "/v1/chat/completions"}


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to be made."""

    prompt: str | Messages
    processors: Sequence[Mapping[str, Any]]
    """pipeline of heuristics, a list of {name, params}; empty: the base model's own distribution"""
    seed: int
    max_new_tokens: int
    policy: str | None = None
    """a policy by its name on the servers, which decides alone: no processors beside it; None: the servers' sampling"""

    def __post_init__(self) -> None:
        if self.policy is not None and self.processors:
            raise InvalidValue("processors", list(self.processors), "none beside a policy")
        if not 0 <= self.seed < 2**63:
            raise InvalidValue("seed", self.seed, "in [0, 2^63)")
        if self.max_new_tokens < 1:
            raise InvalidValue("max_new_tokens", self.max_new_tokens, ">= 1")


@dataclass(frozen=True)
class ServerCompletion:
    """A completion as a server reports it."""

    text: str
    """special tokens left out"""
    token_ids: list[int] | None
    """end-of-sequence token included; None: a server that returns text only (OpenAI's chat completions)"""
    terminated: bool
    """True: ended by an end-of-sequence token; False: truncated by the token limit (transformers' server says so too
    when the end-of-sequence token is the last that fits)"""
    logprobs: list[float] | None
    """nats, one a token, if asked for. Of SGLang after the temperature, of vLLM by default before it, of both before
    truncation, and in the server's arithmetic: recompute them for importance ratios"""


Result = ServerCompletion | RequestFailure
WithPolicy = Callable[[dict[str, Any], str, int], dict[str, Any]]
"""(body of a request, name of a policy, token budget) -> the body that asks for it"""


class ServerGenerator:
    """Completions from a pool of servers of one kind. Use it as a context manager.

    Args:
        config: the servers.
        kind: what they speak: sglang (/generate), vllm (/v1/completions) or openai (/v1/chat/completions).
        model: name under which they serve the model; needed by openai.
        encode: prompt -> token ids, as `LogitsBackend.encode`; needed by sglang and vllm, which are sent ids. The
            openai kind sends messages, a text as one user turn, and the server renders them.
        decode: token ids -> text without special tokens, as `LogitsBackend.decode`; needed by sglang and vllm.
        eos_token_ids: end a completion, besides those the server knows; not sent by the openai kind.
        stop: texts that end a completion; its text is what comes before.
        logprobs: ask for log-probabilities; sglang and vllm only.
        with_policy: how requests name a policy (`asn_rl.serving.client.WITH_POLICY`); None: they cannot.
        extra: further fields of each request, for example {"chat_template_kwargs": {"enable_thinking": False}}.
    """

    def __init__(
        self,
        config: ServersConfig,
        kind: Kind,
        *,
        model: str | None = None,
        encode: Callable[[str | Messages], list[int]] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
        eos_token_ids: Iterable[int] = (),
        stop: Sequence[str] = (),
        logprobs: bool = False,
        with_policy: WithPolicy | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        _require_kind(kind)
        if kind == "openai" and model is None:
            raise ConfigError("servers of kind 'openai' need the model's name; set model (GET /v1/models lists them)")
        if kind == "openai" and logprobs:
            raise ConfigError("logprobs come without token ids from servers of kind 'openai'; use sglang or vllm")
        if kind != "openai" and (encode is None or decode is None):
            raise ConfigError(f"servers of kind {kind!r} are sent token ids; give encode and decode")
        self.kind: Kind = kind
        self.model, self.encode, self.decode = model, encode, decode
        self.eos_token_ids, self.logprobs, self.extra = sorted(eos_token_ids), logprobs, dict(extra or {})
        self.stop, self.with_policy = tuple(stop), with_policy
        self.pool = ServerPool(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.close()

    def generate(
        self, requests: Iterable[GenerationRequest]
    ) -> Iterator[tuple[int, ServerCompletion | RequestFailure]]:
        """Yield each request's index and completion, or failure, in order of completion. See `ServerPool.post`; an
        answer without a completion is an attempt that failed.

        Raises:
            ConfigError: a pipeline that the servers cannot reproduce (see `sampling_params`).
            BackendError: no server is healthy at the start.
        """
        payloads = (self.payload(request) for request in requests)
        for index, found in self.pool.post(PATHS[self.kind], payloads, self._parsed):
            yield index, found if isinstance(found, RequestFailure) else self._decoded(found)

    def payload(self, request: GenerationRequest) -> dict[str, Any]:
        """The body of a request."""
        body = self._body(request, sampling_params(self.kind, request.processors))
        if request.policy is not None:
            if self.with_policy is None:
                raise ConfigError(f"no request can name the policy {request.policy!r}; give with_policy")
            body = self.with_policy(body, request.policy, request.max_new_tokens)
        if clash := sorted(body.keys() & self.extra.keys()):
            raise ConfigError(f"extra sets {clash}, which a request decides itself; leave them out")
        return body | self.extra

    def _body(self, request: GenerationRequest, sampling: dict[str, Any]) -> dict[str, Any]:
        if self.kind == "openai":
            messages = [{"role": "user", "content": request.prompt}]
            turns = messages if isinstance(request.prompt, str) else request.prompt
            limits = {"max_tokens": request.max_new_tokens, "seed": request.seed}
            return {"model": self.model, "messages": turns} | sampling | limits | self._stop()
        assert self.encode is not None
        ids, stop = list(self.encode(request.prompt)), {"stop_token_ids": self.eos_token_ids} | self._stop()
        if self.kind == "sglang":
            sampling |= {"max_new_tokens": request.max_new_tokens, "sampling_seed": request.seed} | stop
            return {"input_ids": ids, "sampling_params": sampling, "return_logprob": self.logprobs}
        body = {"prompt": ids, "max_tokens": request.max_new_tokens, "seed": request.seed, "return_token_ids": True}
        optional = ({"model": self.model} if self.model else {}) | ({"logprobs": 0} if self.logprobs else {})
        return body | optional | stop | sampling

    def _stop(self) -> dict[str, Any]:
        return {"stop": list(self.stop)} if self.stop else {}

    def _parsed(self, answer: Mapping[str, Any]) -> Result:
        found = parse_completion(self.kind, answer)
        if self.logprobs and isinstance(found, ServerCompletion) and found.logprobs is None:
            return RequestFailure("malformed", f"no logprobs came from a server of kind {self.kind!r}")
        return found

    def _decoded(self, completion: ServerCompletion) -> ServerCompletion:
        if completion.token_ids is None or self.decode is None:
            return completion
        return replace(completion, text=before_stop(self.decode(completion.token_ids), self.stop))


def sampling_params(kind: Kind, processors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A pipeline in a server's words. All settings are sent, so that the server's own defaults do not join in.

    Args:
        kind: sglang, vllm or openai.
        processors: list of {name, params}, applied in order, each to what the one before left, renormalised.

    Raises:
        ConfigError: a heuristic, parameter or order that the server cannot reproduce exactly.
        InvalidValue: a value outside its range.
    """
    _require_kind(kind)
    steps = [_step(kind, processor) for processor in processors]
    greedy = any(name == "greedy" for name, _ in steps)  # the others keep the most probable token where it is
    steps = [(name, value) for name, value in steps if name != "greedy" and NEUTRAL.get(name) != value]
    if not greedy:
        _require_order(kind, [name for name, _ in steps])
    values = {"temperature": 0.0} if greedy else dict(steps)
    if kind == "openai":
        return {"temperature": 1.0, "top_p": 1.0} | values
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1 if kind == "sglang" else 0, "min_p": 0.0}
    penalties = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    return neutral | values | penalties


def _step(kind: Kind, processor: Mapping[str, Any]) -> tuple[str, float]:
    """Name and value of one heuristic, `{"name": "top_p", "params": {"top_p": 0.9}}` -> ("top_p", 0.9)."""
    if not isinstance(processor, Mapping) or not set(processor) <= {"name", "params"}:
        raise ConfigError(f"a pipeline step is {{name, params}}, got {processor!r}")
    name, params = processor.get("name"), dict(processor.get("params") or {})
    if name not in ("greedy", *ORDERS[kind]):
        raise ConfigError(_refusal(kind, f"heuristic {name!r}"))
    keep = params.pop("min_tokens_to_keep", 1) if name not in ("greedy", "temperature") else 1
    if keep != 1:
        raise ConfigError(_refusal(kind, f"heuristic {name!r} with min_tokens_to_keep={keep!r}"))
    expected = set() if name == "greedy" else {name}
    if set(params) != expected:
        wanted = ", ".join(expected) or "none"
        raise ConfigError(f"heuristic {name!r} takes the parameters: {wanted}; got {params!r}")
    value = params.get(name, 0.0)
    _require_range(kind, name, value)
    return name, value


def _require_range(kind: Kind, name: str, value: Any) -> None:
    low, high = TEMPERATURES[kind]
    number = type(value) in (int, float) and math.isfinite(value)
    ok, allowed = {
        "greedy": (True, ""),
        "temperature": (number and low <= value <= high, f"a finite number in [{low:g}, {high:g}]"),
        "top_k": (type(value) is int and value >= 1, "an integer >= 1"),
        "top_p": (number and 0 < value <= 1, "a number in (0, 1]"),
        "min_p": (number and 0 <= value <= 1, "a number in [0, 1]"),
    }[name]
    if not ok:
        advice = f"servers of kind {kind!r} apply no other as given; for 0 use greedy" if name == "temperature" else ""
        raise InvalidValue(f"{name}.{name}", value, allowed, advice)


def _require_order(kind: Kind, names: Sequence[str]) -> None:
    """A pipeline is the server's if swaps of neighbours that commute bring it into the server's order."""
    order, written = ORDERS[kind], " -> ".join(names)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(_refusal(kind, f"heuristic {repeated[0]!r} twice in one pipeline ({written})"))
    if kind == "sglang" and {"top_k", "top_p"} <= set(names):
        raise ConfigError(_refusal(kind, f"heuristics 'top_k' and 'top_p' together ({written})"))
    for first, second in combinations(names, 2):
        if order.index(first) > order.index(second) and {first, second} not in COMMUTING:
            raise ConfigError(_refusal(kind, f"heuristic {first!r} before {second!r} ({written})"))


def _refusal(kind: Kind, what: str) -> str:
    without_both = " with one of top_p and top_k" if kind == "sglang" else ""
    return (
        f"servers of kind {kind!r} cannot apply {what}. They can: greedy, or once each, in this order, "
        f"{', '.join(ORDERS[kind])}{without_both}. Generate this pipeline in process (backend hf)"
    )


def parse_completion(kind: Kind, answer: Mapping[str, Any]) -> Result:
    """A server's answer to one request; `malformed` when a field that is needed is missing or makes no sense, and
    `final` when the server ended the completion for a reason that stays (a content filter, a call of a tool)."""
    _require_kind(kind)
    try:
        completion, reason = _PARSERS[kind](answer)
        if reason not in ("stop", "length"):
            detail = f"the completion ended by {reason!r:.80}, neither by a stop token nor by the token limit"
            return RequestFailure("malformed", detail, final=reason not in PASSING)
        _check_tokens(kind, completion)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        return RequestFailure("malformed", f"no completion of kind {kind!r} ({problem}): {str(answer)[:200]}")
    return completion


def _parse_sglang(answer: Mapping[str, Any]) -> tuple[ServerCompletion, Any]:
    meta = answer["meta_info"]
    reason, logprobs = meta["finish_reason"]["type"], meta.get("output_token_logprobs")
    values = None if logprobs is None else [entry[0] for entry in logprobs]
    return ServerCompletion(answer["text"], answer["output_ids"], reason == "stop", values), reason


def _parse_vllm(answer: Mapping[str, Any]) -> tuple[ServerCompletion, Any]:
    (choice,) = answer["choices"]
    reason, logprobs = choice["finish_reason"], choice.get("logprobs")
    values = None if logprobs is None else logprobs["token_logprobs"]
    return ServerCompletion(choice["text"], choice["token_ids"], reason == "stop", values), reason


def _parse_openai(answer: Mapping[str, Any]) -> tuple[ServerCompletion, Any]:
    (choice,) = answer["choices"]
    reason = choice["finish_reason"]
    return ServerCompletion(choice["message"]["content"], None, reason == "stop", None), reason


_PARSERS: Mapping[str, Callable[[Mapping[str, Any]], tuple[ServerCompletion, Any]]] = {
    "sglang": _parse_sglang,
    "vllm": _parse_vllm,
    "openai": _parse_openai,
}


def _check_tokens(kind: Kind, completion: ServerCompletion) -> None:
    ids, logprobs = completion.token_ids, completion.logprobs
    if not isinstance(completion.text, str):
        raise TypeError(f"the text is a {type(completion.text).__name__}")
    completion.text.encode()  # JSON may hold half a surrogate pair, "\ud800", which no file of records can
    if kind == "openai":
        return
    if not isinstance(ids, list) or not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError("the token ids are no list of integers")
    if max(ids) >= TOKEN_IDS:
        raise ValueError(f"token id {max(ids)!r:.40} is not below {TOKEN_IDS}")
    if logprobs is not None:
        numbers = [value for value in logprobs if type(value) in (int, float)]
        if not len(ids) == len(logprobs) == len(numbers):
            raise ValueError(f"{len(numbers)} logprobs for {len(ids)} tokens")


def _require_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise UnknownName("kind of server", kind, get_args(Kind))
