"""A small inference engine over HTTP: continuous batches of the toy base model, policies through the real host.

It speaks SGLang's `/generate`: a request names its policy in `custom_params` and gets token ids with the log-probs of
the distribution they were drawn from, status 422 where the policy cannot answer, or 503 where the row was lost.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from local_server import LocalServer, Reply

from asn_rl.backends.toy import ToyBackend
from asn_rl.serving.host import Failure, PolicyHost, ServedRequest
from asn_rl.serving.settings import BUDGET_ARGUMENT, POLICY_ARGUMENT, ServingSettings


@dataclass
class Request:
    """One completion under way."""

    prompt: list[int]
    sampling: dict[str, Any]
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str | None = None
    failure: Failure | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def draws(self) -> torch.Generator:
        """Of this step: a function of the request alone, not of its batch."""
        place = f"{self.sampling.get('sampling_seed')}/{self.prompt}/{len(self.tokens)}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:7], "little"))


class ToyEngine:
    """A server as a context manager.

    Args:
        policies: folder of policies.
        temperature: on top of the policy's distribution: an engine that does not do what it should.
        refuses: prompts (token ids) that are answered with status 400.

    Attributes:
        served: token ids of every completion, in the order of their ends.
    """

    def __init__(
        self,
        backend: ToyBackend,
        policies: Path,
        *,
        temperature: float = 1.0,
        refuses: Callable[[list[int]], bool] = lambda prompt: False,
        tracked: int = 32,
    ) -> None:
        self.backend, self.temperature, self.refuses = backend, temperature, refuses
        policies.mkdir(parents=True, exist_ok=True)
        status = policies.parent / f"status-{uuid.uuid4().hex}"
        self.host = PolicyHost(ServingSettings(policies, status, backend.fingerprint, tracked))
        self.served: list[list[int]] = []
        self._new: list[Request] = []
        self._active: list[Request] = []
        self._wake, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.server = LocalServer(self._generate)
        self.url = self.server.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.die()
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _generate(self, payload: dict[str, Any]) -> Reply:
        if self.refuses(payload["input_ids"]):
            return 400, {"error": "this prompt is refused"}
        request = Request(payload["input_ids"], payload["sampling_params"])
        with self._wake:
            self._new.append(request)
            self._wake.notify()
        request.ended.wait()
        if request.failure is not None:
            return 503 if request.failure.transient else 422, {"error": request.failure.reason}
        entries = [[value, token, None] for value, token in zip(request.logprobs, request.tokens, strict=True)]
        meta = {"id": request.key, "finish_reason": {"type": request.reason}, "output_token_logprobs": entries}
        return 200, {"text": self.backend.decode(request.tokens), "output_ids": request.tokens, "meta_info": meta}

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._new or self._active or self._closed)
                if self._closed:
                    return
                self._active, self._new = self._active + self._new, []
            self._step(self._active)
            ended = [request for request in self._active if request.reason is not None]
            self._active = [request for request in self._active if request.reason is None]
            self.host.forget([request.key for request in ended])
            for request in ended:
                self.served.append(request.tokens)
                request.ended.set()

    @torch.no_grad()
    def _step(self, batch: list[Request]) -> None:
        """One token for every request."""
        last = torch.tensor([(request.prompt + request.tokens)[-1] for request in batch])
        asked = [_served(request) for request in batch]
        weights, failures = self.host(self.backend.table[last], asked)
        failed = {failure.key: failure for failure in failures}
        logprobs = torch.log_softmax(weights / self.temperature, -1)
        for request, row in zip(batch, logprobs, strict=True):
            token = int(torch.multinomial(row.exp(), 1, generator=request.draws()))
            request.tokens.append(token)
            request.logprobs.append(row[token].item())
            request.failure = failed.get(request.key)
            if request.failure is not None:
                request.reason = "abort"
            elif token in (request.sampling.get("stop_token_ids") or ()):
                request.reason = "stop"
            elif len(request.tokens) == request.sampling["max_new_tokens"]:
                request.reason = "length"


def _served(request: Request) -> ServedRequest:
    own = request.sampling["custom_params"]
    return ServedRequest(request.key, list(request.tokens), own[BUDGET_ARGUMENT], own[POLICY_ARGUMENT])
