"""Labelling and selecting on Ray Data: the chunks and functions of one process, on many cores or nodes.

Workers read candidates from the run folder by path and import reward functions by name: on a cluster of several nodes
the folder lies on storage that all of them share, and the functions are installed there.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from asn_rl.errors import AsnError, ConfigError, InvalidValue, RewardError, check_at_least
from asn_rl.labelling.labels import Chunk, Engine, label_chunk
from asn_rl.labelling.records import Record, label_record
from asn_rl.labelling.select import Map
from asn_rl.labelling.store import read_candidates
from asn_rl.rewards.compose import RewardConfig, RewardSuite

BLOCKS = 1000
"""tasks that the work is cut into, at most; Ray spends about 10 ms on each"""


@dataclass(frozen=True)
class RayConfig:
    """Where Ray runs, and how many workers do the work."""

    address: str | None = None
    """address of a running cluster (auto: the one of this machine); null: Ray is started here, and ends with this
    process"""
    num_cpus: int | None = None
    """cores of a Ray that is started here; null: all"""
    concurrency: int | None = None
    """label workers, each with a labeller (and its model) of its own; null: one a core, or as many as the GPUs carry"""
    num_gpus: float = 0.0
    """GPUs that a label worker holds, for labellers with a model; 0.5: two workers share one"""
    retries: int = 3
    """further workers that a chunk may cost, before its scores are masked"""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "num_gpus", "retries")
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise InvalidValue("num_gpus", self.num_gpus, "at most 1, or a whole number", "Ray shares out single GPUs")
        for name in ("num_cpus", "concurrency"):
            if getattr(self, name) is not None:
                check_at_least(self, 1, name)
        if self.address is not None and self.num_cpus is not None:
            raise ConfigError(
                f"num_cpus {self.num_cpus} belongs to a Ray that is started here, and address {self.address!r} names "
                "a running one; set one of them"
            )


def check_gpus(name: str, labeller: RewardConfig, config: RayConfig) -> None:
    """Refuse a labeller on a GPU where label workers hold none.

    From such workers older versions of Ray hide every GPU; newer ones (pull request 62492 of Ray) let all of them, one
    a core, put a model of their own on the same GPU.

    Raises:
        ConfigError: argument `device` of the labeller is a cuda device, and `num_gpus` is 0.
    """
    device = labeller.arguments.get("device")
    if config.num_gpus == 0 and str(device).startswith("cuda"):
        raise ConfigError(
            f"labeller {name!r} has device: {device}, and label workers hold num_gpus 0: Ray hides GPUs from them, or "
            "lets all of them crowd on one. Pass --ray-gpus 1 (in code RayConfig(num_gpus=1)), or a fraction of 1 if "
            "several workers are to share a GPU"
        )


def ray_engine(config: RayConfig | None = None) -> Engine:
    """An engine for `labels.label`: an actor pool of label workers, results in the order in which they are ready.

    A chunk whose worker dies is given to another one, `retries` times; then its scores are masked and counted, with a
    warning. Errors are those of the labeller, as in one process.

    Raises:
        ConfigError: Ray is missing, its cluster cannot be reached, or the workers lack the labeller's GPU.
    """
    options = config or RayConfig()

    def engine(
        labeller: RewardConfig, name: str, chunks: Iterable[Chunk]
    ) -> Iterator[tuple[int, list[Record], Mapping[str, int]]]:
        check_gpus(name, labeller, options)
        ray = _connected(options)
        workers = _workers(ray, options)
        items = list(enumerate(chunks))
        data = _dataset(ray, items)
        answers = data.map_batches(
            LabelWorker,
            fn_constructor_args=(labeller, name, options.retries, attempts_actor(ray), tuple(sys.path)),
            batch_size=1,  # a chunk; with GPUs Ray insists on a number
            compute=ray.data.ActorPoolStrategy(size=max(1, min(workers, len(items)))),
            num_cpus=None if options.num_gpus else 1,  # Ray discourages both
            num_gpus=options.num_gpus,
        )
        warned = False
        for row in answers.iter_rows():
            answer = json.loads(row["answer"])
            if refused := answer.get("refused"):
                raise RewardError(refused)
            if (lost := answer["counts"].get(f"{labeller.function}/worker_lost")) and not warned:
                warned = True
                warnings.warn(
                    f"labeller {name!r} ended {lost} worker processes on the same candidates; their "
                    f"{len(answer['records'])} scores are masked. Further ones are only counted",
                    RuntimeWarning,
                    stacklevel=2,
                )
            yield answer["prompts"], answer["records"], answer["counts"]

    return engine


def ray_map(config: RayConfig | None = None) -> Map:
    """`map` over blocks as Ray tasks, results in the order of the blocks: an engine for `select.select`.

    The function and the blocks travel to the workers, so the function is one of a module.

    Raises:
        ConfigError: Ray is missing or its cluster cannot be reached.
    """
    options = config or RayConfig()

    def engine(function: Callable[[Any], Any], blocks: Iterable[Any]) -> Iterator[Any]:
        ray = _connected(options)
        data = _dataset(ray, blocks)
        data.context.execution_options.preserve_order = True
        answers = data.map_batches(_apply, fn_args=(function,), batch_size=None, num_cpus=1)
        for row in answers.iter_rows():
            yield pickle.loads(row["answer"])

    return engine


class LabelWorker:
    """One labeller in one worker process, its models loaded once."""

    def __init__(
        self, labeller: RewardConfig, name: str, retries: int, attempts: Any, path: tuple[str, ...] = ()
    ) -> None:
        self.labeller, self.name, self.retries, self.attempts = labeller, name, retries, attempts
        sys.path.extend(folder for folder in path if folder not in sys.path)  # plug-ins of the working folder

    @cached_property
    def suite(self) -> RewardSuite:
        return RewardSuite([self.labeller])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"answer": [json.dumps(self._answer(*pickle.loads(item))) for item in batch["item"]]}

    def _answer(self, number: int, chunk: Chunk) -> dict[str, Any]:
        import ray

        before = int(ray.get(self.attempts.begin.remote(number)))
        try:
            if before > self.retries:
                return self._masked(chunk, before)
            records, counts = label_chunk(self.suite, self.name, chunk)
            ray.get(self.attempts.end.remote(number))
        except AsnError as error:  # as text: errors with arguments of their own do not survive the way back
            return {"refused": str(error)}
        except OSError as error:
            return {"refused": f"a Ray worker cannot read a candidate: {error}; all nodes must share the run folder"}
        return {"prompts": len(chunk), "records": records, "counts": dict(counts)}

    def _masked(self, chunk: Chunk, lost: int) -> dict[str, Any]:
        candidates = [candidate for _, places in chunk for candidate in read_candidates(places)]
        reason = f"the worker process died, {lost} times"
        records = [label_record(candidate, self.name, None, reason) for candidate in candidates]
        function = self.labeller.function  # what the suite of this one labeller calls it, be it named name#2 here
        counts = {f"{function}/masked": len(records), f"{function}/worker_lost": lost}
        return {"prompts": len(chunk), "records": records, "counts": counts}


def attempts_actor(ray: Any) -> Any:
    """Counts how often each chunk was begun and not ended, outside the workers, who may not live to tell.

    The class is local so that it travels by value: its process then does without torch.
    """

    class Attempts:
        def __init__(self) -> None:
            self.begun: dict[int, int] = {}

        def begin(self, number: int) -> int:
            """How often this chunk was begun before."""
            before = self.begun.get(number, 0)
            self.begun[number] = before + 1
            return before

        def end(self, number: int) -> None:
            """The chunk did no harm: it may be begun again when a neighbour in its task did."""
            self.begun.pop(number, None)

    return ray.remote(num_cpus=0)(Attempts).remote()


def _apply(batch: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    return {"answer": [pickle.dumps(function(pickle.loads(item))) for item in batch["item"]]}


def _connected(config: RayConfig) -> Any:
    """The ray module, connected; a Ray that already runs in this process is used as it is."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError("the Ray engine needs Ray Data; run: pip install 'asn_rl[ray]'") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # its plans and bars would tear ours
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    here = {} if config.address else {"num_cpus": config.num_cpus, "include_dashboard": False}
    try:
        ray.init(address=config.address or "local", **here)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot connect to Ray at {config.address or 'this machine'}: {error}; check `ray status`, or leave "
            "address out to start Ray here"
        ) from error
    return ray


def _dataset(ray: Any, items: Iterable[Any]) -> Any:
    """A dataset with one pickled item a row. What is pickled here goes to this project's own workers only."""
    rows = [{"item": pickle.dumps(item)} for item in items]
    data = ray.data.from_items(rows, override_num_blocks=max(1, min(len(rows), BLOCKS)))
    data.context.enable_progress_bars = False
    return data


def _workers(ray: Any, config: RayConfig) -> int:
    """How many label workers to ask for. A Ray of this machine that lacks their GPUs is refused, since it would wait
    for them for ever; a cluster may grow."""
    have = ray.cluster_resources()
    gpus = have.get("GPU", 0)
    if config.address is None and gpus < config.num_gpus:
        raise ConfigError(
            f"num_gpus (--ray-gpus) is {config.num_gpus:g}, and Ray on this machine has {gpus:g} GPUs; lower it, run "
            "the labellers on device: cpu, or give the address of a cluster that has them"
        )
    if config.concurrency is not None:
        return config.concurrency
    if config.num_gpus > 0:
        return max(1, int(gpus / config.num_gpus))
    return max(1, int(have.get("CPU", 1)))
