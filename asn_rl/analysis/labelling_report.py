"""The labelling report: one self-contained HTML page that says which heuristic wins where, and what that rests on."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asn_rl.analysis.page import STYLE, figure, svg, table
from asn_rl.errors import ConfigError
from asn_rl.evaluation.statistics import as_interval
from asn_rl.evaluation.verdict import BETTER, NO_CLAIM, verdict
from asn_rl.labelling.labels import read_counts
from asn_rl.labelling.records import folder_name, read_file, read_prompts
from asn_rl.labelling.select import SELECTED
from asn_rl.rewards.letter_judge import position_share

SHOWN = 20
"""heuristics in figures, those with the largest lead; tables have all"""
LENGTH = 1500
"""characters of a text that are shown"""
_SCALES = {
    "mad": "median, 1.4826 MAD",
    "std": "mean, standard deviation",
    "constant": "constant: says nothing",
    "none": "raw",
}
MEASURES = {
    "self_bleu": "Self-BLEU (nltk's method1 smoothing, words): lower is more different.",
    "distinct_1": "Distinct n-grams of words over all n-grams.",
    "vendi": "Vendi score: the effective number of different meanings.",
    "embedding_entropy": "Embedding entropy: its logarithm, nats.",
}
Row = Mapping[str, Any]


def write_labelling_report(run: str | Path) -> Path:
    """Write `labelling.html` for a run folder whose candidates are selected, and return its path.

    Raises:
        ConfigError: nothing is selected yet, or matplotlib is missing.
    """
    run = Path(run)
    try:
        summary = json.loads((run / "selected" / "summary.json").read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{run} has no selected candidates to report on; run `asn-rl select` first") from error
    prompts = {prompt.id: prompt.last_turn for part in read_prompts(run / "prompts.jsonl").values() for prompt in part}
    examples = [record for _, record in read_file(run / "selected" / "examples.jsonl", SELECTED)]
    counts = {name: read_counts(run / "labels" / "train" / folder_name(name)) for name in summary["labellers"]}
    path = run / "labelling.html"
    path.write_text(_page(run, summary, counts, examples, prompts), encoding="utf-8")
    return path


def headline(summary: Row) -> str:
    """The result in a sentence. A gain is claimed only when its cross-fitted interval excludes zero."""
    names = summary["heuristics"]
    winner = max(names, key=lambda name: names[name]["wins"])
    share = names[winner]["wins"] / summary["prompts"]["all"]
    wins = f"{winner} is rated best on the most prompts ({share:.0%} of {summary['prompts']['all']})"
    gain = summary["gain"] and summary["gain"]["by_prompt"]["cross_fitted"]
    if gain is None:
        return f"What choosing by prompt gains cannot be said with these scores; {wins}."
    numbers = f"{_interval(gain)} over the best single heuristic"
    found = verdict(as_interval(gain))
    if found != NO_CLAIM:
        return f"Choosing the heuristic for each prompt {'gains' if found == BETTER else 'loses'} {numbers}; {wins}."
    return f"No gain from choosing the heuristic for each prompt can be claimed: {numbers}; {wins}."


def _page(
    run: Path,
    summary: Row,
    counts: Mapping[str, Mapping[str, int]],
    examples: Sequence[Row],
    prompts: Mapping[str, str],
) -> str:
    candidates, of = summary["candidates"], summary["prompts"]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>asn_rl labelling</title>",
        f"<style>{STYLE}.long{{white-space:pre-wrap;max-width:34rem}}</style><h1>Which heuristic wins where</h1>",
        f"<p><strong>{html.escape(headline(summary))}</strong></p>",
        f"<p class='note'>{of['all']} prompts, {len(summary['heuristics'])} heuristics, {candidates['cells']} "
        f"candidates, {len(summary['labellers'])} labellers; {candidates['kept']} candidates kept. Scores are in units "
        "of the normalised total. Intervals: bootstrap over prompts, 95 %. Strata weigh the same.</p>",
        _missing(summary),
        "<h2>Heuristics</h2>",
        "<p class='note'>Lead: mean total minus the mean of all heuristics on the same prompts. Won: prompts on which "
        "the heuristic's rating is the highest.</p>",
        _lead_figure(summary),
        _heuristics_table(summary),
        "<h2>What choosing gains</h2>",
        "<p class='note'>Over the best single heuristic. Cross-fitted: chosen on half of the seeds, scored on the "
        "other half, and the other way round. Naive: chosen and scored on the same seeds; what it promises beyond the "
        "cross-fitted figure is the winner's curse.</p>",
        _gain_table(summary),
        *_diversity(summary),
        "<h2>Labellers</h2>",
        _histograms(summary),
        _labellers_table(summary, counts),
        _masked_table(summary),
        "<h2>Do labellers agree?</h2>",
        "<p class='note'>Spearman's rank correlation over the candidates that both scored.</p>",
        _correlation_figure(summary),
        "<h2>Best and worst candidates</h2>",
        "<p class='note'>Raw scores, normalised ones in brackets; a dash is masked.</p>",
        _examples_table(examples, prompts),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(json.dumps(summary['settings'], indent=1))}</pre>",
        *(
            f"<pre>{html.escape((run / name).read_text())}</pre>"
            for name in ("command.txt", "config.yaml")
            if (run / name).exists()
        ),
        "</html>",
    ]
    return "\n".join(parts)


def _missing(summary: Row) -> str:
    """What did not count, in words; nothing where everything did."""
    candidates, prompts = summary["candidates"], summary["prompts"]
    notes = {
        "candidates were not generated": candidates["missing"],
        "candidates are blank": candidates["blank"],
        "candidates were cut off by the token limit": candidates["truncated"],
        "candidates have no label at all": candidates["without_total"],
        "candidates lack a label that a sibling has: ranked last, not counted in ratings": candidates["lacking_labels"],
        "prompts have no candidate with all labels: rated by their stratum alone": prompts["rated_by_stratum_only"],
        "prompts have no candidate to keep": prompts["none_kept"],
    }
    found = "".join(f"<li>{count} {what}</li>" for what, count in notes.items() if count)
    return f"<ul class='note'>{found}</ul>" if found else ""


def _lead_figure(summary: Row) -> str:
    names = _by_lead(summary)[:SHOWN][::-1]
    strata = list(summary["prompts"]["by_stratum"])
    groups = ["", *(strata[:5] if len(strata) > 1 else [])]
    made, axes = figure(1, len(groups), 9.0 / len(groups) + 0.6, 1.2 + 0.22 * len(names))
    for axis, group in zip(axes, groups, strict=True):
        rows = [_at(summary["heuristics"][name], group)["lead"] for name in names]
        for y, row in enumerate(rows):
            if row is not None:
                axis.plot([row["low"], row["high"]], [y, y], color="tab:blue", linewidth=1.5)
                axis.plot(row["mean"], y, "o", color="tab:blue", markersize=4)
        axis.axvline(0, color="black", linewidth=0.5)
        axis.set(title=_plain(group or "all prompts"), ylim=(-0.7, len(names) - 0.3))
        axis.set_yticks(range(len(names)), map(_plain, names) if axis is axes[0] else [""] * len(names))
    return svg(made)


def _heuristics_table(summary: Row) -> str:
    strata = list(summary["prompts"]["by_stratum"])
    shown = strata if len(strata) > 1 else []
    wins = {label: _winner(summary, label) for label in shown}

    def cell(name: str, label: str) -> str:
        text = _interval(summary["heuristics"][name]["strata"][label]["lead"])
        return f"<mark>{text}</mark>" if wins[label] == name else text

    rows = [
        [
            html.escape(name),
            str(summary["heuristics"][name]["wins"]),
            _interval(summary["heuristics"][name]["lead"]),
            *(cell(name, label) for label in shown),
            _interval(summary["heuristics"][name]["mean"], signed=False),
        ]
        for name in _by_lead(summary)
    ]
    return table(["heuristic", "won", "lead", *shown, "mean total"], rows)


def _winner(summary: Row, label: str) -> str:
    """The heuristic with the largest lead in a stratum."""
    rows = {name: row["strata"][label]["lead"] for name, row in summary["heuristics"].items()}
    return max(rows, key=lambda name: -np.inf if rows[name] is None else rows[name]["mean"])


def _gain_table(summary: Row) -> str:
    gain = summary["gain"]
    if gain is None:
        return "<p>One seed a prompt: choosing and scoring need one each.</p>"
    strata = list(summary["prompts"]["by_stratum"])
    rows = [
        [
            html.escape(group or "all prompts"),
            *(
                _interval(_at(gain[by], group)[how])
                for by in ("by_prompt", "by_stratum")
                for how in ("cross_fitted", "naive")
            ),
        ]
        for group in ("", *(strata if len(strata) > 1 else []))
    ]
    said = ", ".join(map(html.escape, gain.get("left_out", ())))
    note = f"<p>Left out, because its scores compare candidates of all seeds: {said}.</p>" if said else ""
    header = ["", "by prompt, cross-fitted", "by prompt, naive", "by stratum, cross-fitted", "by stratum, naive"]
    return table(header, rows) + note


def _diversity(summary: Row) -> list[str]:
    found = summary["diversity"]
    if not found["prompts"]:
        return []
    measures = list(next(iter(found["heuristics"].values())))
    said = " ".join(filter(None, map(MEASURES.get, measures)))
    rows = [
        [html.escape(name), *(_interval(found["heuristics"][name][measure], signed=False) for measure in measures)]
        for name in _by_lead(summary)
    ]
    return [
        "<h2>How different a heuristic's completions are</h2>",
        f"<p class='note'>Of one prompt, on {found['prompts']} prompts. {said}</p>",
        table(["heuristic", *(measure.replace("_", " ") for measure in measures)], rows),
    ]


def _histograms(summary: Row) -> str:
    labellers = summary["labellers"]
    columns = min(3, len(labellers))
    made, axes = figure(-(-len(labellers) // columns), columns, 3.2, 2.2)
    for axis, (name, row) in zip(axes, labellers.items(), strict=False):
        edges = row["histogram"]["edges"]
        axis.stairs(row["histogram"]["counts"], edges, fill=True, color="tab:blue", alpha=0.7)
        axis.axvline(row["quantiles"]["0.5"], color="black", linewidth=0.8)
        axis.set(title=_plain(name), ylabel="candidates")
    for axis in axes[len(labellers) :]:
        axis.set_visible(False)
    return svg(made)


def _labellers_table(summary: Row, counts: Mapping[str, Mapping[str, int]]) -> str:
    rows = []
    for name, row in summary["labellers"].items():
        events = {
            event.rpartition("/")[2]: count
            for event, count in counts.get(name, {}).items()
            if count and not event.endswith("/masked")
        }
        quantiles = row["quantiles"]
        rows.append(
            [
                html.escape(name),
                f"{summary['settings']['weights'][name]:g}",
                str(row["scored"]),
                str(row["masked"]),
                html.escape(", ".join(f"{count} {event}" for event, count in events.items())) or "none",
                f"{quantiles['0.05']:.3g}, {quantiles['0.5']:.3g}, {quantiles['0.95']:.3g}",
                "" if row.get("stderr") is None else f"±{row['stderr']:.2g}",
                f"{row['scale']['centre']:.3g}, {row['scale']['scale']:.3g} ({_SCALES[row['scale']['how']]})",
            ]
        )
    header = ["labeller", "weight", "scored", "masked", "events", "5 %, median, 95 %", "uncertainty", "normalised by"]
    return table(header, rows) + "".join(_position_bias(name, counts.get(name, {})) for name in summary["labellers"])


def _position_bias(name: str, counts: Mapping[str, int]) -> str:
    """Of a labeller that asks a judge which of two answers is better."""
    found = {event.rpartition("/")[2]: count for event, count in counts.items()}
    share = position_share(found)
    if share is None:
        return ""
    first, valid = share
    return (
        f"<p class='note'>{html.escape(name)} took the first of two answers in {first:.0%} of {valid} valid answers "
        "(50 %: no position bias).</p>"
    )


def _masked_table(summary: Row) -> str:
    """Masked scores of each heuristic, for the labellers that masked any: a rule may be hard to score."""
    shown = {name: row["masked_by_heuristic"] for name, row in summary["labellers"].items() if row["masked"]}
    if not shown:
        return ""
    rows = [[html.escape(name), *(str(part[name]) for part in shown.values())] for name in summary["heuristics"]]
    return "<p class='note'>Masked scores by heuristic:</p>" + table(["heuristic", *shown], rows)


def _correlation_figure(summary: Row) -> str:
    found = summary["correlations"]
    names = list(found)
    values = np.array([[np.nan if found[a][b] is None else found[a][b] for b in names] for a in names], float)
    size = 1.6 + 0.5 * len(names)
    made, (axis,) = figure(1, 1, size + 1.5, size)
    axis.imshow(np.nan_to_num(values), cmap="RdBu", vmin=-1, vmax=1)
    axis.set_xticks(range(len(names)), map(_plain, names), rotation=45, ha="right")
    axis.set_yticks(range(len(names)), map(_plain, names))
    for i, j in np.ndindex(values.shape):
        text = "-" if np.isnan(values[i, j]) else f"{values[i, j]:.2f}"
        dark = abs(values[i, j]) > 0.6
        axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return svg(made)


def _examples_table(examples: Sequence[Row], prompts: Mapping[str, str]) -> str:
    rows = []
    for record in examples:
        scores = [f"{html.escape(name)}: {_score(record, name)}" for name in record["raw"]]
        rows.append(
            [
                _text(prompts.get(record["prompt_id"], record["prompt_id"])) if record["rank"] == 1 else "",
                f"{'best' if record['rank'] == 1 else 'worst'}<br>{html.escape(record['heuristic'])}",
                _text(record["completion"]),
                f"total: {record['total']:.2f}<br>" + "<br>".join(scores),
            ]
        )
    return table(["prompt", "candidate", "completion", "scores"], rows, "text")


def _score(record: Row, name: str) -> str:
    raw, normalised = record["raw"][name], record["normalised"][name]
    return "-" if raw is None else f"{raw:.3g} ({normalised:+.2f})"


def _text(text: str) -> str:
    more = f" … ({len(text) - LENGTH} more characters)" if len(text) > LENGTH else ""
    return f"<div class='long'>{html.escape(text[:LENGTH])}{more}</div>"


def _by_lead(summary: Row) -> list[str]:
    """Heuristics, the largest lead first."""
    rows = summary["heuristics"]
    return sorted(rows, key=lambda name: np.inf if rows[name]["lead"] is None else -rows[name]["lead"]["mean"])


def _at(row: Row, group: str) -> Row:
    """Of a stratum, or of all prompts."""
    return row["strata"][group] if group else row


def _interval(found: Mapping[str, float] | None, signed: bool = True) -> str:
    if found is None:
        return "-"
    sign = "+" if signed else ""
    return f"{found['mean']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
