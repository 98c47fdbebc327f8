"""Trajectories on disk: safetensors beside JSON, written as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asn_rl.checkpoint import atomic_folder, load_state, save_state
from asn_rl.ops.context import check_context
from asn_rl.ops.sketch import Sketch
from asn_rl.types import OPTIONAL_INPUTS, Observation, Prompt, Trajectories

_LISTS = ("sample", "prompt_ids", "completion_ids", "completions")
_TENSORS = ("terminated", "points", "behaviour_logprobs", "base_logprobs")


def save_trajectories(folder: Path, trajectories: Trajectories) -> None:
    """Write trajectories to `folder`; an interruption leaves nothing there."""
    obs = trajectories.observations
    state: dict[str, Any] = {
        "prompts": [{"id": p.id, "content": p.content, "columns": dict(p.columns)} for p in trajectories.prompts],
        **{name: list(getattr(trajectories, name)) for name in _LISTS},
        **{name: getattr(trajectories, name) for name in _TENSORS},
        "sketch": vars(obs.sketch),
        "observations": {name: getattr(obs, name) for name in ("context", *sorted(OPTIONAL_INPUTS))},
        "extras": dict(trajectories.extras),
        "recorded": trajectories.recorded,
    }
    with atomic_folder(folder) as scratch:
        save_state(scratch, state)


def load_trajectories(folder: Path) -> Trajectories:
    """What `save_trajectories` wrote.

    Raises:
        CheckpointError: missing or truncated.
        InvalidValue: a context entry out of its documented range.
    """
    state = load_state(folder)
    check_context(state["observations"]["context"])
    return Trajectories(
        prompts=[Prompt(p["id"], p["content"], p["columns"]) for p in state["prompts"]],
        observations=Observation(Sketch(**state["sketch"]), **state["observations"]),
        extras=state["extras"],
        recorded=state.get("recorded", True),
        **{name: state[name] for name in (*_LISTS, *_TENSORS)},
    )
