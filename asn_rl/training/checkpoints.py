"""Checkpoints of a training run: the policy beside what its trainer needs to continue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asn_rl.checkpoint import (
    atomic_folder,
    checkpoint_folder,
    latest_checkpoint,
    load_state,
    load_weights,
    remove_old_checkpoints,
    remove_unfinished_checkpoints,
    save_state,
)
from asn_rl.protocols import TrainablePolicy


def save_training(
    run: Path, step: int, policy: TrainablePolicy, state: Mapping[str, Any], *, keep: int, metadata: Mapping[str, Any]
) -> None:
    """Write the checkpoint of a step; all but the newest `keep` are removed."""
    with atomic_folder(checkpoint_folder(run, step)) as scratch:
        policy.save_pretrained(scratch / "policy", **metadata)
        save_state(scratch, state)
    remove_old_checkpoints(run, keep)


def load_training(run: Path, policy: TrainablePolicy) -> tuple[dict[str, Any], Path] | None:
    """Put the newest checkpoint's weights into `policy`; its state and folder, None where there is none."""
    remove_unfinished_checkpoints(run)
    folder = latest_checkpoint(run)
    if folder is None:
        return None
    state = load_state(folder)
    load_weights(policy, folder / "policy")
    return state, folder
