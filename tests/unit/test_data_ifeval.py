from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asn_rl.data import DataConfig, load_prompts
from asn_rl.data.ifeval import ifeval
from asn_rl.data.splits import SPLITS
from asn_rl.errors import DataError

SOURCE = "asn_rl.data.ifeval:ifeval"


def row(key: int, prompt: str = "Do it", **instructions: dict[str, Any]) -> dict[str, Any]:
    names = {"words": "length_constraints:number_words", "sentences": "length_constraints:number_sentences"}
    names |= {"sections": "detectable_format:multiple_sections", "comma": "punctuation:no_comma"}
    names |= {"repeat": "combination:repeat_prompt", "two": "combination:two_responses"}
    names |= {"paragraphs": "length_constraints:number_paragraphs"}
    names |= {"first": "length_constraints:nth_paragraph_first_word"}
    ids = [names[name] for name in instructions]
    return {
        "key": key,
        "prompt": f"{prompt} {key}.",
        "instruction_id_list": ids,
        "kwargs": list(instructions.values()),
    }


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "input_data.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    return str(folder)


def test_rows_become_prompts_of_disjoint_splits(tmp_path: Path) -> None:
    rows = [row(i, words={"num_words": i, "relation": "less than", "keyword": None}) for i in range(20)]
    path = write(tmp_path, rows)
    parts = {split: load_prompts(DataConfig(SOURCE, {"path": path}), split) for split in SPLITS}
    assert [len(part) for part in parts.values()] == [10, 4, 6]
    prompts = {prompt.id: prompt for part in parts.values() for prompt in part}
    assert set(prompts) == {f"ifeval/{i}" for i in range(20)}
    assert prompts["ifeval/7"].content == "Do it 7."
    assert prompts["ifeval/7"].columns == {
        "task": "ifeval",
        "instruction_id_list": ["length_constraints:number_words"],
        "kwargs": [{"num_words": 7, "relation": "less than"}],
    }


def test_seed_decides_the_split(tmp_path: Path) -> None:
    path = write(tmp_path, [row(i, comma={}) for i in range(40)])
    assert ifeval("test", path=path) == ifeval("test", path=path, seed=0) != ifeval("test", path=path, seed=1)


def test_short_prompts_keep_their_split(tmp_path: Path) -> None:
    short = [
        row(0, comma={}),
        row(1, words={"num_words": 60, "relation": "at least"}),
        row(2, words={"num_words": 300, "relation": "less than"}),
        row(3, sentences={"num_sentences": 6, "relation": "at least"}),
        row(4, sections={"section_spliter": "PART", "num_sections": 2}),
    ]
    long = [
        row(10, comma={}, words={"num_words": 61, "relation": "at least"}),
        row(11, sentences={"num_sentences": 7, "relation": "at least"}),
        row(12, sections={"section_spliter": "PART", "num_sections": 3}),
        row(13, repeat={"prompt_to_repeat": "x"}),
        row(14, two={}),
        row(15, paragraphs={"num_paragraphs": 2}),
        row(16, first={"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "so"}),
        row(17, "x" * 500, comma={}),
    ]
    path = write(tmp_path, short + long)
    found: set[str] = set()
    for split in SPLITS:
        chosen = {prompt.id for prompt in ifeval(split, path=path, short=True)}
        assert chosen <= {prompt.id for prompt in ifeval(split, path=path)}
        found |= chosen
    assert found == {f"ifeval/{i}" for i in range(5)}


def test_file_is_found_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "ifeval", [row(i, comma={}) for i in range(10)])
    monkeypatch.setenv("ASN_RL_DATA", str(tmp_path))
    assert ifeval("train") == ifeval("train", path=path) == ifeval("train", path=f"{path}/input_data.jsonl")
    monkeypatch.delenv("ASN_RL_DATA")
    with pytest.raises(DataError, match=r"give data\.arguments \{path: input_data\.jsonl\}, or set the environment"):
        ifeval("train")


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "x", "instruction_id_list": [], "kwargs": []},
        {"key": 1, "prompt": None, "instruction_id_list": [], "kwargs": []},
        {"key": 1, "prompt": "x", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
        {"key": 1, "prompt": "x", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]},
        {"key": 1, "prompt": "x", "answer": "7"},
    ],
)
def test_rows_of_another_kind_are_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = write(tmp_path, [row(0, comma={}), bad])
    with pytest.raises(DataError, match=r"input_data\.jsonl, line 2: a row of IFEval has"):
        ifeval("train", path=path, short=True)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        ifeval("train", path=str(tmp_path / "none.jsonl"))
