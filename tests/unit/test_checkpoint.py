from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_disk import fill_disk
from safetensors import SafetensorError
from torch import Tensor, nn

from asn_policies import LocalTransform, Pipeline, PolicyModule
from asn_rl import checkpoint
from asn_rl.backends.toy import ToyBackend
from asn_rl.checkpoint import (
    atomic_folder,
    check_compatible,
    checkpoint_folder,
    latest_checkpoint,
    load_policy,
    load_state,
    read_policy_config,
    remove_old_checkpoints,
    rng_state,
    save_policy,
    save_state,
    set_rng_state,
)
from asn_rl.errors import CheckpointError
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt

METADATA = {"base_model": "toy", "fingerprint": "toy-1", "sketch": {"head": 8, "tail": 4}}
STEPS = [{"name": "temperature", "params": {"temperature": 0.7}}, {"name": "mirostat", "params": {"tau": 2.0}}]


def shaken(policy: PolicyModule) -> PolicyModule:
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved learned policy."""
    save_policy(tmp_path / "policy", shaken(LocalTransform(8)), **METADATA)
    return tmp_path / "policy"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Policies


@pytest.mark.parametrize("make", [lambda: shaken(LocalTransform(8)), lambda: Pipeline(STEPS, title="mine")])
def test_a_loaded_policy_samples_what_the_saved_one_samples(
    tmp_path: Path, toy: ToyBackend, make: Callable[[], PolicyModule]
):
    policy = make()
    save_policy(tmp_path / "policy", policy, **METADATA)
    loaded = load_policy(tmp_path / "policy")
    assert type(loaded) is type(policy)
    own = type(policy).from_pretrained(tmp_path / "policy", fingerprint="toy-1")
    config = RolloutConfig(max_new_tokens=6, head=8, tail=4)
    runs = [rollout(p, toy, [Prompt("p", "w1")], config, num_generations=8) for p in (policy, loaded, own)]  # type: ignore[arg-type]
    for run in runs[1:]:
        assert run.completion_ids == runs[0].completion_ids
        assert torch.equal(run.behaviour_logprobs, runs[0].behaviour_logprobs)


def test_a_folder_says_what_it_holds(folder: Path):
    config = read_policy_config(folder)
    assert (config.policy, config.arguments) == ("asn_policies:LocalTransform", {"hidden": 8})
    assert (config.base_model, config.fingerprint, config.sketch) == ("toy", "toy-1", {"head": 8, "tail": 4})
    card = (folder / "README.md").read_text()
    assert "base_model: toy" in card
    assert "LocalTransform" in card


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(folder: Path):
    save_policy(folder, Pipeline(STEPS))
    assert isinstance(load_policy(folder), Pipeline)
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_weights_are_refused(folder: Path, keep: int):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or missing.*older checkpoint"):
        load_policy(folder)


def test_missing_weights_are_refused(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="damaged or missing"):
        load_policy(folder)


@pytest.mark.parametrize("where", ["", "nowhere", "policy/README.md"])
def test_a_folder_without_a_policy_is_refused(folder: Path, where: str):
    with pytest.raises(CheckpointError, match="holds no policy"):
        load_policy(folder.parent / where)


@pytest.mark.parametrize(
    "content", [b"", b'{"policy": "asn_pol', b"[]", b"3", b"\xff", b"{}", b'{"format_version": 1, "surprise": 2}']
)
def test_a_damaged_configuration_is_refused(folder: Path, content: bytes):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_policy(folder)


def test_a_newer_format_asks_for_an_upgrade_whatever_else_it_says(folder: Path):
    edit(folder, format_version=2, a_key_of_the_future=1)
    with pytest.raises(CheckpointError, match=r"format version 2.*reads up to 1; upgrade asn_rl"):
        load_policy(folder)


def test_weights_of_another_shape_are_refused(folder: Path):
    edit(folder, arguments={"hidden": 16})
    with pytest.raises(CheckpointError, match="do not fit LocalTransform"):
        load_policy(folder)


def test_arguments_the_class_does_not_take_are_refused(folder: Path):
    edit(folder, arguments={"hidden": 8, "depth": 2})
    with pytest.raises(CheckpointError, match=r"does not take the arguments.*depth"):
        load_policy(folder)


def test_another_class_is_refused_by_from_pretrained(folder: Path):
    with pytest.raises(CheckpointError, match="holds a asn_policies:LocalTransform, not a asn_policies:Pipeline"):
        Pipeline.from_pretrained(folder)


def test_another_base_model_is_refused(folder: Path):
    with pytest.raises(
        CheckpointError, match=r"trained on base model 'toy' .fingerprint toy-1.*uses one with .* toy-2"
    ):
        check_compatible(folder, fingerprint="toy-2")
    with pytest.raises(CheckpointError, match="use the same base model"):
        LocalTransform.from_pretrained(folder, fingerprint="toy-2")


def test_a_reference_of_another_architecture_is_refused(folder: Path):
    architecture = "asn_policies:SamplingNetwork"
    with pytest.raises(CheckpointError, match=f"is a asn_policies:LocalTransform, expected {architecture}"):
        check_compatible(folder, fingerprint="toy-1", architecture=architecture)
    assert check_compatible(folder, fingerprint="toy-1", architecture="asn_policies:LocalTransform")


# What a file says is never run.


@pytest.mark.parametrize(
    ("policy", "arguments"),
    [("os:mkdir", {"path": "{}"}), ("pathlib:Path.mkdir", {}), ("torch:load", {"f": "{}"}), ("os:sep", {})],
)
def test_only_a_module_class_is_ever_called(tmp_path: Path, folder: Path, policy: str, arguments: dict[str, str]):
    trap = tmp_path / "trap"
    edit(folder, policy=policy, arguments={name: value.format(trap) for name, value in arguments.items()})
    with pytest.raises((CheckpointError, LookupError)):
        load_policy(folder)
    assert not trap.exists()


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_loading_a_policy_never_unpickles(tmp_path: Path, folder: Path, name: str):
    torch.save({"state": Trap(tmp_path / "trap")}, folder / name)
    with pytest.raises(CheckpointError):
        load_policy(folder)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_loading_a_state_never_unpickles(tmp_path: Path, name: str):
    save_state(tmp_path, {"a": torch.zeros(1)})
    torch.save({"state": Trap(tmp_path / "trap")}, tmp_path / name)
    with pytest.raises(CheckpointError):
        load_state(tmp_path)
    assert not (tmp_path / "trap").exists()


# Training states


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_state_survives_with_its_keys_types_and_tensors(tmp_path: Path):
    shared = torch.arange(6.0)
    state = {
        "optimizer": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 7: {"exp_avg": shared[::2]}},
        "lists": [1, [torch.zeros(0), None], "text", 0.1, True, {}],
        "dtypes": [torch.ones(2, dtype=d) for d in (torch.bool, torch.uint8, torch.int64, torch.bfloat16)],
        "shared": [shared, shared],
        "__tensor__": "a name like the mark",
        "a": {"b": torch.zeros(1)},
        "a/b": torch.ones(1),
    }
    save_state(tmp_path, state)
    assert same(load_state(tmp_path), state)


def test_a_state_without_tensors_survives(tmp_path: Path):
    save_state(tmp_path, {"step": 3, "beta": 1e-3})
    assert load_state(tmp_path) == {"step": 3, "beta": 1e-3}


def test_an_optimiser_continues_from_its_saved_state(tmp_path: Path):
    def run(steps: int, resume: bool) -> Tensor:
        weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        for step in range(steps):
            if resume and step == 2:
                save_state(tmp_path, {"weight": weight, "optimizer": optimizer.state_dict()})
                state = load_state(tmp_path)
                weight = nn.Parameter(state["weight"])
                optimizer = torch.optim.AdamW([weight], lr=0.1)
                optimizer.load_state_dict(state["optimizer"])
            optimizer.zero_grad()
            (weight**4).sum().backward()
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(5, resume=True), run(5, resume=False))


def test_every_random_state_is_restored(tmp_path: Path):
    def draw() -> tuple[float, float, float, float]:
        legacy = np.random.standard_normal()  # noqa: NPY002  (the global state is what is meant)
        return random.random(), random.gauss(0, 1), float(legacy), torch.rand(1).item()

    draw()
    save_state(tmp_path, rng_state())
    first = draw()
    draw()
    set_rng_state(load_state(tmp_path))
    assert draw() == first


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("keep", [None, 0, 5, -1])
def test_a_missing_or_truncated_state_is_refused(tmp_path: Path, name: str, keep: int | None):
    save_state(tmp_path, {"a": torch.arange(4), "b": 1})
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if keep is not None:
        (tmp_path / name).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"damaged or missing.*Remove that checkpoint"):
        load_state(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", '{"format_version": 1}', '{"state": {}}'])
def test_a_state_of_another_form_is_refused(tmp_path: Path, content: str):
    save_state(tmp_path, {})
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match="damaged or missing"):
        load_state(tmp_path)


def test_tensors_of_another_state_are_refused(tmp_path: Path):
    save_state(tmp_path, {"a": torch.zeros(1)})
    plain = (tmp_path / "state.json").read_text()
    save_state(tmp_path, {"b": torch.zeros(1)})
    (tmp_path / "state.json").write_text(plain)
    with pytest.raises(CheckpointError, match="damaged or missing"):
        load_state(tmp_path)


def test_a_state_of_a_newer_format_asks_for_an_upgrade(tmp_path: Path):
    (tmp_path / "state.json").write_text('{"format_version": 2, "state": {}}')
    with pytest.raises(CheckpointError, match="upgrade asn_rl"):
        load_state(tmp_path)


# Whole or not at all


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, existing: bool, error: type[BaseException]):
    target = tmp_path / "step-000001"
    if existing:
        with atomic_folder(target) as scratch:
            (scratch / "a").write_text("old")

    def write() -> None:
        with atomic_folder(target) as scratch:
            (scratch / "a").write_text("new")
            raise error

    with pytest.raises(error):
        write()
    assert [path.name for path in tmp_path.iterdir()] == (["step-000001"] if existing else [])
    assert not existing or (target / "a").read_text() == "old"


@pytest.mark.parametrize("name", ["config.json", "README.md"])
def test_a_full_disk_leaves_the_old_policy_and_says_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    fill_disk(monkeypatch, name)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Free some disk space.*copy is intact"):
        save_policy(folder, LocalTransform(16))
    assert read_policy_config(folder).arguments == {"hidden": 8}
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]


def test_a_disk_that_is_full_for_the_weights_is_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object) -> None:
        raise SafetensorError('Error while serializing: I/O error: Os { code: 28, message: "No space left on device" }')

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_policy(folder, LocalTransform(16))
    with pytest.raises(CheckpointError, match="No space left on device"), atomic_folder(folder) as scratch:
        save_state(scratch, {"a": torch.zeros(1)})
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*policy"):
        save_policy(tmp_path / "file" / "policy", LocalTransform(8))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_between_the_two_renames_restores_the_old_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    rename = Path.rename
    renames: list[Path] = []

    def second_fails(self: Path, target: Path) -> Path:
        renames.append(self)
        if len(renames) == 2:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        save_policy(folder, LocalTransform(16))
    assert read_policy_config(folder).arguments == {"hidden": 8}
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]


# Checkpoints of a run


def test_the_newest_checkpoint_is_found_also_past_six_digits(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 10, 999_999, 1_000_000):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
        found = latest_checkpoint(tmp_path)
        assert found == checkpoint_folder(tmp_path, step)


def test_leftovers_and_copies_are_no_checkpoints_and_stay(tmp_path: Path):
    checkpoint_folder(tmp_path, 10).mkdir(parents=True)
    others = [".step-000020-x1y2", ".step-000020-x1y2-old", "step-000010-best", "step-final", "notes"]
    for name in others:
        (tmp_path / "checkpoints" / name).mkdir()
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 10)
    checkpoint_folder(tmp_path, 20).mkdir()
    remove_old_checkpoints(tmp_path, keep=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted([*others, "step-000020"])


def test_a_write_in_progress_does_not_look_like_a_checkpoint(tmp_path: Path):
    with atomic_folder(checkpoint_folder(tmp_path, 5)) as scratch:
        (scratch / "half").touch()
        assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 5)
