"""Several records as one, and the arms ranked over all tasks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asn_rl.errors import DataError
from asn_rl.evaluation.record import Record, check_record, differences, values_of, with_differences
from asn_rl.evaluation.statistics import Resampling, as_plain, bootstrap

_FEWEST = 5
"""rows of a group of their own, where tasks share rows"""
_AGREE = ("version", "fingerprint", "split", "limits", "primary", "level", "prompts", "strata")


def merge_records(records: Mapping[str, Record]) -> Record:
    """One record of several runs. Every arm is compared anew with one baseline a task, that of the first run that has
    the task, on the same prompts and all at once.

    An arm that several runs have with the same figures stays one arm; where its figures differ, each carries its run's
    name in brackets.

    Args:
        records: run name -> record.

    Raises:
        DataError: no records, a damaged one, or two of different base models, benchmark versions, limits or prompts.
    """
    if not records:
        raise DataError("there are no evaluations to merge; name one run at least")
    for run, record in records.items():
        check_record(record, run)
    first = next(iter(records))
    for run, record in records.items():
        if record["base_model"] != records[first]["base_model"]:
            raise DataError(
                f"{first} and {run} cannot be merged: base model {records[first]['base_model']!r} against "
                f"{record['base_model']!r}; compare runs of one base model"
            )
    tasks: dict[str, dict[str, Record]] = defaultdict(dict)
    for run, record in records.items():
        for name, task in record["tasks"].items():
            tasks[name][run] = task
    merged = {name: _merged_task(name, runs) for name, runs in tasks.items()}
    left_out = {name: why for record in records.values() for name, why in record["left_out"].items()}
    return {**records[first], "tasks": merged, "left_out": left_out}


def _merged_task(name: str, runs: Mapping[str, Record]) -> Record:
    first = next(iter(runs))
    task = runs[first]
    judged = {run: other for run, other in runs.items() if "judge" in other}
    for run, other in runs.items():
        _check_same(name, (first, task), (run, other), _AGREE)
    for run, other in judged.items():  # win rates against another arm, or by another judge, are other figures
        _check_same(name, next(iter(judged.items())), (run, other), ("judge",))
    named = _arm_names(runs)
    baseline = named[first, task["baseline"]]
    notes = [f"{run}: {note}" if len(runs) > 1 else note for run, other in runs.items() for note in other["notes"]]
    arms: dict[str, Record] = {}
    for run, other in runs.items():
        for arm, entry in other["arms"].items():
            kept = arms.setdefault(named[run, arm], {**entry, "run": entry["run"] or run})
            kept["metrics"] = {**entry["metrics"], **kept["metrics"]}
        if named[run, other["baseline"]] != baseline:
            notes.append(
                f"{run} was compared with {other['baseline']}; here all arms are compared with {baseline}, and what it "
                "says of training seeds, or of stopping early, is left out"
            )
            for arm in other["arms"]:
                for said in ("seeds", "sequential"):
                    arms[named[run, arm]].pop(said, None)
    metrics = list(dict.fromkeys(metric for other in runs.values() for metric in other["metrics"]))
    # Win rates have their judge, and no interval of a task that was looked at is one of a fixed number of prompts.
    said = {key: other[key] for other in runs.values() for key in ("judge", "stop_early") if key in other}
    together = {**task, **said, "metrics": metrics, "baseline": baseline, "notes": notes, "arms": arms}
    return with_differences(together) if len(runs) > 1 else together


def _check_same(name: str, one: tuple[str, Record], other: tuple[str, Record], keys: Sequence[str]) -> None:
    for key in keys:
        mine, theirs = one[1][key], other[1][key]
        if mine != theirs:
            if isinstance(mine, list):
                mine, theirs = (f"{len(part)} of them" for part in (mine, theirs))
            raise DataError(
                f"{one[0]} and {other[0]} cannot be merged: task {name}, {key} {mine!r} against {theirs!r}; evaluate "
                "one of them again with the other's"
            )


def _arm_names(runs: Mapping[str, Record]) -> dict[tuple[str, str], str]:
    """(run, arm) -> the arm's name among all runs."""
    holders: dict[str, list[str]] = defaultdict(list)
    for run, task in runs.items():
        for arm in task["arms"]:
            holders[arm].append(run)
    named = {}
    for arm, among in holders.items():
        same = all(_same(runs[among[0]]["arms"][arm], runs[run]["arms"][arm]) for run in among)
        for run in among:
            named[run, arm] = arm if same else f"{arm} ({run})"
    return named


def _same(one: Record, other: Record) -> bool:
    """Two entries of one arm: the same figures wherever both have some."""
    shared = set(one["metrics"]) & set(other["metrics"])
    return all(one[key] == other[key] for key in ("kind", "samples", "values")) and all(
        one["metrics"][name] == other["metrics"][name] for name in shared
    )


def leaderboard(record: Record) -> list[dict[str, Any]]:
    """One row an arm, the highest mean over tasks first; tasks weigh the same. Prompts of one row of data in several
    tasks of a family (turns of a conversation, benchmarks that extend another) are resampled together.

    Keys: `arm`, `kind`, `run`, `tasks` (name -> mean, low, high of the primary metric, None where the arm was not run
    on the task), and for arms that have all tasks, where these share a primary metric, `overall` (mean, low, high) and
    `difference` (mean, low, high, p_holm; to the baseline of each task, intervals that hold together). Else they are
    None and the arm stands below.
    """
    tasks = record["tasks"]
    names = list(dict.fromkeys(arm for task in tasks.values() for arm in task["arms"]))
    whole = [name for name in names if all(name in task["arms"] for task in tasks.values())]
    if len({task["primary"] for task in tasks.values()}) != 1:
        whole = []
    overall, gaps = _over_tasks(tasks, whole)
    rows = []
    for name in names:
        entries = {task: part["arms"].get(name) for task, part in tasks.items()}
        known = next(entry for entry in entries.values() if entry)
        rows.append(
            {
                "arm": name,
                "kind": known["kind"],
                "run": known["run"],
                "tasks": {
                    task: entry["metrics"][tasks[task]["primary"]] if entry else None for task, entry in entries.items()
                },
                "overall": overall.get(name),
                "difference": gaps.get(name),
            }
        )
    return sorted(rows, key=lambda row: -row["overall"]["mean"] if row["overall"] else np.inf)


def _over_tasks(tasks: Mapping[str, Record], arms: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    if not arms:
        return {}, {}
    first = next(iter(tasks.values()))
    how = Resampling(first["resamples"], first["level"], first["seed"])
    rows = _Rows.of(tasks)
    values = {arm: [values_of(task["arms"][arm]) for task in tasks.values()] for arm in arms}
    known = [arm for arm in arms if rows.known(values[arm])]
    options = {"resamples": how.resamples, "level": how.level, "seed": how.seed}
    overall = {arm: as_plain(bootstrap(rows.joined(values[arm]), rows.groups, **options)) for arm in known}
    baselines = {task["baseline"] for task in tasks.values()}
    anchor = [values_of(task["arms"][task["baseline"]]) for task in tasks.values()]
    gaps = {
        arm: [mine - other for mine, other in zip(values[arm], anchor, strict=True)]
        for arm in known
        if baselines != {arm}
    }
    compared = {arm: rows.joined(gap) for arm, gap in gaps.items() if rows.known(gap)}
    return overall, differences(compared, rows.groups, how)[0] if compared else {}


@dataclass(frozen=True)
class _Rows:
    """The rows of data behind the prompts of several tasks. A row that several tasks ask, as the turns of a
    conversation do, is resampled as one."""

    places: list[np.ndarray]
    """(P,) the row of each prompt, task by task"""
    strata: list[np.ndarray]
    """(P,) labels, task by task"""
    groups: list[str]
    """of each row: the tasks and strata that it is in"""

    @classmethod
    def of(cls, tasks: Mapping[str, Record]) -> _Rows:
        numbers: dict[str, int] = {}
        places, strata, member = [], [], defaultdict(list)
        for name, task in tasks.items():
            family = task.get("family")
            ids = task["prompts"] if family is None else [id.partition("/")[2] or id for id in task["prompts"]]
            keys = [f"{family or name}/{id}" for id in ids]
            places.append(np.array([numbers.setdefault(key, len(numbers)) for key in keys]))
            strata.append(np.asarray(task["strata"]))
            for row, label in zip(places[-1].tolist(), task["strata"], strict=True):
                member[row].append(f"{name} {label}")
        groups = [" + ".join(member[row]) for row in range(len(numbers))]
        return cls(places, strata, _pooled(groups, shared=len(numbers) < sum(map(len, places))))

    def known(self, values: Sequence[np.ndarray]) -> bool:
        """Whether every stratum of every task, and every group, has a value."""
        parts = zip(values, self.strata, strict=True)
        if not all((~np.isnan(v[labels == label])).any() for v, labels in parts for label in set(labels.tolist())):
            return False
        joined = self.joined(values)
        return set(self.groups) == {group for group, value in zip(self.groups, joined, strict=True) if value == value}

    def joined(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """(rows,) numbers whose mean over groups of the mean over rows is the mean over tasks; NaN: masked in all.

        What a row adds is taken around the means of its strata, so that how many masked ones a resample draws tells
        nothing by itself."""
        added, known = np.zeros(len(self.groups)), np.zeros(len(self.groups), bool)
        mean = 0.0
        for v, labels, places in zip(values, self.strata, self.places, strict=True):
            names = set(labels.tolist())
            for label in names:
                which = (labels == label) & ~np.isnan(v)
                share, centre = 1 / (len(values) * len(names)), v[which].mean()
                np.add.at(added, places[which], share * (v[which] - centre) / which.sum())
                known[places[which]] = True
                mean += share * centre
        groups = np.asarray(self.groups)
        for group in set(self.groups):
            added[groups == group] *= len(set(self.groups)) * known[groups == group].sum()
        return np.where(known, mean + added, np.nan)


def _pooled(groups: list[str], shared: bool) -> list[str]:
    """Where tasks share rows, the few that happen to be in a combination of tasks join the largest group: a group needs
    two rows to have a spread."""
    counts = Counter(groups)
    largest = max(counts, key=lambda group: counts[group])
    return [largest if shared and counts[group] < _FEWEST else group for group in groups]
