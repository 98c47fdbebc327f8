from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from asn_rl.data import DataConfig, load_prompts
from asn_rl.data.benchmark import Benchmark, benchmark_names, benchmark_prompts, gold_rows, load_benchmark
from asn_rl.data.benchmark_format import as_text, render
from asn_rl.data.ifeval import ifeval
from asn_rl.data.splits import SPLITS
from asn_rl.errors import ConfigError, DataError, InvalidValue, UnknownName
from asn_rl.evaluation.metrics import METRICS
from asn_rl.latex import last_boxed
from asn_rl.rewards import REWARDS
from asn_rl.rewards.contract import load_function
from asn_rl.types import Prompt

USER_FILE = """
schema: asn_rl.benchmark/1
name: sums
version: 1
title: Sums
paper: none
licence: CC0
files:
  test: {path: sums/test.csv, rows: 30}
prompt:
  form: raw
  text: "{{a}} + {{b}} ="
  target: " {{sum}}"
  few_shot: {examples: [{a: 0, b: 1, sum: 1}, {a: 1, b: 1, sum: 2}]}
columns:
  - {name: answer, field: sum}
verifiers:
  - {name: numeric_answer, function: numeric_answer}
max_new_tokens: 8
stop: ["\\n"]
gold: "{{answer}}"
"""
ROWS = [{"a": str(i), "b": "7", "sum": str(i + 7)} for i in range(30)]


def write(folder: Path, suffix: str, rows: list[dict[str, Any]] = ROWS, name: str = "test") -> Path:
    file = folder / "sums" / f"{name}{suffix}"
    file.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["a", "b", "sum"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        data = json.dumps(rows) if ".json" in suffix and ".jsonl" not in suffix else lines
        file.write_bytes(gzip.compress(data.encode()) if suffix.endswith(".gz") else data.encode())
    return file


def user_file(folder: Path, without: tuple[str, ...] = (), **changes: Any) -> Path:
    values = {key: value for key, value in (yaml.safe_load(USER_FILE) | changes).items() if key not in without}
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def sums(folder: Path, **changes: Any) -> Benchmark:
    return load_benchmark(user_file(folder, **changes))


def splits(benchmark: Benchmark, path: Path | None) -> dict[str, list[Prompt]]:
    return {split: benchmark_prompts(benchmark, split, path) for split in SPLITS}


def test_a_user_adds_one_with_a_file_of_20_lines(tmp_path: Path) -> None:
    assert len(USER_FILE.strip().splitlines()) <= 20
    write(tmp_path, ".csv")
    parts = splits(sums(tmp_path), tmp_path)
    assert [len(part) for part in parts.values()] == [15, 6, 9]
    ids = [prompt.id for part in parts.values() for prompt in part]
    assert sorted(ids) == sorted(f"sums/test/{i}" for i in range(30))
    (prompt,) = [prompt for part in parts.values() for prompt in part if prompt.id == "sums/test/5"]
    assert prompt == Prompt("sums/test/5", "0 + 1 = 1\n\n1 + 1 = 2\n\n5 + 7 =", {"answer": "12"})
    config = DataConfig("benchmark", {"name": str(tmp_path / "sums.yaml"), "path": str(tmp_path)}, limit=3)
    assert load_prompts(config, "test") == benchmark_prompts(sums(tmp_path), "test", tmp_path, 3) == parts["test"][::3]
    with pytest.raises(ConfigError, match="nam"):
        load_prompts(DataConfig("benchmark", {"nam": "gsm8k"}), "test")


def test_all_formats_hold_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASN_RL_DATA", str(tmp_path))
    found = []
    for suffix in (".csv", ".jsonl", ".json", ".jsonl.gz", ".csv.gz"):
        if suffix == ".csv.gz":
            (tmp_path / "sums/test.csv.gz").write_bytes(gzip.compress((tmp_path / "sums/test.csv").read_bytes()))
        else:
            write(tmp_path, suffix)
        found.append(splits(sums(tmp_path, files={"test": {"path": f"sums/test{suffix}"}}), None))
    for i, row in enumerate(ROWS):
        (tmp_path / f"sums/{i:02}.json").write_text(json.dumps(row))
    (tmp_path / "sums/test.json").unlink()
    found.append(splits(sums(tmp_path, files={"test": {"path": "sums/*.json"}}), None))
    assert all(parts == found[0] for parts in found)


def test_a_train_file_gives_selection_too(tmp_path: Path) -> None:
    """Rows of the train file that repeat a test question, or are shown as examples, are left out."""
    write(tmp_path, ".jsonl")
    more = [{"a": str(i), "b": "8", "sum": str(i + 8)} for i in range(70)]
    write(tmp_path, ".jsonl", [*more, ROWS[3]], "train")
    files = {part: {"path": f"sums/{part}.jsonl"} for part in ("train", "test")}
    shown = {"form": "chat", "text": "{{a}}+{{b}}?", "target": " {{sum}}", "system": "Add."}
    benchmark = sums(tmp_path, files=files, prompt={**shown, "few_shot": {"part": "train", "rows": [2, 0]}})
    parts = splits(benchmark, tmp_path)
    assert [prompt.id for prompt in parts["test"]] == [f"sums/test/{i}" for i in range(30)]
    ids = {split: {prompt.id for prompt in part} for split, part in parts.items()}
    assert ids["train"] | ids["selection"] == {f"sums/train/{i}" for i in range(70)} - {"sums/train/0", "sums/train/2"}
    assert not ids["train"] & ids["selection"]
    assert 17 <= len(ids["selection"]) <= 20  # 2 in 7 of 71
    assert parts["test"][4].content == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "2+8?"},
        {"role": "assistant", "content": "10"},
        {"role": "user", "content": "0+8?"},
        {"role": "assistant", "content": "8"},
        {"role": "user", "content": "4+7?"},
    ]
    everything = gold_rows(benchmark, tmp_path)
    assert len(everything) == 101
    assert everything[0][1] == {"a": "0", "b": "8", "sum": "8", "answer": "8"}
    with pytest.raises(InvalidValue, match=r"few_shot.rows must be in \[0, 70\]"):
        benchmark_prompts(
            sums(tmp_path, files=files, prompt={**shown, "few_shot": {"part": "train", "rows": [71]}}), "test", tmp_path
        )


def test_parts_of_one_file_by_number(tmp_path: Path) -> None:
    write(tmp_path, ".jsonl", [{**row, "n": i} for i, row in enumerate(ROWS)])
    bounds = {"few_shot": (0, 1), "test": (2, 9), "selection": (10, 14), "train": (15, 29)}
    files = {
        part: {"path": "sums/test.jsonl", "where": {"field": "n", "least": low, "most": high}, "rows": high - low + 1}
        for part, (low, high) in bounds.items()
    }
    format = {"form": "raw", "text": "{{a}}+{{b}}=", "target": "{{sum}}", "few_shot": {"part": "few_shot", "rows": [1]}}
    parts = splits(sums(tmp_path, files=files, prompt=format, id_field="n"), tmp_path)
    assert [len(part) for part in parts.values()] == [15, 5, 8]
    assert parts["test"][0].id == "sums/test/2"
    assert parts["test"][0].content == "1+7=8\n\n2+7="


def test_examples_never_come_from_the_test_split(tmp_path: Path) -> None:
    write(tmp_path, ".csv")
    for part in ("test", "selection"):
        with pytest.raises(ConfigError, match="part must be"):
            sums(tmp_path, prompt={"text": "{{a}}", "target": "{{sum}}", "few_shot": {"part": part, "rows": [0]}})
    with pytest.raises(ConfigError, match="takes examples from its train part, for which it has no file"):
        sums(tmp_path, prompt={"text": "{{a}}", "target": "{{sum}}", "few_shot": {"part": "train", "rows": [0]}})
    in_test = benchmark_prompts(sums(tmp_path), "test", tmp_path)[0].id.rpartition("/")[2]
    example = {"a": f" {in_test}", "b": 7, "sum": 0}  # spaces do not hide it
    format = {"form": "raw", "text": "{{a}} + {{b}} =", "target": " {{sum}}", "few_shot": {"examples": [example]}}
    for split in SPLITS:
        with pytest.raises(DataError, match=r"shows an example that the test split asks \(.*line"):
            benchmark_prompts(sums(tmp_path, prompt=format), split, tmp_path)


def test_one_file_is_divided_as_the_source_ifeval_divides_it(tmp_path: Path) -> None:
    rows = [
        {"key": i, "prompt": f"Do {i}.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for i in range(41)
    ]
    (tmp_path / "ifeval").mkdir()
    (tmp_path / "ifeval/input_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in SPLITS:
        ours = benchmark_prompts(load_benchmark("ifeval"), split, tmp_path, verify_checksums=False)
        theirs = ifeval(split, path=str(tmp_path / "ifeval"))
        assert {prompt.last_turn for prompt in ours} == {prompt.last_turn for prompt in theirs}


def test_checksums(tmp_path: Path) -> None:
    data = write(tmp_path, ".csv").read_bytes()
    good = hashlib.sha256(data).hexdigest()
    assert benchmark_prompts(
        sums(tmp_path, files={"test": {"path": "sums/test.csv", "sha256": good.upper()}}), "test", tmp_path
    )
    other = sums(tmp_path, files={"test": {"path": "sums/test.csv", "sha256": "0" * 64}})
    with pytest.raises(DataError, match=f"sha256 {good}, expected {'0' * 64}"):
        benchmark_prompts(other, "test", tmp_path)
    assert len(benchmark_prompts(other, "test", tmp_path, verify_checksums=False)) == 9
    fewer = sums(tmp_path, files={"test": {"path": "sums/test.csv", "rows": 31}})
    with pytest.raises(DataError, match="its test part must have 31 rows, it has 30"):
        benchmark_prompts(fewer, "test", tmp_path)


def test_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASN_RL_DATA", raising=False)
    with pytest.raises(DataError, match=r"needs the file sums/test.csv: give the folder .* or set .* ASN_RL_DATA"):
        benchmark_prompts(sums(tmp_path), "test")
    with pytest.raises(DataError, match=f"needs the file sums/test.csv, and {tmp_path} does not hold it"):
        benchmark_prompts(sums(tmp_path), "test", tmp_path)
    with pytest.raises(DataError, match="does not hold it"):
        benchmark_prompts(load_benchmark("math"), "test", tmp_path)
    write(tmp_path, ".csv")
    nothing_to_train_on = sums(tmp_path, shares={"train": 0})
    with pytest.raises(DataError, match="the 'train' split of benchmark 'sums' holds no prompts"):
        benchmark_prompts(nothing_to_train_on, "train", tmp_path)
    with pytest.raises(UnknownName, match=r"unknown split 'tests'.*'test'"):
        benchmark_prompts(sums(tmp_path), "tests", tmp_path)


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".jsonl", '{"a": 1, "b": 2, "sum": 3}\n{"a": 1,\n', r"test.jsonl, line 2 is not JSON"),
        (".jsonl", "[1]\n", r"line 1 must be a JSON object, got \[1\]"),
        (".jsonl", '{"a": 1, "b": 2}', r"line 1: no field 'sum' in this row; it has a, b"),
        (".jsonl", '{"a": 1, "b": {}, "sum": 3}', r"line 1: a template shows text, numbers and lists of them, got {}"),
        (".jsonl", r'{"a": "\udc80", "b": 2, "sum": 3}', r"line 1 holds half of a surrogate pair.*\\udc80"),
        (".json", r'[{"a": "\ud83d\ude00"}, {"a": "\ud83d"}]', "entry 1 holds half of a surrogate pair"),
        (".json", '{"a": 1}', "must hold a list of objects, got dict"),
        (".json", "[1]", "entry 0 must be an object, got 1"),
        (".csv", "a,b,sum\n1,2\n", "line 2 must have 3 fields"),
        (".csv", 'a,b,sum\n1,2,"3\n', "is not CSV"),
        (".jsonl.gz", "no gzip", "cannot read .*test.jsonl.gz"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, suffix: str, text: str, message: str) -> None:
    (tmp_path / "sums").mkdir()
    (tmp_path / f"sums/test{suffix}").write_text(text)
    benchmark = sums(tmp_path, files={"test": {"path": f"sums/test{suffix}"}}, shares={"train": 0, "selection": 0})
    with pytest.raises(DataError, match=message):
        benchmark_prompts(benchmark, "test", tmp_path)


def test_ids_are_unique_and_text_is_utf_8(tmp_path: Path) -> None:
    write(tmp_path, ".csv")
    with pytest.raises(DataError, match=r"the id '7' is that of .*line 2, too"):
        benchmark_prompts(sums(tmp_path, id_field="b"), "test", tmp_path)
    with pytest.raises(DataError, match="the id 'k' must be text or a whole number, got None"):
        benchmark_prompts(sums(tmp_path, id_field="k"), "test", tmp_path)
    (tmp_path / "sums/test.csv").write_bytes(b"a,b,sum\n\xff,2,3\n")
    with pytest.raises(DataError, match=r"cannot read .*'utf-8' codec"):
        benchmark_prompts(sums(tmp_path), "test", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": ["accuracy"]}, "unknown key 'metric'; did you mean 'metrics'"),
        ({"prompt": {"text": "{{a}}", "targt": "x"}}, "unknown key 'targt' in 'prompt'; did you mean 'target'"),
        ({"schema": "asn_rl.benchmark/2"}, "'schema' must be 'asn_rl.benchmark/1', got 'asn_rl.benchmark/2'"),
        ({"prompt": {"text": "a"}}, "template with at least one"),
        ({"prompt": {"text": "{{a}}", "few_shot": {"examples": [{"a": 1}]}}}, "target"),
        ({"files": {"train": {"path": "a.csv"}}}, "needs a test part"),
        ({"files": {"test": {"path": "a.parquet"}}}, r"path must be a file that ends in .jsonl, .json, .csv"),
        ({"source": {"function": "arithmetic"}}, "needs `files` or a `source`, and not both"),
        ({"columns": [{"name": "answer"}]}, "field must be given for column 'answer'"),
        ({"columns": [{"name": "answer", "field": "a", "pattern": "a"}]}, "regular expression with one group"),
        ({"columns": [{"name": "answer", "field": "a", "pattern": "("}]}, "regular expression with one group"),
        ({"columns": [{"name": "x", "field": "a"}, {"name": "x", "field": "b"}]}, "column names must be different"),
        ({"stop": [""]}, "stop must be texts of at least one character"),
        ({"shares": {"test": -1}}, "test must be >= 0"),
        ({"max_new_tokens": 0}, "must be >= 1"),
        ({"version": "one"}, "version must be a value of type int"),
        ({"extends": "gsm8k_chat"}, "must name a benchmark that extends no other, got 'gsm8k_chat'"),
    ],
)
def test_bad_yaml(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        sums(tmp_path, **changes)
    assert "sums.yaml" in str(caught.value)


def test_unreadable_yaml(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"unknown benchmark 'gsm8'. Did you mean 'gsm8k'\?.*YAML file"):
        load_benchmark("gsm8")
    with pytest.raises(ConfigError, match="cannot read the benchmark"):
        load_benchmark(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match="must hold a mapping of keys, got list"):
        load_benchmark(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="missing"):
        load_benchmark(user_file(tmp_path, without=("licence",)))


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets.load_dataset` reads a local folder as it reads one of the hub's."""
    import datasets
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ASN_RL_DATA", raising=False)
    datasets.disable_progress_bars()
    write(tmp_path, ".jsonl")
    files = {"test": {"path": "sums/test.jsonl", "rows": 30, "sha256": "0" * 64}}
    here = sums(tmp_path, files={"test": {"path": "sums/test.jsonl"}})
    hub = sums(tmp_path, files=files, hub={"dataset": str(tmp_path / "sums")})
    assert splits(hub, None) == splits(here, tmp_path)
    with pytest.raises(DataError, match="sha256"):  # a local file goes first, and is checked
        benchmark_prompts(hub, "test", tmp_path)
    offline = sums(tmp_path, files=files, hub={"dataset": "nobody/nothing-here"})
    with pytest.raises(
        DataError, match=r"cannot read the split 'test' of nobody/nothing-here from the hub \(.*ASN_RL_D"
    ):
        benchmark_prompts(offline, "test")


def test_the_hubs_rows_are_of_one_revision_and_variants_share_theirs() -> None:
    shipped = {name: load_benchmark(name) for name in benchmark_names()}
    pinned = {name: b.hub.revision for name, b in shipped.items() if b.hub}
    assert len(pinned) >= 9
    assert all(re.fullmatch("[0-9a-f]{40}", str(revision)) for revision in pinned.values())
    families = {name: b.family for name, b in shipped.items() if b.family}
    assert families == {"gsm8k_chat": "gsm8k", "math_four_shot": "math", "mbpp_sanitized": "mbpp"}


def test_procedural_splits_and_refused_families(tmp_path: Path) -> None:
    parts = splits(load_benchmark("rg_gcd"), None)
    shown = {str(prompt.content).rpartition("\n\n")[0] for part in parts.values() for prompt in part}
    assert len(shown) == 1  # the same four examples everywhere
    questions = [str(prompt.content).rpartition("\n\n")[2] for part in parts.values() for prompt in part]
    assert len(set(questions)) == len(questions)
    assert not any(question in shown.copy().pop() for question in questions)
    source = {"function": "reasoning_gym", "arguments": {"family": "basic_arithmetic"}}
    refused = user_file(tmp_path, without=("files",), source=source, prompt={"text": "{{question}}"})
    with pytest.raises(
        InvalidValue, match=r"verified answers, got 'basic_arithmetic'; wrong answers wherever '/' occurs"
    ):
        benchmark_prompts(load_benchmark(refused), "test")


@pytest.mark.parametrize("name", benchmark_names())
def test_shipped_files(name: str) -> None:
    benchmark = load_benchmark(name)
    assert benchmark.name == name
    assert set(benchmark.metrics) <= set(METRICS)
    for verifier in benchmark.verifiers:
        load_function(REWARDS.path(verifier.function), verifier.arguments)


def test_templates() -> None:
    fields = {"a": 51.0, "b": ["x", "y"], "c": {"d": "{{a}}"}, "e": "1\r\n2"}
    assert render("{{a}} {{b}} {{b.1}} {{c.d}} {{e}} \\boxed{} {{{a}}} {{ a }}", fields, "here") == (
        "51 x\ny y {{a}} 1\n2 \\boxed{} {51} {{ a }}"
    )
    for template in ("{{f}}", "{{b.2}}", "{{a.b}}", "{{c.__class__}}"):
        with pytest.raises(DataError, match="here: no field"):
            render(template, fields, "here")
    with pytest.raises(DataError, match="got True"):
        as_text(True, "here")
    assert last_boxed("\\boxed{1} so \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert last_boxed("none") is last_boxed("\\boxed{\\frac{1}{2}") is None


ROWS_OF = {
    "gsm8k": (5335, 2133, 1319), "svamp": (500, 200, 300), "math500": (0, 100, 400), "ifeval": (270, 109, 162),
    "ifbench": (0, 60, 240), "humaneval": (0, 33, 131), "mbpp": (374, 90, 500), "mbpp_sanitized": (120, 43, 257),
    "cruxeval": (0, 160, 640), "mt_bench": (0, 16, 64), "novelty_bench": (50, 20, 30),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS_OF)
def test_real_files(benchmark_data: Path, name: str) -> None:
    benchmark = load_benchmark(name)
    given = [split for split, count in zip(SPLITS, ROWS_OF[name], strict=True) if count]
    parts = {split: benchmark_prompts(benchmark, split, benchmark_data) for split in given}
    if name == "gsm8k":  # five rows of the train part are shown
        assert sum(map(len, parts.values())) == 7473 - 5 + 1319
    else:
        assert [len(part) for part in parts.values()] == [count for count in ROWS_OF[name] if count]
    prompts = [prompt for part in parts.values() for prompt in part]
    assert len({prompt.id for prompt in prompts}) == len({str(prompt.content) for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_chat", "svamp", "cruxeval", "rg_letter_counting"])
def test_gold_answers_are_accepted(benchmark_data: Path, name: str) -> None:
    benchmark = load_benchmark(name)
    rows = gold_rows(benchmark, benchmark_data)
    golds = [render(benchmark.gold or "", fields, prompt.id) for prompt, fields in rows]
    columns = {"answer": [fields["answer"] for _, fields in rows]}
    for verifier in benchmark.verifiers:
        function = REWARDS.resolve(verifier.function)
        scores = function([""] * len(rows), golds, **verifier.arguments, **columns)
        assert scores == [1.0] * len(rows)
        others = golds[1:] + golds[:1]
        wrong = [rows[i][1]["answer"] != rows[(i + 1) % len(rows)][1]["answer"] for i in range(len(rows))]
        scores = function([""] * len(rows), others, **verifier.arguments, **columns)
        assert [score for score, is_wrong in zip(scores, wrong, strict=True) if is_wrong] == [0.0] * sum(wrong)


def test_few_shot_of_gsm8k(benchmark_data: Path) -> None:
    """The form of lm-eval's task `gsm8k`, with the first five rows of the train part."""
    train = [json.loads(line) for line in (benchmark_data / "gsm8k/train.jsonl").read_text().splitlines()[:5]]
    test = json.loads((benchmark_data / "gsm8k/test.jsonl").read_text().splitlines()[0])
    shown = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in train)
    prompt = benchmark_prompts(load_benchmark("gsm8k"), "test", benchmark_data, 1)[0]
    assert prompt == Prompt("gsm8k/test/0", f"{shown}Question: {test['question']}\nAnswer:", {"answer": "18"})
