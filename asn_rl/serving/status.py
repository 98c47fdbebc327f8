"""What became of the requests with a policy: counts and failures, in a file that outlives the engine.

Engines have no place for it in their answers. Every process writes a file of its own into one folder; health checks
and clients read them all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asn_rl.errors import ServingError
from asn_rl.files import write_whole

LOG = logging.getLogger("asn_rl.serving")
_KEPT = 4096
"""failures that are listed; older ones are only counted"""
_DELAY_S = 1.0
_COUNTS = ("requests", "tokens", "failed", "loads", "refused_loads")


@dataclass(frozen=True)
class Failure:
    """A request that does not get what its policy says; its logits stay as the base model gave them."""

    key: Hashable
    policy: str
    reason: str
    transient: bool = False
    """the request may be served if it is sent again: the engine lost its place, the policy is not at fault"""


class StatusFile:
    """What one process of an engine reports.

    By policy: `requests` that began, `tokens` that were decoded, requests that `failed`, versions that were loaded
    (`loads`) or could not be (`refused_loads`), and the last such `error`. Failures and loads are on disk at once,
    counts after a second.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"status-{os.getpid()}.json"
        self.policies: dict[str, dict[str, Any]] = {}
        self.failures: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self.write()

    def count(self, policy: str, what: str, by: int = 1) -> None:
        with self._lock:
            entry = self.policies.setdefault(policy, dict.fromkeys(_COUNTS, 0))
            entry[what] += by
            if what in ("failed", "loads", "refused_loads"):
                self.write()
            elif self._timer is None:
                self._timer = threading.Timer(_DELAY_S, self.write)
                self._timer.daemon = True
                self._timer.start()

    def failed(self, failure: Failure) -> None:
        LOG.error("request %s with policy %r gets plain sampling: %s", failure.key, failure.policy, failure.reason)
        entry = vars(failure) | {"key": str(failure.key), "time": time.time()}
        with self._lock:
            self.failures.append(entry)
            self.count(failure.policy, "failed")

    def refused(self, policy: str, reason: str) -> None:
        LOG.error("policy %r cannot be loaded: %s", policy, reason)
        with self._lock:
            self.policies.setdefault(policy, dict.fromkeys(_COUNTS, 0))["error"] = reason
            self.count(policy, "refused_loads")

    def write(self) -> None:
        """Write the file now. A full disk is logged: reports must not end the engine."""
        with self._lock:
            self._timer = None
            state = {"pid": os.getpid(), "time": time.time(), "policies": self.policies}
            text = json.dumps(state | {"failures": list(self.failures)}, indent=1)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.path, text)
            except OSError as error:
                LOG.error("cannot write %s: %s", self.path, error)


def read_status(folder: str | Path) -> dict[str, Any]:
    """Counts by policy, summed over the processes that wrote into a folder, and their failures.

    Returns:
        `processes` (number), `policies` (counts by name), `failures` (key, policy, reason,
            transient, time; oldest first).

    Raises:
        ServingError: a file is damaged.
    """
    policies: dict[str, dict[str, Any]] = {}
    failures: list[dict[str, Any]] = []
    paths = sorted(Path(folder).glob("status-*.json"))
    for path in paths:
        try:
            state = json.loads(path.read_text())
            failures += state["failures"]
            found = dict(state["policies"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ServingError(
                f"the status file {path} is damaged ({error}); remove it and restart the engine"
            ) from error
        for name, entry in found.items():
            total = policies.setdefault(name, dict.fromkeys(_COUNTS, 0))
            total |= {key: total[key] + entry[key] for key in _COUNTS}
            total |= {"error": entry["error"]} if "error" in entry else {}
    failures.sort(key=lambda failure: failure["time"])
    return {"processes": len(paths), "policies": policies, "failures": failures}


def is_reporting(folder: str | Path) -> bool:
    """Whether a process that is alive, on this machine, serves policies and reports to a folder."""
    for path in Path(folder).glob("status-*.json"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(path.stem.removeprefix("status-")), 0)
            return True
    return False
