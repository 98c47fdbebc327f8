"""Scores of candidates: one labeller at a time, whole prompts at a time, so that labellers may compare candidates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asn_rl.errors import InvalidValue
from asn_rl.labelling.grid import Grid
from asn_rl.labelling.records import LABEL, Record, ShardWriter, as_score, folder_name, label_record, read_records
from asn_rl.labelling.store import CandidateStore, Location, read_candidates
from asn_rl.rewards.compose import RewardConfig, RewardSuite, unique_names
from asn_rl.runs import progress, write_json
from asn_rl.types import Candidate, Prompt

CHUNK = 256
"""candidates handed to a labeller at a time, at least; always whole prompts"""

_COUNTS = "counts.json"

Chunk = list[tuple[Prompt, list[Location]]]
Engine = Callable[[RewardConfig, str, Iterable[Chunk]], Iterator[tuple[int, list[Record], Mapping[str, int]]]]
"""(labeller's configuration, its name, chunks) -> (prompts done, label records, event counts) of each chunk, in any
order"""


def label_chunk(suite: RewardSuite, name: str, chunk: Chunk) -> tuple[list[Record], Mapping[str, int]]:
    """Label records of some prompts' candidates, and what was counted meanwhile.

    Labellers that compare completions do so within a prompt and heuristic: the column `group` says so. Those that
    compare across heuristics (a tournament) go by `prompt_id`.
    """
    rows = [[(_grouped(prompt, c), c) for c in read_candidates(places)] for prompt, places in chunk]
    values, reasons, counts = _scores(suite, rows)
    candidates = [candidate for part in rows for _, candidate in part]
    said = zip(candidates, values, reasons, strict=True)
    return [label_record(candidate, name, value, reason) for candidate, value, reason in said], counts


def _scores(
    suite: RewardSuite, rows: Sequence[Sequence[tuple[Prompt, Candidate]]]
) -> tuple[list[float | None], list[str | None], Counter[str]]:
    """Scores of some prompts' candidates, reasons where masked, and counts. A call that raises is made again with half
    of the prompts each, so that a candidate on which the labeller crashes masks its own prompt and no other."""
    flat = [row for part in rows for row in part]
    raw = suite.scores(
        [prompt for prompt, _ in flat],
        [candidate.completion for _, candidate in flat],
        [candidate.completion_ids for _, candidate in flat],
        terminated=[candidate.terminated for _, candidate in flat],
    )
    ((name, values),), (reasons,), counts = raw.values.items(), raw.reasons.values(), Counter(raw.counts)
    failed = counts[f"{name}/error"] > 0 and all(value is None for value in values)
    if not failed or len(rows) == 1:
        return values, reasons, counts
    counts[f"{name}/masked"] = 0
    first, second = (_scores(suite, part) for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]))
    return first[0] + second[0], first[1] + second[1], counts + first[2] + second[2]


def _grouped(prompt: Prompt, candidate: Candidate) -> Prompt:
    content = prompt.content if candidate.history is None else candidate.history
    return Prompt(prompt.id, content, {**prompt.columns, "group": f"{prompt.id}\n{candidate.heuristic}"})


def local_engine(
    config: RewardConfig, name: str, chunks: Iterable[Chunk]
) -> Iterator[tuple[int, list[Record], Mapping[str, int]]]:
    """One labeller in this process (or, where its configuration says so, in worker processes of its own)."""
    with RewardSuite([config]) as suite:
        for chunk in chunks:
            records, counts = label_chunk(suite, name, chunk)
            yield len(chunk), records, counts


def label(
    labellers: Sequence[RewardConfig],
    store: CandidateStore,
    prompts: Mapping[str, Prompt],
    folder: Path,
    engine: Engine = local_engine,
    retry: Collection[str] = (),
) -> dict[str, dict[str, int]]:
    """Score every candidate with every labeller. Prompts that are done are passed over; one that was interrupted is
    scored again as a whole.

    Args:
        retry: labellers, by their unique names, that are asked again where they masked a candidate: a server or a
            checker may have failed. They see the whole prompt again, because they may compare its candidates, but only
            scores in the place of masks are kept: a score that is known never changes.

    Returns:
        What each labeller counted: masked scores, failed calls and so on. Added up over interrupted runs in the
        labeller's `counts.json`.
    """
    counted: dict[str, dict[str, int]] = {}
    for name, config in zip(unique_names(labellers), labellers, strict=True):
        place = folder / folder_name(name)
        labels = read_labels(place, name, store.grid)
        unlabelled = np.asarray((store.present & ~labels.seen).any((1, 2)))
        masked = labels.seen & store.present & np.isnan(labels.scores) & (name in retry)
        todo = np.flatnonzero(unlabelled | masked.any((1, 2))).tolist()
        counts: Counter[str] = Counter()
        total = len(store.grid.prompts)
        with ShardWriter(place) as shard, progress(f"label {name}", total, total - len(todo)) as advance:
            chunks = _chunks(todo, store, _with_all_columns(prompts))
            try:
                for done, records, events in engine(config, name, chunks) if todo else ():
                    shard.write([record for record in records if _is_news(record, store.grid, unlabelled, masked)])
                    counts.update(events)
                    advance(done, f"{counts[f'{config.function}/masked']} masked")
            finally:
                if counts:
                    so_far = Counter(read_counts(place))
                    so_far.update(counts)
                    write_json(place / _COUNTS, so_far)
        counted[name] = dict(counts)
    return counted


def _is_news(record: Record, grid: Grid, unlabelled: np.ndarray, masked: np.ndarray) -> bool:
    """Whether a record belongs to a prompt that was not done, or puts a score in the place of a mask."""
    cell = grid.index((record["prompt_id"], record["heuristic"], record["seed"]), "a label")
    return bool(unlabelled[cell[0]] or (masked[cell] and record["score"] is not None))


def read_counts(folder: Path) -> dict[str, int]:
    """What a labeller counted so far; nothing before it has labelled."""
    path = folder / _COUNTS
    return json.loads(path.read_text()) if path.exists() else {}


def _with_all_columns(prompts: Mapping[str, Prompt]) -> dict[str, Prompt]:
    """Prompts with every column that any of them has, None where it does not apply, as a whole batch would show it."""
    columns = {name: None for prompt in prompts.values() for name in prompt.columns}
    return {key: Prompt(p.id, p.content, {**columns, **p.columns}) for key, p in prompts.items()}


def _chunks(todo: Sequence[int], store: CandidateStore, prompts: Mapping[str, Prompt]) -> Iterator[Chunk]:
    chunk: Chunk = []
    rows = 0
    for i in todo:
        places = store.locations(i)
        chunk.append((prompts[store.grid.prompts[i]], places))
        rows += len(places)
        if rows >= CHUNK:
            yield chunk
            chunk, rows = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True)
class Labels:
    """Scores of one labeller over a grid."""

    scores: np.ndarray
    """(P, A, S) float64; NaN: masked, or not labelled"""
    seen: np.ndarray
    """(P, A, S) bool: labelled, be it with a score or as masked"""


def read_labels(folder: Path, name: str, grid: Grid) -> Labels:
    """The scores that a labeller left; of a cell that was scored twice, the later one.

    Raises:
        DataError: a malformed record, or one of another labeller or grid.
    """
    scores, seen = np.full(grid.shape, np.nan), np.zeros(grid.shape, bool)
    for where, record in read_records(folder, LABEL):
        if record.get("labeller") != name:
            raise InvalidValue(f"{where}: labeller", record.get("labeller"), f"{name!r}", "the record is misplaced")
        cell = grid.index((record["prompt_id"], record["heuristic"], record["seed"]), where)
        value = as_score(record, where)
        scores[cell], seen[cell] = np.nan if value is None else value, True
    return Labels(scores, seen)
