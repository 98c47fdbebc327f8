"""The pool against real HTTP servers on this machine that die, hang, fail and recover."""

from __future__ import annotations

import itertools
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_server import Break, LocalServer, Reply, unused_port, wait_until

from asn_rl.backends import _server_dispatch, servers
from asn_rl.backends._server_dispatch import LONGEST_WAIT_S, Dispatcher
from asn_rl.backends.servers import RequestFailure, ServerPool, ServersConfig
from asn_rl.errors import BackendError, ConfigError, DataError, InvalidValue

ROOT = Path(__file__).parents[2]


def square(payload: dict[str, Any]) -> Reply:
    return 200, {"square": payload["x"] ** 2}


def items(n: int) -> list[dict[str, int]]:
    return [{"x": x} for x in range(n)]


def config(*pool: LocalServer, **settings: Any) -> ServersConfig:
    return ServersConfig(tuple(server.url for server in pool), **{"backoff_s": 0.02, "concurrency": 3} | settings)


def post(pool: ServerPool, payloads: Any) -> dict[int, Any]:
    """Answers by index, each of which came once."""
    answers = list(pool.post("/square", payloads, dict))
    assert len({index for index, _ in answers}) == len(answers)
    return dict(answers)


def squares(n: int) -> dict[int, Any]:
    return {x: {"square": x * x} for x in range(n)}


def test_every_item_is_answered_by_servers_that_share_them() -> None:
    with LocalServer(square) as a, LocalServer(square) as b, ServerPool(config(a, b)) as pool:
        assert post(pool, items(60)) == squares(60)
        stats = pool.stats()
        assert sum(entry["answered"] for entry in stats.values()) == 60
        assert all(entry["answered"] and entry["alive"] and not entry["failed"] for entry in stats.values())
        assert sorted(payload["x"] for payload in a.payloads + b.payloads) == list(range(60))
        assert post(pool, []) == {}


def test_answers_come_in_order_of_completion() -> None:
    def respond(payload: dict[str, Any]) -> Reply:
        if payload["x"] == 0:
            server.resume.wait(10)
        return square(payload)

    with LocalServer(respond) as server, ServerPool(config(server, concurrency=2)) as pool:
        order = []
        for index, _ in pool.post("/square", items(5), dict):
            order.append(index)
            if len(order) == 4:
                server.resume.set()
        assert order == [1, 2, 3, 4, 0]


def test_concurrency_bounds_each_server_also_for_threads_that_share_the_pool() -> None:
    def respond(payload: dict[str, Any]) -> Reply:
        wait_until(lambda: server.most == 3)  # nobody is answered before the bound is reached
        return square(payload)

    with LocalServer(respond) as server, ServerPool(config(server, concurrency=3)) as pool:
        found: list[dict[int, Any]] = []
        threads = [threading.Thread(target=lambda: found.append(post(pool, items(10)))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [squares(10)] * 3
        assert server.most == 3


def test_payloads_are_read_as_they_are_worked_off() -> None:
    read = itertools.count()
    taken = 0

    def endless() -> Iterator[dict[str, int]]:
        nonlocal taken
        for taken in read:
            yield {"x": taken}

    with LocalServer(square) as server, ServerPool(config(server)) as pool:
        answers = pool.post("/square", endless(), dict)
        for done in range(1, 40):
            next(answers)
            assert taken + 1 <= done + 2 * 3
        answers.close()


def test_a_reader_that_fails_is_heard_and_the_pool_goes_on() -> None:
    def broken() -> Iterator[dict[str, int]]:
        yield {"x": 1}
        raise KeyError("disk gone")

    with LocalServer(square) as server, ServerPool(config(server)) as pool:
        with pytest.raises(KeyError, match="disk gone"):
            list(pool.post("/square", broken(), dict))
        with pytest.raises(DataError, match="payload 1 cannot be sent as JSON"):
            list(pool.post("/square", [{"x": 1}, {"x": float("nan")}], dict))
        assert post(pool, items(4)) == squares(4)


def test_work_of_a_server_that_dies_moves_to_the_other() -> None:
    def dying(payload: dict[str, Any]) -> Reply:
        if len(a.payloads) >= 5:
            a.die()
            raise Break
        return square(payload)

    with LocalServer(dying) as a, LocalServer(square) as b, ServerPool(config(a, b)) as pool:
        assert post(pool, items(60)) == squares(60)
        stats = pool.stats()
        assert not stats[a.url]["alive"]
        assert stats[a.url]["retried"] >= _server_dispatch.STRIKES
        assert stats[a.url]["answered"] + stats[b.url]["answered"] == 60


def test_a_server_that_comes_back_is_used_again() -> None:
    with LocalServer(square) as a, ServerPool(config(a, retries=10)) as pool:
        assert post(pool, items(3)) == squares(3)
        a.die()
        answers = pool.post("/square", items(6), dict)
        found: list[Any] = []
        reader = threading.Thread(target=lambda: found.extend(answers))
        reader.start()
        wait_until(lambda: not pool.stats()[a.url]["alive"])
        with LocalServer(square, port=a.port):
            reader.join()
        assert dict(found) == squares(6)


def test_a_server_that_answers_500_is_taken_out_and_returns_when_healthy() -> None:
    def ailing(payload: dict[str, Any]) -> Reply:
        return square(payload) if a.healthy else (500, {"error": "out of memory"})

    with LocalServer(ailing) as a, LocalServer(square) as b, ServerPool(config(a, b)) as pool:
        pool.check()
        a.healthy = False
        assert post(pool, items(30)) == squares(30)
        assert not pool.stats()[a.url]["alive"]
        a.healthy = True
        wait_until(lambda: pool.stats()[a.url]["alive"])
        assert post(pool, items(30)) == squares(30)
        assert pool.stats()[a.url]["answered"]


def test_a_request_that_always_fails_ends_in_a_failure() -> None:
    def respond(payload: dict[str, Any]) -> Reply:
        return (500, {"error": "cannot"}) if payload["x"] == 2 else square(payload)

    with LocalServer(respond) as a, LocalServer(respond) as b, ServerPool(config(a, b, retries=3)) as pool:
        answers = post(pool, items(20))
        failure = answers.pop(2)
        assert answers == {x: {"square": x * x} for x in range(20) if x != 2}
        assert failure.reason == "status"
        assert "status 500" in failure.detail
        assert "cannot" in failure.detail
        tries = [[payload["x"] for payload in server.payloads].count(2) for server in (a, b)]
        assert tries == [2, 2]  # attempts alternate
        assert sum(entry["failed"] for entry in pool.stats().values()) == 1


def test_a_hanging_server_times_out_and_its_work_moves() -> None:
    def hang(payload: dict[str, Any]) -> Reply:
        a.resume.wait(30)
        return square(payload)

    with LocalServer(hang) as a, LocalServer(square) as b, ServerPool(config(a, b, timeout_s=0.3)) as pool:
        assert post(pool, items(20)) == squares(20)
        assert pool.stats()[a.url]["retried"] >= 3


def test_a_time_out_is_named() -> None:
    def hang(payload: dict[str, Any]) -> Reply:
        server.resume.wait(30)
        return square(payload)

    with LocalServer(hang) as server, ServerPool(config(server, timeout_s=0.1, retries=1)) as pool:
        assert post(pool, items(1)) == {0: RequestFailure("timeout", f"{server.url}: no answer within 0.1 s")}
        assert len(server.payloads) == 2


def test_429_is_waited_for_and_does_not_speak_against_the_server() -> None:
    def crowded(payload: dict[str, Any]) -> Reply:
        seen = [known["x"] for known in server.payloads].count(payload["x"])
        return square(payload) if seen > 2 else (429, {"error": "slow down"}, {"Retry-After": "0.01"})

    with LocalServer(crowded) as server, ServerPool(config(server)) as pool:
        assert post(pool, items(10)) == squares(10)
        assert pool.stats()[server.url] == {"answered": 10, "retried": 20, "failed": 0, "alive": True}
        assert server.health_checks == 1


@pytest.mark.parametrize("header", ["Wed, 21 Oct 2026 07:28:00 GMT", "nan", "-5", ""])
def test_other_retry_after_headers_are_passed_over(header: str) -> None:
    def crowded(payload: dict[str, Any]) -> Reply:
        return square(payload) if len(server.payloads) > 1 else (429, {}, {"Retry-After": header})

    with LocalServer(crowded) as server, ServerPool(config(server)) as pool:
        assert post(pool, items(1)) == squares(1)


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_other_statuses_are_final_and_quote_the_answer(status: int) -> None:
    with LocalServer(lambda payload: (status, b"top_q is unknown " * 50)) as server, ServerPool(config(server)) as pool:
        answers = post(pool, items(5))
        assert {answer.reason for answer in answers.values()} == {"status"}
        assert answers[0].final
        assert answers[0].detail == f"{server.url}: status {status}: " + ("top_q is unknown " * 50)[:200]
        assert len(server.payloads) == 5


@pytest.mark.parametrize(
    ("reply", "reason", "words"),
    [
        ((200, b'{"square": 4'), "malformed", "no JSON object"),
        ((200, [1, 2]), "malformed", "a list"),
        ((200, b"\xff\xfe"), "malformed", "no JSON object"),
        ((200, b"not gzip", {"Content-Encoding": "gzip"}), "malformed", "DecodingError"),
        ((200, b'{"square"', {"Content-Length": "999"}), "refused", "RemoteProtocolError"),
    ],
)
def test_torn_answers_are_tried_again_and_named(reply: Reply, reason: str, words: str) -> None:
    def torn(payload: dict[str, Any]) -> Reply:
        seen = [known["x"] for known in server.payloads].count(payload["x"])
        return reply if payload["x"] == 3 or seen == 1 else square(payload)

    with LocalServer(torn) as server, ServerPool(config(server, retries=2)) as pool:
        answers = post(pool, items(6))
        failure = answers.pop(3)
        assert answers == {x: {"square": x * x} for x in range(6) if x != 3}
        assert failure.reason == reason
        assert words in failure.detail


def test_the_caller_reads_answers_and_says_what_is_wrong_with_them() -> None:
    """For a passing reason it is tried again, for a final one not; what the check itself raises reaches the caller."""

    def respond(payload: dict[str, Any]) -> Reply:
        seen = [known["x"] for known in server.payloads].count(payload["x"])
        return (200, {"square": None}) if (payload["x"] == 1 and seen == 1) or payload["x"] == 3 else square(payload)

    def read(answer: dict[str, Any]) -> int | RequestFailure:
        if answer["square"] == 16:
            return RequestFailure("malformed", "never", final=True)
        return RequestFailure("malformed", "empty") if answer["square"] is None else answer["square"]

    with LocalServer(respond) as server, ServerPool(config(server, retries=2)) as pool:
        answers = dict(pool.post("/square", items(6), read))
        assert answers.pop(3) == RequestFailure("malformed", f"{server.url}: empty")
        assert answers.pop(4) == RequestFailure("malformed", f"{server.url}: never", final=True)
        assert answers == {x: x * x for x in (0, 1, 2, 5)}
        assert pool.stats()[server.url] | {"alive": True} == {"answered": 4, "retried": 3, "failed": 2, "alive": True}
        with pytest.raises(ZeroDivisionError):
            list(pool.post("/square", items(1), lambda answer: 1 // answer["square"]))
        assert post(pool, items(3)) == squares(3)


def test_no_server_at_the_start() -> None:
    nobody = f"http://127.0.0.1:{unused_port()}"
    with LocalServer(square) as ill, ServerPool(ServersConfig((nobody, ill.url))) as pool:
        ill.healthy = False
        with pytest.raises(BackendError, match=f"{nobody}: ConnectError.*{ill.url}: status 503.*health_path"):
            pool.check()
        with pytest.raises(BackendError, match="no inference server is healthy"):
            next(pool.post("/square", items(1), dict))
        assert not ill.payloads


def test_servers_without_a_health_path_are_tried_again_instead() -> None:
    def moody(payload: dict[str, Any]) -> Reply:
        return (500, "ill") if len(server.payloads) <= 5 else square(payload)

    with LocalServer(moody) as server, ServerPool(config(server, health_path=None, retries=9)) as pool:
        server.healthy = False  # which nobody asks
        assert post(pool, items(8)) == squares(8)
        assert server.health_checks == 0
        assert pool.stats()[server.url]["alive"]


def test_a_silent_health_check_is_a_failed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server_dispatch, "HEALTH_LIMIT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with ServerPool(ServersConfig((url,))) as pool, pytest.raises(BackendError, match=r"no answer within 0.1 s"):
            pool.check()


def test_check_waits_for_a_server_that_starts() -> None:
    port = unused_port()
    with ServerPool(ServersConfig((f"http://127.0.0.1:{port}",), backoff_s=0.02)) as pool:
        started: list[LocalServer] = []
        starter = threading.Timer(0.1, lambda: started.append(LocalServer(square, port=port)))
        starter.start()
        pool.check(wait_s=20)
        assert post(pool, items(3)) == squares(3)
        starter.join()
        started[0].die()


def test_remaining_items_fail_when_no_server_is_left() -> None:
    def dying(payload: dict[str, Any]) -> Reply:
        if payload["x"] >= 10:
            server.die()
            raise Break
        return square(payload)

    with LocalServer(dying) as server, ServerPool(config(server, no_server_s=0.2, retries=9)) as pool:
        answers = post(pool, items(500))
        assert sorted(answers) == list(range(500))
        done = {x: answer for x, answer in answers.items() if not isinstance(answer, RequestFailure)}
        assert done == {x: {"square": x * x} for x in done}
        assert set(done) <= set(range(10))
        lost = {answer for answer in answers.values() if isinstance(answer, RequestFailure)}
        assert lost == {RequestFailure("no_server", "no server was healthy for 0.2 s")}
        with pytest.raises(BackendError, match="no inference server is healthy"):
            list(pool.post("/square", items(1), dict))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), n=st.integers(0, 25), concurrency=st.integers(1, 4))
def test_nothing_is_lost_and_nothing_comes_twice(data: st.DataObject, n: int, concurrency: int) -> None:
    """Each item meets a drawn number of mishaps of drawn kinds, fewer than there are retries."""
    mishaps = st.lists(st.sampled_from(["500", "429", "break", "torn", "short"]), max_size=3)
    plan = {x: data.draw(mishaps) for x in range(n)}
    lock = threading.Lock()

    def respond(payload: dict[str, Any]) -> Reply:
        with lock:
            ahead = plan[payload["x"]]
            mishap = ahead.pop() if ahead else None
        match mishap:
            case None:
                return square(payload)
            case "torn":
                return 200, b"{"
            case "short":
                return 200, b"{", {"Content-Length": "9"}
            case "break":
                raise Break
            case status:
                return int(status), {}

    with LocalServer(respond) as a, LocalServer(respond) as b:
        settings = config(a, b, concurrency=concurrency, retries=3, backoff_s=0.002)
        with ServerPool(settings) as pool:
            assert post(pool, items(n)) == squares(n)


def test_leaving_early_cancels_what_is_under_way() -> None:
    def hang(payload: dict[str, Any]) -> Reply:
        if payload["x"]:
            server.resume.wait(30)
        return square(payload)

    with LocalServer(hang) as server:
        with ServerPool(config(server)) as pool:
            assert next(pool.post("/square", items(9), dict)) == (0, {"square": 0})
            thread = pool._thread
        assert thread is not None
        assert not thread.is_alive()
        assert not server.resume.is_set()  # the pool did not wait for the hanging requests


def test_closing_ends_readers_in_other_threads() -> None:
    def hang(payload: dict[str, Any]) -> Reply:
        server.resume.wait(30)
        return square(payload)

    with LocalServer(hang) as server:
        pool, said = ServerPool(config(server)), []

        def read() -> None:
            try:
                list(pool.post("/square", items(9), dict))
            except BackendError as error:
                said.append(str(error))

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: len(server.payloads) == 3)
        pool.close()
        reader.join()
        assert said == [servers.CLOSED]


def test_closing_ends_a_check() -> None:
    pool, said = ServerPool(ServersConfig((f"http://127.0.0.1:{unused_port()}",), backoff_s=30)), []

    def wait() -> None:
        try:
            pool.check(wait_s=60)
        except BackendError as error:
            said.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until(lambda: any(thread.name == "asn_rl server pool" for thread in threading.enumerate()))
    pool.close()
    waiting.join()
    assert said == [servers.CLOSED]


def test_a_closed_pool_starts_anew() -> None:
    with LocalServer(square) as server:
        pool = ServerPool(config(server))
        for _ in range(2):
            with pool:
                assert post(pool, items(5)) == squares(5)
            assert not pool.stats()[server.url]["alive"]


INTERRUPTED = """
import sys, threading
from asn_rl.backends.servers import ServerPool, ServersConfig
try:
    with ServerPool(ServersConfig((sys.argv[1],))) as pool:
        list(pool.post("/square", ({"x": x} for x in range(99)), dict))
except KeyboardInterrupt:
    print("interrupted", threading.active_count())
"""


def _listen_to_interrupts() -> None:
    """A shell lets its background jobs ignore Ctrl-C, and their children inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_the_pool_while_requests_hang() -> None:
    def hang(payload: dict[str, Any]) -> Reply:
        server.resume.wait(60)
        return square(payload)

    with LocalServer(hang) as server:
        command = [sys.executable, "-c", INTERRUPTED, server.url]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=_listen_to_interrupts
        ) as process:
            wait_until(lambda: len(server.payloads) == 8, limit_s=30)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30)[0] == "interrupted 1\n"
        assert process.returncode == 0


def test_the_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "s3cret")
    with LocalServer(square) as server, ServerPool(config(server, api_key_env="A_KEY")) as pool:
        assert post(pool, items(1)) == squares(1)
        assert server.headers[0]["Authorization"] == "Bearer s3cret"
        assert server.headers[0]["Content-Type"] == "application/json"
    monkeypatch.delenv("A_KEY")
    with pytest.raises(ConfigError, match="api_key_env names 'A_KEY', which is not set"):
        ServerPool(ServersConfig(("http://localhost:1",), api_key_env="A_KEY"))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "asn_rl.backends._server_dispatch")
    with pytest.raises(ConfigError, match=r"need httpx; run: pip install 'asn_rl\[servers\]'"):
        ServerPool(ServersConfig(("http://localhost:1",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": ()}, "urls must be a non-empty list"),
        ({"urls": "http://a"}, "urls must be a non-empty list"),
        ({"urls": ("localhost:30000",)}, "urls must be addresses such as"),
        ({"urls": ("http://",)}, "urls must be addresses such as"),
        ({"urls": ("http://a:99999",)}, "urls must be addresses such as"),
        ({"urls": ("http://user:word@a",)}, "without user"),
        ({"urls": (7,)}, "urls must be addresses such as"),
        ({"urls": ("http://a", "http://a/")}, "urls must be distinct"),
        ({"concurrency": 0}, "concurrency must be >= 1, got 0"),
        ({"timeout_s": 0}, "timeout_s must be > 0"),
        ({"timeout_s": float("nan")}, "timeout_s must be > 0"),
        ({"retries": -1}, "retries must be >= 0"),
        ({"backoff_s": 0}, "backoff_s must be > 0"),
        ({"no_server_s": -1}, "no_server_s must be >= 0"),
        ({"health_path": "health"}, "health_path must be a path that starts with /"),
    ],
)
def test_bad_values_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        ServersConfig(**{"urls": ("http://a",)} | settings)


def test_back_off_doubles_and_is_the_same_in_every_run() -> None:
    dispatcher = Dispatcher(ServersConfig(("http://a",), backoff_s=0.5), [], {})
    waits = [[dispatcher._backoff(index, attempt) for attempt in range(9)] for index in range(50)]
    assert waits == [[dispatcher._backoff(index, attempt) for attempt in range(9)] for index in range(50)]
    for attempt in range(9):
        nominal = min(0.5 * 2**attempt, LONGEST_WAIT_S)
        column = [row[attempt] for row in waits]
        assert all(nominal / 2 < wait <= nominal for wait in column)
        assert len(set(column)) == 50
