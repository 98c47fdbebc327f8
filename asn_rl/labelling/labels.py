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
from asn_rl.labelling.records import (
    LABEL,
    Record,
    ShardWriter,
    as_key,
    as_score,
    folder_name,
    label_record,
    read_records,
)
from asn_rl.labelling.store import CandidateStore, Location, read_candidates
from asn_rl.rewards.compose import RawScores, RewardConfig, RewardSuite, unique_names
from asn_rl.runs import console, progress, write_json
from asn_rl.types import Candidate, Key, Prompt

CHUNK = 256
"""candidates handed to a labeller at a time, at least; always whole prompts"""
TIMEOUTS = 16
"""calls of a chunk that may exceed their time before the candidates of one that hangs are no longer taken apart"""
APART = "score_apart"
"""field of a label record: see `Labels.apart`"""

_COUNTS = "counts.json"

Rows = Sequence[tuple[Prompt, Candidate]]
"""the candidates of one prompt"""
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
    records = [label_record(candidate, name, value, reason) for candidate, value, reason in said]
    among = suite.configs[0].compares
    if among is not None:
        apart = _scores_apart(suite, rows) if among == "group" else [None] * len(records)
        records = [record | {APART: value} for record, value in zip(records, apart, strict=True)]
    return records, counts


def _scores_apart(suite: RewardSuite, rows: Sequence[Rows]) -> list[float | None]:
    """Scores of a labeller that compares candidates when each is compared with its own half of the seeds only."""
    found: dict[Key, float | None] = {}
    for half in range(2):
        parts = [[(prompt, c) for prompt, c in part if c.seed % 2 == half] for part in rows]
        values, _, _ = _scores(suite, [part for part in parts if part])
        members = [candidate for part in parts for _, candidate in part]
        found |= {candidate.key: value for candidate, value in zip(members, values, strict=True)}
    return [found[candidate.key] for part in rows for _, candidate in part]


def _scores(suite: RewardSuite, rows: Sequence[Rows]) -> tuple[list[float | None], list[str | None], Counter[str]]:
    """Scores of some prompts' candidates, reasons where masked, and counts. A call that fails is made again with half
    of the prompts each, so that a candidate on which the labeller crashes or hangs masks its own prompt and no other;
    after `TIMEOUTS` calls that hung, the rest of those that fail is masked as it is."""
    values: list[float | None] = []
    reasons: list[str | None] = []
    counts: Counter[str] = Counter()
    parts, hung = [(0, len(rows))] if rows else [], 0
    while parts:
        low, high = parts.pop()
        raw = _called(suite, rows[low:high])
        ((name, found),), (why,) = raw.values.items(), raw.reasons.values()
        hung += raw.counts.get(f"{name}/timeout", 0)
        counts.update(raw.counts)
        failed = raw.counts.get(f"{name}/error", 0) + raw.counts.get(f"{name}/timeout", 0) > 0
        if failed and high - low > 1 and hung <= TIMEOUTS and all(value is None for value in found):
            counts[f"{name}/masked"] -= raw.counts[f"{name}/masked"]
            middle = (low + high) // 2
            parts += [(middle, high), (low, middle)]  # the left one is next: answers come in order
        else:
            values += found
            reasons += why
    return values, reasons, counts


def _called(suite: RewardSuite, rows: Sequence[Rows]) -> RawScores:
    flat = [row for part in rows for row in part]
    return suite.scores(
        [prompt for prompt, _ in flat],
        [candidate.completion for _, candidate in flat],
        [candidate.completion_ids for _, candidate in flat],
        terminated=[candidate.terminated for _, candidate in flat],
    )


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
    """Score every candidate with every labeller. Prompts that are done are passed over; one that was interrupted, or
    has a candidate whose text was replaced since, is scored again as a whole.

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
        labels = read_labels(place, name, store)
        if labels.stale:
            console.print(f"{name}: {labels.stale} labels are of texts that were replaced; they are made again")
        unlabelled = np.asarray((store.present & ~labels.seen).any((1, 2)))
        masked = labels.seen & store.present & np.isnan(labels.scores) & (name in retry)
        todo = np.flatnonzero(unlabelled | masked.any((1, 2))).tolist()
        counts: Counter[str] = Counter()
        total = len(store.grid.prompts)
        with ShardWriter(place) as shard, progress(f"label {name}", total, total - len(todo)) as advance:
            chunks = _chunks(todo, store, _with_all_columns(prompts))
            so_far = Counter(read_counts(place))
            for done, records, events in engine(config, name, chunks) if todo else ():
                shard.write([record for record in records if _is_news(record, store.grid, unlabelled, masked)])
                counts.update(events)
                so_far.update(events)
                write_json(place / _COUNTS, so_far)
                advance(done, f"{counts[f'{config.function}/masked']} masked")
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
    apart: np.ndarray
    """(P, A, S) scores where no candidate was compared with one of the other half of the seeds (even and odd ones);
    NaN: masked, or not known"""
    stderr: float | None = None
    """mean standard deviation of the scores; None: the labeller does not know it"""
    stale: int = 0
    """cells with labels of texts that were replaced since: they count as not labelled"""


def read_labels(folder: Path, name: str, store: CandidateStore) -> Labels:
    """The scores that a labeller left of these candidates; of a cell that was scored twice, the later one.

    Raises:
        DataError: a malformed record, or one of another labeller or grid.
    """
    shape = store.grid.shape
    scores, apart = np.full(shape, np.nan), np.full(shape, np.nan)
    seen, stale = np.zeros(shape, bool), np.zeros(shape, bool)
    stderr = np.full(shape, np.nan)
    for where, record in read_records(folder, LABEL):
        if record.get("labeller") != name:
            raise InvalidValue(f"{where}: labeller", record.get("labeller"), f"{name!r}", "the record is misplaced")
        cell = store.grid.index(as_key(record, where), where)
        of = record.get("digest")
        if of is not None and store.present[cell] and of != f"{int(store.digest[cell]):016x}":
            stale[cell] = True
            continue
        value = as_score(record, where)
        stderr[cell] = as_score(record, where, "stderr") if "stderr" in record else np.nan
        alone = as_score(record, where, APART) if APART in record else value
        scores[cell], seen[cell] = np.nan if value is None else value, True
        apart[cell] = np.nan if alone is None else alone
    known = stderr[~np.isnan(stderr)]
    return Labels(scores, seen, apart, float(known.mean()) if known.size else None, int((stale & ~seen).sum()))
