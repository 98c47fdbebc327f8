from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asn_rl.errors import InvalidValue, RewardError
from asn_rl.rewards import workers
from asn_rl.rewards.workers import Failure, WorkerPool

HELPERS = "slow_rewards"


@pytest.fixture(autouse=True)
def importable_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import from the caller's sys.path. (A package `tests` in site-packages would hide `tests.helpers`.)"""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))


def items(*values: int, **rest: Any) -> list[dict[str, Any]]:
    return [{"x": value, **rest} for value in values]


@pytest.fixture(scope="module")
def doubler() -> Iterator[WorkerPool]:
    with WorkerPool(f"{HELPERS}:double", workers=2, time_limit=30) as pool:
        yield pool


def test_results_keep_their_order(doubler: WorkerPool) -> None:
    assert doubler.map(items(*range(50))) == [2 * x for x in range(50)]
    assert doubler.map([]) == []


def test_large_items(doubler: WorkerPool) -> None:
    text = "x" * 3_000_000
    assert doubler.map([{"x": text}])[0] == text + text


def test_threads_share_a_pool(doubler: WorkerPool) -> None:
    found: dict[int, list[Any]] = {}

    def ask(i: int) -> None:
        found[i] = doubler.map(items(*range(i, i + 20)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [2 * x for x in range(i, i + 20)] for i in range(4)}


def test_hanging_item_is_killed_and_the_others_are_answered() -> None:
    with WorkerPool(f"{HELPERS}:hang_on", time_limit=0.3) as pool:
        results = pool.map(items(1, 2, 3, hang=2))
        assert results == [1, Failure("timeout", "no answer within 0.3 s"), 3]
        assert pool.map(items(4, hang=2)) == [4]


def test_dead_worker_is_replaced() -> None:
    with WorkerPool(f"{HELPERS}:die_on") as pool:
        results = pool.map(items(1, 2, 3, die=2))
        assert results == [1, Failure("died", "its worker process ended with exit status 3"), 3]
        assert pool.map(items(4, die=2)) == [4]


@pytest.mark.parametrize("size", [1, 2])
def test_items_given_in_advance_outlive_their_worker(size: int) -> None:
    with WorkerPool(f"{HELPERS}:hang_on", time_limit=1, workers=size) as pool:
        assert pool.map(items(*range(200), hang=-1)) == list(range(200))
        results = pool.map(items(*range(200), hang=100))
        assert results == [*range(100), Failure("timeout", "no answer within 1 s"), *range(101, 200)]
    with WorkerPool(f"{HELPERS}:die_on", workers=size) as pool:
        pool.map(items(*range(200), die=-1))
        results = pool.map(items(*range(200), die=100))
        assert [x if isinstance(x, int) else x.reason for x in results] == [*range(100), "died", *range(101, 200)]


def test_only_short_items_are_given_in_advance(doubler: WorkerPool) -> None:
    doubler.map(items(1))
    worker = doubler._workers[0]
    paces = [None, 0.0, workers.AHEAD_S / 4, workers.AHEAD_S / 1.5, workers.AHEAD_S * 1.5, 100.0]
    appetites = []
    for worker.pace in paces:
        appetites.append(worker.appetite)
    assert appetites == [1, 1 + workers.AHEAD_ITEMS, 5, 2, 1, 1]


def test_death_by_signal_is_named() -> None:
    with WorkerPool(f"{HELPERS}:kill_itself") as pool:
        assert pool.map([{}]) == [Failure("died", "its worker process ended with signal SIGKILL")]


def test_worker_killed_from_outside_is_replaced() -> None:
    with WorkerPool(f"{HELPERS}:process_id") as pool:
        first = pool.map([{}])[0]
        os.kill(first, signal.SIGKILL)
        pool._workers[0].process.wait()
        second = pool.map([{}])[0]
        assert second not in (first, os.getpid())
        assert pool.map([{}]) == [second]


def test_exceptions_are_results_with_their_place() -> None:
    with WorkerPool(f"{HELPERS}:fail_on") as pool:
        one, failure = pool.map(items(1, 2, fail=2))
    assert one == 1
    assert failure.reason == "error"
    assert failure.detail.startswith("ZeroDivisionError: 2 is not wanted (slow_rewards.py:")


@pytest.mark.parametrize(
    ("function", "item", "reason", "detail"),
    [
        ("refuse", {"x": 1}, "refused", "1 can never work"),
        ("leave", {}, "error", "SystemExit: enough"),
        ("unsendable", {}, "error", "answer cannot be sent"),
        ("double", {"y": 1}, "error", "TypeError"),
    ],
)
def test_other_failures(function: str, item: dict[str, Any], reason: str, detail: str) -> None:
    with WorkerPool(f"{HELPERS}:{function}") as pool:
        failure = pool.map([item])[0]
    assert failure.reason == reason
    assert detail in failure.detail


def test_item_that_cannot_be_sent(doubler: WorkerPool) -> None:
    with pytest.raises(RewardError, match=r"item cannot be sent to a worker process.*use plain values"):
        doubler.map([{"x": lambda: None}])
    assert doubler.map(items(1)) == [2]


def test_factory_is_called_once_with_the_arguments() -> None:
    with WorkerPool(f"{HELPERS}:adder", {"n": 3}) as pool:
        assert pool.map(items(1, 2)) == [4, 5]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("no_such_module:f", "cannot import 'no_such_module'"),
        (f"{HELPERS}:doubel", "Did you mean 'double'"),
    ],
)
def test_target_that_cannot_be_imported(target: str, why: str) -> None:
    with pytest.raises(RewardError, match=rf"worker for '{target}' could not start.*{why}"):
        WorkerPool(target).start()


def test_worker_that_dies_while_starting() -> None:
    with pytest.raises(RewardError, match="exit status 3 while importing it"):
        WorkerPool(f"{HELPERS}:die_on", {"x": 1, "die": 1}).start()


def test_worker_that_is_never_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_LIMIT_S", 0.3)
    with pytest.raises(RewardError, match=r"was not ready within 0\.3 s"):
        WorkerPool(f"{HELPERS}:hang_on", {"x": 1, "hang": 1}).map([{}])


@pytest.mark.parametrize(("option", "value"), [("workers", 0), ("time_limit", 0.0), ("time_limit", float("nan"))])
def test_refused_options(option: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=f"{option} must be"):
        WorkerPool(f"{HELPERS}:double", **{option: value})


def test_interrupted_call_leaves_no_stale_answers() -> None:
    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with WorkerPool(f"{HELPERS}:hang_on") as pool:
            pool.start()
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                pool.map(items(2, hang=2))
            assert pool.map(items(3, hang=2)) == [3]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_closed_pool_ends_its_workers_and_starts_anew() -> None:
    pool = WorkerPool(f"{HELPERS}:process_id")
    first = pool.map([{}])[0]
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    with pool:
        assert pool.map([{}]) != [first]


def test_forked_child_gets_workers_of_its_own() -> None:
    with WorkerPool(f"{HELPERS}:process_id") as pool:
        theirs = pool.map([{}])[0]
        parent, children = pool._owner, pool._workers
        pool._owner = -1  # as a forked child sees it
        assert pool.map([{}]) != [theirs]
        assert len(children) == 1
        workers._shut_down(children, parent)


def run_script(*lines: str) -> subprocess.CompletedProcess[str]:
    """Returns when the script and everything that inherited its standard output has ended."""
    script = "\n".join(
        [f"import sys; sys.path[:] = {sys.path!r}", "from asn_rl.rewards.workers import WorkerPool", *lines]
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


def test_workers_end_with_the_program() -> None:
    done = run_script(f"pool = WorkerPool('{HELPERS}:process_id', workers=2)", "pool.map([{}, {}]); print('done')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_busy_workers_end_when_the_program_is_killed() -> None:
    done = run_script(
        "import os, threading",
        f"pool = WorkerPool('{HELPERS}:hang_on')",
        "pool.start()",
        "threading.Timer(0.2, lambda: os.kill(os.getpid(), 9)).start()",
        "pool.map([{'x': 1, 'hang': 1}])",
    )
    assert done.returncode == -signal.SIGKILL


def test_killed_workers_take_their_children_along() -> None:
    done = run_script(
        f"pool = WorkerPool('{HELPERS}:hang_with_child', time_limit=0.5)", "print(pool.map([{}])[0].reason)"
    )
    assert (done.returncode, done.stdout) == (0, "timeout\n")


def test_workers_are_light() -> None:
    with WorkerPool(f"{HELPERS}:heavy_modules") as pool:
        assert pool.map([{}]) == [[]]


VERIFIERS = (
    "numeric_answer exact_answer math_answer choice_answer json_schema ifeval length_budget format_match distinct_valid"
)


def test_verifiers_import_nothing_heavy() -> None:
    done = run_script(
        "from asn_rl.rewards import REWARDS",
        f"functions = [REWARDS.resolve(name) for name in {VERIFIERS.split()}]",
        "import asn_rl.rewards._math_verify",
        "print(len(functions), {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules))",
    )
    assert (done.stdout, done.stderr) == ("9 set()\n", "")
