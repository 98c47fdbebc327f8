"""The commands, as a user types them, on the toy backend; those that are killed run in a process of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from asn_rl.backends import BackendConfig, shared_backend
from asn_rl.checkpoint import load_policy
from asn_rl.cli import main
from asn_rl.data.store import load_trajectories
from asn_rl.job.config import CONTROLS
from asn_rl.rewards.corpus import corpus_coverage

Command = Callable[..., "Ended"]
ROOT = Path(__file__).resolve().parents[2]
JOB = {
    "backend": {"kind": "toy", "model": "random:32:0"},
    "data": {"source": "jsonl", "arguments": {"path": "prompts.jsonl"}},
    "rewards": [{"function": "toy_rewards:second_choice"}],
    "rollout": {"max_new_tokens": 8, "head": 32, "tail": 1},
    "policy": {"arguments": {"width": 8, "point_width": 4}},
    "heuristics": [
        {"name": "greedy", "processors": [{"name": "greedy"}]},
        {"name": "T=1"},
        {"name": "top_k=2", "processors": [{"name": "top_k", "params": {"top_k": 2}}]},
    ],
    "generate": {"num_generations": 4},
    "distill": {"epochs": 3},
    "grpo": {"steps": 6, "prompts_per_step": 4, "num_generations": 4, "save_every": 2},
    "compare": {"num_generations": 4, "resamples": 500},
}


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def asn_rl(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """The command in this process, in the working folder."""

    def call(*arguments: str) -> Ended:
        status = main(arguments)
        return Ended(status, *capsys.readouterr())

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a configuration and its prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    rows = [{"prompt": f"w{i}", "id": f"p{i}"} for i in range(1, 31)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def environment() -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "envs", "policies", "tests/helpers"))
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "asn_rl.cli", *arguments]


def job(verb: str, run: str = "run", *overrides: str) -> list[str]:
    return [verb, "--config", "job.yaml", "--run", run, *overrides]


def test_the_whole_job_leaves_what_its_stages_promise(folder: Path, asn_rl: Command) -> None:
    done = asn_rl(*job("run"))
    assert done.status == 0, done.stderr
    run = folder / "run"
    made = "config.yaml command.txt prompts.jsonl selection.json labelling.html comparison.json report.html"
    for name in (*made.split(), "selected/selected.jsonl", "distilled", "policy"):
        assert (run / name).exists(), name
    comparison = json.loads((run / "comparison.json").read_text())
    arms = [row["name"] for row in comparison["rows"]]
    assert arms == list(dict.fromkeys(["greedy", "T=1", comparison["best_static"], "distilled", "rl"]))
    assert "against best static" in done.stdout
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=.https?:|@import|<script", page), "the page must not fetch anything"

    again = asn_rl(*job("run"))
    assert again.status == 0
    assert "GRPO 6/6" not in again.stdout, "a finished stage ran again"


@pytest.mark.parametrize(
    "settings",
    [
        ["policy={name: asn_policies:TokenStrategy, arguments: {inputs: [prompt_embedding], width: 8}}"],
        [
            "policy={name: asn_policies:SequenceStrategy, arguments: {inputs: [prompt_embedding], width: 8}}",
            "mixture=asn_policies:SequenceStrategy",
        ],
        ["policy={name: asn_policies:TwoSlopeWarp, arguments: {width: 8}}", "algorithm=ppo"],
        ["policy={name: asn_policies:TokenStrategy, arguments: {width: 8}}", "algorithm=lpo", "lpo={epochs: 2}"],
    ],
    ids=["gate a token", "gate a completion", "warp by PPO", "gate by LPO"],
)
def test_a_policy_may_begin_at_its_own_start_and_meet_its_controls(
    folder: Path, asn_rl: Command, settings: list[str]
) -> None:
    steps = "{steps: 2, prompts_per_step: 4, num_generations: 4}"
    own = ["warm_start=false", "compare.controls=true", f"grpo={steps}", f"ppo={steps}", *settings]
    done = asn_rl(*job("run", "run", *own))
    assert done.status == 0, done.stderr
    comparison = json.loads((folder / "run" / "comparison.json").read_text())
    assert [row["name"] for row in comparison["rows"]][-4:] == ["rl", *CONTROLS]
    assert list(comparison["rl_against"]) == list(CONTROLS)
    assert not (folder / "run" / "distilled").exists()
    assert (folder / "run" / "start").exists()
    shuffled, plain = (load_trajectories(folder / "run" / "comparison" / name) for name in ("shuffled context", "rl"))
    assert [prompt.id for prompt in shuffled.prompts] == [prompt.id for prompt in plain.prompts]
    mixture = load_policy(folder / "run" / "controls" / "context-free" / "policy")
    assert not mixture.needs & {"prompt_embedding", "hidden"}
    shares = torch.softmax(mixture.get_parameter("gate.logits"), -1)
    assert mixture.names[int(shares.argmax())] == comparison["best_static"], "where it begins"
    assert (folder / "run" / "report.html").exists()
    assert asn_rl(*job("report", "run", *own)).stdout.count("shuffled context") == 1


def test_headroom_says_whether_adaptation_can_help(folder: Path, asn_rl: Command) -> None:
    done = asn_rl(*job("headroom", "run", "compare.resamples=200", "bandit.folds=3"), "--split", "selection")
    assert done.status == 0, done.stderr
    report = json.loads((folder / "run" / "headroom.json").read_text())
    assert report["split"] == "selection"
    assert report["verdict"] in done.stdout
    assert "oracle - static" in done.stdout


def test_headroom_of_rewards_that_compare_completions_compares_within_halves(folder: Path, asn_rl: Command) -> None:
    reward = {"function": "distinct_ngrams", "arguments": {"n": 1}}
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB | {"rewards": [reward]}))
    fast = ("compare.resamples=200", "bandit.folds=3")
    assert asn_rl(*job("select", "run", *fast)).status == 0
    assert asn_rl(*job("headroom", "run", *fast)).status == 0
    report, selection = (
        json.loads((folder / "run" / name).read_text()) for name in ("headroom.json", "selection.json")
    )
    assert report["split"] == "train"
    for name in ("oracle", "static"):
        assert report["rewards"][name]["mean"] == pytest.approx(selection["headroom"][name])


def test_a_policy_is_promoted_only_on_evidence(folder: Path, asn_rl: Command) -> None:
    small = ["distill.epochs=1", "promotion={num_generations: 4, resamples: 200}"]
    assert asn_rl(*job("distill", "run", *small)).status == 0
    arguments = ["--candidate", "run/distilled", "--incumbent", "greedy", "--into", "live"]
    done = asn_rl(*job("promote", "run", *small), *arguments)
    record = json.loads((folder / "run" / "promotion" / "decision.json").read_text())
    assert done.status == (record["outcome"] != "promoted")
    assert (folder / "live").exists() == (record["outcome"] == "promoted")
    assert record["sentence"] in done.stdout
    again = asn_rl(*job("promote", "run", *small), *arguments, "--output", "second")
    assert (again.status, "earlier decision" in again.stderr) == (2, True)
    (folder / "fresh.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} w{i}"}) + "\n" for i in range(1, 9)))
    fresh = asn_rl(*job("promote", "run", *small), *arguments, "--output", "second", "--prompts", "fresh.jsonl")
    assert fresh.status in (0, 1), fresh.stderr
    once_more = ("--output", "third", "--prompts", "fresh.jsonl", "--seen", "second")
    assert "earlier decision" in asn_rl(*job("promote", "run", *small), *arguments, *once_more).stderr
    guarded = asn_rl(*job("guard", "run", *small), "--candidate", "run/distilled", "--rule", "greedy")
    assert "the policy in run/distilled, and greedy where the context" in " ".join(guarded.stdout.split())
    assert (folder / "run/guarded/model.safetensors").exists()
    wrong = asn_rl(*job("promote", "run", *small), "--incumbent", "gredy")
    assert wrong.status == 2
    assert "Did you mean 'greedy'" in wrong.stderr


def test_stage_by_stage_equals_all_at_once(folder: Path, asn_rl: Command) -> None:
    assert asn_rl(*job("run", "whole")).status == 0
    for verb in ("generate", "verify", "label", "select", "distill", "reinforce", "report"):
        assert asn_rl(*job(verb, "parts")).status == 0
    for name in ("selection.json", "selected/targets.jsonl", "comparison.json", "policy/model.safetensors"):
        assert (folder / "whole" / name).read_bytes() == (folder / "parts" / name).read_bytes(), name


def test_masked_labels_are_asked_for_again_until_they_are_used(folder: Path, asn_rl: Command) -> None:
    assert asn_rl(*job("label"), "--retry-masked").status == 0
    wrong = asn_rl(*job("label"), "--retry-masked", "nobody")
    assert (wrong.status, "unknown labeller of this run 'nobody'" in wrong.stderr) == (2, True)
    assert asn_rl(*job("select")).status == 0
    late = asn_rl(*job("label"), "--retry-masked")
    assert (late.status, "candidates are selected already" in late.stderr) == (2, True)


def test_verify_tells_by_its_status_and_mends_what_is_missing(folder: Path, asn_rl: Command) -> None:
    assert asn_rl(*job("generate")).status == 0
    assert asn_rl(*job("verify")).status == 0
    shard = folder / "run" / "candidates" / "train" / "shard-00000.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    shard.write_text("".join(lines[:-2]) + lines[-1][:20])  # one cell lost, the last line torn
    found = asn_rl(*job("verify"))
    assert found.status == 1
    assert found.stdout.count("missing: prompt") == 2
    assert "1 torn lines dropped" in found.stdout
    assert asn_rl(*job("verify"), "--fix").status == 0
    assert len(list(shard.parent.glob("shard-*.jsonl"))) == 2
    record = json.loads(lines[0]) | {"completion": "another"}
    (shard.parent / "shard-00002.jsonl").write_text(json.dumps(record) + "\n")
    assert "has another text or other tokens in" in asn_rl(*job("verify")).stdout
    refused = asn_rl(*job("label"))
    assert refused.status == 2
    assert "Remove the wrong lines" in refused.stderr


def test_a_corpus_is_indexed_and_what_is_copied_from_it_is_found(folder: Path, asn_rl: Command) -> None:
    line = "Seven sailors sold their silver spoons in a small harbour town before the winter came."
    (folder / "notes.txt").write_text(line + "\n\nNothing else was written down that year.\n")
    done = asn_rl("index-corpus", "notes.txt", "--output", "index")
    assert done.status == 0, done.stderr
    assert "index: 2 documents" in done.stdout
    backend = shared_backend(BackendConfig(chat_template=False))
    texts = [line, "Completely different words about elephants and their gentle habits at night."]
    scores = corpus_coverage(["p"] * 2, texts, [backend.encode(text) for text in texts], index="index")
    assert scores == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (job("generate", "run", "grpo.stpes=3"), "unknown key 'stpes' in 'grpo'; did you mean 'steps'?"),
        (job("generate", "run", "rollout.max_new_tokens=0"), "max_new_tokens must be >= 1"),
        (job("generate", "run", "backend.kind=tyo"), "Did you mean 'toy'"),
        (job("generate", "run", "rewards=[]"), "rewards is empty"),
        (job("generate", "run", "data.arguments.path=none.jsonl"), "cannot read none.jsonl"),
        (job("generate", "run", "heuristics=[{name: a}, {name: a}]"), "names that differ"),
        (["generate", "--config", "none.yaml", "--run", "run"], "none.yaml"),
        (job("reinforce", "run", "init=nowhere"), "nowhere holds no policy"),
        (job("generate", "run", "heuristics=[{name: ../a}]"), "heuristic name must be letters"),
        (job("generate", "run", "compare.stratify_by=task"), "lacks the column 'task'"),
    ],
)
def test_bad_input_ends_with_status_two_and_advice(
    folder: Path, asn_rl: Command, arguments: list[str], message: str
) -> None:
    done = asn_rl(*arguments)
    assert done.status == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_folder_keeps_its_configuration(folder: Path, asn_rl: Command) -> None:
    assert asn_rl(*job("label")).status == 0
    other = asn_rl(*job("label", "run", "grpo.steps=7"))
    assert other.status == 2
    assert "grpo.steps: 6 -> 7" in other.stderr


def test_a_reference_of_another_base_model_or_architecture_is_refused(folder: Path, asn_rl: Command) -> None:
    assert asn_rl(*job("distill")).status == 0
    assert asn_rl(*job("distill", "other", "backend.model=random:32:1")).status == 0
    small = ("policy.name=asn_policies:LocalTransform", "policy.arguments={}")
    assert asn_rl(*job("distill", "small", *small)).status == 0
    for reference, message in (("other", "trained on base model 'random:32:1'"), ("small", "LocalTransform, expected")):
        done = asn_rl(*job("reinforce", f"with-{reference}", f"reference={reference}/distilled"))
        assert done.status == 2
        assert message in done.stderr


def _listen_to_interrupts() -> None:
    """A shell lets its background jobs ignore Ctrl-C, and their children inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(
    arguments: Sequence[str], folder: Path, signal_number: int, reached: Callable[[], bool]
) -> tuple[int, str]:
    """Status and standard error of the command in a process that gets a signal at some point."""
    process = subprocess.Popen(
        command(*arguments), cwd=folder, env=environment(), stdout=subprocess.DEVNULL,
        preexec_fn=_listen_to_interrupts, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, "it ended before the signal"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal_number)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def test_an_interrupted_run_resumes_to_the_same_policy(folder: Path, asn_rl: Command) -> None:
    steps, weights = "grpo.steps=30", "policy/model.safetensors"
    assert asn_rl(*job("reinforce", "whole", steps)).status == 0
    for number in (signal.SIGINT, signal.SIGKILL):
        run = folder / number.name
        status, stderr = interrupted(
            job("reinforce", run.name, steps), folder, number, lambda run=run: any(run.glob("checkpoints/step-*"))
        )
        if number == signal.SIGINT:
            assert status == 130
            assert "the same command continues" in stderr
        assert not (run / "policy").exists(), "it was over before the signal"
        assert asn_rl(*job("reinforce", run.name, steps)).status == 0
        assert (folder / "whole" / weights).read_bytes() == (run / weights).read_bytes()


def test_a_reward_that_hangs_is_stopped_by_the_user_and_put_into_a_process(folder: Path, asn_rl: Command) -> None:
    reward = {"function": "slow_rewards:hang_on_prompt", "arguments": {"prompt": "w3"}}
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB | {"rewards": [reward]}))
    labels = folder / "run" / "labels"
    status, stderr = interrupted(job("label"), folder, signal.SIGINT, lambda: any(labels.rglob("*.jsonl")))
    assert (status, "the same command continues" in stderr) == (130, True)
    (folder / "job.yaml").write_text(
        yaml.safe_dump(JOB | {"rewards": [{**reward, "isolation": "process", "time_limit": 1.0}]})
    )
    with pytest.warns(RuntimeWarning, match="no answer within 1 s"):
        assert asn_rl(*job("label")).status == 0
    records = [json.loads(line) for path in labels.rglob("*.jsonl") for line in path.read_text().splitlines()]
    prompts = json.loads((folder / "run" / "prompts.jsonl").read_text().splitlines()[0])
    assert {row["score"] for row in records} <= {1.0, None}, prompts


def test_candidates_survive_a_kill_and_none_is_generated_twice(folder: Path, asn_rl: Command) -> None:
    many = ("rollout.max_batch=4", "generate.num_generations=16")
    assert asn_rl(*job("generate", "whole", *many)).status == 0
    written = folder / "broken" / "candidates" / "train"
    status, _ = interrupted(
        job("generate", "broken", *many), folder, signal.SIGKILL, lambda: len(candidate_lines(written)) > 8
    )
    assert status == -signal.SIGKILL
    before = candidate_lines(written)
    assert asn_rl(*job("generate", "broken", *many)).status == 0
    whole, after = (candidate_lines(folder / run / "candidates" / "train") for run in ("whole", "broken"))
    assert len(before) < len(whole), "it was over before the signal"
    assert sorted(after) == sorted(whole)
    assert set(before) <= set(after)
    assert asn_rl(*job("verify", "broken", *many)).status == 0


def candidate_lines(folder: Path) -> list[str]:
    """Whole lines of all shards; a torn last line is not there."""
    texts = [path.read_text() for path in sorted(folder.glob("*.jsonl"))] if folder.exists() else []
    return [line for text in texts for line in text.rpartition("\n")[0].splitlines()]


def test_a_full_disk_ends_with_advice(asn_rl: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "run/rollouts/step-000001.jsonl")

    monkeypatch.setattr("asn_rl.training.on_policy.write_jsonl", full)
    done = asn_rl(*job("reinforce"))
    assert done.status == 2
    assert "No space left on device: 'run/rollouts/step-000001.jsonl'" in done.stderr
    assert "Free some space on the disk of run, and the same command continues" in done.stderr
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert asn_rl(*job("reinforce")).status == 0


def test_a_module_in_the_working_folder_is_a_plug_in(folder: Path) -> None:
    (folder / "my_rewards.py").write_text("def one(prompts, completions, **columns): return [1.0] * len(completions)\n")
    path = os.pathsep.join(str(ROOT / part) for part in ("", "envs", "policies"))
    arguments = job("label", "run", "rewards=[{function: 'my_rewards:one'}]")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from asn_rl.cli import main; sys.exit(main(sys.argv[1:]))", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


STAGES = ("run", "generate", "verify", "label", "select", "distill", "reinforce", "report", "eval")
VERBS = (*STAGES, "compare", "benchmarks", "keys", "grid", "model", "train-reward-model", "index-corpus")


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"example:\n  asn-rl {verb}" in capsys.readouterr().out


def test_all_settings_are_listed_with_their_meaning(folder: Path, asn_rl: Command) -> None:
    done = asn_rl("keys")
    assert done.status == 0
    lines = done.stdout.splitlines()
    for key in (
        "grpo.beta",
        "rollout.max_new_tokens",
        "backend.model",
        "generate.train_prompts",
        "generate.servers.kind",
        "grid.function",
        "compare.level",
    ):
        (number,) = [i for i, line in enumerate(lines) if line.strip().startswith(f"{key}=")]
        assert len(lines[number + 1].strip()) > 10, f"{key} is not explained"


def test_the_grid_command_writes_the_reference_grids(folder: Path, asn_rl: Command) -> None:
    for kind, count in (("full", 396), ("filtered", 143)):
        assert asn_rl("grid", "--kind", kind, "--output", f"{kind}.yaml").status == 0
        assert len(yaml.safe_load((folder / f"{kind}.yaml").read_text())["sampling_pipelines"]) == count


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_that_come_with_the_project_are_valid(config: Path) -> None:
    from asn_rl.config import load_config
    from asn_rl.job import JobConfig

    head = config.read_text().splitlines()[:8]
    assert any("hardware:" in line for line in head)
    assert load_config(JobConfig, config).heuristics
