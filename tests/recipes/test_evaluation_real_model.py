"""`asn-rl eval` on the embedded model: raw and chat benchmarks, every verifier for real."""

from __future__ import annotations

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
    assert {f"score:{level}_acc" for level in ("inst_level_strict", "prompt_level_loose")} <= set(chat["metrics"])
    assert chat["arms"]["greedy"]["metrics"]["tokens"]["mean"] == 10
    assert "ifeval" in write_evaluation_page(record, tmp_path / "page.html").read_text()
