"""Records of evaluations, merged and shown: on arms whose rates are known."""

from __future__ import annotations

import copy
import html
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asn_rl.analysis.evaluation_page import claims, print_evaluation, write_evaluation_page
from asn_rl.analysis.frontier import Point, frontier, points
from asn_rl.errors import ConfigError, DataError, InvalidValue, UnknownName
from asn_rl.evaluation.leaderboard import leaderboard, merge_records
from asn_rl.evaluation.multiplicity import compare_all
from asn_rl.evaluation.power import forecast
from asn_rl.evaluation.record import Record, TaskSettings, read_record, task_record, with_differences
from asn_rl.evaluation.samples import Samples
from asn_rl.evaluation.seeds import seed_report
from asn_rl.evaluation.statistics import Resampling, as_interval, bootstrap
from asn_rl.runs import write_json

NAN = math.nan
HOW = Resampling(400, 0.9)
RULES = {"greedy": 0.5, "min_p=0.1 & <b>": 0.45, "temperature=2": 0.1}


def task(seed: int, arms: dict[str, float], *, prompts: int = 60, rules_seed: int = 0, **changes: Any) -> Record:
    """Arms with their rates; the static rules are the same wherever `rules_seed` is."""
    rates = np.random.default_rng(99).normal(0, 0.1, (prompts, 1, 1)) + np.array(list(arms.values()))[:, None]
    uniform = np.random.default_rng(seed).random((prompts, len(arms), 4))
    uniform[:, : len(RULES)] = np.random.default_rng(rules_seed).random((prompts, len(RULES), 4))
    scores = (uniform < rates).astype(float)
    scores[0, 0, 0] = NAN
    lengths = np.broadcast_to(np.arange(1.0, len(arms) + 1)[:, None] * 10, scores.shape)
    texts = [[["a b c", "a b d", "x y", "z"]] * len(arms)] * prompts
    samples = Samples(tuple(arms), ("all",) * prompts, scores, tokens=lengths, texts=texts)
    settings = TaskSettings("1", "ab", "test", {"prompts": None, "tokens": 64}, **{"how": HOW, **changes})
    return task_record(
        samples, [f"p{i}" for i in range(prompts)], settings, metrics=["pass@2", "tokens", "distinct_2"],
        baseline="greedy", kinds={arm: "static" if arm in RULES else "policy" for arm in arms},
        detectable=forecast(prompts, 0.5), notes=["2 prompts have no gold answer <i>"],
    )  # fmt: skip


def record(seed: int = 1, rl: float = 0.85, **options: Any) -> Record:
    arms = {**RULES, "rl": rl}
    return {
        "schema": 1,
        "base_model": "model-a",
        "left_out": {},
        "tasks": {"sums": task(seed, arms, **options), "rhymes": task(seed + 100, arms, prompts=40, **options)},
    }


# Records


def test_a_record_holds_what_was_measured(tmp_path: Path):
    made = record()
    write_json(tmp_path / "evaluation.json", made)
    assert read_record(tmp_path / "evaluation.json") == made
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()
    sums = made["tasks"]["sums"]
    rl, greedy = (np.array(sums["arms"][name]["values"]) for name in ("rl", "greedy"))
    assert sums["arms"]["rl"]["metrics"]["accuracy"]["mean"] == pytest.approx(rl.mean())
    assert sums["arms"]["rl"]["metrics"]["tokens"] == {"mean": 40.0, "low": 40.0, "high": 40.0, "masked": 0}
    assert (sums["arms"]["greedy"]["masked"], sums["arms"]["rl"]["masked"]) == (1, 0)
    assert sums["arms"]["greedy"]["difference"] is None
    others = np.stack([np.array(sums["arms"][name]["values"]) - greedy for name in [*list(RULES)[1:], "rl"]], 1)
    expected = compare_all(others, ["all"] * 60, HOW)
    assert as_interval(sums["arms"]["rl"]["difference"]) == expected.intervals[-1]
    assert sums["arms"]["rl"]["difference"]["p_holm"] == expected.holm[-1]


def test_arms_that_cannot_be_compared_are_named_and_not_claimed():
    sums = record()["tasks"]["sums"]
    sums["arms"]["rl"]["values"] = [1.0] + [None] * 59
    found = with_differences(with_differences(sums))
    assert found["arms"]["rl"]["difference"] is None
    assert found["arms"]["temperature=2"]["difference"] is not None
    assert [note for note in found["notes"] if "too few prompts" in note] == [
        "too few prompts with a value under the arm and the baseline to compare: rl"
    ]
    assert claims(found) == []
    same = with_differences({**sums, "arms": dict.fromkeys(("greedy", "copy"), sums["arms"]["greedy"])})
    assert same["arms"]["copy"]["difference"] == {"mean": 0.0, "low": None, "high": None, "p_holm": 1.0}


def test_settings_that_make_no_comparison_are_refused():
    with pytest.raises(UnknownName, match="unknown baseline 'beam'"):
        with_differences({**record()["tasks"]["sums"], "baseline": "beam"})
    with pytest.raises(InvalidValue, match="primary must be a metric of which more is better"):
        record(primary="tokens")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda made: made.update(schema=2), "schema must be 1, got 2; evaluate again"),
        (lambda made: made.pop("tasks"), "no tasks; the record is damaged"),
        (lambda made: made["tasks"]["sums"].pop("level"), "task sums: no level"),
        (lambda made: made["tasks"]["sums"]["arms"]["rl"].pop("kind"), "task sums, arm rl: no kind"),
        (lambda made: made["tasks"]["sums"]["arms"]["rl"]["values"].pop(), "arm rl: 59 values for 60 prompts"),
    ],
)
def test_damaged_records_are_refused(spoil: Any, words: str, tmp_path: Path):
    made = record()
    spoil(made)
    (tmp_path / "evaluation.json").write_text(json.dumps(made))
    with pytest.raises(DataError, match=f"evaluation.json.*{re.escape(words)}"):
        read_record(tmp_path / "evaluation.json")
    with pytest.raises(DataError, match="cannot read the evaluation"):
        read_record(tmp_path / "none.json")


# Merging


def test_merged_runs_share_their_rules_and_keep_their_policies_apart():
    runs = {"a": record(1, 0.85), "b": record(2, 0.5)}
    kept = copy.deepcopy(runs)
    merged = merge_records(runs)
    assert runs == kept, "the runs' own records are not changed"
    sums = merged["tasks"]["sums"]
    assert list(sums["arms"]) == [*RULES, "rl (a)", "rl (b)"]
    assert [sums["arms"][arm]["run"] for arm in ("greedy", "rl (a)", "rl (b)")] == ["a", "a", "b"]
    gap = sums["arms"]["rl (a)"]["difference"]
    alone = runs["a"]["tasks"]["sums"]["arms"]["rl"]["difference"]
    assert gap["mean"] == alone["mean"]
    assert gap["high"] - gap["low"] > alone["high"] - alone["low"], "one more arm to pick from"
    again = merge_records({"first": merged, "c": record(3, 0.6)})
    assert [arm["run"] for arm in again["tasks"]["sums"]["arms"].values()] == ["a", "a", "a", "a", "b", "c"]


def test_other_draws_of_a_rule_are_another_arm_and_one_baseline_counts():
    other = record(2, rules_seed=7)
    sums = other["tasks"]["sums"]
    sums["baseline"] = "temperature=2"
    sums["arms"]["rl"]["seeds"] = {"left": "out"}
    merged = merge_records({"a": record(1), "b": other})["tasks"]["sums"]
    assert merged["baseline"] == "greedy (a)"
    assert merged["arms"]["greedy (a)"]["difference"] is None
    assert merged["arms"]["greedy (b)"]["difference"] is not None
    assert "b was compared with temperature=2; here all arms are compared with greedy (a)" in merged["notes"][-1]
    assert "seeds" not in merged["arms"]["rl (b)"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda b: b.update(base_model="model-b"), "a and b cannot be merged: base model 'model-a' against 'model-b'"),
        (lambda b: b["tasks"]["sums"].update(version="2"), "task sums, version '1' against '2'"),
        (lambda b: b["tasks"]["sums"].update(fingerprint="cd"), "task sums, fingerprint 'ab' against 'cd'"),
        (lambda b: b["tasks"]["sums"]["limits"].update(tokens=128), "task sums, limits .*64.* against .*128"),
        (lambda b: b["tasks"]["sums"]["prompts"].reverse(), "task sums, prompts '60 of them' against '60 of them'"),
    ],
)
def test_runs_of_something_else_are_not_merged(spoil: Any, words: str):
    other = record(2)
    spoil(other)
    with pytest.raises(DataError, match=words):
        merge_records({"a": record(1), "b": other})
    with pytest.raises(DataError, match="name one run at least"):
        merge_records({})


def test_the_leaderboard_weighs_tasks_alike_whatever_their_strata():
    made = record()
    made["tasks"]["sums"]["strata"] = ["x"] * 20 + ["y"] * 40
    only = made["tasks"]["rhymes"]["arms"].pop("temperature=2")
    rows = {row["arm"]: row for row in leaderboard(made)}
    assert only["kind"] == rows["temperature=2"]["kind"]
    assert list(rows) == ["rl", "greedy", "min_p=0.1 & <b>", "temperature=2"]
    values = {name: np.array(part["arms"]["rl"]["values"]) for name, part in made["tasks"].items()}
    sums, rhymes = values["sums"], values["rhymes"]
    expected = ((sums[:20].mean() + sums[20:].mean()) / 2 + rhymes.mean()) / 2
    assert rows["rl"]["overall"]["mean"] == pytest.approx(expected)
    # In each of the three strata a mean has the standard error of its values, with the weights 1/4, 1/4, 1/2.
    parts = [(sums[:20], 0.25), (sums[20:], 0.25), (rhymes, 0.5)]
    error = math.sqrt(sum(weight**2 * part.var() / len(part) for part, weight in parts))
    width = rows["rl"]["overall"]["high"] - rows["rl"]["overall"]["low"]
    assert width == pytest.approx(2 * 1.645 * error, rel=0.15)
    assert rows["rl"]["difference"]["low"] > 0
    assert rows["greedy"]["difference"] is None
    assert (rows["temperature=2"]["overall"], rows["temperature=2"]["tasks"]["rhymes"]) == (None, None)


def test_rows_that_several_tasks_ask_are_resampled_as_one():
    """Two tasks that are copies of each other say as much as one of them, and half a copy as much as its rows."""
    made = {**record(), "tasks": {"one": record()["tasks"]["sums"], "two": record()["tasks"]["sums"]}}
    alone = leaderboard({**made, "tasks": {"one": made["tasks"]["one"]}})[0]
    apart = leaderboard(made)[0]
    for part in made["tasks"].values():
        part["family"] = "sums"
    together = leaderboard(made)[0]
    for key in ("overall", "difference"):
        assert together[key] == pytest.approx(alone[key])
        assert apart[key]["mean"] == pytest.approx(alone[key]["mean"])
        widths = [row[key]["high"] - row[key]["low"] for row in (apart, alone)]
        assert widths[0] == pytest.approx(widths[1] / math.sqrt(2), rel=0.15)


def test_tasks_that_share_some_rows_have_the_standard_error_of_their_rows():
    generator = np.random.default_rng(5)
    sums, shared = generator.normal(0.5, 0.1, 60), generator.normal(0.5, 0.1, 20)
    made = {**record(), "tasks": {"one": record()["tasks"]["sums"], "two": record()["tasks"]["sums"]}}
    for name, values in (("one", sums), ("two", np.concatenate([shared, sums[:40]]))):
        made["tasks"][name]["family"] = "sums"
        made["tasks"][name]["arms"]["rl"]["values"] = values.tolist()
    made["tasks"]["two"]["prompts"] = [f"sums/other/{i}" for i in range(20)] + [f"p{i}" for i in range(40)]
    found = next(row for row in leaderboard(made) if row["arm"] == "rl")["overall"]
    assert found["mean"] == pytest.approx((sums.mean() + (shared.sum() + sums[:40].sum()) / 60) / 2)
    parts = [(2 * sums[:40] / 120, 40), (sums[40:] / 120, 20), (shared / 120, 20)]  # what each row adds
    error = math.sqrt(sum(count * part.var() for part, count in parts))
    assert found["high"] - found["low"] == pytest.approx(2 * 1.645 * error, rel=0.15)


def masked_turns(one: np.ndarray, two: np.ndarray) -> Record:
    """Two tasks that ask the same rows; NaN: masked."""
    made = {**record(), "tasks": {"one": record()["tasks"]["sums"], "two": record()["tasks"]["sums"]}}
    for name, values in (("one", one), ("two", two)):
        made["tasks"][name]["family"] = "sums"
        made["tasks"][name]["arms"]["rl"]["values"] = [None if np.isnan(v) else v for v in values.tolist()]
        made["tasks"][name]["arms"]["greedy"]["values"] = [0.0] * len(values)
    return made


def test_what_is_masked_in_one_of_several_tasks_adds_no_noise():
    generator = np.random.default_rng(8)
    shared = generator.normal(1.0, 0.2, 60)
    one, two = shared, shared + generator.normal(1.0, 0.1, 60)
    two[generator.random(60) < 0.5] = NAN
    row = next(row for row in leaderboard(masked_turns(one, two)) if row["arm"] == "rl")
    drawn = generator.integers(60, size=(4000, 60))
    direct = np.quantile((one[drawn].mean(1) + np.nanmean(two[drawn], 1)) / 2, [0.05, 0.95])
    for key in ("overall", "difference"):
        assert row[key]["mean"] == pytest.approx((one.mean() + np.nanmean(two)) / 2)
    assert [row["overall"]["low"], row["overall"]["high"]] == pytest.approx(direct, abs=0.01)
    alike = leaderboard(masked_turns(np.ones(60), np.where(np.isnan(two), NAN, 1.0)))
    constant = next(row for row in alike if row["arm"] == "rl")
    assert constant["overall"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert constant["difference"]["low"] is None  # without spread nothing can be claimed


def test_one_shared_row_takes_no_comparison_away():
    made = masked_turns(np.random.default_rng(1).normal(1, 0.1, 60), np.random.default_rng(2).normal(1, 0.1, 60))
    made["tasks"]["two"]["prompts"] = ["p0", *(f"sums/other/{i}" for i in range(59))]
    row = next(row for row in leaderboard(made) if row["arm"] == "rl")
    assert row["difference"]["low"] > 0.9


def test_ids_of_tasks_without_a_family_are_taken_whole():
    made = {**record(), "tasks": {"sums": record()["tasks"]["sums"]}}
    half = made["tasks"]["sums"]
    half["prompts"] = [f"{kind}/{i}" for i in range(30) for kind in "xy"]
    half["arms"]["rl"]["values"] = [1.0, 0.0] * 30
    assert next(row for row in leaderboard(made) if row["arm"] == "rl")["overall"]["mean"] == pytest.approx(0.5)


def test_a_leaderboard_of_one_task_is_that_task():
    made = {**record(), "tasks": {"sums": record()["tasks"]["sums"]}}
    row = leaderboard(made)[0]
    arm = made["tasks"]["sums"]["arms"]["rl"]
    values = np.array(arm["values"])
    found = bootstrap(values, ["all"] * 60, resamples=400, level=0.9)
    assert row["overall"] == pytest.approx({"mean": found.mean, "low": found.low, "high": found.high})
    assert row["difference"] == pytest.approx(arm["difference"])


# The frontier


POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8)


@given(POINTS, st.booleans())
def test_the_frontier_is_what_nothing_dominates(places: list[tuple[int, int]], more_x: bool):
    shown = [Point(str(i), "static", x, y, y, y) for i, (x, y) in enumerate(places)]
    sign = 1 if more_x else -1
    better = {
        (p.x, p.y)
        for p in shown
        if not any(sign * q.x >= sign * p.x and q.y >= p.y and (q.x, q.y) != (p.x, p.y) for q in shown)
    }
    found = frontier(shown, more_x=more_x)
    assert [(p.x, p.y) for p in found] == sorted(better)


def test_several_samples_cost_their_tokens():
    sums = task(1, {**RULES, "rl": 0.8}, primary="pass@2")
    assert [point.x for point in points(sums, "tokens", 2)] == [20, 40, 60, 80]
    assert points(sums, "vendi") == []


# The page and the terminal


class Checker(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_is_one_file_that_claims_what_the_intervals_allow(tmp_path: Path):
    merged = merge_records({"a": record(1, 0.85), "b": record(2, 0.5)})
    arm = merged["tasks"]["sums"]["arms"]["rl (a)"]
    seeds = np.random.default_rng(0).normal([0.1, 0.2, 0.3], 1, (60, 3))
    arm["seeds"] = seed_report(seeds, ["all"] * 60, HOW).as_dict()
    page = write_evaluation_page(merged, tmp_path / "evaluation.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert all(address.startswith(("#", "data:")) for address in checker.addresses), "nothing is loaded from elsewhere"
    assert "script" not in checker.tags
    assert (checker.tags.count("svg"), checker.tags.count("table")) == (2, 4)
    for text in ("min_p=0.1 & <b>", "2 prompts have no gold answer <i>", "sums", "rhymes"):
        assert html.escape(text) in page
        assert "<" not in text or text not in page
    said = re.findall(r"<p><strong>(.*?)</strong></p>", page)
    assert said[0].startswith("sums: rl (a) is better than greedy: difference +0.")
    assert said[1].startswith("sums: No difference between rl (b) and greedy can be claimed: difference ")
    assert "Before the run: A gain of" in page
    assert "1 of 1200 completions are masked" in page
    assert "Training seeds, differences to greedy" in page
    assert page.count("<mark>better</mark>") == 3, "in both tasks and over them"


def looked_at(outcome: str, low: float, high: float) -> Record:
    """A task whose policy has a difference that excludes zero for a fixed number of prompts."""
    made = {**record(), "tasks": {"sums": record()["tasks"]["sums"]}}
    sums = made["tasks"]["sums"]
    sums["stop_early"] = 20
    decision = {"outcome": outcome, "low": low, "high": high, "prompts": 60, "decided_at": None}
    sums["arms"]["rl"]["sequential"] = decision | ({} if outcome == "undecided" else {"decided_at": 40})
    return made


def test_what_was_looked_at_while_it_ran_is_claimed_by_its_confidence_sequence_only(tmp_path: Path):
    made = looked_at("undecided", -0.1, 0.6)
    assert made["tasks"]["sums"]["arms"]["rl"]["difference"]["low"] > 0
    assert claims(made["tasks"]["sums"]) == [
        "Undecided: no difference between rl and greedy can be claimed: confidence sequence of the difference "
        "[-0.100, +0.600] after 60 prompts, 90 %."
    ]
    page = write_evaluation_page(made, tmp_path / "page.html").read_text()
    assert "<mark>" not in page
    assert "This task was looked at while it ran" in page
    assert "describes only" in page, "static rules were not asked about"
    decided = looked_at("better", 0.1, 0.6)
    assert claims(decided["tasks"]["sums"]) == [
        "rl is better than greedy: confidence sequence of the difference [+0.100, +0.600] after 60 prompts, 90 %, "
        "known after 40."
    ]
    assert write_evaluation_page(decided, tmp_path / "page.html").read_text().count("<mark>better</mark>") == 1


def test_merging_keeps_that_a_task_was_looked_at():
    fixed = {**record(2), "tasks": {"sums": record(2)["tasks"]["sums"]}}
    merged = merge_records({"a": fixed, "b": looked_at("better", 0.1, 0.6)})["tasks"]["sums"]
    assert merged["stop_early"] == 20
    assert [line.split(":")[0] for line in claims(merged)] == ["rl (b) is better than greedy"]


def test_the_terminal_shows_the_same_whole(capsys: pytest.CaptureFixture[str]):
    made = record()
    print_evaluation(made)
    shown = capsys.readouterr().out
    assert "…" not in shown
    for line in [*claims(made["tasks"]["sums"]), "all tasks", "sums: 60 prompts, 4 completions each"]:
        assert line in shown
    row = next(line for line in shown.splitlines() if line.lstrip().startswith("rl "))
    value = made["tasks"]["sums"]["arms"]["rl"]["metrics"]["accuracy"]
    assert f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" in row
    assert re.search(r"\d +better +", row)


def test_a_page_without_tokens_or_texts_has_no_figures(tmp_path: Path):
    made = record()
    for part in made["tasks"].values():
        part["metrics"] = ["accuracy"]
    page = write_evaluation_page(made, tmp_path / "page.html").read_text()
    assert "<svg" not in page
    with pytest.raises(DataError, match="the record: schema must be 1"):
        write_evaluation_page({}, tmp_path / "none.html")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'asn_rl\[report\]'"):
        write_evaluation_page(record(), tmp_path / "page.html")
