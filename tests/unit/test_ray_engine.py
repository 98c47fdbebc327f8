"""The Ray engine on a real Ray with two workers: the records of one process, also when workers are killed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from asn_rl.cli import main
from asn_rl.errors import ConfigError, InvalidValue, RewardError
from asn_rl.labelling import labels as labelling
from asn_rl.labelling.grid import Grid
from asn_rl.labelling.labels import label, local_engine, read_counts, read_labels
from asn_rl.labelling.ray_engine import LabelWorker, RayConfig, attempts_actor, ray_engine, ray_map
from asn_rl.labelling.records import LABEL, ShardWriter, candidate_record, read_records
from asn_rl.labelling.select import SelectConfig, select
from asn_rl.labelling.store import CandidateStore
from asn_rl.rewards.compose import RewardConfig
from asn_rl.types import Candidate, Prompt

# Ray 2.60 warns of options of its own whenever it makes its settings, whatever they are.
pytestmark = pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning")

GRID = Grid(tuple(f"p{i}" for i in range(12)), ("cold", "hot"), (1, 2, 3))
PROMPTS = {name: Prompt(name, f"Say {name}.", {"answer": str(i)}) for i, name in enumerate(GRID.prompts)}
LENGTH = RewardConfig("deadly_rewards:length")
ON_GPU = RewardConfig("deadly_rewards:holds_gpu", arguments={"device": "cuda:0"})


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """Ray with two cores and a GPU that nobody looks for, in a folder of its own: paths of its sockets must be shorter
    than those of `tmp_path`."""
    import ray

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # a token would be written to the home folder
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    ray.init(
        address="local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=100 * 2**20,
        _temp_dir=folder, log_to_driver=False,
    )  # fmt: skip
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "CHUNK", 12)  # two prompts each, six chunks


@pytest.fixture
def store(tmp_path: Path) -> CandidateStore:
    texts = np.random.default_rng(0)
    with ShardWriter(tmp_path / "candidates") as shard:
        shard.write(
            [
                candidate_record(Candidate(p, h, s, f"{p}." + "ä" * int(texts.integers(9)), None, True))
                for p, h, s in GRID.keys(np.ones(GRID.shape, bool))
            ]
        )
    return CandidateStore(GRID, tmp_path / "candidates")


def records(folder: Path) -> list[dict[str, Any]]:
    return sorted(
        (r for _, r in read_records(folder, LABEL)), key=lambda r: (r["prompt_id"], r["heuristic"], r["seed"])
    )


def test_the_records_are_those_of_one_process_though_a_worker_is_killed(store: CandidateStore, tmp_path: Path):
    marker = tmp_path / "marker"
    deadly = RewardConfig("deadly_rewards:deadly_once", arguments={"marker": str(marker), "word": "p7."})
    counted = label([deadly], store, PROMPTS, tmp_path / "ray", ray_engine(RayConfig(concurrency=2)))
    assert int(marker.read_text()) != os.getpid(), "a worker died, not this process"
    here = label([deadly], store, PROMPTS, tmp_path / "here", local_engine)
    name = deadly.function
    folders = [tmp_path / place / labelling.folder_name(name) for place in ("ray", "here")]
    assert records(folders[0]) == records(folders[1])
    assert len(records(folders[0])) == GRID.size
    assert counted == here
    assert read_counts(folders[0]) == read_counts(folders[1]) == counted[name]


def test_a_chunk_that_kills_every_worker_is_masked_and_counted(store: CandidateStore, tmp_path: Path):
    deadly = RewardConfig("deadly_rewards:deadly", arguments={"word": "p7."})
    with pytest.warns(RuntimeWarning, match="ended 2 worker processes on the same candidates; their 12 scores are"):
        counted = label([deadly], store, PROMPTS, tmp_path, ray_engine(RayConfig(concurrency=1, retries=1)))
    name = deadly.function
    assert counted[name][f"{name}/worker_lost"] == 2
    assert counted[name][f"{name}/masked"] == 12
    found = read_labels(tmp_path / labelling.folder_name(name), name, store)
    assert found.seen.all()
    assert np.flatnonzero(np.isnan(found.scores).any((1, 2))).tolist() == [6, 7]


def test_a_labeller_that_breaks_its_contract_stops_the_run_with_its_own_message(store: CandidateStore, tmp_path: Path):
    wrong = RewardConfig("deadly_rewards:length", arguments={"budget": 3})
    with pytest.raises(RewardError, match="unknown argument of reward 'deadly_rewards:length' 'budget'"):
        label([wrong], store, PROMPTS, tmp_path, ray_engine(RayConfig(concurrency=1)))


def test_a_run_folder_that_a_worker_does_not_see_is_named(store: CandidateStore, tmp_path: Path):
    import ray

    chunk = [(PROMPTS["p0"], store.locations(0))]
    (tmp_path / "candidates" / "shard-00000.jsonl").rename(tmp_path / "elsewhere")
    worker = LabelWorker(LENGTH, "length", 3, attempts_actor(ray))
    (answer,) = worker({"item": [pickle.dumps((0, chunk))]})["answer"]
    assert re.search("cannot read a candidate.*shard-00000.*must share the run folder", json.loads(answer)["refused"])


def test_only_chunks_that_were_not_ended_count_as_attempts():
    import ray

    attempts = attempts_actor(ray)
    first = [ray.get(attempts.begin.remote(number)) for number in (1, 2, 1)]
    ray.get(attempts.end.remote(1))
    assert first + [ray.get(attempts.begin.remote(number)) for number in (1, 2)] == [0, 0, 1, 0, 1]


def test_selecting_on_ray_writes_the_same_files(store: CandidateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("asn_rl.labelling.select.BLOCK", 5)
    label([LENGTH], store, PROMPTS, tmp_path)
    name = LENGTH.function
    found = {name: read_labels(tmp_path / labelling.folder_name(name), name, store)}
    strata = ["even", "odd"] * 6
    for place, engine in (("here", map), ("ray", ray_map())):
        select(store, found, {name: 1.0}, strata, SelectConfig(top_k=2), tmp_path / place, engine)
    for file in ("selected.jsonl", "targets.jsonl", "examples.jsonl", "summary.json"):
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "ray" / file).read_bytes()


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A labeller on a GPU, in a working folder that is not that of Ray's workers; options that name its job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    settings = {
        "backend": {"kind": "toy", "model": "random:32:0"},
        "data": {"source": "jsonl", "arguments": {"path": "prompts.jsonl"}},
        "rewards": [{"function": ON_GPU.function, "arguments": ON_GPU.arguments}],
        "rollout": {"max_new_tokens": 4, "head": 32, "tail": 1},
        "heuristics": [{"name": "greedy", "processors": [{"name": "greedy"}]}, {"name": "T=1"}],
        "generate": {"num_generations": 2, "train_prompts": 4, "selection_prompts": 2},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    rows = [{"prompt": f"w{i}", "id": f"p{i}"} for i in range(1, 31)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--config", "job.yaml", "--run", "run")


def test_the_commands_label_on_workers_that_hold_a_gpu_and_select(job: tuple[str, ...], tmp_path: Path):
    assert main(["label", *job, "--engine", "ray", "--ray-workers", "1", "--ray-gpus", "0.5"]) == 0
    folder = tmp_path / "run" / "labels" / "train" / labelling.folder_name(ON_GPU.function)
    assert [record["score"] for record in records(folder)] == [1.0] * 4 * 2 * 2
    assert main(["select", *job, "--engine", "ray"]) == 0
    assert (tmp_path / "run" / "selection.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["label", "--ray-gpus", "1"], "--ray-gpus 1.0 needs --engine ray"),
        (["label", "--ray-workers", "2"], "--ray-workers 2 needs --engine ray"),
        (["select", "--ray-address", "auto"], "--ray-address 'auto' needs --engine ray"),
        (["label", "--engine", "ray"], "labeller 'deadly_rewards:holds_gpu' has device: cuda:0"),
        (["label", "--engine", "ray", "--ray-gpus", "-1"], "num_gpus must be >= 0, got -1.0"),
    ],
)
def test_commands_that_cannot_work_end_before_anything_is_generated(
    job: tuple[str, ...], arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([arguments[0], *job, *arguments[1:]]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "candidates").exists()


def test_a_labeller_on_a_gpu_needs_workers_that_hold_one():
    with pytest.raises(ConfigError, match=r"labeller 'mine' has device: cuda:0.*Pass --ray-gpus 1"):
        next(ray_engine()(ON_GPU, "mine", []))


def test_gpus_that_ray_on_this_machine_lacks_are_not_waited_for():
    with pytest.raises(ConfigError, match=r"num_gpus \(--ray-gpus\) is 2, and Ray on this machine has 1 GPUs"):
        next(ray_engine(RayConfig(num_gpus=2, concurrency=1))(ON_GPU, "mine", []))


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'asn_rl\[ray\]'"):
        next(ray_engine()(LENGTH, "length", []))
    with pytest.raises(ConfigError, match=r"pip install 'asn_rl\[ray\]'"):
        next(ray_map()(str, []))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retries": -1}, "retries must be >= 0"),
        ({"num_gpus": -0.5}, "num_gpus must be >= 0"),
        ({"num_gpus": 1.5}, "num_gpus must be at most 1, or a whole number"),
        ({"num_gpus": float("inf")}, "num_gpus must be at most 1, or a whole number"),
        ({"concurrency": 0}, "concurrency must be >= 1"),
        ({"num_cpus": 0}, "num_cpus must be >= 1"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str):
    with pytest.raises(InvalidValue, match=message):
        RayConfig(**change)


def test_cores_belong_to_a_ray_that_is_started_here():
    with pytest.raises(ConfigError, match="num_cpus 2 belongs to a Ray that is started here"):
        RayConfig(address="auto", num_cpus=2)
