"""Policies by name, for the rows of an engine's batch: what SGLang and vLLM share.

An exception in a logits processor ends an engine for all its users. So nothing is raised here: where a policy cannot
answer, the row keeps the base model's logits, and the failure is returned, logged, counted and written to a file
(`asn_rl.serving.status`), so that plain sampling never passes for the policy's.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from asn_rl.checkpoint import CONFIG, WEIGHTS
from asn_rl.errors import CheckpointError, ServingError, UnknownName
from asn_rl.serving.decoder import PolicyDecoder, Row, load_served
from asn_rl.serving.settings import ServingSettings, settings_from_environment
from asn_rl.serving.status import Failure, StatusFile

__all__ = ["Failure", "PolicyHost", "ServedRequest", "check_policy_name", "policy_names", "process_host"]

_NAME = re.compile(r"\w[\w.-]*")
_NOT_SEEN = "it was not seen from its first token on; start it again"


@dataclass(frozen=True)
class ServedRequest:
    """One row of an engine's batch, before its next token."""

    key: Hashable
    """names the request, from its first token to its last"""
    tokens: Sequence[int]
    """generated so far, prompt not included"""
    budget: int
    """tokens it may generate in all"""
    policy: str
    """name of a folder in the folder of policies"""


Stamp = tuple[tuple[int, int, int], ...]
"""(inode, modification time in ns, bytes) of the files of a policy"""


@dataclass(frozen=True, eq=False)
class _Version:
    """A policy as it was read at one time, with the requests that began then."""

    name: str
    stamp: Stamp
    decoder: PolicyDecoder


class PolicyHost:
    """The policies of one folder, over the logits of a batch that changes from step to step.

    A request stays on the version of its policy that was on disk when it began; a changed folder is read again when
    the next request begins, and one that cannot be read leaves the version before in use. A request that failed once
    is sampled plainly to its end, and reported once.
    """

    def __init__(self, settings: ServingSettings) -> None:
        self.settings, self.status = settings, StatusFile(settings.status)
        self._current: dict[str, _Version] = {}
        self._refused: dict[str, tuple[Stamp, str]] = {}
        self._requests: dict[Hashable, _Version | Failure] = {}
        for name in policy_names(settings.policies):
            with contextlib.suppress(CheckpointError):  # reported, and tried again when a request asks for it
                self._newest(name)

    def __call__(self, logits: Tensor, requests: Sequence[ServedRequest]) -> tuple[Tensor, list[Failure]]:
        """For next-token logits (B, V): (B, V) fp32 log-weights of each row's policy, and the rows that failed, whose
        logits are as they were. Never raises. The logits may be overwritten with the answer."""
        groups: dict[_Version, list[int]] = defaultdict(list)
        failures: list[Failure] = []
        for i, request in enumerate(requests):
            if not request.tokens:
                # vLLM shows a prompt that it reads in chunks at every chunk.
                self.status.count(request.policy, "requests", request.key not in self._requests)
                self.forget([request.key])
            found = self._version_of(request)
            if isinstance(found, Failure):
                failures.append(found)
            else:
                groups[found].append(i)
        return self._decoded(logits, requests, groups, failures), failures

    def forget(self, keys: Collection[Hashable]) -> None:
        """Release what is known of requests that have ended; a version without requests goes when a newer one is
        there."""
        for key in keys:
            found = self._requests.pop(key, None)
            if isinstance(found, _Version):
                found.decoder.forget([key])

    def fail(self, request: ServedRequest, reason: str, *, transient: bool = False) -> Failure:
        """Have a request sampled plainly to its end, and report it, once. `transient`: see `Failure`."""
        known = self._requests.get(request.key)
        if isinstance(known, Failure):
            return known
        self.forget([request.key])
        failure = Failure(request.key, request.policy, reason, transient)
        self._requests[request.key] = failure
        self.status.failed(failure)
        return failure

    @property
    def requests(self) -> list[Hashable]:
        """Requests that are under way."""
        return list(self._requests)

    def _version_of(self, request: ServedRequest) -> _Version | Failure:
        known = self._requests.get(request.key)
        if known is None:
            known = self.fail(request, _NOT_SEEN, transient=True) if request.tokens else self._begin(request)
        return known

    def _begin(self, request: ServedRequest) -> _Version | Failure:
        try:
            version = self._newest(request.policy)
        except Exception as error:
            return self.fail(request, str(error))
        self._requests[request.key] = version
        return version

    def _decoded(
        self,
        logits: Tensor,
        requests: Sequence[ServedRequest],
        groups: dict[_Version, list[int]],
        failures: list[Failure],
    ) -> Tensor:
        result = logits.float()
        for version, rows in groups.items():
            asked = [Row(requests[i].key, requests[i].tokens, requests[i].budget) for i in rows]
            try:
                if len(rows) == len(requests):
                    result = version.decoder(result, asked, in_place=True)
                else:
                    result[rows] = version.decoder(result[rows], asked, in_place=True)
                self.status.count(version.name, "tokens", len(rows))
            except Exception:
                for i, row in zip(rows, asked, strict=True):  # one by one: the others are not to suffer
                    try:
                        result[i : i + 1] = version.decoder(result[i : i + 1], [row])
                        self.status.count(version.name, "tokens")
                    except Exception as error:
                        reason, transient = f"{type(error).__name__}: {error}", isinstance(error, ServingError)
                        failures.append(self.fail(requests[i], reason, transient=transient))
        return result

    def _newest(self, name: str) -> _Version:
        """The version on disk; the one before where that cannot be read."""
        current = self._current.get(name)
        try:
            folder = check_policy_name(self.settings.policies, name)
            stamp = _stamp(folder)
        except (UnknownName, CheckpointError):  # removed, or about to be replaced
            if current is None:
                raise
            return current
        if current is not None and current.stamp == stamp:
            return current
        if self._refused.get(name, ((), ""))[0] != stamp:
            try:
                self._current[name] = _Version(name, stamp, self._read(folder, stamp))
                self._refused.pop(name, None)
                self.status.count(name, "loads")
                return self._current[name]
            except Exception as error:
                self._refused[name] = (stamp, f"{type(error).__name__}: {error}")
                self.status.refused(name, self._refused[name][1])
        if current is None:
            raise CheckpointError(self._refused[name][1])
        return current

    def _read(self, folder: Path, stamp: Stamp) -> PolicyDecoder:
        # A copy: safetensors maps its file, and a file that shrinks while it is mapped ends the process.
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / folder.name
            copy.mkdir()
            for name in (CONFIG, WEIGHTS):
                shutil.copy(folder / name, copy / name)
            if _stamp(folder) != stamp:
                raise CheckpointError(f"{folder} is being written; write beside it and rename (`save_policy` does)")
            try:
                policy, size = load_served(copy, self.settings.fingerprint)
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(str(copy), str(folder))) from error
        return PolicyDecoder(policy, size=size, tracked=self.settings.tracked)


def policy_names(folder: Path) -> list[str]:
    """Policies of a folder of policy folders. Names that begin with a dot are unfinished writes."""
    return sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}") if _NAME.fullmatch(path.parent.name))


def check_policy_name(folder: Path, name: str) -> Path:
    """The folder of a policy. Only its direct subfolders have names, so that a request cannot choose a path.

    Raises:
        UnknownName: there is none.
    """
    if not (isinstance(name, str) and _NAME.fullmatch(name) and (folder / name / CONFIG).is_file()):
        raise UnknownName("policy", str(name), policy_names(folder), f"Policies are the folders in {folder}.")
    return folder / name


@functools.cache
def process_host() -> PolicyHost:
    """The host of this process, made from the environment: engines make processors anew, policies are read once."""
    return PolicyHost(settings_from_environment())


def _stamp(folder: Path) -> Stamp:
    try:
        stats = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError as error:
        raise CheckpointError(f"{folder} holds no whole policy ({error})") from error
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)
