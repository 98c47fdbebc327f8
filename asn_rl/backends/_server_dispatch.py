"""The event loop's side of a server pool: slots, attempts, retries and health. `servers.py` is the caller's side."""

from __future__ import annotations

import asyncio
import json
import queue
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import httpx

from asn_rl.backends.servers import CLOSED, Read, RequestFailure, ServersConfig, T
from asn_rl.errors import BackendError

STRIKES = 3
"""failures in a row after which a server is taken out"""
CONNECT_LIMIT_S = 10.0
"""seconds a connection may take to be made"""
HEALTH_LIMIT_S = 5.0
"""seconds a health check may take"""
LONGEST_WAIT_S = 60.0
"""bound of the back-off between two attempts, and of that between two health checks of a server that is out"""


@dataclass
class Server:
    url: str
    alive: bool = False
    busy: int = 0
    """requests under way"""
    strikes: int = 0
    """failures since the last answer"""
    answered: int = 0
    retried: int = 0
    failed: int = 0
    clients: list[httpx.AsyncClient] = field(default_factory=list)
    """one a slot, those not in use"""

    def reset(self) -> None:
        """What is known once all requests have ended and nobody watches its health."""
        self.alive, self.busy, self.strikes, self.clients = False, 0, 0, []


@dataclass(frozen=True)
class _Fault:
    """An attempt that failed."""

    failure: RequestFailure
    passing: bool = True
    """another attempt may succeed"""
    strike: bool = True
    """it speaks against the server"""
    wait_s: float = 0.0
    """seconds that the server asks to wait"""


class Dispatcher:
    """Requests on their way to an answer. Lives in the event loop: only functions that run there may touch it."""

    def __init__(self, config: ServersConfig, servers: list[Server], headers: Mapping[str, str]) -> None:
        self.config, self.servers, self._headers = config, servers, headers
        self._tls = httpx.create_ssl_context()
        self._clients: list[httpx.AsyncClient] = []
        self._health_client = self._new_client()
        self._waiting: deque[tuple[Server | None, asyncio.Future[Server | None]]] = deque()
        self._revivals: dict[str, asyncio.Task[None]] = {}
        self._deadline: asyncio.TimerHandle | None = None
        self._deserted = False

    def _new_client(self) -> httpx.AsyncClient:
        """Each slot has a client of its own: what httpx does per request grows with the square of the connections of
        a client. They have no bounds but on connecting: the dispatcher bounds requests and times."""
        timeout = httpx.Timeout(None, connect=CONNECT_LIMIT_S)
        self._clients.append(httpx.AsyncClient(headers=self._headers, timeout=timeout, verify=self._tls))
        return self._clients[-1]

    async def close(self) -> None:
        """Close the connections, once no request is under way."""
        await asyncio.gather(*(client.aclose() for client in self._clients))

    def launch(
        self,
        tasks: set[asyncio.Task[T | RequestFailure]],
        answers: queue.SimpleQueue[tuple[int, T | RequestFailure] | BaseException],
        path: str,
        index: int,
        body: bytes,
        read: Read[T],
    ) -> None:
        """Begin a request. Its task is in `tasks` while it is under way, and puts exactly one entry into `answers`."""

        def deliver(task: asyncio.Task[T | RequestFailure]) -> None:
            tasks.discard(task)
            if task.cancelled():
                answers.put(BackendError(CLOSED))
            else:
                answers.put(task.exception() or (index, task.result()))

        task = asyncio.create_task(self._answer(path, index, body, read))
        tasks.add(task)
        task.add_done_callback(deliver)

    async def _answer(self, path: str, index: int, body: bytes, read: Read[T]) -> T | RequestFailure:
        avoid, attempt = None, 0
        while True:
            server = await self._slot(avoid)
            if server is None:
                return RequestFailure("no_server", f"no server was healthy for {self.config.no_server_s:g} s")
            try:
                outcome = _as_read(server, await self._attempt(server, path, body), read)
                self._note(server, outcome)
            finally:
                self._release(server)
            if not isinstance(outcome, _Fault):
                return outcome
            if attempt == self.config.retries or not outcome.passing:
                server.failed += 1
                return outcome.failure
            server.retried += 1
            await asyncio.sleep(max(self._backoff(index, attempt), outcome.wait_s))
            avoid, attempt = server, attempt + 1

    def _backoff(self, index: int, attempt: int) -> float:
        """Seconds until the next attempt. The jitter keeps requests that failed together from returning together."""
        jitter = random.Random(f"{index}/{attempt}").random()
        return min(self.config.backoff_s * 2**attempt, LONGEST_WAIT_S) * (1 - jitter / 2)

    async def _attempt(self, server: Server, path: str, body: bytes) -> dict | _Fault:
        client = server.clients.pop() if server.clients else self._new_client()
        try:
            async with asyncio.timeout(self.config.timeout_s):
                response = await client.post(server.url + path, content=body)
        except TimeoutError:
            return _Fault(RequestFailure("timeout", f"{server.url}: no answer within {self.config.timeout_s:g} s"))
        except httpx.DecodingError as error:
            return _Fault(RequestFailure("malformed", f"{server.url}: {_described(error)}"))
        except httpx.RequestError as error:
            return _Fault(RequestFailure("refused", f"{server.url}: {_described(error)}"))
        finally:
            server.clients.append(client)
        if response.is_success:
            return _decoded(server, response)
        status = response.status_code
        passing = status in (408, 429) or status >= 500
        detail = f"{server.url}: status {status}: {response.text[:200]}"
        return _Fault(
            RequestFailure("status", detail, final=not passing),
            passing=passing,
            strike=status >= 500,
            wait_s=_retry_after(response),
        )

    def _note(self, server: Server, outcome: object) -> None:
        """What an attempt says about its server."""
        if not isinstance(outcome, _Fault):
            server.answered += 1
            server.strikes = 0
            return
        server.strikes += outcome.strike
        if server.alive and server.strikes >= STRIKES:
            self._take_out(server)

    # Slots: each server works on at most `concurrency` requests

    async def _slot(self, avoid: Server | None) -> Server | None:
        """A server with room, `avoid` only if no other is healthy; None: there was no server for too long."""
        if self._deserted:
            return None
        future: asyncio.Future[Server | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((avoid, future))
        self._assign()
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled() and (server := future.result()) is not None:  # granted, but not taken up
                self._release(server)
            raise

    def _release(self, server: Server) -> None:
        server.busy -= 1
        self._assign()

    def _assign(self) -> None:
        """Give room to those that wait, in their order."""
        passed_over = []
        while self._waiting and (free := [s for s in self.servers if s.alive and s.busy < self.config.concurrency]):
            avoid, future = self._waiting.popleft()
            if future.done():
                continue
            alternative = any(server.alive and server is not avoid for server in self.servers)
            fitting = [server for server in free if server is not avoid or not alternative]
            if not fitting:
                passed_over.append((avoid, future))
                continue
            server = min(fitting, key=lambda server: server.busy)
            server.busy += 1
            future.set_result(server)
        self._waiting.extendleft(reversed(passed_over))

    # Health

    async def check(self, wait_s: float) -> dict[str, str]:
        """Mark every server as healthy or out, for up to `wait_s` until one is healthy. What is wrong, by URL."""
        end = asyncio.get_running_loop().time() + wait_s
        while True:
            found = await asyncio.gather(*(self._problem(server) for server in self.servers))
            for server, problem in zip(self.servers, found, strict=True):
                if problem is None:
                    self._admit(server)
                else:
                    self._take_out(server)
            left = end - asyncio.get_running_loop().time()
            if not all(found) or left <= 0:
                return {server.url: problem for server, problem in zip(self.servers, found, strict=True) if problem}
            await asyncio.sleep(min(self.config.backoff_s, left))

    async def _problem(self, server: Server) -> str | None:
        """Why a server is not healthy; None: it is, or there is no way to ask."""
        if self.config.health_path is None:
            return None
        try:
            async with asyncio.timeout(HEALTH_LIMIT_S):
                response = await self._health_client.get(server.url + self.config.health_path)
        except TimeoutError:
            return f"no answer within {HEALTH_LIMIT_S:g} s"
        except httpx.RequestError as error:
            return _described(error)
        return None if response.is_success else f"status {response.status_code}"

    def _take_out(self, server: Server) -> None:
        server.alive = False
        if server.url not in self._revivals:
            self._revivals[server.url] = asyncio.create_task(self._revive(server))
        if self._deadline is None and not any(server.alive for server in self.servers):
            self._deadline = asyncio.get_running_loop().call_later(self.config.no_server_s, self._desert)
        self._assign()  # who avoided the remaining server may now have it

    def _admit(self, server: Server) -> None:
        server.alive, server.strikes, self._deserted = True, 0, False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._assign()

    async def _revive(self, server: Server) -> None:
        """Check a server until it is healthy, at growing intervals."""
        pause = self.config.backoff_s
        while not server.alive:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_WAIT_S)
            if not server.alive and await self._problem(server) is None:
                self._admit(server)
        del self._revivals[server.url]

    def _desert(self) -> None:
        self._deserted = True
        while self._waiting:
            future = self._waiting.popleft()[1]
            if not future.done():
                future.set_result(None)


def _decoded(server: Server, response: httpx.Response) -> dict | _Fault:
    try:
        answer = json.loads(response.content)
    except ValueError as error:
        answer = error
    if isinstance(answer, dict):
        return answer
    got = str(answer) if isinstance(answer, ValueError) else f"a {type(answer).__name__}"
    text = response.text[:200]
    return _Fault(RequestFailure("malformed", f"{server.url}: the answer is no JSON object ({got}): {text}"))


def _as_read(server: Server, outcome: dict | _Fault, read: Read[T]) -> T | _Fault:
    """What the caller reads in an answer; a fault in the place of one that it cannot use."""
    if isinstance(outcome, _Fault):
        return outcome
    found = read(outcome)
    if not isinstance(found, RequestFailure):
        return found
    named = replace(found, detail=f"{server.url}: {found.detail}")
    return _Fault(named, passing=not found.final, strike=not found.final)


def _retry_after(response: httpx.Response) -> float:
    """Seconds that a `Retry-After` header asks for; its other form, a date, is passed over."""
    try:
        return min(max(0.0, float(response.headers.get("retry-after", 0))), LONGEST_WAIT_S)
    except ValueError:
        return 0.0


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
