"""From labels to what distillation reads: each prompt's best candidates, and what each heuristic is worth there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np

from asn_rl.config import to_dict
from asn_rl.errors import ConfigError, DataError, InvalidValue, UnknownName, check_at_least, check_positive
from asn_rl.evaluation.statistics import Interval, as_plain, masked_mean
from asn_rl.labelling.diversity import heuristic_diversity
from asn_rl.labelling.labels import Labels
from asn_rl.labelling.rating import (
    Cell,
    Scaled,
    best_heuristic,
    cross_fitted_gains,
    gains,
    heuristic_ratings,
    interval,
    lacking,
    robust_scale,
    soft_targets,
    spearman,
    top_candidates,
    total_score,
)
from asn_rl.labelling.records import Record, candidate_record
from asn_rl.labelling.store import CandidateStore, Location, read_candidates
from asn_rl.runs import progress, write_json

SELECTED, TARGET, SUMMARY = "asn_rl.selected/1", "asn_rl.target/1", "asn_rl.selection/1"
BLOCK = 256
"""prompts whose candidates are read and written at a time"""
EXAMPLES = 8
"""prompts whose best and worst candidate are kept for the report"""
BINS = 30
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

Normalize = Literal["robust", "none"]
Target = Literal["best", "soft"]
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""results of a function for each block, in the order of the blocks: the built-in `map`, or `ray_engine.ray_map`"""


@dataclass(frozen=True)
class SelectConfig:
    """Which candidates and heuristics distillation imitates."""

    normalize: Normalize = "robust"
    """robust: each labeller's scores minus their median, over 1.4826 median absolute deviations (mean and standard
    deviation where more than half of the scores are equal; see `rating.robust_scale`); none: raw scores"""
    shrinkage: float = 32.0
    """samples that the mean of a prompt's stratum is worth when heuristics are rated on a prompt"""
    top_k: int = 1
    """candidates kept a prompt"""
    target: Target = "best"
    """best: all weight on the heuristic with the highest rating on the prompt; soft: softmax of the ratings"""
    temperature: float = 0.1
    """temperature of the soft target over heuristics, in units of the normalised score"""
    diversity_prompts: int = 32
    """prompts on which the report measures how different the completions of each heuristic are; 0: none"""
    encoder: str = ""
    """sentence encoder of the report's Vendi score and embedding entropy, as `vendi_diversity` takes it; empty: words
    alone are compared"""

    def __post_init__(self) -> None:
        if self.normalize not in get_args(Normalize):
            raise InvalidValue("normalize", self.normalize, "robust or none")
        if self.target not in get_args(Target):
            raise InvalidValue("target", self.target, "best or soft")
        check_at_least(self, 0, "shrinkage", "diversity_prompts")
        check_at_least(self, 1, "top_k")
        check_positive(self, "temperature")


@dataclass(frozen=True)
class Pick:
    """A candidate to be written out with its scores; its text is read where that happens."""

    location: Location
    rank: int
    """1: the best of its prompt"""
    total: float
    lacks: int
    """labels it lacks that another candidate of the prompt has"""
    raw: Mapping[str, float | None]
    normalised: Mapping[str, float | None]


def select(
    store: CandidateStore,
    labels: Mapping[str, Labels],
    weights: Mapping[str, float],
    strata: Sequence[str],
    config: SelectConfig,
    folder: Path,
    engine: Map = map,
) -> dict[str, Any]:
    """Rate, rank and choose. Writes `selected.jsonl` (candidates), `targets.jsonl` (a line a prompt: shares of the
    heuristics), `examples.jsonl` (best and worst candidate of some prompts) and, last, `summary.json`, which is
    returned. Every file is whole or not there.

    A candidate that lacks a label which a sibling has is ranked after those that lack fewer, and does not count when
    heuristics are rated; a prompt on which no candidate counts gets the rating of its stratum.

    Args:
        labels: by labeller.
        weights: by the same labellers; negative: a penalty.
        strata: a label for each of the P prompts.
        engine: where texts are read and lines are made.

    Raises:
        ConfigError: labels and weights name different labellers, or no weight counts.
        DataError: candidates without label, a labeller that masked everything, a stratum without any total.
    """
    _check(store, labels, weights, strata)
    found = _totals(store, {name: part.scores for name, part in labels.items()}, weights, config.normalize)
    raw, scaled, total, lacks, comparable = found.raw, found.scaled, found.total, found.lacks, found.comparable
    scores = {name: part.values for name, part in scaled.items()}
    _check_strata(comparable, strata)
    ratings = heuristic_ratings(comparable, strata, config.shrinkage)
    best = best_heuristic(ratings)

    tops = top_candidates(total, lacks, ratings, store.digest, config.top_k)
    shown = _examples(total, lacks, ratings, store.digest, strata)

    def picks(cells: Sequence[tuple[int, Cell]]) -> list[Pick]:
        return [
            Pick(
                store.location(cell), rank, float(total[cell]), int(lacks[cell]), _at(raw, cell), _at(scores, cell)
            )
            for rank, cell in cells
        ]  # fmt: skip

    folder.mkdir(parents=True, exist_ok=True)
    with _whole_file(folder / "selected.jsonl") as lines, progress("select", len(tops)) as advance:
        ranked = [list(enumerate(cells, start=1)) for cells in tops]
        blocks = [ranked[i : i + BLOCK] for i in range(0, len(ranked), BLOCK)]
        made = engine(selected_lines, (picks([pair for cells in block for pair in cells]) for block in blocks))
        for block, text in zip(blocks, made, strict=True):
            lines.write(text)
            advance(len(block), "")
    with _whole_file(folder / "examples.jsonl") as lines:
        lines.write(selected_lines(picks(shown)))
    with _whole_file(folder / "targets.jsonl") as lines:
        lines.writelines(_target_lines(store, strata, ratings, best, config))
    summary = {
        "schema": SUMMARY,
        "settings": {**to_dict(config), "weights": dict(weights)},
        "candidates": {
            "cells": store.grid.size,
            "missing": int((~store.present).sum()),
            "blank": int(store.empty.sum()),
            "truncated": int(store.truncated.sum()),
            "without_total": int((store.present & np.isnan(total)).sum()),
            "lacking_labels": int((~np.isnan(total) & (lacks > 0)).sum()),
            "kept": sum(map(len, tops)),
        },
        "prompts": {
            "all": len(strata),
            "by_stratum": {label: list(strata).count(label) for label in sorted(set(strata))},
            "none_kept": sum(not cells for cells in tops),
            "rated_by_stratum_only": int(np.isnan(comparable).all((1, 2)).sum()),
        },
        "labellers": {
            name: _labeller_summary(part, scaled[name], store, labels[name].stderr) for name, part in raw.items()
        },
        "correlations": _correlations(raw),
        "heuristics": _heuristic_summary(store, comparable, lacks, best, strata),
        "diversity": _diversity_summary(store, strata, config),
        "gain": _gain_summary(store, labels, weights, strata, config),
    }
    write_json(folder / "summary.json", summary)
    return summary


@dataclass(frozen=True)
class _Totals:
    """Scores of all labellers, made one number a candidate; arrays are (P, A, S), NaN where masked."""

    raw: Mapping[str, np.ndarray]
    scaled: Mapping[str, Scaled]
    total: np.ndarray
    lacks: np.ndarray

    @property
    def comparable(self) -> np.ndarray:
        """Totals of the candidates that lack no label which a sibling has."""
        return np.where(self.lacks == 0, self.total, np.nan)


def _totals(
    store: CandidateStore, scores: Mapping[str, np.ndarray], weights: Mapping[str, float], normalize: Normalize
) -> _Totals:
    raw = {name: np.where(store.present, part, np.nan) for name, part in scores.items()}
    scaled = {name: _scaled(part, normalize) for name, part in raw.items()}
    values = {name: part.values for name, part in scaled.items()}
    return _Totals(raw, scaled, total_score(values, weights), lacking(values, weights))


def selected_lines(picks: Sequence[Pick]) -> str:
    """JSON lines of some candidates with their scores."""
    candidates = read_candidates([pick.location for pick in picks])
    return "".join(
        _line(
            {
                **candidate_record(candidate),
                "schema": SELECTED,
                "rank": pick.rank,
                "total": pick.total,
                "lacks": pick.lacks,
                "raw": pick.raw,
                "normalised": pick.normalised,
            }
        )
        for pick, candidate in zip(picks, candidates, strict=True)
    )


def _target_lines(
    store: CandidateStore, strata: Sequence[str], ratings: np.ndarray, best: np.ndarray, config: SelectConfig
) -> Iterator[str]:
    heuristics = store.grid.heuristics
    shares = np.eye(len(heuristics))[best] if config.target == "best" else soft_targets(ratings, config.temperature)
    for i, prompt in enumerate(store.grid.prompts):
        weights = {heuristics[j]: float(shares[i, j]) for j in np.flatnonzero(shares[i])}
        yield _line(
            {
                "schema": TARGET, "prompt_id": prompt, "stratum": strata[i], "best": heuristics[best[i]],
                "weights": weights,
            }
        )  # fmt: skip


def _check(
    store: CandidateStore, labels: Mapping[str, Labels], weights: Mapping[str, float], strata: Sequence[str]
) -> None:
    for name in weights:
        if name not in labels:
            raise UnknownName("labeller", name, labels, "Label with it first: `asn-rl label`.")
    unweighted = [name for name in labels if name not in weights]
    if unweighted or not any(weights.values()) or not all(map(math.isfinite, weights.values())):
        raise ConfigError(
            f"every labeller needs a finite weight, and one of them another than 0; got {dict(weights)} for "
            f"{', '.join(labels)}"
        )
    if len(strata) != len(store.grid.prompts):
        raise InvalidValue("strata", len(strata), f"one label for each of the {len(store.grid.prompts)} prompts")
    present = store.present
    for name, part in labels.items():
        open_cells = present & ~part.seen
        if open_cells.any():
            raise DataError(
                f"labeller {name!r} has not scored {int(open_cells.sum())} of {int(present.sum())} candidates, the "
                f"first is {next(store.grid.keys(open_cells))}; run `asn-rl label` with the same configuration and run "
                "folder"
            )
        if np.isnan(part.scores[present]).all():
            raise DataError(
                f"labeller {name!r} masked all of its {int(present.sum())} scores, so it can rate nothing. Its counts "
                "of errors and time-outs (counts.json beside its labels) say why: mend it and label again, or leave it "
                "out if it does not apply to these prompts"
            )


def _check_strata(total: np.ndarray, strata: Sequence[str]) -> None:
    known = {strata[i] for i in np.argwhere(~np.isnan(total))[:, 0].tolist()}
    for label in strata:
        if label not in known:
            raise DataError(
                f"no candidate of stratum {label!r} has all labels of its prompt, so its heuristics cannot be rated; "
                "add a labeller that applies there, or leave those prompts out"
            )


def _scaled(scores: np.ndarray, how: Normalize) -> Scaled:
    return robust_scale(scores) if how == "robust" else Scaled(scores, "none", 0.0, 1.0)


def _at(scores: Mapping[str, np.ndarray], cell: Cell) -> dict[str, float | None]:
    return {name: _number(part[cell]) for name, part in scores.items()}


def _examples(
    total: np.ndarray, lacks: np.ndarray, ratings: np.ndarray, digest: np.ndarray, strata: Sequence[str]
) -> list[tuple[int, Cell]]:
    """(rank, cell) of the best and the worst candidate of some prompts, one of each stratum in turn."""
    turns = _in_turn(strata, (~np.isnan(total)).sum((1, 2)) > 1, EXAMPLES)
    ranked = top_candidates(total[turns], lacks[turns], ratings[turns], digest[turns], total[0].size)
    chosen = []
    for i, cells in zip(turns, ranked, strict=True):
        ends = [(1, cells[0]), (len(cells), cells[-1])][: len(cells)]
        chosen += [(rank, (i, j, k)) for rank, (_, j, k) in ends]
    return chosen


def _in_turn(strata: Sequence[str], eligible: np.ndarray, count: int) -> list[int]:
    """The first `count` eligible prompts, one of each stratum in turn."""
    labels = np.asarray(strata)
    queues = [np.flatnonzero((labels == label) & eligible).tolist() for label in sorted(set(strata))]
    return [prompt for turn in zip_longest(*queues) for prompt in turn if prompt is not None][:count]


def _diversity_summary(store: CandidateStore, strata: Sequence[str], config: SelectConfig) -> dict[str, Any]:
    chosen = _in_turn(strata, (store.present.sum(-1) > 1).any(-1), config.diversity_prompts)
    heuristics = heuristic_diversity(store, chosen, strata, config.encoder) if chosen else {}
    return {"prompts": len(chosen), "heuristics": heuristics}


def _labeller_summary(raw: np.ndarray, scaled: Scaled, store: CandidateStore, stderr: float | None) -> dict[str, Any]:
    known = raw[~np.isnan(raw)]
    counts, edges = np.histogram(known, BINS)
    masked = store.present & np.isnan(raw)
    return {
        "scored": known.size,
        "masked": int(masked.sum()),
        "masked_by_heuristic": dict(zip(store.grid.heuristics, masked.sum((0, 2)).tolist(), strict=True)),
        "stderr": stderr,
        "scale": {"how": scaled.how, "centre": scaled.centre, "scale": scaled.scale},
        "quantiles": dict(zip(map(str, QUANTILES), np.quantile(known, QUANTILES).tolist(), strict=True)),
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }


def _correlations(raw: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    """Spearman's rank correlation over the candidates that both labellers scored; None: not defined."""
    names = list(raw)
    found: dict[str, dict[str, float | None]] = {name: {} for name in names}
    for i, one in enumerate(names):
        for other in names[i:]:
            found[one][other] = found[other][one] = _number(spearman(raw[one], raw[other]))
    return found


def _heuristic_summary(
    store: CandidateStore, total: np.ndarray, lacks: np.ndarray, best: np.ndarray, strata: Sequence[str]
) -> dict[str, Any]:
    """For each heuristic, overall and by stratum: prompts it wins, its mean total, and its lead over the mean of all
    heuristics on the same prompts."""
    means = masked_mean(total)
    lead = means - masked_mean(means)[:, None]
    labels = np.asarray(strata)

    def row(j: int, rows: np.ndarray) -> dict[str, Any]:
        part = labels[rows].tolist()
        return {
            "wins": int((best[rows] == j).sum()),
            "mean": _plain(interval(means[rows, j], part)),
            "lead": _plain(interval(lead[rows, j], part)),
        }

    groups = {label: np.flatnonzero(labels == label) for label in sorted(set(strata))}
    return {
        name: {
            **row(j, np.arange(len(labels))),
            "lacking_labels": int((store.present & (lacks > 0))[:, j].sum()),
            "strata": {label: row(j, rows) for label, rows in groups.items()},
        }
        for j, name in enumerate(store.grid.heuristics)
    }


def _gain_summary(
    store: CandidateStore,
    labels: Mapping[str, Labels],
    weights: Mapping[str, float],
    strata: Sequence[str],
    config: SelectConfig,
) -> dict[str, Any] | None:
    """Gain over the best single heuristic, of choosing by prompt and by stratum; None: one seed cannot say.

    One half of the seeds chooses, the other one scores. Labels that compare candidates are those of a half by itself,
    and labellers that have no such labels are left out.
    """
    if store.grid.shape[-1] < 2:
        return None
    apart = _totals(store, {name: part.apart for name, part in labels.items()}, weights, config.normalize)
    total = apart.comparable
    left_out = [name for name, part in apart.raw.items() if weights[name] and np.isnan(part).all()]
    groups = np.asarray(strata)
    found: dict[str, Any] = {"left_out": left_out}
    for what, amount in (("by_prompt", config.shrinkage), ("by_stratum", math.inf)):
        honest, naive = cross_fitted_gains(total, strata, amount), gains(total, total, strata, amount)

        def both(rows: np.ndarray, honest: np.ndarray = honest, naive: np.ndarray = naive) -> dict[str, Any]:
            part = groups[rows].tolist()
            return {
                "cross_fitted": _plain(interval(honest[rows], part)),
                "naive": _plain(interval(naive[rows], part)),
            }

        found[what] = {
            **both(np.arange(len(groups))),
            "strata": {label: both(np.flatnonzero(groups == label)) for label in sorted(set(strata))},
        }
    return found


def _plain(found: Interval | None) -> dict[str, float | None] | None:
    return None if found is None else as_plain(found)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[str]]:
    """A text file that appears under its name when all of it is written; nothing is held in memory."""
    scratch = path.with_name(f"{path.name}.part")
    with scratch.open("w", encoding="utf-8") as lines:
        yield lines
    scratch.rename(path)
