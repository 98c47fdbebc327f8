from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asn_rl.errors import DataError
from asn_rl.metrics import MetricsLogger, read_metrics


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "events")).Reload()


def logged(run: Path, steps: range, *, resume_after: int = 0, scale: float = 1.0) -> None:
    with MetricsLogger(run, resume_after=resume_after) as log:
        for step in steps:
            log.log(step, {"loss/total": scale * step})


def test_scalars_are_in_jsonl_and_in_tensorboard(tmp_path: Path):
    logged(tmp_path, range(1, 4), scale=0.5)
    assert read_metrics(tmp_path) == [{"step": s, "loss/total": 0.5 * s} for s in (1, 2, 3)]
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss/total")] == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_a_record_is_on_disk_before_the_run_ends(tmp_path: Path):
    with MetricsLogger(tmp_path) as log:
        log.log(1, {"a": 1})
        assert read_metrics(tmp_path) == [{"step": 1, "a": 1.0}]


def test_texts_are_a_table_in_tensorboard(tmp_path: Path):
    with MetricsLogger(tmp_path) as log:
        log.log_texts(7, "completions", [{"prompt": "a|b", "text": "one\ntwo"}, {"prompt": 3, "text": "x"}])
        log.log_texts(7, "nothing", [])
    (event,) = events(tmp_path).Tensors("completions/text_summary")
    assert event.step == 7
    table = event.tensor_proto.string_val[0].decode()
    assert table == "| prompt | text |\n| --- | --- |\n| a\\|b | one two |\n| 3 | x |"


def test_numbers_that_json_lacks_are_null(tmp_path: Path):
    with MetricsLogger(tmp_path) as log:
        log.log(1, {"a": math.nan, "b": -math.inf, "c": 1})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": 1.0}


def test_a_resumed_run_drops_what_it_writes_again(tmp_path: Path):
    logged(tmp_path, range(1, 6))
    logged(tmp_path, range(3, 5), resume_after=2, scale=10)
    expected = [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert [(record["step"], record["loss/total"]) for record in read_metrics(tmp_path)] == expected
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss/total")] == expected


def test_a_run_that_starts_over_starts_empty(tmp_path: Path):
    logged(tmp_path, range(1, 4))
    MetricsLogger(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_a_torn_last_line_is_dropped_also_when_the_run_resumes(tmp_path: Path):
    logged(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    logged(tmp_path, range(3, 4), resume_after=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_any_other_malformed_line_is_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        MetricsLogger(tmp_path)


def test_a_run_without_metrics_has_none(tmp_path: Path):
    assert read_metrics(tmp_path) == []
