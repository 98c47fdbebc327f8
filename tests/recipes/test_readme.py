"""What the README shows works as shown."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from asn_policies import OrderStatisticsNetwork
from asn_rl.backends import BackendConfig
from asn_rl.backends.hf import HFBackend
from asn_rl.checkpoint import save_policy
from asn_rl.config import from_dict
from asn_rl.data.benchmark import load_benchmark
from asn_rl.job import JobConfig
from asn_rl.testing import check_policy, check_reward

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [body for language, body in BLOCKS if language == "python"]


def named(name: str) -> str:
    (body,) = [body for body in PYTHON if body.startswith(f"# {name}")]
    return body


def test_the_example_reward_keeps_the_contract() -> None:
    scope: dict = {}
    exec(named("my_rewards.py"), scope)
    assert check_reward(scope["brevity"], ["Hi"], ["Hello there"]) == [pytest.approx(1 / 3)]


def test_the_example_policy_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policies.py").write_text(named("my_policies.py"))
    monkeypatch.syspath_prepend(tmp_path)
    import my_policies  # type: ignore[import-not-found]

    check_policy(my_policies.EntropyTemperature())
    sys.modules.pop("my_policies")


def yaml_block(key: str) -> str:
    (text,) = [body for language, body in BLOCKS if language == "yaml" and yaml.safe_load(body).get(key)]
    return text


def test_the_example_configuration_is_valid() -> None:
    assert from_dict(JobConfig, yaml.safe_load(yaml_block("backend"))).backend.device == "cuda"


def test_the_example_benchmark_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml_block("extends"))
    assert load_benchmark(path).verifiers == load_benchmark("gsm8k").verifiers


def test_the_library_examples_run() -> None:
    examples = [body for body in PYTHON if "rollout(" in body or "gym.make(" in body]
    assert len(examples) == 2
    for body in examples:
        scope: dict = {}
        exec(body, scope)
        if "out" in scope:
            assert len(scope["out"].completions) == 4
        else:
            assert scope["terminated"] or scope["truncated"]
            assert scope["reward"] in (0.0, 1.0)


def shortened(part: str) -> str:
    """The example that holds `part`, with 4 tokens instead of 64."""
    (body,) = [body for body in PYTHON if part in body]
    return body.replace("64", "4")


def test_the_transformers_example_runs(smollm: HFBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_policy("policies/min-p", OrderStatisticsNetwork())
    inputs = {"input_ids": torch.tensor([smollm.encode("Name an animal.")])}
    exec(shortened("decoding(model"), {"model": smollm.model, "inputs": inputs | {"pad_token_id": 0}})


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning", "ignore:.*pin_memory.*:UserWarning")
def test_the_trl_example_runs(smollm: HFBackend, tmp_path: Path) -> None:
    scope: dict = {}
    exec(named("my_rewards.py"), scope)
    args = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=2, num_generations=2, max_completion_length=4, max_steps=1,
        report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["Name an animal."] * 2})
    names = {"policy": OrderStatisticsNetwork(), "reward": scope["brevity"], "args": args, "data": data}
    scope = names | {"BackendConfig": lambda: BackendConfig(dtype="float32"), "GRPOTrainer": GRPOTrainer}
    exec(shortened("check_trainer"), scope)
    assert scope["trainer"].state.global_step == 1


def test_every_file_the_readme_links_to_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert links
    assert all((root / target).exists() for target in links)
