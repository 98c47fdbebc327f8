"""The report: one self-contained HTML page, and the comparison as a table on the terminal."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asn_rl.analysis.page import STYLE, svg, table
from asn_rl.analysis.page import figure as make_figure
from asn_rl.analysis.transfer import Difference, TransferCurves, largest_differences, transfer_curves
from asn_rl.data.store import load_trajectories
from asn_rl.evaluation.statistics import as_interval
from asn_rl.evaluation.verdict import NO_CLAIM
from asn_rl.evaluation.verdict import verdict as judged
from asn_rl.job import Job, compare, distil, reinforce
from asn_rl.job.config import DISTILLED, RL
from asn_rl.metrics import read_metrics
from asn_rl.runs import console
from asn_rl.types import Trajectories

_CURVES = (
    ("reward/total", "mean reward"),
    ("kl/exact", "KL to the older checkpoint, nats a token"),
    ("policy/entropy", "policy entropy, nats a token"),
    ("policy/truncated", "share cut off by the token limit"),
    ("eval/pair_accuracy", "held-out pairs in the right order"),
)
"""shown where a run has them"""


def verdict(comparison: Mapping[str, Any]) -> str:
    """The result in a sentence. A difference counts as an improvement only when its interval excludes zero."""
    rl = _row(comparison, RL)
    gap, level = rl["difference"], round(100 * comparison["level"])
    numbers = (
        f"{rl['reward']['mean']:.3f} against {_row(comparison, comparison['best_static'])['reward']['mean']:.3f}, "
        f"difference {gap['mean']:+.3f} with {level} % interval [{gap['low']:+.3f}, {gap['high']:+.3f}]"
    )
    against = f"the best static rule of the grid ({comparison['best_static']})"
    found = judged(as_interval(gap))
    if found == NO_CLAIM:
        return f"No difference between the RL policy and {against} can be claimed: {numbers}."
    return f"The RL policy is {found} than {against}: {numbers}."


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """The comparison on the terminal."""
    header, rows = _cells(comparison)
    console.print(
        f"\n{comparison['prompts']} held-out prompts, {comparison['samples']} completions each", highlight=False
    )
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    for first, *rest in (header, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        console.print("  ".join(cells), highlight=False, markup=False)
    console.print(verdict(comparison), highlight=False, markup=False)


def write_report(job: Job) -> Path:
    """Write `report.html` for a finished job and return its path.

    Raises:
        ConfigError: matplotlib is missing.
    """
    comparison = compare(job)
    policy = reinforce(job)
    static = {arm.name: arm.policy for arm in job.arms}[comparison["best_static"]]
    trajectories = load_trajectories(job.run / "comparison" / RL)
    shown = {"RL": policy, f"best static ({comparison['best_static']})": static}
    if (job.run / DISTILLED).exists():
        shown[DISTILLED] = distil(job)
    curves = {
        name: [
            transfer_curves(arm, trajectories, title="confident", low=0.3, high=0.5),
            transfer_curves(arm, trajectories, title="open", low=0.9, high=1.0),
        ]
        for name, arm in shown.items()
        if arm.needs <= policy.needs  # the completions recorded what the policy reads
    }
    pieces = [[job.backend.decode([token]) for token in ids] for ids in trajectories.completion_ids]
    comparable = static.needs <= policy.needs
    differences = largest_differences(policy, static, trajectories, pieces) if comparable else []
    page = _page(job, comparison, curves, differences, trajectories)
    path = job.run / "report.html"
    path.write_text(page)
    return path


def _page(
    job: Job,
    comparison: Mapping[str, Any],
    curves: Mapping[str, Sequence[TransferCurves]],
    differences: Sequence[Difference],
    trajectories: Trajectories,
) -> str:
    versus = "; ".join(
        f"against {html.escape(name)} {gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
        for name, gap in comparison["rl_against"].items()
    )
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>asn_rl report</title>",
        f"<style>{STYLE}</style><h1>Learning how to sample</h1>",
        f"<p><strong>{html.escape(verdict(comparison))}</strong></p>",
        table(*_cells(comparison)),
        f"<p class='note'>{comparison['prompts']} held-out prompts, {comparison['samples']} completions each, the same "
        f"random draws for every arm. Strata weigh the same. Intervals: paired bootstrap over prompts, "
        f"{round(100 * comparison['level'])} %. The best static rule was chosen on the selection split from "
        f"{len(comparison['grid'])} declared rules: {html.escape(', '.join(comparison['grid']))}."
        + (f" The RL policy {versus}.</p>" if versus else "</p>"),
        _headroom(comparison["headroom"]),
        "<h2>Learning curves</h2>",
        _learning_curves(job.run),
        "<h2>What the policy does to a token's log-probability</h2>",
        "<p class='note'>Each line is one position of the RL policy's completions; a flat line leaves the base model "
        "alone, a falling one sharpens it to the left, lines end where points are cut.</p>",
        _transfer_figure(curves),
        "<h2>Where it differs from the best static rule</h2>",
        _differences_table(differences),
        "<h2>Completions of the RL policy</h2>",
        _completions_table(trajectories, comparison["samples"]),
        "<h2>Reproduce</h2>",
        f"<pre>{html.escape((job.run / 'command.txt').read_text())}</pre>",
        f"<pre>{html.escape((job.run / 'config.yaml').read_text())}</pre></html>",
    ]
    return "\n".join(parts)


def _headroom(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "<p class='note'>Headroom was not measured: a reward compares candidates of all seeds.</p>"
    return (
        f"<p class='note'>Headroom on the training prompts (split halves): choosing the best rule of the grid for each "
        f"prompt gives {found['oracle']:.3f}, the best single rule {found['static']:.3f}. A policy that chooses token "
        "by token may exceed both.</p>"
    )


def _cells(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    strata = list(comparison["rows"][0]["by_stratum"])
    by_stratum = strata if len(strata) > 1 else []
    header = ["arm", *by_stratum, "reward", "interval", "against best static", "distinct-3", "tokens", "truncated"]
    rows = []
    for row in comparison["rows"]:
        name, gap = row["name"], row["difference"]
        best = name == comparison["best_static"]
        rows.append(
            [
                f"{name} (best static)" if best else name,
                *(f"{row['by_stratum'][label]:.3f}" for label in by_stratum),
                f"{row['reward']['mean']:.3f}",
                f"[{row['reward']['low']:.3f}, {row['reward']['high']:.3f}]",
                "" if best else f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]",
                f"{row['distinct_3']:.2f}",
                f"{row['tokens']:.1f}",
                f"{row['truncated']:.0%}",
            ]
        )
    return header, rows


def _row(comparison: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(row for row in comparison["rows"] if row["name"] == name)


def _differences_table(differences: Sequence[Difference]) -> str:
    rows = [
        [
            html.escape(d.prompt),
            f"{html.escape(d.before)}<mark>{html.escape(d.token)}</mark>",
            f"{d.kl:.2f}",
            *(f"{value:.2f}" for value in d.entropy),
        ]
        for d in differences
    ]
    header = ["prompt", "completion, drawn token marked", "divergence", "base entropy", "RL", "static"]
    return table(header, rows, "text")


def _completions_table(trajectories: Trajectories, samples: int, groups: int = 8) -> str:
    prompts = len(trajectories) // samples
    rows = []
    for group in range(min(groups, prompts)):
        first = group * prompts // min(groups, prompts) * samples
        texts = "<br>".join(html.escape(text) for text in trajectories.completions[first : first + 3])
        rows.append([html.escape(trajectories.prompts[first].last_turn), texts])
    return table(["prompt", "three of its completions"], rows, "text")


def _learning_curves(run: Path) -> str:
    distilled, steps = read_metrics(run / "distill"), read_metrics(run)
    curves = [(name, title) for name, title in _CURVES if any(name in row for row in steps)]
    figure, axes = make_figure(1, bool(distilled) + len(curves), 3.2)
    if distilled:
        axes[0].plot([r["step"] for r in distilled], [r["loss/distill_kl"] for r in distilled], label="training")
        if "eval/distill_kl" in distilled[0]:
            axes[0].plot([r["step"] for r in distilled], [r["eval/distill_kl"] for r in distilled], label="held out")
        axes[0].set(title="distillation KL, nats a token", xlabel="epoch")
        axes[0].legend()
    for axis, (name, title) in zip(axes[bool(distilled) :], curves, strict=True):
        axis.plot([r["step"] for r in steps], [r.get(name) for r in steps], color="tab:orange")
        axis.set(title=title, xlabel="RL step")
    return svg(figure)


def _transfer_figure(curves: Mapping[str, Sequence[TransferCurves]]) -> str:
    figure, axes = make_figure(len(next(iter(curves.values()))), len(curves), 5.0)
    for column, (name, kinds) in enumerate(curves.items()):
        for row, kind in enumerate(kinds):
            axis = axes[row * len(curves) + column]
            for x, y in zip(kind.logprobs, kind.shifts, strict=True):
                axis.plot(x, y, color="tab:blue", alpha=0.25, linewidth=0.8)
            axis.axhline(0, color="black", linewidth=0.5)
            axis.set(title=f"{name}\n{kind.title}", xlabel="log p under the base model", ylabel="shift, nats")
            axis.set_xlim(-14, 0)
            axis.set_ylim(-20, 5)  # what is 20 nats less likely is gone
    return svg(figure)
