"""Completions from engines that decode with our policies: tokens in, tokens out.

    with SGLangClient(ServersConfig(urls=("http://127.0.0.1:30000",))) as client:
        answers = client.complete([prompt_ids], policy="math", max_new_tokens=64, num_generations=8)

Several servers share the work, a dead one's goes to the others (`asn_rl.backends.servers`). No text travels, so nothing
is tokenised twice; the log-probs are those of the distribution that the policy made and the token was drawn from.
Servers are started with `python -m asn_rl.serving.sglang_server` or `asn_rl.serving.vllm_server`; the client of the
latter is in `asn_rl.serving.vllm_client`.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from asn_rl.backends.server_generation import (
    PATHS,
    Kind,
    ServerCompletion,
    WithPolicy,
    parse_completion,
    sampling_params,
)
from asn_rl.backends.servers import RequestFailure, ServerPool, ServersConfig
from asn_rl.errors import DataError, InvalidValue
from asn_rl.serving.settings import BUDGET_ARGUMENT, POLICY_ARGUMENT, STATUS_PATH
from asn_rl.serving.sglang import PROCESSOR, processor_with

_STATUS_LIMIT_S = 5.0
"""seconds a server may take to say what became of its requests"""


@dataclass(frozen=True)
class Served:
    """One completion as an engine sampled it."""

    completion_ids: list[int]
    """end-of-sequence token included; empty if it failed"""
    logprobs: list[float]
    """nats, one a token, of the distribution that it was drawn from, in the engine's arithmetic"""
    finish_reason: Literal["stop", "length"] | None
    """stop: an end-of-sequence token; length: the token limit; None: it failed"""
    failed: str | None = None
    """why there is no completion"""


class EngineClient(Protocol):
    """What samples completions elsewhere."""

    def complete(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        policy: str | None,
        max_new_tokens: int,
        num_generations: int = 1,
        seeds: Sequence[int] | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> list[Served]:
        """`num_generations` completions of every prompt; those of a prompt are adjacent, as in `rollout`.

        Args:
            prompt_ids: tokens of each prompt.
            policy: its name on the servers; None: the base model's own distribution.
            max_new_tokens: the token budget, which the policy sees too.
            seeds: one a prompt; each completion is sent one of its own, made of it. Whether an engine heeds seeds is
                its own affair (SGLang: with --enable-deterministic-inference only).
            stop_token_ids: end a completion, besides those the engine knows.

        Raises:
            BackendError: no server is healthy.
            DataError, InvalidValue: an empty prompt, or arguments that make no sense.
        """
        ...

    def health(self) -> dict[str, dict[str, Any]]:
        """By address: what `asn_rl.serving.status.read_status` says there (counts by policy, failures), or
        {"problem": what is wrong}."""
        ...


class PooledClient(ABC):
    """A client of servers of one kind. Use it as a context manager.

    Args:
        config: the servers. Give each enough `concurrency` to fill its batch.
    """

    kind: Kind
    path: str

    def __init__(self, config: ServersConfig) -> None:
        self.config, self.pool = config, ServerPool(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way."""
        self.pool.close()

    def complete(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        policy: str | None,
        max_new_tokens: int,
        num_generations: int = 1,
        seeds: Sequence[int] | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> list[Served]:
        """See `EngineClient.complete`. A request is one completion, so each fails and is tried again alone."""
        _check(prompt_ids, max_new_tokens, num_generations, seeds)

        def payloads() -> Iterator[dict[str, Any]]:
            for i, ids in enumerate(prompt_ids):
                for g in range(num_generations):
                    seed = None if seeds is None else derived_seed(seeds[i], g)
                    yield self.payload(list(ids), policy, max_new_tokens, seed, sorted(stop_token_ids))

        answers = dict(self.pool.post(self.path, payloads(), self._read))
        return [self._served(answers[i]) for i in range(len(prompt_ids) * num_generations)]

    def health(self) -> dict[str, dict[str, Any]]:
        """See `EngineClient.health`."""
        return {url.rstrip("/"): _status(url.rstrip("/") + STATUS_PATH, self.config) for url in self.config.urls}

    @abstractmethod
    def payload(
        self, prompt_ids: list[int], policy: str | None, max_new_tokens: int, seed: int | None, stop: list[int]
    ) -> dict[str, Any]:
        """The body of a request for one completion."""

    def _read(self, answer: Mapping[str, Any]) -> ServerCompletion | RequestFailure:
        found = parse_completion(self.kind, answer)
        if isinstance(found, ServerCompletion) and not _are_logprobs(found.logprobs):
            return RequestFailure("malformed", f"the log-probs are no finite numbers: {str(found.logprobs)[:200]}")
        return found

    def _served(self, found: ServerCompletion | RequestFailure) -> Served:
        if isinstance(found, RequestFailure):
            return Served([], [], None, f"{found.reason}: {found.detail}")
        assert found.token_ids is not None
        assert found.logprobs is not None
        return Served(found.token_ids, found.logprobs, "stop" if found.terminated else "length")


class SGLangClient(PooledClient):
    """Completions from SGLang servers that `asn_rl.serving.sglang_server` started.

    Args:
        router: the addresses are those of SGLang's router. It drops `custom_params`, so a request's arguments travel in
            the processor's string, from which the servers take them.
    """

    kind: Kind = "sglang"
    path = PATHS["sglang"]

    def __init__(self, config: ServersConfig, *, router: bool = False) -> None:
        super().__init__(config)
        self.router = router

    def payload(
        self, prompt_ids: list[int], policy: str | None, max_new_tokens: int, seed: int | None, stop: list[int]
    ) -> dict[str, Any]:
        """The body of a request to `/generate`."""
        sampling = sampling_params("sglang", []) | {"max_new_tokens": max_new_tokens, "stop_token_ids": stop}
        if seed is not None:
            sampling["sampling_seed"] = seed
        body = {"input_ids": prompt_ids, "sampling_params": sampling, "return_logprob": True}
        if policy is None:
            return body
        return (through_router if self.router else in_sglang)(body, policy, max_new_tokens)


def in_sglang(body: dict[str, Any], policy: str, budget: int) -> dict[str, Any]:
    """The body of a request to SGLang's `/generate` that asks for a policy."""
    sampling = body["sampling_params"] | {"custom_params": _arguments(policy, budget)}
    return body | {"sampling_params": sampling, "custom_logit_processor": PROCESSOR}


def through_router(body: dict[str, Any], policy: str, budget: int) -> dict[str, Any]:
    """The same to SGLang's router, which drops `custom_params`."""
    return body | {"custom_logit_processor": processor_with(_arguments(policy, budget))}


def in_vllm(body: dict[str, Any], policy: str, budget: int) -> dict[str, Any]:
    """The body of a request to vLLM's `/v1/completions` that asks for a policy."""
    return body | {"vllm_xargs": _arguments(policy, budget)}


WITH_POLICY: Mapping[str, WithPolicy] = {"sglang": in_sglang, "vllm": in_vllm, "router": through_router}
"""by what is asked: SGLang, vLLM, SGLang's router"""


def _arguments(policy: str, budget: int) -> dict[str, Any]:
    return {POLICY_ARGUMENT: policy, BUDGET_ARGUMENT: budget}


def derived_seed(seed: int, key: int | str) -> int:
    """Seed in [0, 2^31) of a part: completions of a prompt, or prompts of a step, differ whatever the engine does."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def _check(
    prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, num_generations: int, seeds: Sequence[int] | None
) -> None:
    for i, ids in enumerate(prompt_ids):
        if not len(ids) or not all(isinstance(token, int) and token >= 0 for token in ids):
            raise DataError(f"prompt {i} must be a list of token ids >= 0, got {str(ids)[:80]}; encode texts first")
    if max_new_tokens < 1:
        raise InvalidValue("max_new_tokens", max_new_tokens, ">= 1", "a completion needs at least one token")
    if num_generations < 1:
        raise InvalidValue("num_generations", num_generations, ">= 1")
    if seeds is not None and len(seeds) != len(prompt_ids):
        raise InvalidValue("seeds", list(seeds), f"{len(prompt_ids)} numbers, one a prompt")


def _are_logprobs(values: list[float] | None) -> bool:
    return values is not None and all(math.isfinite(value) for value in values)


def _status(url: str, config: ServersConfig) -> dict[str, Any]:
    import httpx  # the pool has found it

    key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
    headers = {"Authorization": f"Bearer {key.strip()}"} if key else {}
    try:
        answer = httpx.get(url, headers=headers, timeout=_STATUS_LIMIT_S)
        found: Any = answer.json() if answer.is_success else f"status {answer.status_code}: {answer.text[:200]}"
    except (httpx.HTTPError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
    return dict(found) if isinstance(found, Mapping) else {"problem": f"{url}: {found}"}
