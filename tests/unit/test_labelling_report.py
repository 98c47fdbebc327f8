"""The labelling page, on candidates that were really selected."""

from __future__ import annotations

import html
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from asn_rl.analysis.labelling_report import headline, write_labelling_report
from asn_rl.errors import ConfigError
from asn_rl.labelling.grid import Grid
from asn_rl.labelling.labels import Labels, label, read_labels
from asn_rl.labelling.records import ShardWriter, candidate_record, folder_name, write_prompts
from asn_rl.labelling.select import SelectConfig, select
from asn_rl.labelling.store import CandidateStore
from asn_rl.rewards.compose import RewardConfig, unique_names
from asn_rl.types import Candidate, Prompt

GRID = Grid(tuple(f"p{i}" for i in range(20)), ("cold", "hot", "top_p=0.9"), (1, 2, 3, 4))
STRATA = ["counting", "rhyming & <b>"] * 10
LABELLERS = [RewardConfig("numeric_answer"), RewardConfig("length_budget", weight=-0.5, arguments={"budget": 8})]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as the job leaves it: hot is right in one stratum, cold in the other, with one exception."""
    prompts = {
        name: Prompt(name, f"What is {i} + 1? <i>", {"answer": str(i + 1)}) for i, name in enumerate(GRID.prompts)
    }
    write_prompts(tmp_path / "prompts.jsonl", {"selection": [], "train": list(prompts.values())})
    (tmp_path / "command.txt").write_text("asn-rl select --config a.yaml\n")
    with ShardWriter(tmp_path / "candidates" / "train") as shard:
        shard.write([candidate_record(candidate(*cell)) for cell in GRID.keys(np.ones(GRID.shape, bool))])
    store = CandidateStore(GRID, tmp_path / "candidates" / "train")
    label(LABELLERS, store, prompts, tmp_path / "labels" / "train")
    names = unique_names(LABELLERS)
    found = {name: read_labels(tmp_path / "labels" / "train" / folder_name(name), name, store) for name in names}
    weights = dict(zip(names, [1.0, -0.5], strict=True))
    select(store, found, weights, STRATA, SelectConfig(shrinkage=2), tmp_path / "selected")
    return tmp_path


def candidate(prompt: str, heuristic: str, seed: int) -> Candidate:
    i = int(prompt[1:])
    right = {"cold": i % 2 == 0, "hot": i % 2 == 1 and (i, seed) != (5, 1), "top_p=0.9": seed == 1}[heuristic]
    text = f"<script>alert({seed})</script> so {i + 1 if right else i + 7}"
    return Candidate(prompt, heuristic, seed, text, list(range(seed + 4)), seed < 4)


class Checker(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_is_one_file_that_says_the_result_first(run: Path):
    page = write_labelling_report(run).read_text()
    checker = Checker()
    checker.feed(page)
    assert "script" not in checker.tags
    assert all(address.startswith(("#", "data:")) for address in checker.addresses), "nothing is loaded from elsewhere"
    assert checker.tags.count("svg") == 3
    first = re.search(r"<p><strong>(.*?)</strong>", page)
    assert first is not None
    assert first[1].startswith("Choosing the heuristic for each prompt gains +")
    assert page.index("<strong>") < page.index("<svg") < page.index("<table")


def test_the_page_holds_what_was_measured(run: Path):
    page = write_labelling_report(run).read_text()
    for text in ("numeric_answer", "length_budget", "top_p=0.9", "rhyming & <b>", "What is 0 + 1? <i>", "<script>"):
        assert html.escape(text) in page
    assert "<script>" not in page
    assert "60 candidates were cut off by the token limit" in page
    assert "asn-rl select --config a.yaml" in page
    assert page.count("<mark>") >= 2, "the winner of each stratum is marked"
    assert "Of one prompt, on 20 prompts. Self-BLEU" in page
    assert "<th>self bleu</th><th>distinct 1</th>" in page
    assert "Vendi" not in page, "no encoder was asked for"
    rows = re.findall(r"<tr><td>(cold|hot|top_p=0.9)</td><td>(\d+)</td>", page)
    assert sorted(rows) == [("cold", "10"), ("hot", "10"), ("top_p=0.9", "0")]


def test_failed_and_masked_scores_are_shown(run: Path, tmp_path: Path):
    place = run / "labels" / "train" / "length_budget"
    (place / "counts.json").write_text('{"length_budget/masked": 3, "length_budget/timeout": 2}')
    assert "<td>2 timeout</td>" in write_labelling_report(run).read_text()
    asked = '{"length_budget/answers": 50, "length_budget/neither": 10, "length_budget/first_preferred": 30}'
    (place / "counts.json").write_text(asked)
    page = write_labelling_report(run).read_text()
    assert "length_budget took the first of two answers in 75% of 40 valid answers (50 %: no position bias)" in page
    store = CandidateStore(GRID, run / "candidates" / "train")
    scores = np.random.default_rng(0).normal(size=GRID.shape)
    scores[:5, 1] = math.nan
    found = {"numeric_answer": Labels(scores, np.ones(GRID.shape, bool), scores, stderr=0.25)}
    select(store, found, {"numeric_answer": 1.0}, STRATA, SelectConfig(), run / "selected")
    page = write_labelling_report(run).read_text()
    assert "<tr><td>hot</td><td>20</td></tr>" in page
    assert "<td>±0.25</td>" in page
    assert "20 candidates have no label at all" in page


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.1, 0.05, 0.2), "gains +0.100 [+0.050, +0.200] over the best single heuristic; hot is rated best"),
        ((-0.1, -0.2, -0.05), "loses -0.100"),
        ((0.1, -0.05, 0.2), "No gain from choosing the heuristic for each prompt can be claimed: +0.100"),
        (None, "cannot be said with these scores; hot is rated best on the most prompts (75% of 4)."),
    ],
)
def test_a_gain_is_claimed_only_when_the_interval_says_so(interval: tuple[float, float, float] | None, words: str):
    found = interval and dict(zip(("mean", "low", "high"), interval, strict=True))
    summary = {
        "heuristics": {"cold": {"wins": 1}, "hot": {"wins": 3}},
        "prompts": {"all": 4},
        "gain": {"by_prompt": {"cross_fitted": found}},
    }
    assert words in headline(summary)


def test_a_run_without_selection_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="run `asn-rl select` first"):
        write_labelling_report(tmp_path)


def test_without_matplotlib_the_error_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'asn_rl\[report\]'"):
        write_labelling_report(run)
