"""An evaluation for people: one self-contained HTML page, and tables on the terminal. `evaluation.record` has the
record's schema. Every claim is `evaluation.verdict`'s or, where an evaluation was looked at while it ran, that of
`evaluation.sequential`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from asn_rl.analysis.frontier import figures
from asn_rl.analysis.page import STYLE, svg, table
from asn_rl.evaluation.leaderboard import leaderboard
from asn_rl.evaluation.metrics import parse_name
from asn_rl.evaluation.record import Record, check_record
from asn_rl.evaluation.statistics import as_interval
from asn_rl.evaluation.verdict import BETTER, NO_CLAIM, claim, signed, verdict
from asn_rl.files import write_whole
from asn_rl.runs import console

Row = Mapping[str, Any]
_INTERVALS = (
    "Intervals of one arm: bootstrap over prompts, {level:g} %. Intervals of differences: paired by prompt, and they "
    "hold together for all arms of a table, so that the best one may be picked by them. A difference counts only when "
    "its interval excludes zero; p is Holm's, which may be a little less strict than that."
)
_LOOKED = (
    "This task was looked at while it ran. Verdicts and claims are those of a confidence sequence ({level:g} % for all "
    "policies of a run together), which holds for any number of looks; bootstrap intervals of differences describe."
)
_DESCRIBES = "describes only"
_WIDE = "body{max-width:80rem} td small{color:#555} .wide{overflow-x:auto}"


def write_evaluation_page(record: Record, path: Path) -> Path:
    """Write the page and return its path.

    Raises:
        DataError: the record is damaged or of another schema.
        ConfigError: matplotlib is missing.
    """
    check_record(record, "the record")
    write_whole(path, _page(record))
    return path


def print_evaluation(record: Record) -> None:
    """The record on the terminal: a table and the claims of each task, then the leaderboard where there are more.

    Raises:
        DataError: the record is damaged or of another schema.
    """
    check_record(record, "the record")
    for name, task in record["tasks"].items():
        _print(evaluation_table(record, name))
        for line in [*claims(task), *_remarks(task)]:
            console.print(line, highlight=False, markup=False)
    if len(record["tasks"]) > 1:
        _print(leaderboard_table(record))
    for line in _left_out(record):
        console.print(line, highlight=False, markup=False)


def evaluation_table(record: Record, name: str) -> Table:
    """One task as a rich table, an arm a row, the best first; other metrics than the primary one without intervals."""
    task = record["tasks"][name]
    return _rich(f"{name}: {_size(task)}", *_cells(task, intervals=False))


def leaderboard_table(record: Record) -> Table:
    """The leaderboard as a rich table."""
    return _rich("all tasks", *_leaders(record))


def claims(task: Row) -> list[str]:
    """What may be said of each policy against the baseline, in sentences."""
    found = []
    for name, arm in task["arms"].items():
        if arm["kind"] != "policy":
            continue
        if "stop_early" in task:
            found += [_decided(name, task, arm["sequential"])] if "sequential" in arm else []
        elif arm["difference"]:
            found.append(claim(name, task["baseline"], as_interval(arm["difference"]), task["level"]))
    return found


def _decided(name: str, task: Row, decision: Row) -> str:
    """What a policy's `StopDecision` allows to say."""
    baseline, prompts = task["baseline"], decision["prompts"]
    interval = f"[{decision['low']:+.3f}, {decision['high']:+.3f}]"
    numbers = f"confidence sequence of the difference {interval} after {prompts} prompts, {100 * task['level']:g} %"
    if decision["outcome"] == "undecided":
        return f"Undecided: no difference between {name} and {baseline} can be claimed: {numbers}."
    return f"{name} is {decision['outcome']} than {baseline}: {numbers}, known after {decision['decided_at']}."


def _page(record: Record) -> str:
    tasks = record["tasks"]
    levels = {task["level"] for task in tasks.values()}
    title = "Evaluation of " + (", ".join(tasks) if len(tasks) < 4 else f"{len(tasks)} tasks")
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{STYLE}{_WIDE}</style><h1>{html.escape(title)}</h1>",
        *(_said(f"{name}: {line}") for name, task in tasks.items() for line in claims(task)),
        *(_said(line) for line in _left_out(record)),
        f"<p class='note'>Base model {html.escape(str(record['base_model']))}. "
        + _INTERVALS.format(level=100 * max(levels, default=0.95))
        + "</p>",
    ]
    if len(tasks) > 1 or len({arm["run"] for task in tasks.values() for arm in task["arms"].values()}) > 1:
        header, rows = _leaders(record)
        parts += [
            "<h2>Leaderboard</h2>",
            "<p class='note'>The mean is over tasks, which weigh the same; only arms that ran on all of them have one. "
            "The difference is to the baseline of each task.</p>",
            _wide_table(header, rows),
        ]
    for name, task in tasks.items():
        parts += _section(name, task)
    return "\n".join([*parts, "</html>"])


def _left_out(record: Record) -> list[str]:
    return [f"{name} could not be run: {why}" for name, why in record["left_out"].items()]


def _section(name: str, task: Row) -> list[str]:
    header, rows = _cells(task, intervals=True)
    limits = ", ".join(f"{what} {limit}" for what, limit in task["limits"].items() if limit is not None) or "none"
    made = figures(task)
    return [
        f"<h2>{html.escape(name)}</h2>",
        f"<p class='note'>Version {html.escape(str(task['version']))}, split {html.escape(task['split'])}, "
        f"{_size(task)}. Limits: {html.escape(limits)}. Baseline: {html.escape(task['baseline'])}.{_judge(task)}</p>",
        _remarks_list(task),
        _wide_table(header, rows),
        svg(made) if made else "",
        _seeds(task),
    ]


def _judge(task: Row) -> str:
    """Whom win rates are against, and who judged."""
    if not (judge := task.get("judge")):
        return ""
    by = " ".join([judge["function"], *(f"{name}={value}" for name, value in judge["arguments"].items())])
    return f" Win rates: against {html.escape(judge['reference'])}, by {html.escape(by)}."


def _cells(task: Row, *, intervals: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows, cells as plain text; an interval stands in brackets after its mean. The primary metric always
    has one, the others where `intervals`."""
    primary, others = task["primary"], [name for name in task["metrics"] if name != task["primary"]]
    masked = any(arm["masked"] for arm in task["arms"].values())
    runs = len({arm["run"] for arm in task["arms"].values()}) > 1
    versus = [f"against {task['baseline']}", "p", "verdict"]
    names = [other.removeprefix("score:") for other in others]  # as lm-eval calls them
    header = ["arm", "kind", *(["run"] if runs else []), primary, *versus, *names]
    rows = []
    for name, arm in sorted(task["arms"].items(), key=lambda item: _rank(item[1]["metrics"].get(primary))):
        gap = arm["difference"]
        rows.append(
            [
                f"{name} (baseline)" if name == task["baseline"] else name,
                arm["kind"],
                *([arm["run"]] if runs else []),
                _estimate(arm["metrics"].get(primary)),
                *_against(gap, name == task["baseline"], _sequential(task, arm)),
                *(_estimate(arm["metrics"].get(other), intervals) for other in others),
                *([str(arm["masked"])] if masked else []),
            ]
        )
    return header + (["masked"] if masked else []), rows


def _leaders(record: Record) -> tuple[list[str], list[list[str]]]:
    tasks, leaders = record["tasks"], leaderboard(record)
    looked = _DESCRIBES if any("stop_early" in task for task in tasks.values()) else None
    runs = len({row["run"] for row in leaders}) > 1
    rows = [
        [
            row["arm"],
            row["kind"],
            *([row["run"]] if runs else []),
            _estimate(row["overall"]),
            *_against(row["difference"], row["difference"] is None and row["overall"] is not None, looked),
            *(_estimate(row["tasks"][task]) for task in tasks),
        ]
        for row in leaders
    ]
    header = ["arm", "kind", *(["run"] if runs else []), "mean", "against baseline", "p", "verdict"]
    return [*header, *(f"{name} ({task['primary']})" for name, task in tasks.items())], rows


def _against(gap: Row | None, baseline: bool, said: str | None = None) -> list[str]:
    """Difference, p and verdict; `said`: the verdict where the interval allows none, nor a p."""
    if gap is None:
        return ["", "", ""] if baseline else ["-", "-", said or "-"]
    interval = as_interval(gap)
    return [signed(interval), "-", said] if said else [signed(interval), f"{gap['p_holm']:.3f}", verdict(interval)]


def _sequential(task: Row, arm: Row) -> str | None:
    """The verdict of an arm in a task that was looked at while it ran; None: it was not."""
    if "stop_early" not in task:
        return None
    outcome = arm.get("sequential", {"outcome": _DESCRIBES})["outcome"]
    return NO_CLAIM if outcome == "undecided" else outcome


def _estimate(found: Row | None, interval: bool = True) -> str:
    if not found or found["mean"] is None:
        return "-"
    digits = 3 if abs(found["mean"]) < 10 else 1
    bounds = f" [{found['low']:.{digits}f}, {found['high']:.{digits}f}]" if interval else ""
    return f"{found['mean']:.{digits}f}{bounds}"


def _rank(found: Row | None) -> float:
    return float("inf") if not found or found["mean"] is None else -found["mean"]


def _size(task: Row) -> str:
    samples = sorted({arm["samples"] for arm in task["arms"].values()})
    counts = str(samples[0]) if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    return f"{len(task['prompts'])} prompts, {counts} completions each"


def _remarks(task: Row) -> list[str]:
    """What the figures rest on, in sentences."""
    arms = task["arms"]
    masked = {name: arm["masked"] for name, arm in arms.items() if arm["masked"]}
    found = [f"Before the run: {task['detectable']['sentence']}"] if task["detectable"] else []
    if masked:
        total = sum(len(task["prompts"]) * arm["samples"] for arm in arms.values())
        found.append(f"{sum(masked.values())} of {total} completions are masked: not counted for or against an arm.")
    for metric in task["metrics"]:
        left = {name: arm["metrics"][metric]["masked"] for name, arm in arms.items() if metric in arm["metrics"]}
        if any(left.values()):
            found.append(f"{metric}: up to {max(left.values())} prompts of an arm have no value and do not count.")
    looked = [_LOOKED.format(level=100 * task["level"])] if "stop_early" in task else []
    return looked + found + list(task["notes"])


def _remarks_list(task: Row) -> str:
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in _remarks(task))
    titles = {name: parse_name(name).metric for name in task["metrics"]}
    words = "; ".join(
        f"{name.removeprefix('score:')}: {metric.title}, {metric.better} is better" for name, metric in titles.items()
    )
    return f"<ul class='note'>{lines}<li>{html.escape(words)}.</li></ul>"


def _seeds(task: Row) -> str:
    """Policies that were trained with several seeds."""
    rows = []
    for name, arm in task["arms"].items():
        if seeds := arm.get("seeds"):
            these, others = (as_interval(seeds[key]) for key in ("interval", "crossed"))
            means = ", ".join(f"{mean:+.3f}" for mean in seeds["by_seed"])
            said = _DESCRIBES if "stop_early" in task else verdict(others)
            cells = [name, means, f"{seeds['spread']:.3f}", signed(these), signed(others), said]
            rows.append([html.escape(cell) for cell in cells])
    if not rows:
        return ""
    header = ["policy", "each seed", "spread", "these seeds", "other seeds too", "verdict"]
    note = f"Training seeds, differences to {task['baseline']}. Not adjusted for picking."
    return f"<p class='note'>{html.escape(note)}</p>" + table(header, rows)


def _said(line: str) -> str:
    return f"<p><strong>{html.escape(line)}</strong></p>"


def _two_lines(cell: str) -> str:
    """HTML of a cell: the interval below the mean; a verdict that counts is marked."""
    if cell == BETTER:
        return f"<mark>{cell}</mark>"
    if cell in (NO_CLAIM, _DESCRIBES):
        return f"<small>{cell}</small>"
    value, bracket, rest = cell.partition(" [")
    return html.escape(value) + (f"<br><small>[{html.escape(rest)}</small>" if bracket else "")


def _wide_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<div class='wide'>{table(header, [[_two_lines(cell) for cell in row] for row in rows])}</div>"


def _rich(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for i, name in enumerate(header):
        made.add_column(escape(name), justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def _print(made: Table) -> None:
    """Whole, also where the terminal is narrower: a table whose cells are cut says nothing."""
    needed = Measurement.get(console, console.options.update(max_width=10_000), made).maximum
    Console(file=console.file, width=max(console.width, needed), soft_wrap=True).print(made)
