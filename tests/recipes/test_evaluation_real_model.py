"""`asn-rl eval` on the embedded model: raw and chat benchmarks, every verifier for real."""

from __future__ import annotations

import json
from pathlib import Path

from asn_rl.analysis.evaluation_page import write_evaluation_page
from asn_rl.config import load_config
from asn_rl.job import Job, JobConfig, evaluate

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "evaluate.yaml"
RULES = 'heuristics=[{"name": "greedy", "processors": [{"name": "greedy"}]}, {"name": "base"}]'


def test_a_raw_benchmark_stops_at_its_stop_string_and_a_chat_benchmark_is_chat(
    tmp_path: Path, benchmark_data: Path
) -> None:
    settings = [
        RULES, "evaluate.tasks=[rg_gcd, ifeval]", "evaluate.limit=2", "evaluate.num_generations=2", "threads=1",
        "evaluate.max_new_tokens=10", "evaluate.resamples=100", f"evaluate.data={benchmark_data}",
    ]  # fmt: skip
    job = Job(load_config(JobConfig, CONFIG, settings), tmp_path / "run")
    record = evaluate(job)
    assert record["left_out"] == {}
    raw, chat = record["tasks"]["rg_gcd"], record["tasks"]["ifeval"]
    assert raw["arms"]["greedy"]["metrics"]["truncated"]["mean"] == 0  # four examples end with a new line, so does it
    names = [f"{level}_level_{mode}_acc" for level in ("prompt", "inst") for mode in ("strict", "loose")]
    assert {f"score:{name}" for name in names} <= set(chat["metrics"])
    assert chat["arms"]["greedy"]["metrics"]["tokens"]["mean"] == 10
    page = write_evaluation_page(record, tmp_path / "page.html").read_text()
    assert all(f"<th>{name}</th>" in page for name in ["accuracy", *names])


def test_a_judge_compares_two_turns_of_a_conversation(tmp_path: Path, benchmark_data: Path) -> None:
    """The embedded model judges itself: the mechanics, on real text."""
    settings = [
        RULES, "evaluate.tasks=[mt_bench]", "evaluate.limit=2", "evaluate.num_generations=2", "threads=1",
        "evaluate.max_new_tokens=6", "evaluate.resamples=100", f"evaluate.data={benchmark_data}",
        "evaluate.judge={function: judge_win, arguments: {dtype: float32, minimum_share: 0}}",
    ]  # fmt: skip
    job = Job(load_config(JobConfig, CONFIG, settings), tmp_path / "run")
    record = evaluate(job)
    assert list(record["tasks"]) == ["mt_bench", "mt_bench turn 2"]
    for task in record["tasks"].values():
        assert task["primary"] == "win_rate"
        assert {0.0, 0.25, 0.5, 0.75, 1.0} >= {value for arm in task["arms"].values() for value in arm["values"]}
        assert any("the judge took the first of two answers" in note for note in task["notes"])
    shard = job.run / "evaluation" / "mt_bench turn 2" / "test" / "candidates" / "shard-00000.jsonl"
    for line in shard.read_text().splitlines():
        assert [turn["role"] for turn in json.loads(line)["history"]] == ["user", "assistant", "user"]
