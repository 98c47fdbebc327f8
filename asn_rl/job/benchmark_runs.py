"""Benchmarks as the labelling pipeline runs them: prompts, completions of every arm in mixed batches, scores."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from asn_rl.backends import load_backend
from asn_rl.checkpoint import load_policy
from asn_rl.data.benchmark import Benchmark, benchmark_prompts, load_benchmark
from asn_rl.errors import AsnError, ConfigError, DataError
from asn_rl.evaluation.comparison import Arm
from asn_rl.evaluation.metrics import METRICS
from asn_rl.job.config import DISTILLED, RL
from asn_rl.job.job import Job
from asn_rl.job.servers import generate_on_servers, publish_arms
from asn_rl.labelling import generate as generating
from asn_rl.labelling import labels as labelling
from asn_rl.labelling.grid import Grid
from asn_rl.labelling.records import LABEL, as_key, read_records, write_prompts
from asn_rl.labelling.store import CandidateStore, read_candidates
from asn_rl.protocols import LogitsBackend
from asn_rl.rewards import REWARDS
from asn_rl.rewards.compose import RewardConfig, unique_names
from asn_rl.rewards.contract import load_function
from asn_rl.rewards.embedding_diversity import EMBEDDED, load_encoder
from asn_rl.rollout import RolloutConfig, encoded_prompts
from asn_rl.runs import console
from asn_rl.types import Candidate, Messages, Prompt

JUDGED = "win_rate"
"""what events of the judge are listed under"""


@dataclass(frozen=True)
class Task:
    """A benchmark that can be run, or one turn of its conversations."""

    name: str
    benchmark: Benchmark
    prompts: Mapping[str, list[Prompt]]
    """by split: selection, test"""
    backend: LogitsBackend
    rollout: RolloutConfig
    folder: Path
    served: Mapping[str, str] | None = None
    """names of the arms on the servers that complete the prompts; null: this process does"""
    after: Task | None = None
    """the turn before, of a conversation"""


@dataclass(frozen=True)
class Scored:
    """P prompts under A arms with S samples, and what was counted meanwhile."""

    prompts: list[Prompt]
    scores: dict[str, np.ndarray]
    """(P, A, S) by verifier, then by scorer; NaN: masked"""
    tokens: np.ndarray
    truncated: np.ndarray
    texts: list[list[list[str]]]
    events: dict[str, int]
    """by "verifier: event" """
    wins: np.ndarray | None = None
    """(P, A, S) the judge's view of each completion against the reference's: 1, 0.5, 0; NaN: masked"""
    unscored: dict[str, list[str]] = field(default_factory=dict)
    """completions without a score, "prompt, arm, seed", by "verifier: reason" """


def learned_arms(job: Job) -> list[Arm]:
    """What `evaluate.policies` names, then what this run folder has learned."""
    own = {name: job.run / folder for name, folder in ((DISTILLED, DISTILLED), (RL, "policy"))}
    named: dict[str, list[Path]] = {
        name: [Path(f) for f in given] for name, given in job.config.evaluate.policies.items()
    }
    named |= {name: [folder] for name, folder in own.items() if folder.exists() and name not in named}
    arms = []
    for name, folders in named.items():
        for i, folder in enumerate(folders):
            job.check_policy(folder)
            arms.append(Arm(seed_name(name, i) if len(folders) > 1 else name, load_policy(folder)))
    return arms


def seed_name(name: str, seed: int) -> str:
    return f"{name} {seed}"


def prepared(job: Job, arms: Sequence[Arm]) -> tuple[list[Task], dict[str, str]]:
    """The benchmarks that can be run, and why the others cannot: known before hours of generation."""
    servers = job.config.generate.servers
    served = publish_arms(job, servers, arms) if servers is not None and servers.policies is not None else None
    ready: list[Task] = []
    left_out: dict[str, str] = {}
    for name in job.config.evaluate.tasks:
        try:
            benchmark = load_benchmark(name)
            if benchmark.name in (task.benchmark.name for task in ready):
                raise ConfigError(f"two of evaluate.tasks are called {benchmark.name!r}; give yours another name")
            turns = _turns(job, benchmark, served)
            _check_installed(job, turns[0])
            ready += turns
        except AsnError as error:
            leave_out(left_out, name, error)
    if not ready:
        raise DataError(nothing_ran(left_out))
    return ready, left_out


def leave_out(left_out: dict[str, str], name: str, error: AsnError) -> None:
    left_out[name] = str(error)
    console.print(f"[yellow]left out[/] {name}: {error}", highlight=False)


def nothing_ran(left_out: Mapping[str, str]) -> str:
    return "no benchmark can be run: " + "; ".join(f"{name}: {why}" for name, why in left_out.items())


def _check_installed(job: Job, task: Task) -> None:
    """An error of what scores a task and is not installed or cannot be loaded: every reward function of this process is
    called with no completions, and the sentence encoder is loaded where a metric needs it.

    Raises:
        AsnError: what is missing, by the function that needs it.
    """
    config = job.config.evaluate
    names = {name for part in task.prompts.values() for prompt in part for name in prompt.columns}
    nothing = {name: [] for name in ("completion_ids", *names, "terminated", "prompt_id", "group", "references")}
    for reward in [*_verifiers(task.benchmark), *config.scorers, *([config.judge] if config.judge else [])]:
        function = load_function(REWARDS.path(reward.function), reward.arguments)
        if reward.isolation == "process":  # what it loads is for its own process
            continue
        try:
            function([], [], **{name: cells for name, cells in nothing.items() if name not in reward.arguments})
        except AsnError:
            raise
        except Exception:
            continue  # a function of somebody else's need not bear being called with nothing
    if any("encoder" in METRICS[name].needs for name in (*task.benchmark.metrics, *config.metrics) if name in METRICS):
        load_encoder(EMBEDDED)


def _verifiers(benchmark: Benchmark) -> list[RewardConfig]:
    return [RewardConfig(v.function, arguments=dict(v.arguments)) for v in benchmark.verifiers]


def _turns(job: Job, benchmark: Benchmark, served: Mapping[str, str] | None) -> list[Task]:
    """The benchmark, and for each follow-up a task that goes on after the one before."""
    tasks = [replace(_task(job, benchmark), served=served)]
    for turn in range(2, 2 + len(benchmark.prompt.follow_ups)):
        name = f"{benchmark.name} turn {turn}"
        task = replace(tasks[-1], name=name, folder=tasks[0].folder.with_name(name), after=tasks[-1])
        for part in task.prompts.values():
            silent = [_conversation(prompt, turn) for prompt in part]
            # One whose answers could fill the context shows now; how long they are is not known yet.
            encoded_prompts(task.backend, silent, turn * task.rollout.max_new_tokens)
        tasks.append(task)
    return tasks


def _conversation(prompt: Prompt, turn: int) -> Prompt:
    """What is asked in a turn after answers that say nothing."""
    asked, empty = prompt, Candidate(prompt.id, "", 0, "", None, terminated=True)
    for _ in range(turn - 1):
        asked = generating.next_turn(prompt, replace(empty, history=generating.as_messages(asked)))
    return asked


def _task(job: Job, benchmark: Benchmark) -> Task:
    config = job.config.evaluate
    prompts = {
        split: benchmark_prompts(benchmark, split, config.data, config.limit, verify_checksums=config.verify_checksums)
        for split in ("selection", "test")
    }
    chat = benchmark.prompt.form == "chat"
    backend = load_backend(replace(job.config.backend, chat_template=chat, system_prompt=None, examples=()))
    limits = replace(
        job.config.rollout,
        max_new_tokens=config.max_new_tokens or benchmark.max_new_tokens,
        stop=benchmark.stop,
    )
    for part in prompts.values():
        encoded_prompts(backend, part, limits.max_new_tokens)  # one that is too long shows now
    return Task(benchmark.name, benchmark, prompts, backend, limits, job.run / "evaluation" / benchmark.name)


def run_prompts(
    job: Job, task: Task, name: str, prompts: list[Prompt], arms: Sequence[Arm], reference: str | None = None
) -> Scored:
    """Completions of some prompts under all arms in mixed batches, scored by the benchmark's verifiers, and compared by
    the judge with those of a reference arm where one is named."""
    config, folder = job.config.evaluate, task.folder / name
    by_id = {prompt.id: prompt for prompt in prompts}
    store = _completed(job, task, name, prompts, arms)
    grid = store.grid
    write_prompts(folder / "prompts.jsonl", {name: prompts})
    configs = [*_verifiers(task.benchmark), *config.scorers]
    labelling.label(configs, store, by_id, folder / "labels")
    places = [folder / "labels" / labelling.folder_name(label) for label in unique_names(configs)]
    labels = [
        labelling.read_labels(place, label, store).scores
        for place, label in zip(places, unique_names(configs), strict=True)
    ]
    names = [*(v.name for v in task.benchmark.verifiers), *unique_names(config.scorers)]
    candidates = iter(read_candidates([store.location(cell) for cell in np.ndindex(grid.shape)]))
    cells = [[[next(candidates) for _ in grid.seeds] for _ in arms] for _ in prompts]
    counted, wins = dict(zip(names, places, strict=True)), None
    if reference is not None and config.judge is not None:
        counted[JUDGED] = folder / "wins" / labelling.folder_name(reference)
        counted[JUDGED] /= labelling.folder_name(config.judge.function)
        wins = _wins(config.judge, store, prompts, cells, reference, counted[JUDGED])
    return Scored(
        prompts,
        dict(zip(names, labels, strict=True)),
        np.array([[[len(c.completion_ids or ()) for c in group] for group in row] for row in cells], float),
        store.truncated.astype(float),
        [[[c.completion for c in group] for group in row] for row in cells],
        {
            f"{label}: {event.rpartition('/')[2]}": count
            for label, place in counted.items()
            for event, count in labelling.read_counts(place).items()
            if count
        },
        wins,
        {f"{label}: {reason}": ids for label, place in counted.items() for reason, ids in _unscored(place).items()},
    )


def _unscored(place: Path) -> dict[str, list[str]]:
    """Completions that a labeller gave no score, "prompt, arm, seed", by the reason."""
    last = {as_key(record, where): record for where, record in read_records(place, LABEL)}
    found: dict[str, list[str]] = defaultdict(list)
    for key, record in last.items():
        if record["score"] is None:
            found[record.get("reason", "no reason given")].append(", ".join(map(str, key)))
    return dict(found)


def _completed(job: Job, task: Task, name: str, prompts: list[Prompt], arms: Sequence[Arm]) -> CandidateStore:
    """Completions of some prompts under all arms; in a later turn, after those of the turn before."""
    folder = task.folder / name / "candidates"
    grid = Grid(tuple(p.id for p in prompts), tuple(arm.name for arm in arms), job.config.evaluate.seeds)
    store, by_id = CandidateStore(grid, folder), {prompt.id: prompt for prompt in prompts}
    earlier = _completed(job, task.after, name, prompts, arms) if task.after else None
    fixed, servers = [arm.name for arm in arms if arm.deterministic], job.config.generate.servers
    if task.served is not None and servers is not None:
        generate_on_servers(
            servers, store, by_id, task.backend, task.rollout, fixed, served=task.served, earlier=earlier
        )
    else:
        policies = {arm.name: arm.policy for arm in arms}
        source = generating.InProcess(task.backend, policies, by_id, task.rollout, fixed, earlier)
        generating.generate(store, source, folder)
    return CandidateStore(grid, folder)


def _wins(
    judge: RewardConfig,
    store: CandidateStore,
    prompts: Sequence[Prompt],
    cells: Sequence[Sequence[Sequence[Candidate]]],
    reference: str,
    place: Path,
) -> np.ndarray:
    """(P, A, S) what the judge says of each completion against one of the reference's, which tie with themselves."""
    arm = store.grid.heuristics.index(reference)
    against = {
        prompt.id: replace(prompt, columns={**prompt.columns, "references": _references(row[arm])})
        for prompt, row in zip(prompts, cells, strict=True)
    }
    labelling.label([judge], store.without(arm), against, place.parent)
    wins = labelling.read_labels(place, judge.function, store).scores
    wins[:, arm] = 0.5
    return wins


def _references(group: Sequence[Candidate]) -> list[str | Messages]:
    """What a prompt's completions meet, in order. Arms share their draws seed by seed, so each meets the completion of
    the next seed: with its own, what is compared would not be two independent answers."""
    whole = [
        c.completion if c.history is None else [*c.history, {"role": "assistant", "content": c.completion}]
        for c in group
    ]
    return [*whole[1:], whole[0]]


def joined(parts: Sequence[Scored]) -> Scored:
    events = {name: 0 for part in parts for name in part.events}
    unscored: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        for reason, ids in part.unscored.items():
            unscored[reason] += ids
    return Scored(
        [prompt for part in parts for prompt in part.prompts],
        {name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores},
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.truncated for part in parts]),
        [row for part in parts for row in part.texts],
        {name: sum(part.events.get(name, 0) for part in parts) for name in events},
        None if parts[0].wins is None else np.concatenate([part.wins for part in parts if part.wins is not None]),
        dict(unscored),
    )


def fingerprint(task: Task) -> str:
    """Of the benchmark's file and everything that was read by it."""
    rows = [(p.id, p.content, dict(p.columns)) for split in sorted(task.prompts) for p in task.prompts[split]]
    text = json.dumps([asdict(task.benchmark), rows], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
