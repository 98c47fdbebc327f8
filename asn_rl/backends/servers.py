"""A pool of inference servers: requests go out, answers come back as they are done, whatever happens to one server.

The pool keeps one thread with an event loop, in which all requests, retries and health checks run: a pending request
can be cancelled at once, and 500 requests under way need no 500 threads.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from asn_rl.errors import BackendError, ConfigError, DataError, InvalidValue, check_at_least, check_positive

if TYPE_CHECKING:
    from asn_rl.backends._server_dispatch import Dispatcher

T = TypeVar("T")


@dataclass(frozen=True)
class ServersConfig:
    """Inference servers that share the work."""

    urls: tuple[str, ...]
    """base addresses, for example http://127.0.0.1:30000; the requests' paths are appended"""
    concurrency: int = 8
    """requests under way per server"""
    timeout_s: float = 300.0
    """seconds a request may take, from connecting to the last byte"""
    retries: int = 4
    """further attempts at a request that failed for a passing reason"""
    backoff_s: float = 0.5
    """seconds before the first retry; doubles with each, less a deterministic jitter of up to a half"""
    health_path: str | None = "/health"
    """path that answers 2xx to GET while a server is healthy; null: servers have none, and are tried again instead"""
    api_key_env: str | None = None
    """environment variable with the key that is sent as bearer token; null: none is sent"""
    no_server_s: float = 60.0
    """seconds without any healthy server after which the remaining requests fail"""

    def __post_init__(self) -> None:
        if isinstance(self.urls, str) or not self.urls:
            raise InvalidValue("urls", self.urls, "a non-empty list of addresses")
        for url in self.urls:
            _check_url(url)
        bases = [url.rstrip("/") for url in self.urls]
        if repeated := sorted({base for base in bases if bases.count(base) > 1}):
            raise InvalidValue("urls", repeated, "distinct", "raise concurrency to send more to one server")
        check_at_least(self, 1, "concurrency")
        check_at_least(self, 0, "retries", "no_server_s")
        check_positive(self, "timeout_s", "backoff_s")
        if self.health_path is not None and not self.health_path.startswith("/"):
            raise InvalidValue("health_path", self.health_path, "a path that starts with /")

    @property
    def capacity(self) -> int:
        """Requests under way on all servers together."""
        return self.concurrency * len(self.urls)


@dataclass(frozen=True)
class RequestFailure:
    """What takes the place of an answer."""

    reason: Literal["timeout", "refused", "status", "malformed", "no_server"]
    """timeout: no whole answer in time; refused: no connection, or it broke; status: an HTTP status other than 2xx;
    malformed: an answer that is not what was asked for; no_server: no server was healthy for too long"""
    detail: str
    final: bool = False
    """the request itself is refused (a status such as 404, a content filter): it will fail whenever it is made"""


T = TypeVar("T")
Read = Callable[[dict[str, Any]], T | RequestFailure]
"""makes of an answer, a JSON object, what the caller wants; a failure is an attempt that failed: tried again like a
status 5xx unless it is `final`. Called in the pool's thread, so it must be fast"""


class ServerPool:
    """Inference servers that share requests. Use it as a context manager; closing cancels what is under way.

    A request that meets a connection error, a time-out, a damaged answer, or status 408, 429 or 5xx is tried again
    after a back-off (or after what `Retry-After` asks for), on another server where there is one. Other statuses are
    final. A server that fails three times in a row (408 and 429 do not count) is taken out, checked in the background
    and returns when healthy. A server may see a request twice, the caller gets one answer to each. The pool may be
    shared by threads; `concurrency` then holds for all of them together.

    Raises:
        ConfigError: the package httpx, or the environment variable of the API key, is missing.
    """

    def __init__(self, config: ServersConfig) -> None:
        state = random.getstate()
        try:
            from asn_rl.backends._server_dispatch import Server
        except ImportError as error:
            raise ConfigError(f"inference servers need {error.name}; run: pip install 'asn_rl[servers]'") from error
        finally:
            random.setstate(state)  # importing httpx draws from it
        self.config = config
        self._headers = _headers(config.api_key_env)
        self._servers = [Server(url.rstrip("/")) for url in config.urls]
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._dispatcher: Dispatcher
        self._closing: asyncio.Event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and end the thread. The pool can be used again and then starts anew."""
        with self._lock:
            if self._running:
                assert self._thread is not None
                self._loop.call_soon_threadsafe(self._closing.set)
                self._thread.join()
            self._thread = None
            for server in self._servers:
                server.reset()

    def check(self, wait_s: float = 0.0) -> None:
        """Ask every server for its health.

        Args:
            wait_s: seconds to keep asking until one is healthy.

        Raises:
            BackendError: none is.
        """
        self._start()
        problems = self._result(self._dispatcher.check(wait_s))
        if len(problems) == len(self._servers):
            listed = "; ".join(f"{url}: {problem}" for url, problem in problems.items())
            raise BackendError(
                f"no inference server is healthy ({listed}). Start one, correct urls, or set health_path (now "
                f"{self.config.health_path!r}) to a path that the servers answer"
            )

    def post(
        self, path: str, payloads: Iterable[Mapping[str, Any]], read: Read[T]
    ) -> Iterator[tuple[int, T | RequestFailure]]:
        """Send each payload as JSON; yield its index and the answer as read, or the failure, as they are done.

        `payloads` is read in the caller's thread, and only as fast as it is worked off: at most twice
        `config.capacity` are out at a time, answers that wait for the caller included.

        Args:
            read: of each answer; `dict` takes it as it is.

        Raises:
            BackendError: no server is healthy at the start, or the pool is closed meanwhile.
            DataError: a payload cannot be written as JSON.
        """
        if not self._running or not any(server.alive for server in self._servers):
            self.check()
        answers: queue.SimpleQueue[tuple[int, T | RequestFailure] | BaseException] = queue.SimpleQueue()
        tasks: set[asyncio.Task[T | RequestFailure]] = set()
        source, limit, out, exhausted = enumerate(payloads), 2 * self.config.capacity, 0, False
        try:
            while True:
                if not exhausted and out < limit:
                    entry = next(source, None)
                    if entry is None:
                        exhausted = True
                    else:
                        self._call(self._dispatcher.launch, tasks, answers, path, entry[0], _encoded(*entry), read)
                        out += 1
                if out == 0:
                    return
                try:
                    answer = answers.get(block=exhausted or out == limit)
                except queue.Empty:
                    continue
                out -= 1
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            if out:
                with suppress(RuntimeError):  # the loop is closed: then they are cancelled already
                    # Without the lock: the garbage collector may come here in any thread, while close() holds it.
                    self._loop.call_soon_threadsafe(cancel, tasks)

    def stats(self) -> dict[str, dict[str, Any]]:
        """By URL: requests `answered`, `retried` (failed here, tried again) and `failed` (for good), and `alive`."""
        names = ("answered", "retried", "failed", "alive")
        return {server.url: {name: getattr(server, name) for name in names} for server in self._servers}

    @property
    def _running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()  # a forked child has no thread

    def _start(self) -> None:
        from asn_rl.backends._server_dispatch import Dispatcher

        with self._lock:
            if self._running:
                return
            self._dispatcher = Dispatcher(self.config, self._servers, self._headers)
            ready = threading.Event()
            # A daemon: a caller that forgets to close the pool can still end.
            self._thread = threading.Thread(target=self._run, args=(ready,), name="asn_rl server pool", daemon=True)
            self._thread.start()
            ready.wait()

    def _run(self, ready: threading.Event) -> None:
        async def main() -> None:
            self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await self._closing.wait()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            cancel(rest)
            await asyncio.gather(*rest, return_exceptions=True)
            await self._dispatcher.close()

        asyncio.run(main())

    def _call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have the event loop call a function, without waiting for it."""
        with self._lock:
            if not self._running:
                raise BackendError(CLOSED)
            self._loop.call_soon_threadsafe(function, *arguments)

    def _result(self, coroutine: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if not self._running:
                coroutine.close()
                raise BackendError(CLOSED)
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError as error:
            raise BackendError(CLOSED) from error
        except BaseException:  # Ctrl-C
            future.cancel()
            raise


@cache
def shared_pool(config: ServersConfig) -> ServerPool:
    """The process-wide pool of these settings; it ends with this process."""
    return ServerPool(config)


CLOSED = "the server pool was closed while requests were under way; keep it open until the last answer is read"


def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in list(tasks):
        task.cancel()


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        ok = ok and not (parts.query or parts.fragment or parts.username)
    except (ValueError, TypeError, AttributeError):
        ok = False
    if not ok:
        allowed = "addresses such as http://127.0.0.1:30000, without user, query or fragment"
        raise InvalidValue("urls", url, allowed, "name a key's environment variable in api_key_env")


def _headers(api_key_env: str | None) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if api_key_env is None:
        return headers
    key = os.environ.get(api_key_env, "").strip()
    if not key:
        raise ConfigError(f"api_key_env names {api_key_env!r}, which is not set; run: export {api_key_env}=...")
    return headers | {"Authorization": f"Bearer {key}"}


def _encoded(index: int, payload: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(payload, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"payload {index} cannot be sent as JSON: {error}; use texts, lists and finite numbers"
        ) from error
