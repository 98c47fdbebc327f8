"""Completions scored by lm-evaluation-harness 0.4.13, by its own tasks, and by this library, item by item.

The tasks are lm-eval's files as installed; only where their rows come from is replaced, so that nothing is downloaded.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from asn_rl.data.benchmark import gold_rows, load_benchmark
from asn_rl.data.benchmark_files import read_part
from asn_rl.integrations.lm_eval import provide_punkt
from asn_rl.registry import load_attribute
from asn_rl.rewards import REWARDS
from asn_rl.rewards.ifeval import MODES, instruction_verdicts
from asn_rl.types import Prompt

Scores = dict[str, Any]
"""by metric, as lm-eval names it (with its filter, where there are several); None: masked"""


@dataclass(frozen=True)
class Item:
    """A completion of a benchmark's row."""

    kind: str
    """what was done to get it"""
    prompt: Prompt
    fields: Mapping[str, Any]
    """of the benchmark's row"""
    completion: str

    @property
    def id(self) -> str:
        return f"{self.prompt.id} ({self.kind})"


@dataclass(frozen=True)
class Comparison:
    """A benchmark in both houses."""

    benchmark: str
    task: str
    """lm-eval's file, below its folder of tasks"""
    metrics: Mapping[str, str]
    """verifiers of the benchmark -> metrics of the task, with its filter"""


GSM8K = Comparison(
    "gsm8k",
    "gsm8k/gsm8k.yaml",
    {"strict_match": "exact_match,strict-match", "flexible_extract": "exact_match,flexible-extract"},
)
IFEVAL = Comparison(
    "ifeval", "ifeval/ifeval.yaml", {f"prompt_level_{mode}_acc": f"prompt_level_{mode}_acc,none" for mode in MODES}
)
MATH500 = Comparison("math500", "minerva_math/minerva_math500.yaml", {"math_answer": "math_verify,none"})
COMPARISONS = {comparison.benchmark: comparison for comparison in (GSM8K, IFEVAL, MATH500)}


def rows(comparison: Comparison, path: str | Path | None) -> list[tuple[Prompt, dict[str, Any]]]:
    """Prompts of the test part, asked without examples, with their columns; and the fields of their rows."""
    benchmark = load_benchmark(comparison.benchmark)
    assert benchmark.files is not None
    assert benchmark.files.test is not None
    prompts = {prompt.id: prompt for prompt, _ in gold_rows(benchmark, path)}
    where = {"id_field": benchmark.id_field, "verify": True}
    part = read_part(benchmark.name, "test", benchmark.files.test, benchmark.hub, path, **where)
    return [(prompts[f"{benchmark.name}/test/{row.key}"], dict(row.fields)) for row in part]


def lm_eval_task(comparison: Comparison, items: Sequence[Item], folder: Path) -> Any:
    """lm-eval's task over the rows of some items, one an item; its files are written into an existing folder."""
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    importlib.import_module("datasets").disable_progress_bars()
    if comparison is IFEVAL:
        provide_punkt()
        load_attribute("langdetect:DetectorFactory").seed = 0  # else its guesses on short texts differ from run to run
    file = folder / f"{comparison.benchmark}.jsonl"
    file.write_text("".join(json.dumps(dict(item.fields)) + "\n" for item in items))
    split = "train" if comparison is IFEVAL else "test"
    config = {
        "include": str(resources.files("lm_eval.tasks") / comparison.task),
        "task": comparison.benchmark,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "fewshot_split": None,
        "num_fewshot": 0,
    }
    (folder / f"{comparison.benchmark}.yaml").write_text(yaml.safe_dump(config))
    tasks = manager(include_path=str(folder), include_defaults=False).load([comparison.benchmark])
    task = tasks["tasks"][comparison.benchmark]
    task.build_all_requests(rank=0, world_size=1)
    return task


def scored_by_lm_eval(task: Any, completions: Sequence[str]) -> list[Scores]:
    """What the filters and metrics of a task make of one completion a row, as lm-eval's `evaluate` asks them."""
    instances = sorted(task.instances, key=lambda instance: instance.doc_id)
    for instance, completion in zip(instances, completions, strict=True):
        instance.resps, instance.filtered_resps = [completion], {}
    task.apply_filters()
    scores: list[Scores] = [{} for _ in instances]
    for name in instances[0].filtered_resps:
        for i, (_, doc) in enumerate(task.doc_iterator(rank=0, limit=None, world_size=1)):
            found = task.process_results(doc, [instances[i].filtered_resps[name]])
            scores[i] |= {f"{metric},{name}": value for metric, value in found.items()}
    return scores


def scored_by_us(comparison: Comparison, items: Sequence[Item]) -> list[Scores]:
    """The same metrics by the benchmark's verifiers, and IFEval's instructions one by one."""
    prompts, completions = [item.prompt.content for item in items], [item.completion for item in items]
    names = {name for item in items for name in item.prompt.columns}
    columns = {name: [item.prompt.columns.get(name) for item in items] for name in names}
    scores: list[Scores] = [{} for _ in items]
    for verifier in load_benchmark(comparison.benchmark).verifiers:
        if verifier.name in comparison.metrics:
            found = REWARDS.resolve(verifier.function)(prompts, completions, **verifier.arguments, **columns)
            for score, value in zip(scores, found, strict=True):
                score[comparison.metrics[verifier.name]] = value
    if comparison is IFEVAL:
        verdicts = instruction_verdicts(completions, columns["instruction_id_list"], columns["kwargs"])
        for score, row in zip(scores, verdicts, strict=True):
            for m, mode in enumerate(MODES):
                score[f"inst_level_{mode}_acc,none"] = [None if verdict is None else verdict[m] for verdict in row]
    return scores
