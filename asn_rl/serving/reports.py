"""Middleware of an API server: what became of the policies, over HTTP.

    vllm serve ... --middleware asn_rl.serving.reports.policy_reports

GET /asn_rl/status answers with `asn_rl.serving.status.read_status`. A request that named itself (`asn_request` among
its `vllm_xargs`) and whose policy failed is answered with status 422 and the reason, not with a completion that plain
sampling made. Streams are passed on: ask for the status after them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from asn_rl.serving.settings import REQUEST_ARGUMENT, STATUS_PATH, settings_from_environment
from asn_rl.serving.status import read_status


async def policy_reports(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """See the module."""
    if request.url.path == STATUS_PATH:
        return JSONResponse(await run_in_threadpool(read_status, settings_from_environment().status))
    if request.method != "POST" or not request.url.path.endswith("/completions"):
        return await call_next(request)
    label = _label(await _body(request))
    response = await call_next(request)
    reason = None if label is None else await run_in_threadpool(_reason, label)
    if reason is None or not 200 <= response.status_code < 300:
        return response
    error = {"message": f"the policy failed: {reason}", "type": "policy_failed", "code": 422}
    return JSONResponse({"error": error}, 422)


async def _body(request: Request) -> Any:
    try:
        return await request.json()
    except ValueError:
        return None  # the server itself says what is wrong


def _label(body: Any) -> str | None:
    if not isinstance(body, dict) or body.get("stream") or not isinstance(body.get("vllm_xargs"), dict):
        return None
    label = body["vllm_xargs"].get(REQUEST_ARGUMENT)
    return None if label is None else str(label)


def _reason(label: str) -> str | None:
    """Why the policy of a request failed; None: it did not."""
    for failure in read_status(settings_from_environment().status)["failures"]:
        if failure["key"].rpartition("#")[0] == label:
            return failure["reason"]
    return None
