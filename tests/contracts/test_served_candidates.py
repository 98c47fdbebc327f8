"""Candidates of a job from a real engine that serves its rules as policies: SGLang, and vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_servers import MODEL, Running

from asn_rl.config import from_dict
from asn_rl.job import Job, JobConfig, generate, verify
from asn_rl.labelling.records import CANDIDATE, as_candidate, read_records
from asn_rl.types import Candidate

EDT = {"name": "edt", "params": {"temperature": 1.0, "theta": 10.0}}
RULES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"name": "greedy"}],
    "EDT, then greedy": [EDT, {"name": "greedy"}],  # no engine has EDT of its own
    "EDT": [EDT],
}
PROMPTS = ["Name an animal.", "Name a colour.", "What is the capital of France?"]


def candidates(folder: Path, **servers: Any) -> dict[tuple[str, str, int], Candidate]:
    """Of a job's training prompts."""
    rows = [{"id": f"p{i}", "prompt": text, "split": "train"} for i, text in enumerate(PROMPTS)]
    rows += [{"id": "s", "prompt": "Name a fruit.", "split": "selection"}]
    folder.mkdir()
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "backend": {"model": MODEL, "dtype": "float32"},
        "data": {"source": "jsonl", "arguments": {"path": str(folder / "prompts.jsonl")}},
        "rewards": [{"function": "length_budget", "arguments": {"budget": 30}}],
        "rollout": {"max_new_tokens": 8, "stop": ["\n"]},
        "heuristics": [{"name": name, "processors": steps} for name, steps in RULES.items()],
        "generate": {"num_generations": 3, "servers": servers or None},
    }
    job = Job(from_dict(JobConfig, config), folder / "run")
    generate(job)
    assert all(part.ok for part in verify(job).values())
    found = [as_candidate(r, where) for where, r in read_records(job.run / "candidates/train", CANDIDATE)]
    return {candidate.key: candidate for candidate in found}


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_rules_that_no_engine_has_are_served(tmp_path: Path, request: pytest.FixtureRequest, engine: str) -> None:
    server: Running = request.getfixturevalue(f"{engine}_server")
    pool = {"urls": [server.url], "concurrency": 16}
    there = candidates(tmp_path / "there", kind=engine, policies=str(server.policies), pool=pool)
    here = candidates(tmp_path / "here")
    assert there.keys() == here.keys()
    for key, candidate in there.items():
        if key[1] != "EDT":
            assert candidate.completion == here[key].completion
        assert "\n" not in candidate.completion
    drawn = {
        prompt: {c.completion for (p, rule, _), c in there.items() if (p, rule) == (prompt, "EDT")}
        for prompt in ("p0", "p1")
    }
    assert drawn["p0"] != drawn["p1"]
