"""lm-evaluation-harness: it drives our policies, and scores as we do."""

from __future__ import annotations

import functools
import importlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from asn_policies import OrderStatisticsNetwork, Pipeline
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.checkpoint import save_policy
from asn_rl.errors import BackendError, CheckpointError, ConfigError, DataError, InvalidValue, UnknownName
from asn_rl.integrations.lm_eval import AsnLM, main
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt

TOY = {"backend": "toy", "model": "random:16:3"}
GREEDY = {"do_sample": False, "temperature": 0.0}


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's `simple_evaluate` on a task of three rows, without a network; returns its records of the rows."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # runs pip
    harness = importlib.import_module("lm_eval")
    manager = importlib.import_module("lm_eval.tasks").TaskManager

    def run(model: Any, questions: list[str], model_args: Any = None, *, task: dict | None = None, **options: Any):
        rows = [{"question": question, "answer": "w1"} for question in questions]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "task": "tiny",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "c")},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "num_fewshot": 0,
            "generation_kwargs": {"until": ["w9"], "max_gen_toks": 6, **GREEDY},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            **(task or {}),
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
        tasks = manager(include_path=str(tmp_path), include_defaults=False)
        done = harness.simple_evaluate(
            model, model_args, tasks=["tiny"], task_manager=tasks, bootstrap_iters=0, **options
        )
        records = sorted(done["samples"]["tiny"], key=lambda record: record["doc_id"])
        return [record["resps"][0] for record in records], done

    return run


def test_a_policy_by_name_samples_as_our_rollout_does(evaluate: Any, caplog: pytest.LogCaptureFixture) -> None:
    questions = ["w1 w2", "w3", "w4 w5 w6"]
    with caplog.at_level("WARNING", "lm_eval"):
        texts, done = evaluate("asn", questions, {**TOY, "policy": "T=1", "seed": 5}, batch_size="2")
    assert "asks for greedy decoding; the policy 'T=1' decides" in caplog.text
    prompts = [Prompt(f"tiny/{i}/0", question) for i, question in enumerate(questions)]
    config = RolloutConfig(max_new_tokens=6, stop=("w9",))
    expected = rollout(Pipeline([]), ToyBackend.random(16, 3), prompts, config, seed=5).completions
    assert texts == [[text] for text in expected]
    assert done["config"]["asn"]["policy"] == "T=1"
    assert done["config"]["model"] == "asn"


def test_repeats_are_draws_of_their_own_and_stop_strings_end_them(evaluate: Any) -> None:
    model = AsnLM(Pipeline([]), ToyBackend.random(16, 3), seed=1)
    texts, _ = evaluate(model, ["w1"], task={"repeats": 4, "generation_kwargs": {"until": "w2", "max_tokens": 30}})
    assert len(set(texts[0])) == 4
    assert not any("w2" in text for text in texts[0])
    assert evaluate(model, ["w1"], task={"generation_kwargs": {"until": "w2", "max_tokens": 30}})[0][0] == texts[0][:1]


def test_a_saved_policy_and_a_pipeline_of_a_file(tmp_path: Path) -> None:
    policy = OrderStatisticsNetwork()
    save_policy(
        tmp_path / "own", policy, fingerprint=ToyBackend.random(16, 3).fingerprint, sketch={"head": 8, "tail": 4}
    )
    model = AsnLM.create_from_arg_obj({**TOY, "policy": str(tmp_path / "own"), "tail": 2})
    assert isinstance(model.policy, OrderStatisticsNetwork)
    assert (model.config.head, model.config.tail) == (8, 2)
    entry = {"name": "mild", "processors": [{"name": "temperature", "params": {"temperature": 0.5}}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"sampling_pipelines": [entry]}))
    text = f"backend=toy,model=random:16:3,policy=mild,pipelines={tmp_path / 'rules.yaml'}"
    named = AsnLM.create_from_arg_string(text, {"batch_size": 3, "device": None}).policy
    assert isinstance(named, Pipeline)
    assert named.title == "mild"
    with pytest.raises(CheckpointError, match="trained on base model"):
        AsnLM.create_from_arg_obj({"backend": "toy", "model": "random:16:4", "policy": str(tmp_path / "own")})


def test_the_embedded_model_answers_in_its_chat(evaluate: Any, smollm: HFBackend) -> None:
    raw = HFBackend(smollm.model, smollm.tokenizer, chat_template=False)
    model = AsnLM(Pipeline([{"name": "greedy"}]), raw, info={"policy": "greedy"})
    question = "What is 3 + 4?"
    texts, _ = evaluate(model, [question], apply_chat_template=True)
    config = RolloutConfig(max_new_tokens=6, stop=("w9",))
    assert texts[0] == list(rollout(model.policy, smollm, [Prompt("q", question)], config).completions)
    assert smollm.encode(question) == raw.encode(model.apply_chat_template([{"role": "user", "content": question}]))
    with pytest.raises(InvalidValue, match="lm-eval renders prompts itself"):
        AsnLM(model.policy, smollm)
    with pytest.raises(InvalidValue, match="apply_chat_template"):
        model.chat_template("rag")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.7}, "gen_kwargs temperature must be 0 or 1, got 0.7; only the policy samples"),
        ({"do_sample": True, "top_p": 0.9}, "gen_kwargs top_p must be 1, got 0.9"),
        ({"typical_p": 0.9}, "unknown generation setting 'typical_p'"),
        ({"until": [""]}, "texts of at least one character"),
        ({"max_gen_toks": 0}, "max_new_tokens must be >= 1"),
    ],
)
def test_sampling_of_a_task_is_refused(evaluate: Any, kwargs: dict[str, Any], message: str) -> None:
    model = AsnLM(Pipeline([]), ToyBackend.random(16, 3))
    with pytest.raises((InvalidValue, UnknownName), match=message):
        evaluate(model, ["w1"], task={"generation_kwargs": kwargs})


def test_settings_that_change_nothing_are_allowed(evaluate: Any) -> None:
    neutral = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_gen_toks": 2}
    texts, _ = evaluate(AsnLM(Pipeline([]), ToyBackend.random(16, 3)), ["w1"], task={"generation_kwargs": neutral})
    assert texts[0][0]


def test_what_cannot_be_evaluated_is_named(evaluate: Any) -> None:
    toy = ToyBackend.random(16, 3)
    model = AsnLM(Pipeline([]), toy)
    choices = {"output_type": "multiple_choice", "doc_to_choice": ["w1", "w2"], "metric_list": [{"metric": "acc"}]}
    with pytest.raises(ConfigError, match="the tasks tiny ask for log-likelihoods"):
        evaluate(model, ["w1"], task=choices)
    with pytest.raises(BackendError, match="no chat template"):
        evaluate(model, ["w1"], apply_chat_template=True)
    toy.max_context = 8
    with pytest.raises(DataError, match="prompt 'tiny/1/0' has 3 tokens"):
        evaluate(model, ["w1", "w1 w2 w3"])
    with pytest.raises(UnknownName, match=r"unknown policy 'greedi'. Did you mean 'greedy'\?"):
        AsnLM.create_from_arg_obj({**TOY, "policy": "greedi"})
    with pytest.raises(ConfigError, match="unknown key 'temperature' in 'model_args'"):
        AsnLM.create_from_arg_obj({**TOY, "policy": "greedy", "temperature": 1})
    with pytest.raises(ConfigError, match="missing 1 required positional argument: 'policy'"):
        AsnLM.create_from_arg_obj(TOY)
    with pytest.raises(InvalidValue, match="batch_size must be a whole number, got 'auto'"):
        AsnLM.create_from_arg_obj({**TOY, "policy": "greedy"}, {"batch_size": "auto"})


def test_the_command_is_lm_evals_own(
    tmp_path: Path, evaluate: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(AsnLM(Pipeline([]), ToyBackend.random(16, 3)), ["w1", "w2"])  # writes the task
    asked = ["--tasks", "tiny", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "4"]
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    only_ours = functools.partialmethod(manager.__init__, include_defaults=False)
    monkeypatch.setattr(manager, "__init__", only_ours)  # finding the 10,000 tasks of its own takes 14 s
    toy = "backend=toy,model=random:16:3"
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "asn", "--model_args", f"{toy},policy=greedy", *asked])
    assert main() == 0
    assert "exact_match" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "asn", "--model_args", f"{toy},policy=no", *asked])
    assert main() == 2
    assert "error: unknown policy 'no'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gsm8k", "ifeval", "math500"])
def test_scores_agree_item_by_item(
    name: str, benchmark_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of bent answer; `scripts/check_lm_eval.py` does the same with 500 and with a model's own."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts")
    check, harness = importlib.import_module("check_lm_eval"), importlib.import_module("_harness")
    comparison, count = harness.COMPARISONS[name], {"gsm8k": 60, "ifeval": 80, "math500": 10}[name]
    items = importlib.import_module("_completions").made(comparison, harness.rows(comparison, benchmark_data), count)
    task = harness.lm_eval_task(comparison, items, tmp_path)
    theirs = harness.scored_by_lm_eval(task, [item.completion for item in items])
    ours = harness.scored_by_us(comparison, items)
    assert {score[metric] for score in ours for metric in list(score)[:1]} == {0.0, 1.0}
    different = check.differences(items, ours, theirs)
    assert [item.id for item, our, their in different if check.explanation(comparison, item, our, their) is None] == []
    assert (name == "ifeval") == bool(different)  # keys 1122 and 1129: lm-eval counts random letters
