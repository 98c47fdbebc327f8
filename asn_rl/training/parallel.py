"""Several processes that train one policy: they share the prompts of a step and add up their gradients.

`accelerate launch` and `torchrun` start them and tell them so by environment variables (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT). A process that was not started so is alone, and every function here leaves what it is given
as it is.

What travels is small: a gradient of kilobytes, a few numbers a token, texts. It therefore goes through the CPU by gloo,
on machines with GPUs too, as tensors and JSON (nothing is unpickled). Sums over processes are taken in float64, in the
order of the processes or by one ring, so that all of them hold the same bits and their policies never part.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asn_rl.errors import AsnError, ConfigError, TrainingError
from asn_rl.runs import console
from asn_rl.threads import available_cores

TIMEOUT = timedelta(hours=2)  # the main process may replay candidates while the others wait for it
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
T = TypeVar("T", bound=Tensor | Sequence)
R = TypeVar("R")


@dataclass(frozen=True)
class _World:
    """The processes that this one has met."""

    rank: int
    size: int
    group: Any
    """None: the default one"""


_world: _World | None = None


def join() -> None:
    """Meet the other processes that a launcher started, if it did. To be called before anything is written; again, it
    does nothing. Only the main process, number 0, prints from here on; each takes the GPU of its LOCAL_RANK.

    Raises:
        ConfigError: the launcher's environment variables make no sense.
        TrainingError: the others could not be reached.
    """
    global _world
    if _world is not None or not launched():
        return
    try:
        number, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError as error:
        found = {name: os.environ[name] for name in _VARIABLES}
        raise ConfigError(
            f"the launcher's environment {found} is damaged: {error}; unset it, or use torchrun"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    if dist.is_initialized():  # by the caller's own script, perhaps for NCCL
        group = _checked(lambda: dist.new_group(backend="gloo", timeout=TIMEOUT))
    else:
        group = None
        _checked(lambda: dist.init_process_group("gloo", timeout=TIMEOUT))
    console.quiet = number > 0
    _world = _World(number, count, group)


def launched() -> bool:
    """Whether a launcher started several processes, this one among them."""
    return all(name in os.environ for name in _VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def main_alone() -> None:
    """From here on the main process works alone: the others end, with exit status 0."""
    global _world
    if _world is None:
        return
    left = _world
    with suppress(RuntimeError):
        dist.destroy_process_group(left.group)
    if left.rank > 0:
        sys.exit(0)
    _world = None
    console.print(f"one process does what follows; the other {left.size - 1} end here", highlight=False)


def size() -> int:
    """How many processes train together."""
    return 1 if _world is None else _world.size


def rank() -> int:
    """Which of them this one is."""
    return 0 if _world is None else _world.rank


def is_main() -> bool:
    """Whether this process writes the run folder."""
    return rank() == 0


def threads() -> int | None:
    """Threads that leave each process of this machine its share of the cores; None: all."""
    if _world is None:
        return None
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", _world.size)))


def shard(items: T) -> T:
    """This process's part of a sequence, or of a tensor's first axis. They are dealt out one by one: neighbours, such
    as the prompts of one task, often take alike long."""
    return items if _world is None else items[_world.rank :: _world.size]  # type: ignore[return-value]


def gathered(values: Tensor) -> Tensor:
    """(n, ...) tensors of all processes, one after the other along the first axis; n may differ."""
    if _world is None:
        return values
    as_sent = values.to(torch.uint8) if values.dtype == torch.bool else values
    return torch.cat(_exchange(as_sent.detach().cpu())).to(values)


def before(count: int) -> int:
    """The sum of what the processes before this one give."""
    return sum(gathered_json(count)[: rank()])


def gathered_json(value: Any) -> list[Any]:
    """A value of every process; they are sent as JSON."""
    if _world is None:
        return [value]
    sent = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in _exchange(sent)]


def from_main(value: R) -> R:
    """The main process's value, in all."""
    return gathered_json(value if is_main() else None)[0]


def summed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers by name, summed over the processes; a name that a process lacks counts as 0 there."""
    totals: dict[str, Any] = {}
    for part in gathered_json(dict(values)):
        totals |= {name: totals[name] + value if name in totals else value for name, value in part.items()}
    return totals


def sum_gradients(parameters: Sequence[nn.Parameter], weight: float = 1.0) -> None:
    """Make every gradient the sum over processes of `weight` times theirs; None where nobody has one.

    Args:
        weight: this process's; ignored where it is alone.
    """
    if _world is None:
        return
    given = torch.tensor([p.grad is not None for p in parameters])
    parts = [torch.zeros(p.numel()) if p.grad is None else weight * p.grad.double().flatten().cpu() for p in parameters]
    total = torch.cat([given.double(), *parts]).contiguous()
    _checked(lambda: dist.all_reduce(total, group=_group()))
    given, *parts = total.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, some, gradient in zip(parameters, given.tolist(), parts, strict=True):
        parameter.grad = gradient.reshape(parameter.shape).to(parameter) if some else None


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes go through. Where it raises in one, all end with that reason; none goes on before all
    are through."""
    try:
        yield
    except Exception as error:
        with suppress(TrainingError):  # others that are gone already
            _settle(str(error) if isinstance(error, AsnError) else f"{type(error).__name__}: {error}")
        raise
    _settle(None)


@contextmanager
def main_first() -> Iterator[None]:
    """A block that the main process goes through before the others do."""
    if is_main():
        with together():
            yield
    else:
        _settle(None)
        yield


def check_agreement(step: int, parameters: Sequence[Tensor]) -> None:
    """`TrainingError` unless all processes stand at the same step with the same weights."""
    if _world is None:
        return
    digest = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in parameters)).hexdigest()[:12]
    stand = gathered_json([step, digest])
    if any(other != stand[0] for other in stand):
        listed = ", ".join(f"{i}: step {at}, weights {weights}" for i, (at, weights) in enumerate(stand))
        raise TrainingError(
            f"the processes do not begin at the same place ({listed}); on several machines the run folder must be the "
            "same, on a file system that they share"
        )


def _settle(failure: str | None) -> None:
    """Tell the others how it went. `TrainingError` where another one failed."""
    for i, reason in enumerate(gathered_json(failure)):
        if reason is not None and failure is None:
            raise TrainingError(f"process {i} of {size()} failed: {reason}")


def _exchange(values: Tensor) -> list[Tensor]:
    """(n, ...) tensors of all processes, in their order."""
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    _checked(lambda: dist.all_gather(counts, torch.tensor([len(values)]), group=_group()))
    longest = max(int(count) for count in counts)
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(size())]
    _checked(lambda: dist.all_gather(parts, padded, group=_group()))
    return [part[: int(count)] for part, count in zip(parts, counts, strict=True)]


def _group() -> Any:
    return None if _world is None else _world.group


def _checked(collective: Callable[[], R]) -> R:
    try:
        return collective()
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"this process has lost the others, or never met them ({str(error).partition('. ')[0]}). What ended the "
            "first of them stands above or in its log; the same command continues from the last checkpoint"
        ) from error
