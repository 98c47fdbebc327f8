"""What the README shows works as shown."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from asn_rl.config import from_dict
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


def test_the_example_configuration_is_valid() -> None:
    (text,) = [body for language, body in BLOCKS if language == "yaml"]
    assert from_dict(JobConfig, yaml.safe_load(text)).backend.device == "cuda"


def test_the_library_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    examples = [body for body in PYTHON if not body.startswith("# my_")]
    assert len(examples) == 2
    for body in examples:
        scope: dict = {}
        exec(body, scope)
        if "out" in scope:
            assert len(scope["out"].completions) == 4
        else:
            assert scope["terminated"] or scope["truncated"]
            assert scope["reward"] in (0.0, 1.0)


def test_every_file_the_readme_links_to_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert links
    assert all((root / target).exists() for target in links)
