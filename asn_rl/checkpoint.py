"""Policies and training states on disk: JSON beside safetensors, never pickle.

A policy folder holds `config.json` (class, constructor arguments, base model), `model.safetensors` and a model card.
A training state additionally holds arbitrary nested dictionaries of tensors and plain values.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asn_rl.errors import CheckpointError
from asn_rl.protocols import TrainablePolicy
from asn_rl.registry import load_attribute

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD, STATE = "config.json", "model.safetensors", "README.md", "state.json"


@dataclass(frozen=True)
class PolicyConfig:
    """What `config.json` of a policy folder says."""

    policy: str
    """class as "module:attribute" """
    arguments: dict[str, Any]
    """constructor arguments"""
    base_model: str | None = None
    """name of the base model it was trained on"""
    fingerprint: str | None = None
    """fingerprint of that base model"""
    sketch: dict[str, int] | None = None
    """sketch size it was trained on"""
    format_version: int = FORMAT_VERSION


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of `target` when the block ends without an error.

    An interrupted or failed write (a full disk) leaves the old `target` as it was.
    """
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        yield scratch
        scratch.chmod(0o755)
        _replace_folder(target, scratch)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error}. Free some disk space, or choose a folder you may write to; a previous "
            "copy is intact"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _replace_folder(target: Path, new: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = new.with_name(new.name + "-old")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:  # Ctrl-C too
        if not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_policy(folder: Path, module: TrainablePolicy, config: PolicyConfig, card: str) -> None:
    """Write a policy into an existing folder. Any file system or serialisation error passes through as OSError."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / WEIGHTS)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    (folder / CONFIG).write_text(json.dumps(vars(config), indent=2, sort_keys=True) + "\n")
    (folder / CARD).write_text(card)


def save_policy(folder: str | Path, policy: Any, **metadata: Any) -> None:
    """Save a policy (`policy.save_pretrained`) so that an interruption never leaves half a folder."""
    with atomic_folder(Path(folder)) as scratch:
        policy.save_pretrained(scratch, **metadata)


def read_policy_config(folder: str | Path) -> PolicyConfig:
    """`config.json` of a policy folder.

    Raises:
        CheckpointError: missing, not JSON, or of a newer format.
    """
    path = Path(folder) / CONFIG
    try:
        raw = json.loads(path.read_text())
        _check_format(path, raw)  # first: a newer format may have other keys
        return PolicyConfig(**raw)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder} holds no policy ({CONFIG} is missing); give a folder made by save_pretrained"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Restore it, or use an older checkpoint") from error


def _check_format(path: Path, raw: Any) -> None:
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(version, int):
        raise TypeError("it has no format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this library reads up to {FORMAT_VERSION}; upgrade asn_rl"
        )


def load_policy(folder: str | Path, **changes: Any) -> TrainablePolicy:
    """The policy a folder holds, whatever its class. The class is imported by the name the folder gives.

    Args:
        changes: constructor arguments in the place of those it was saved with, for inference: `hard_cut=True` cuts
            exactly where training cut softly, `argmax=True` takes a gate's likeliest strategy alone.

    Raises:
        CheckpointError: damaged, of a newer format, or not a policy: only an `nn.Module` class is ever called.
    """
    config = read_policy_config(folder)
    cls = load_attribute(config.policy)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckpointError(f"{folder} names {config.policy!r} as its policy, which is not an nn.Module class")
    try:
        module = cls(**{**config.arguments, **changes})
    except TypeError as error:
        raise CheckpointError(
            f"{config.policy} does not take the arguments in {folder} or those given: {error}. Use the version it was "
            "saved with"
        ) from error
    if not isinstance(module, TrainablePolicy):
        raise CheckpointError(f"{folder} names {config.policy!r}, which is not a policy (asn_rl.protocols)")
    load_weights(module, Path(folder))
    return module


def load_weights(module: TrainablePolicy, folder: Path) -> None:
    """Weights of a policy folder into a module of the same shape."""
    tensors = _load_tensors(folder / WEIGHTS)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {folder} do not fit {type(module).__name__}: {error}") from error


def check_compatible(folder: str | Path, *, fingerprint: str, architecture: str | None = None) -> PolicyConfig:
    """Refuse a policy of another base model, or (for a KL reference) of another architecture."""
    config = read_policy_config(folder)
    if config.fingerprint is not None and config.fingerprint != fingerprint:
        raise CheckpointError(
            f"the policy in {folder} was trained on base model {config.base_model!r} (fingerprint "
            f"{config.fingerprint}), this run uses one with fingerprint {fingerprint}; use the same base model, or "
            "train a new policy"
        )
    if architecture is not None and config.policy != architecture:
        raise CheckpointError(
            f"the policy in {folder} is a {config.policy}, expected {architecture}; a reference must have the "
            "architecture of the policy it anchors"
        )
    return config


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a nested dictionary of tensors, numbers, strings and lists into an existing folder."""
    tensors: dict[str, Tensor] = {}
    plain = _strip_tensors(state, "", tensors)
    try:
        save_file(tensors, folder / "state.safetensors")
    except SafetensorError as error:
        raise OSError(str(error)) from error
    (folder / STATE).write_text(json.dumps({"format_version": FORMAT_VERSION, "state": plain}))


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        CheckpointError: missing, truncated, or of a newer format.
    """
    try:
        raw = json.loads((folder / STATE).read_text())
        _check_format(folder / STATE, raw)
        return _put_tensors(raw["state"], load_file(folder / "state.safetensors"))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"the training state in {folder} is damaged or missing: {error}. Remove that checkpoint; the run then "
            "resumes from the one before"
        ) from error


_MARK = "__tensor__"


def _strip_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{path}"  # the number keeps {"a": {"b": t}} and {"a/b": t} apart
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_MARK: name}
    if isinstance(value, Mapping):
        # JSON keys are strings; optimisers key their state by integers.
        return {"__items__": [[key, _strip_tensors(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_strip_tensors(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _MARK in value:
            return tensors[value[_MARK]]
        return {key: _put_tensors(item, tensors) for key, item in value["__items__"]}
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is damaged or missing: {error}. Restore it, or use an older checkpoint"
        ) from error


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder; unfinished writes have names that start with a dot."""
    found = _checkpoints(run)
    return found[-1] if found else None


def _checkpoints(run: Path) -> list[Path]:
    """Oldest first. Other names (a copy that somebody keeps) are not ours to load or remove."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def remove_old_checkpoints(run: Path, keep: int) -> None:
    for folder in _checkpoints(run)[:-keep]:
        shutil.rmtree(folder)


def remove_unfinished_checkpoints(run: Path) -> None:
    """What a killed process left of the checkpoint it was writing."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def rng_state() -> dict[str, Any]:
    """Every global random state a run may draw from, in the form `save_state` takes."""
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002  (the global state of user code, such as rewards)
    assert isinstance(legacy, dict)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # of this process's own device
        "python": random.getstate(),
        "numpy": {**legacy, "state": {"key": legacy["state"]["key"].tolist(), "pos": legacy["state"]["pos"]}},
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])  # noqa: NPY002
