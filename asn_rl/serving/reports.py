"""Middleware of an API server: what became of the policies, over HTTP.

    vllm serve ... --middleware asn_rl.serving.reports.PolicyReports

GET /asn_rl/status answers with `asn_rl.serving.status.read_status`. A request that names a policy (`asn_policy` among
its `vllm_xargs`, whatever its path) and whose policy failed is answered with the reason, not with a completion that
plain sampling made: with status 503 if it may be sent again, else 422. For that it gets a name of its own
(`asn_request`, behind the client's if there is one), and its answer is held back until it is whole, a stream too.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asn_rl.errors import InvalidValue
from asn_rl.serving.settings import POLICY_ARGUMENT, REQUEST_ARGUMENT, STATUS_PATH, settings_from_environment
from asn_rl.serving.status import read_status

_ARGUMENTS = "vllm_xargs"
"""field of a request's body in which vLLM takes a request's own arguments"""
_REFUSED = {
    "background": "vLLM answers before it is known whether the policy failed",
    "use_beam_search": "a policy is a distribution to draw from, and beam search does not ask it",
}
"""fields of a body that leave a policy unasked or its failure unseen, and why"""


class PolicyReports:
    """See the module."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive) if scope["type"] == "http" else None
        if request is not None and request.url.path == STATUS_PATH:
            report = await run_in_threadpool(read_status, settings_from_environment().status)
            await JSONResponse(report)(scope, receive, send)
        elif request is not None and request.method == "POST":
            await self._posted(request, send)
        else:
            await self.app(scope, receive, send)

    async def _posted(self, request: Request, send: Send) -> None:
        try:
            raw = await request.body()
        except ClientDisconnect:
            return
        body = _with_policy(raw)
        if body is None:
            await self.app(request.scope, _again(raw, request.receive), send)
            return
        if field := next((field for field in _REFUSED if body.get(field)), None):
            problem = InvalidValue(field, body[field], "left out beside a policy", _REFUSED[field])
            await _error(400, str(problem))(request.scope, request.receive, send)
            return
        label = _label(body[_ARGUMENTS])
        named = json.dumps(body | {_ARGUMENTS: body[_ARGUMENTS] | {REQUEST_ARGUMENT: label}}).encode()
        held: list[Message] = []

        async def hold(message: Message) -> None:
            held.append(message)

        await self.app(_resized(request.scope, len(named)), _again(named, request.receive), hold)
        failure = await run_in_threadpool(_failure, label) if _succeeded(held) else None
        if failure is not None:
            status = 503 if failure["transient"] else 422
            await _error(status, f"the policy failed: {failure['reason']}")(request.scope, request.receive, send)
            return
        for message in held:
            await send(message)


def _with_policy(raw: bytes) -> dict[str, Any] | None:
    """A body that names a policy; None: it names none, or is not JSON (the server itself says what is wrong)."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    own = body.get(_ARGUMENTS) if isinstance(body, dict) else None
    return body if isinstance(own, dict) and POLICY_ARGUMENT in own else None


def _label(arguments: Mapping[str, Any]) -> str:
    """A name that no other request has, nor an earlier attempt at the same one."""
    given = arguments.get(REQUEST_ARGUMENT)
    return uuid.uuid4().hex if given is None else f"{given}.{uuid.uuid4().hex}"


def _again(raw: bytes, receive: Receive) -> Receive:
    """`receive`, before which a body that was read already comes once more."""
    unread: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

    async def again() -> Message:
        return unread.pop() if unread else await receive()

    return again


def _resized(scope: Scope, length: int) -> Scope:
    """The scope of a request whose body has another length, in bytes."""
    others = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*others, (b"content-length", str(length).encode())]}


def _succeeded(messages: list[Message]) -> bool:
    return any(m["type"] == "http.response.start" and 200 <= m["status"] < 300 for m in messages)


def _failure(label: str) -> dict[str, Any] | None:
    """What is reported of a request whose policy failed, failures that stay first; None: it did not fail."""
    failures = read_status(settings_from_environment().status)["failures"]
    own = [failure for failure in failures if failure["key"].rpartition("#")[0] == label]
    return min(own, key=lambda failure: failure["transient"], default=None)


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request" if status == 400 else "policy_failed"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)
