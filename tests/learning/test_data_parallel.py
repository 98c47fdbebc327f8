"""Several processes train the policy that one would have trained. About 40 s, most of it processes that import torch.

One launch of three processes does all the runs on the toy backend (`in_three`: this file is also what is launched), one
of two runs the command on the real model; the oracle is one process, this one. AdamW divides a gradient by its size, so
a parameter whose gradient is nothing but rounding moves at random: the policies here have none such.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_rewards

from asn_policies import RecurrentPolicy, TemperatureTopP
from asn_rl.backends import BackendConfig
from asn_rl.checkpoint import latest_checkpoint, load_policy, load_state, save_policy
from asn_rl.cli import main
from asn_rl.data import DataConfig
from asn_rl.errors import AsnError
from asn_rl.job import GenerateConfig, HeuristicSpec, Job, JobConfig, PolicySpec, distil, select
from asn_rl.metrics import read_metrics
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.training import grpo, parallel, ppo
from asn_rl.training.budget import BudgetConfig
from asn_rl.training.distill import DistillConfig, distill
from asn_rl.training.grpo import GRPOConfig
from asn_rl.training.on_policy import in_process
from asn_rl.training.ppo import PPOConfig
from asn_rl.types import Prompt

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-6
PROMPTS = [Prompt(f"p{i}", f"w{i}") for i in range(1, 9)]
ROLLOUT = RolloutConfig(max_new_tokens=8, head=32, tail=1)
NORMALIZED = RewardConfig("toy_rewards:second_choice", normalize="batch")
"""reads the scores of all processes"""
# Five prompts do not divide by two or three processes; of minibatches of 8 tokens, some processes have none.
SHARED: dict[str, Any] = {"steps": 4, "prompts_per_step": 5, "num_generations": 3, "learning_rate": 1e-2}
GROUPS = GRPOConfig(**SHARED, save_every=2, num_iterations=2, minibatch_tokens=8, kl_target=0.003, early_stop_kl=0.02)
CASES: dict[str, GRPOConfig | PPOConfig] = {
    "groups": GROUPS,
    "whitened": GRPOConfig(
        **SHARED,
        advantage="whitened",
        loss_type="sequence",
        beta=0.0,
        budget=BudgetConfig(max_mean_tokens=3),
        weight_decay=0.1,
        minibatch_tokens=30,
    ),
    "ppo": PPOConfig(**SHARED, kl_in="reward", loss_type="constant", minibatch_tokens=40),
}
DISTILL = DistillConfig(epochs=3, minibatch_tokens=20, holdout=0.3)


def train(folder: Path, config: GRPOConfig | PPOConfig, **options: Any) -> None:
    torch.manual_seed(0)
    policy, rewards = TemperatureTopP(width=8), RewardSuite([options.pop("reward", NORMALIZED)])
    module: Any = ppo if isinstance(config, PPOConfig) else grpo
    module.train(policy, policy, toy_rewards.TOY, PROMPTS, rewards, ROLLOUT, config, folder, **options)


def distill_recurrent(folder: Path) -> None:
    """Whole completions in a minibatch, the held-out loss among the metrics."""
    torch.manual_seed(0)
    policy = RecurrentPolicy()
    seen = rollout(policy, toy_rewards.TOY, PROMPTS, ROLLOUT, num_generations=3)
    figures = distill(policy, seen, seen.points, replace(DISTILL, target="tokens"))
    if parallel.is_main():
        save_policy(folder, policy)
        (folder / "figures.json").write_text(json.dumps(dict(figures)))


def job(folder: Path) -> Job:
    rows = "".join(f'{{"prompt": "w{i}", "id": "p{i}"}}\n' for i in range(1, 25))
    (folder.parent / "prompts.jsonl").write_text(rows)
    config = JobConfig(
        backend=BackendConfig(kind="toy", model="random:32:0"),
        data=DataConfig("jsonl", {"path": "prompts.jsonl"}),
        rewards=(RewardConfig("toy_rewards:second_choice"),),
        rollout=ROLLOUT,
        policy=PolicySpec("asn_policies:TemperatureTopP", {"width": 8}),
        heuristics=(
            HeuristicSpec("T=1"),
            HeuristicSpec("T=0.5", [{"name": "temperature", "params": {"temperature": 0.5}}]),
        ),
        generate=GenerateConfig(num_generations=4),
        distill=DISTILL,
        threads=1,
    )
    return Job(config, folder)


def in_three(folder: Path) -> None:
    """Every case, a run that one process began, what cannot be shared, a reward that fails in the last process; at the
    end the second process is killed."""
    for name, config in CASES.items():
        train(folder / name, config)
    distill_recurrent(folder / "recurrent")
    distil(job(folder / "job"))
    train(folder / "begun by one", GROUPS)
    refused = {
        "few": reason(lambda: train(folder / "refused", replace(GROUPS, prompts_per_step=2))),
        "ranked": reason(lambda: train(folder / "refused", replace(GROUPS, surrogate="clip_cov"))),
        "apart": reason(lambda: parallel.check_agreement(0, [torch.full((1,), float(parallel.before(1)))])),
        "unselected": reason(lambda: distil(job(folder / "unselected"))),
        "raising": reason(
            lambda: train(folder / "refused", GROUPS, reward=RewardConfig("__main__:fails_in_the_last_process"))
        ),
    }
    everywhere = {name: parallel.gathered_json(text) for name, text in refused.items()}
    if parallel.is_main():
        (folder / "refused.json").write_text(json.dumps(everywhere))

    def sample(policy: Any, prompts: Any, **options: Any) -> Any:
        if parallel.before(1) == 1 and latest_checkpoint(folder / "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        return in_process(toy_rewards.TOY, ROLLOUT)(policy, prompts, **options)

    train(folder / "killed", GROUPS, sample=sample)


def reason(refused: Callable[[], object]) -> str:
    with pytest.raises(AsnError) as caught:
        refused()
    return str(caught.value)


def fails_in_the_last_process(completions: list[str], **columns: Any) -> list[float | None]:
    last = parallel.before(1) == parallel.size() - 1
    return [0.5] * (len(completions) - last)


def launch(processes: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    paths = [ROOT, ROOT / "envs", ROOT / "policies", ROOT / "tests" / "helpers"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes"]
    command = [sys.executable, *launcher, str(processes), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, config in CASES.items():
            train(folder / name, config)
        distill_recurrent(folder / "recurrent")
        select(job(folder / "job"))
        shutil.copytree(folder / "job", folder / "selected")
        distil(job(folder / "job"))
    return folder


@pytest.fixture(scope="module")
def shared(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What three processes make, and the messages of their end."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(alone / "selected", folder / "job")
    train(folder / "begun by one", replace(GROUPS, steps=2))
    shutil.rmtree(folder / "begun by one" / "policy")
    ended = launch(3, __file__, str(folder), cwd=folder)
    messages = ended.stdout + ended.stderr
    assert ended.returncode == 1, messages
    return folder, messages


def assert_same_run(run: Path, oracle: Path) -> None:
    """Weights, metrics and completions; not the times."""
    ours, theirs = (dict(load_policy(folder / "policy").named_parameters()) for folder in (run, oracle))
    assert_same_weights(ours, theirs)
    measured, expected = read_metrics(run), read_metrics(oracle)
    assert [list(row) for row in measured] == [list(row) for row in expected]
    for row, other in zip(measured, expected, strict=True):
        for name in row:
            if not name.startswith("time/"):
                assert math.isclose(row[name], other[name], rel_tol=TOLERANCE, abs_tol=TOLERANCE), name
    rollouts = [sorted((folder / "rollouts").iterdir()) for folder in (run, oracle)]
    assert [path.read_text() for path in rollouts[0]] == [path.read_text() for path in rollouts[1]]


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, weights in ours.items():
        torch.testing.assert_close(weights, theirs[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_three_processes_train_what_one_trains(alone: Path, shared: tuple[Path, str], name: str) -> None:
    run = shared[0] / name
    assert_same_run(run, alone / name)
    states = [load_state(folder) for folder in (latest_checkpoint(run), latest_checkpoint(alone / name)) if folder]
    if name == "ppo":
        assert_same_weights(states[0]["critic"], states[1]["critic"])
    assert states[0]["beta"] == states[1]["beta"]
    assert states[0]["price"] == pytest.approx(states[1]["price"], abs=TOLERANCE)


def test_the_cases_reach_what_has_to_be_shared(alone: Path) -> None:
    """The KL coefficient moves, an epoch ends early, the budget costs something."""
    rows = read_metrics(alone / "groups")
    assert len({row["kl/beta"] for row in rows}) > 1
    assert len({row["policy/gradient_steps"] for row in rows}) > 1
    assert any(row["budget/price"] > 0 for row in read_metrics(alone / "whitened"))


@pytest.mark.parametrize("name", ["recurrent", "job/distilled"])
def test_three_processes_distil_what_one_distils(alone: Path, shared: tuple[Path, str], name: str) -> None:
    policies = [dict(load_policy(folder / name).named_parameters()) for folder in (shared[0], alone)]
    assert_same_weights(*policies)
    where = "recurrent/figures.json" if name == "recurrent" else "job/distill/summary.json"
    ours, theirs = (json.loads((folder / where).read_text()) for folder in (shared[0], alone))
    del ours["time/distill"], theirs["time/distill"]
    assert ours == pytest.approx(theirs, abs=TOLERANCE)


def test_a_run_continues_in_another_number_of_processes(alone: Path, shared: tuple[Path, str]) -> None:
    """From one to three; and from three, of which one is killed in the third step, to one."""
    folder, messages = shared
    assert "SIGKILL" in messages
    assert not (folder / "killed" / "policy").exists()
    train(folder / "killed", GROUPS)
    for name in ("begun by one", "killed"):
        assert_same_run(folder / name, alone / "groups")


def test_what_ends_one_process_ends_all(shared: tuple[Path, str]) -> None:
    refused = json.loads((shared[0] / "refused.json").read_text())
    for name, why in {
        "few": "prompts_per_step must be >= 3",
        "ranked": "clip_cov",
        "apart": "do not begin at the same place",
        "unselected": "run `asn-rl select`",
    }.items():
        assert all(why in message for message in refused[name])
    *others, failing = refused["raising"]
    assert "fails_in_the_last_process" in failing
    assert others == [f"process 2 of 3 failed: {failing}"] * 2


def test_one_process_shares_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither without a launcher nor with one that starts a single process."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    parallel.join()
    parallel.main_alone()
    assert (parallel.size(), parallel.is_main(), parallel.threads()) == (1, True, None)
    values = torch.arange(3)
    assert parallel.gathered(values) is values
    assert parallel.shard(values) is values
    assert (parallel.before(3), parallel.from_main(2), parallel.summed({"a": 1})) == (0, 2, {"a": 1})


REAL = [
    "backend.dtype=float32",
    "data.limit=12",
    "policy={name: 'asn_policies:TemperatureTopP', arguments: {width: 8}}",
    "warm_start=false",
    "rollout.max_new_tokens=6",
    "rollout.max_batch=4",  # one prompt at a time, so that the base model rounds alike
    "grpo.steps=2",
    "grpo.prompts_per_step=3",
    "grpo.num_generations=4",
    "grpo.save_every=1",
    "grpo.balance=null",
    "threads=1",
]


def test_the_command_on_the_real_model(tmp_path: Path) -> None:
    """`accelerate launch` on `asn-rl reinforce`, against the same command in this process."""
    options = ["reinforce", "--config", str(ROOT / "configs" / "demo.yaml"), "--run"]
    ended = launch(2, "-m", "asn_rl.cli", *options, str(tmp_path / "shared"), *REAL, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("GRPO 2/2") == 1  # only the main process prints
    assert main([*options, str(tmp_path / "alone"), *REAL]) == 0
    assert_same_run(tmp_path / "shared", tmp_path / "alone")


if __name__ == "__main__":
    in_three(Path(sys.argv[1]))
