"""HTTP servers on this machine that misbehave on request."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]
"""status, body (bytes as they are, anything else as JSON), and headers"""


class LocalServer:
    """A server whose POST answers are `respond(payload)`.

    `respond` may wait on `resume`, raise `Break` to drop the connection, or call `die`.

    Attributes:
        payloads: what was posted, in order of arrival.
        most: largest number of requests that were under way at once.
    """

    def __init__(self, respond: Callable[[dict[str, Any]], Reply], port: int = 0) -> None:
        self.respond, self.healthy, self.resume = respond, True, threading.Event()
        self.payloads: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.health_checks = self.most = self._busy = 0
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", port), _handler(self))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.die()

    def die(self) -> None:
        """Stop listening and break every connection, as a killed process does."""
        self.resume.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.socket.close()
        with self._lock:
            for connection in self._connections:
                _abort(connection)

    def answer(self, payload: dict[str, Any], headers: dict[str, str]) -> Reply:
        with self._lock:
            self.payloads.append(payload)
            self.headers.append(headers)
            self._busy += 1
            self.most = max(self.most, self._busy)
        try:
            return self.respond(payload)
        finally:
            with self._lock:
                self._busy -= 1

    def connected(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def disconnected(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)


class Break(Exception):
    """Drop the connection without an answer."""


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not so within {limit_s:g} s"
        time.sleep(0.005)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are what these servers are for: nothing is printed."""


def _abort(connection: socket.socket) -> None:
    with suppress(OSError):  # the other side was faster
        connection.shutdown(socket.SHUT_RDWR)


def _handler(server: LocalServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            server.connected(self.connection)

        def finish(self) -> None:
            super().finish()
            server.disconnected(self.connection)

        def do_GET(self) -> None:
            server.health_checks += 1
            self._reply(200 if server.healthy and self.path == "/health" else 503, {})

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self._reply(*server.answer(payload, dict(self.headers)))
            except Break:
                self.close_connection = True

        def _reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(raw))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)
            if headers and headers.get("Content-Length", str(len(raw))) != str(len(raw)):
                self.close_connection = True  # an answer that breaks off

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return Handler
