from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asn_rl.errors import InvalidValue, RewardError
from asn_rl.rewards import REWARDS, _sandbox_process
from asn_rl.rewards.code import code_tests, program_text
from asn_rl.rewards.sandbox import sandbox_report

SQUARE = "def square(x):\n"
TESTS = "assert square(3) == 9\nassert square(-2) == 4\n"


@pytest.fixture(scope="module", autouse=True)
def known_gaps() -> None:
    """A warning tells of them once, where there are any; `test_what_is_left_open_is_said` looks at them."""
    with warnings.catch_warnings(action="ignore"):
        sandbox_report()


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("    return 1\n", "    return 1\n"),
        ("    return 1\ndef g():", "    return 1"),
        ("    return 1\n\nprint(f())\ndef g():", "    return 1\n"),
        ("Sure:\n```python\nx = 1\n```\nand\n```python\nx = 2\n```", "x = 1\n"),
        ("```Python3\nx = 1\n\ndef g(): pass\n```", "x = 1\n\ndef g(): pass\n"),
        ("```py title=a\nx = '```'\n  ```", "x = '```'\n"),
        ("```python\nx = 1", "x = 1"),
        ("    return 1\n```\n\nOutput:\n```\n1\n```", "    return 1\n```\n\nOutput:\n```\n1\n```"),
        ("```pyramid\nx\n```", "```pyramid\nx\n```"),
        ("", ""),
    ],
)
def test_program_text(text: str, program: str) -> None:
    assert program_text(text, ["\ndef", "\nprint"]) == program


@given(st.text(), st.text())
def test_fenced_text_is_found_again(before: str, code: str) -> None:
    before, code = before.replace("`", "'"), code.replace("`", "'")
    assert program_text(f"{before}\n```python\n{code}\n```\nafter", ["a"]) == f"{code}\n"


def test_scores_by_row() -> None:
    rows: list[tuple[Any, str | None, str | None, bool, float | None]] = [
        ("    return x * x\n", SQUARE, TESTS, True, 1.0),
        ("    return x * x\nsquare(", SQUARE, TESTS, True, 0.0),
        ("    return x + x\n", SQUARE, TESTS, True, 0.0),
        ("    return x * x\n", SQUARE, TESTS, False, 0.0),
        ("    return x * x\n", SQUARE, None, True, None),
        (f"Here:\n```python\n{SQUARE}    return x ** 2\n```", None, TESTS, True, 1.0),
        (f"```python\n{SQUARE}    return x ** 2\n```", SQUARE + "    '''The square.'''\n", TESTS, True, 1.0),
        ([{"role": "assistant", "content": f"```python\n{SQUARE}    return x ** 2\n```"}], None, TESTS, True, 1.0),
        ("    return x * x  # \ud800", SQUARE, TESTS, True, 0.0),
        ("    return x * x  # \0", SQUARE, TESTS, True, 0.0),
        ("import sys; sys.exit(0)", "", TESTS, True, 0.0),
        ("I cannot do that.", "", TESTS, True, 0.0),
    ]
    completions, prefixes, tests, ended, expected = map(list, zip(*rows, strict=True))
    before = code_tests.__dict__["counts"].copy()
    scores = code_tests(
        ["p"] * len(rows), completions, code_prefix=prefixes, test_program=tests, terminated=ended, other=ended
    )
    assert scores == expected
    assert code_tests.__dict__["counts"] - before == {"failed": 6}


def test_stop_strings_and_no_prefix() -> None:
    text = SQUARE + "    return x * x\n# Now we test it\nassert square(2) == 5"
    assert code_tests(["p"], [text], test_program=[TESTS]) == [0.0]
    assert code_tests(["p"], [text], test_program=[TESTS], stop=["\n#"]) == [1.0]


def test_limits_are_passed_on_and_counted() -> None:
    before = code_tests.__dict__["counts"].copy()
    texts = ["while True: pass", "import time; time.sleep(60)", "x = bytes(1 << 28)"]
    scores = code_tests(["p"] * 3, texts, test_program=["pass"] * 3, cpu_s=1, wall_s=1.5, memory_mb=128)
    assert scores == [0.0] * 3
    assert code_tests.__dict__["counts"] - before == {"timeout": 2, "memory": 1}


def test_a_failed_sandbox_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_tests.__dict__["counts"].copy()
    monkeypatch.setattr(_sandbox_process, "START_LIMIT_S", 0.0)
    assert code_tests(["p"] * 2, ["x = 1"] * 2, test_program=["assert x == 1"] * 2) == [None, None]
    assert code_tests.__dict__["counts"] - before == {"sandbox": 2}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "'code_tests' needs a column 'test_program'"),
        ({"test_program": [" \n"]}, "needs Python code in the column 'test_program'.*use null"),
        ({"test_program": [3]}, "needs Python code in the column 'test_program', got 3"),
        ({"test_program": ["assert ("]}, r"'test_program' is no Python \('\(' was never closed"),
        ({"test_program": ["pass"], "code_prefix": [3]}, "needs text or null in the column 'code_prefix', got 3"),
    ],
)
def test_bad_columns(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        code_tests(["p"], ["x = 1"], **columns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "def"}, "stop must be a list of texts"),
        ({"stop": [""]}, "stop must be a list of texts"),
        ({"cpu_s": 0}, "cpu_s must be"),
        ({"workers": 0}, "workers must be"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        code_tests(["p"], ["x = 1"], test_program=["pass"], **options)


def test_is_registered() -> None:
    assert REWARDS.path("code_tests") == "asn_rl.rewards.code:code_tests"


def test_reference_solutions_pass_and_corrupted_ones_do_not(benchmark_data: Path) -> None:
    """A sample. All 164 and 974 pass; MBPP 123 needs 5 s of CPU."""
    with gzip.open(benchmark_data / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines][::20]
    tests = [f"{row['test']}\ncheck({row['entry_point']})\n" for row in rows]
    prefixes = [row["prompt"] for row in rows]
    for row in json.loads((benchmark_data / "mbpp" / "sanitized-mbpp.json").read_text())[5::60]:
        rows.append({"canonical_solution": row["code"], "corrupted": row["code"].replace("return", "return not")})
        tests.append("\n".join([*row["test_imports"], *row["test_list"]]))
        prefixes.append("")
    columns = {"test_program": tests, "code_prefix": prefixes}
    right = [row["canonical_solution"] for row in rows]
    wrong = [row.get("corrupted", "    return None\n") for row in rows]
    assert all(a != b for a, b in zip(right, wrong, strict=True))
    assert code_tests(["p"] * len(rows), right, **columns) == [1.0] * len(rows)
    assert code_tests(["p"] * len(rows), wrong, **columns) == [0.0] * len(rows)
