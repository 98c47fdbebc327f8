"""The training scripts, one after the other, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_script import ROOT, script

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("[!_]*.py"))
PROMPTS = [f"What is {a} + {b}?" for a in range(1, 5) for b in range(1, 6)]


def test_supervised_then_rl_then_evaluation(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "answer": str(sum(map(int, prompt[8:-1].split(" + "))))} for prompt in PROMPTS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--source", "jsonl", "--path", "questions.jsonl", "--max-new-tokens", "6")
    rule = ("--pipeline", "temperature: {temperature: 0.7}", "min_p: {min_p: 0.1}")
    done = script("train_supervised.py", *data, *rule, "--num-generations", "2", "--epochs", "2", "--output", "warm",
                  cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nats a token" in done.stdout
    done = script("train_rl.py", *data, "--init", "warm", "--reward", "numeric_answer", "--run", "rl", "--steps", "1",
                  cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2
    assert "a draw needs 24 prompts" in done.stderr
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row | {"prompt": f"{i}. {row['prompt']}"}) + "\n"
                                                      for i in range(3) for row in rows))  # fmt: skip
    done = script("train_rl.py", *data, "--init", "warm", "--reward", "numeric_answer", "--run", "rl", "--steps", "1",
                  cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = script("evaluate.py", *data, "--policy", "warm", "rl/policy", "--reward", "numeric_answer",
                  "--num-generations", "1", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "difference" in line]
    assert [line.split()[0] for line in lines] == ["greedy", "T=1", "warm", "rl/policy"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_shows_an_example(name: str) -> None:
    text = (ROOT / "scripts" / name).read_text()
    assert f"python scripts/{name}" in text
