"""What environments are made from: names, dicts, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asn_envs.sources import as_backend, as_prompts, as_reward, find_prompt
from asn_rl.backends import BackendConfig
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import ConfigError, DataError, InvalidValue, RewardError, UnknownName
from asn_rl.types import Prompt

ROWS = [{"id": "a", "prompt": "w1", "answer": "7"}, {"id": "b", "prompt": [{"role": "user", "content": "w2"}]}]


def test_a_backend_has_many_spellings(toy: ToyBackend):
    config = BackendConfig(kind="toy", model="random:32:0")
    spelt = [as_backend(s) for s in ("toy:random:32:0", {"kind": "toy", "model": "random:32:0"}, config)]
    assert {backend.fingerprint for backend in spelt} == {toy.fingerprint}
    assert spelt[0] is spelt[1] is spelt[2]
    assert as_backend(toy) is toy


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "toy", "modle": "x"}, "did you mean 'model'"),
        ({"kind": "tyo"}, "Did you mean 'toy'"),
        ("toy:nonsense", "random:VOCAB:SEED"),
        (3, "a dict of its fields"),
    ],
)
def test_a_backend_that_cannot_be_made(source: Any, message: str):
    with pytest.raises((ConfigError, UnknownName, InvalidValue), match=message):
        as_backend(source)


def test_prompts_from_rows_and_from_a_file_are_the_same(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    # A line separator inside a string is no end of line.
    rows = [*ROWS, {"id": "c", "prompt": "one\u2028two"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert as_prompts(path) == as_prompts(str(path)) == as_prompts(rows)
    assert as_prompts(ROWS)[0] == Prompt("a", "w1", {"answer": "7"})
    assert as_prompts(as_prompts(ROWS)) == as_prompts(ROWS)
    assert as_prompts([{"prompt": "w1"}])[0].id == "row-1"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the prompt list is empty"),
        ([{"id": "a"}], "prompt 1: 'prompt' must be text"),
        ([ROWS[0], ROWS[0]], "'a' occurs twice"),
        ([{"id": "a", "prompt": "w1", "completions": 3}], "a column 'completions'"),
        ("no/such/file.jsonl", "cannot read no/such/file.jsonl"),
    ],
)
def test_prompts_that_cannot_be_used(source: Any, message: str):
    with pytest.raises(DataError, match=message):
        as_prompts(source)


def test_a_malformed_line_is_named(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a", "prompt": "w1"}\n{"id": \n')
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 2"):
        as_prompts(path)


def test_an_unknown_prompt_id_suggests_the_closest():
    with pytest.raises(UnknownName, match=r"Did you mean 'train/12'.*200 prompts in all"):
        find_prompt({f"train/{i}": i for i in range(200)}, "trian/12")


def test_rewards_by_name_and_path():
    by_name, by_path = as_reward("numeric_answer"), as_reward("asn_rl.rewards.numeric:numeric_answer")
    assert by_name is by_path
    with pytest.raises(UnknownName, match="Did you mean 'numeric_answer'"):
        as_reward("numeric_anser")
    with pytest.raises(RewardError, match=r"\*\*columns"):
        as_reward(lambda prompts, completions: [0.0])  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="reward must be a function"):
        as_reward(3)  # type: ignore[arg-type]
