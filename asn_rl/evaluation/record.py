"""What an evaluation leaves behind: a record of plain values, one JSON file a run (`evaluation.json`).

schema        1
base_model    fingerprint of the base model
left_out      benchmarks that could not be run -> why
tasks         name of the benchmark ->
    version, fingerprint, split, limits, primary, level, resamples, seed    see `TaskSettings`
    family          only where ids are those of a benchmark's rows: its name. Tasks of one family may ask the same row
    prompts         ids of the P prompts
    strata          P labels; every stratum weighs the same
    metrics         names of the metrics, see `metrics.METRICS`
    baseline        the arm that all others are compared with
    judge           only where one compared arms: function, arguments, and the reference that all others met
    stop_early      only where the evaluation was looked at while it ran: prompts between looks. `difference` then only
                    describes: its intervals are made for a number of prompts that is fixed in advance
    detectable      None, or `power.forecast` from before the run
    notes           sentences about what was masked, missing, cut off or left out
    arms            name ->
        kind          static (a rule of the grid) or policy
        run           the run that it comes from; "" before records are merged
        samples       completions of each prompt
        masked        completions that the verifier (or the judge, where arms are compared by win rate) masked
        metrics       name -> mean, low, high (None: a stratum without a value), masked (prompts without a value)
        values        P numbers, the primary metric by prompt; None: masked
        difference    None (the baseline itself, or too few prompts), or of the primary metric, the arm minus the
                      baseline: mean, low, high (None: infinite) and p_holm. The intervals of a task hold together,
                      so that any arm may be picked by them (`multiplicity`)
        sequential    only of policies, with `stop_early`: outcome (better, worse, undecided), low, high, prompts,
                      decided_at (`sequential.StopDecision`): what may be claimed
        seeds         only where a policy was trained with several seeds: `seeds.SeedReport.as_dict()` of the
                      difference to the baseline
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from asn_rl.errors import DataError, InvalidValue, UnknownName
from asn_rl.evaluation.metrics import measure, parse_name
from asn_rl.evaluation.multiplicity import compare_all
from asn_rl.evaluation.samples import Samples
from asn_rl.evaluation.sequential import StopDecision
from asn_rl.evaluation.statistics import Resampling, as_plain, bootstrap, finite_or_none

SCHEMA = 1
Record = dict[str, Any]
Kind = Literal["static", "policy"]
_TASK = ("version", "fingerprint", "split", "limits", "primary", "level", "resamples", "seed", "prompts", "strata")
_TASK += ("metrics", "baseline", "detectable", "notes", "arms")
_ARM = ("kind", "run", "samples", "masked", "metrics", "values", "difference")


@dataclass(frozen=True)
class TaskSettings:
    """What arms were run on and how they are compared. Records of a task are merged only where all of it agrees."""

    version: str
    """of the benchmark's file"""
    fingerprint: str
    """sha256 over the benchmark's file and data"""
    split: str
    limits: Mapping[str, int | None]
    """for example {"prompts": None, "tokens": 256}; None: no limit"""
    family: str = ""
    """the benchmark whose rows the prompts' ids name; empty: a task that shares none"""
    primary: str = "accuracy"
    """the metric that arms are compared by; more is better"""
    judge: Mapping[str, Any] | None = None
    """what win rates come from: function, arguments, reference"""
    stop_early: int | None = None
    """prompts between looks, where the number of prompts was not fixed in advance"""
    how: Resampling = field(default_factory=Resampling)


def task_record(
    samples: Samples,
    prompts: Sequence[str],
    settings: TaskSettings,
    *,
    metrics: Sequence[str],
    baseline: str,
    kinds: Mapping[str, Kind],
    detectable: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    decisions: Mapping[str, StopDecision] | None = None,
) -> Record:
    """One task of a record.

    Args:
        prompts: ids of the P prompts.
        metrics: names; `settings.primary` is added where it is not among them.
        baseline: choose it on other prompts (the selection split).
        kinds: of every arm.
        decisions: of the arms that were compared with the baseline while the evaluation ran.

    Raises:
        UnknownName: a baseline that is no arm, or an unknown metric.
        InvalidValue: samples that lack what a metric needs, other numbers of prompts or kinds, or a primary metric of
            which less is better.
    """
    if len(prompts) != len(samples.strata):
        raise InvalidValue("prompts", len(prompts), f"{len(samples.strata)} ids, one for each prompt of the samples")
    if parse_name(settings.primary).metric.better != "higher":
        raise InvalidValue("primary", settings.primary, "a metric of which more is better", "arms are ranked by it")
    if set(kinds) != set(samples.arms):
        raise InvalidValue("kinds", sorted(kinds), f"one for each arm: {sorted(samples.arms)}")
    names = list(dict.fromkeys([settings.primary, *metrics]))
    measured = {name: measure(samples, name) for name in names}
    masked = _masked(samples, settings.primary)
    task: Record = {
        "version": settings.version,
        "fingerprint": settings.fingerprint,
        **({"family": settings.family} if settings.family else {}),
        "split": settings.split,
        "limits": dict(settings.limits),
        "primary": settings.primary,
        "level": settings.how.level,
        "resamples": settings.how.resamples,
        "seed": settings.how.seed,
        "prompts": list(prompts),
        "strata": list(samples.strata),
        "metrics": names,
        "baseline": baseline,
        **({"judge": dict(settings.judge)} if settings.judge else {}),
        **({"stop_early": settings.stop_early} if settings.stop_early is not None else {}),
        "detectable": dict(detectable) if detectable else None,
        "notes": list(notes),
        "arms": {
            arm: {
                "kind": kinds[arm],
                "run": "",
                "samples": samples.samples,
                "masked": int(masked[:, i].sum()),
                "metrics": {
                    name: _estimate(values[:, i], samples.strata, settings.how) for name, values in measured.items()
                },
                "values": [finite_or_none(value) for value in measured[settings.primary][:, i]],
                "difference": None,
                **({"sequential": asdict(decisions[arm])} if decisions and arm in decisions else {}),
            }
            for i, arm in enumerate(samples.arms)
        },
    }
    return with_differences(task)


def with_differences(task: Record) -> Record:
    """The task with every arm compared with the baseline anew, all at once. Arms with too few prompts to be compared
    get no difference, and a note says so."""
    arms, baseline = task["arms"], task["baseline"]
    if baseline not in arms:
        raise UnknownName("baseline", baseline, arms)
    how = Resampling(task["resamples"], task["level"], task["seed"])
    anchor = values_of(arms[baseline])
    gaps = {name: values_of(arm) - anchor for name, arm in arms.items() if name != baseline}
    found, left_out = differences(gaps, task["strata"], how)
    note = "too few prompts with a value under the arm and the baseline to compare: "
    notes = [line for line in task["notes"] if not line.startswith(note)]
    return {
        **task,
        "notes": notes + ([note + ", ".join(left_out)] if left_out else []),
        "arms": {name: {**arm, "difference": found.get(name)} for name, arm in arms.items()},
    }


def differences(
    gaps: Mapping[str, np.ndarray], strata: Sequence[str], how: Resampling
) -> tuple[dict[str, dict[str, float | None]], list[str]]:
    """Simultaneous intervals and Holm's p-values of (P,) paired differences, and the names with fewer than two prompts
    in a stratum, which cannot be compared."""
    labels = np.asarray(strata)
    enough = {
        name: all((~np.isnan(gap[labels == label])).sum() >= 2 for label in set(strata)) for name, gap in gaps.items()
    }
    names = [name for name in gaps if enough[name]]
    if not names:
        return {}, list(gaps)
    compared = compare_all(np.stack([gaps[name] for name in names], 1), strata, how)
    rows = zip(names, compared.intervals, compared.holm, strict=True)
    return {name: {**as_plain(gap), "p_holm": p} for name, gap, p in rows}, [n for n in gaps if not enough[n]]


def values_of(arm: Mapping[str, Any]) -> np.ndarray:
    """(P,) the primary metric by prompt; NaN: masked."""
    return np.array([math.nan if value is None else value for value in arm["values"]], dtype=np.float64)


def read_record(path: str | Path) -> Record:
    """The record in a JSON file.

    Raises:
        DataError: it cannot be read or is no record.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the evaluation in {path}: {error}. Run `asn-rl eval` for it again") from error
    check_record(record, str(path))
    return record


def check_record(record: Any, where: str) -> None:
    """Raises:
    DataError: what is missing or of another schema, with its place.
    """
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: schema must be {SCHEMA}, got {found!r}; evaluate again with this version")
    _check_keys(record, ("base_model", "left_out", "tasks"), where)
    for name, task in record["tasks"].items():
        _check_keys(task, _TASK, f"{where}, task {name}")
        for arm, entry in task["arms"].items():
            _check_keys(entry, _ARM, f"{where}, task {name}, arm {arm}")
            if len(entry["values"]) != len(task["prompts"]):
                counts = f"{len(entry['values'])} values for {len(task['prompts'])} prompts"
                raise DataError(f"{where}, task {name}, arm {arm}: {counts}; evaluate again")


def _check_keys(entry: Any, keys: Sequence[str], where: str) -> None:
    missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise DataError(f"{where}: no {', '.join(missing)}; the record is damaged, evaluate again")


def _estimate(values: np.ndarray, strata: Sequence[str], how: Resampling) -> dict[str, float | int | None]:
    known, labels = ~np.isnan(values), np.asarray(strata)
    masked = int((~known).sum())
    if not all(known[labels == label].any() for label in set(strata)):
        return {"mean": None, "low": None, "high": None, "masked": masked}
    found = bootstrap(values, strata, resamples=how.resamples, level=how.level, seed=how.seed)
    return {**as_plain(found), "masked": masked}


def _masked(samples: Samples, primary: str) -> np.ndarray:
    """(P, A, S) completions without the score that the primary metric is a mean of; none where it reads the texts."""
    values = {"scores": samples.scores, "wins": samples.wins}.get(parse_name(primary).metric.needs[0])
    return np.zeros(samples.scores.shape, bool) if values is None else np.isnan(values)
