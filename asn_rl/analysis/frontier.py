"""Frontier plots: what an arm reaches against what it spends, and its quality against its diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asn_rl.analysis.page import figure
from asn_rl.evaluation.metrics import parse_name

DIVERSITY = ("vendi", "distinct_2", "distinct_3", "distinct_1", "self_bleu")
"""of these the first that a task has is drawn"""
_APART = (150, 11)
"""pixels of a name"""
_STYLE = {"static": ("tab:blue", "o", "static rule"), "policy": ("tab:orange", "D", "policy")}


@dataclass(frozen=True)
class Point:
    """An arm in a plot."""

    arm: str
    kind: str
    x: float
    y: float
    low: float
    high: float
    """interval of y"""


def frontier(points: Sequence[Point], *, more_x: bool) -> list[Point]:
    """The points that no other one matches in both directions and beats in one (Pareto), by growing x; of equal points
    the first. More y is better; with `more_x` more x, too, else less."""
    sign = 1 if more_x else -1
    kept, best = [], None
    for point in sorted(points, key=lambda point: (-sign * point.x, -point.y)):
        if best is None or point.y > best:
            kept.append(point)
            best = point.y
    return sorted(kept, key=lambda point: point.x)


def figures(task: Mapping[str, Any]) -> Any | None:
    """A matplotlib figure with the plots that the task's metrics allow; None: neither."""
    primary, has = task["primary"], task["metrics"]
    k = parse_name(primary).k
    plots: list[tuple[str, int, str, bool]] = []
    if "tokens" in has:
        label = "tokens a completion" if k == 1 else f"tokens for {k} completions"
        plots.append(("tokens", k, label, False))
    diversity = next((name for name in DIVERSITY if name in has), None)
    if diversity:
        metric = parse_name(diversity).metric
        more = metric.better == "higher"
        plots.append((diversity, 1, metric.title + ("" if more else " (less is more diverse)"), more))
    plots = [plot for plot in plots if points(task, plot[0], plot[1])]
    if not plots:
        return None
    made, axes = figure(1, len(plots), 5.6, 4.2)
    for axis, (name, factor, label, more_x) in zip(axes, plots, strict=True):
        _draw(axis, points(task, name, factor), task["baseline"], more_x=more_x)
        axis.set(xlabel=label, ylabel=primary)
    axes[0].legend(fontsize=8)
    return made


def points(task: Mapping[str, Any], name: str, factor: int = 1) -> list[Point]:
    """Arms by a metric, times `factor`, and the primary metric; an arm without either is left out."""
    found = []
    for arm, entry in task["arms"].items():
        x, y = entry["metrics"].get(name), entry["metrics"].get(task["primary"])
        if x and y and x["mean"] is not None and y["mean"] is not None:
            found.append(Point(arm, entry["kind"], factor * x["mean"], y["mean"], y["low"], y["high"]))
    return found


def _draw(axis: Any, shown: Sequence[Point], baseline: str, *, more_x: bool) -> None:
    best = frontier(shown, more_x=more_x)
    axis.plot([p.x for p in best], [p.y for p in best], color="0.6", linewidth=1, label="frontier", zorder=1)
    for kind, (colour, marker, label) in _STYLE.items():
        group = [p for p in shown if p.kind == kind]
        for p in group:
            axis.plot([p.x, p.x], [p.low, p.high], color=colour, alpha=0.35, linewidth=1, zorder=2)
        if group:
            axis.scatter(
                [p.x for p in group], [p.y for p in group], c=colour, marker=marker, s=26, label=label, zorder=3
            )
    anchor = [p for p in shown if p.arm == baseline]
    axis.scatter(
        [p.x for p in anchor],
        [p.y for p in anchor],
        s=90,
        facecolors="none",
        edgecolors="black",
        label="baseline",
        zorder=4,
    )
    axis.margins(x=0.12, y=0.08)
    _name(axis, [p for p in shown if p in best or p in anchor or p.kind == "policy"])


def _name(axis: Any, named: Sequence[Point]) -> None:
    """Names beside points, to the side where there is room; one that would lie on another moves up."""
    if not named:
        return
    axis.autoscale_view()
    middle = (min(p.x for p in named) + max(p.x for p in named)) / 2
    places: list[tuple[float, float]] = []
    for p in sorted(named, key=lambda p: p.y):
        right = p.x <= middle
        x, y = axis.transData.transform((p.x, p.y))
        height = y
        while any(abs(x - other_x) < _APART[0] and abs(height - other_y) < _APART[1] for other_x, other_y in places):
            height += 1
        places.append((x, height))
        axis.annotate(
            p.arm.replace("$", r"\$"), (p.x, p.y), fontsize=7, textcoords="offset pixels", va="bottom",
            xytext=(7 if right else -7, 3 + height - y), ha="left" if right else "right",
        )  # fmt: skip
