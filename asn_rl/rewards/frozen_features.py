"""A small reward model: a linear Bradley-Terry head on features of the frozen base model.

The features of a completion are the last token's final hidden state beside the mean of an inner layer over the
completion's tokens (two thirds of the way up by default): what the model is about to say, and what it has been thinking
of. The score is w . (features - mean) / scale, in nats: P(a is better than b) = sigmoid(score(a) - score(b)).
`asn_rl.training.reward_model` fits the head.

Two warnings. Scores of different prompts do not compare: only pairs within a prompt were learned. And a head learns
whatever tells right from wrong in its pairs: where a scorer gives 0 to completions that the token limit cut off, being
cut off is most of what it learns.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from asn_rl.backends import BackendConfig, shared_backend
from asn_rl.backends.batching import chunks_of_similar_length
from asn_rl.checkpoint import CONFIG, FORMAT_VERSION, WEIGHTS, atomic_folder
from asn_rl.config import from_dict, to_dict
from asn_rl.errors import AsnError, CheckpointError, InvalidValue, RewardError

if TYPE_CHECKING:
    from asn_rl.backends.hf import HFBackend

KIND = "bradley_terry_head"
BATCH_TOKENS = 2048
"""padded positions of a pass; every layer's hidden states of these are held at once"""


@dataclass(frozen=True)
class Head:
    """A fitted head and what it reads. D is the base model's hidden size."""

    weight: Tensor
    """(2 D,) float64"""
    mean: Tensor
    """(2 D,) float64 of the features it was fitted on"""
    scale: Tensor
    """(2 D,) float64 standard deviations"""
    base_model: BackendConfig
    """how prompts are encoded, by which model, and its precision"""
    fingerprint: str
    """of that model"""
    layer: int
    """hidden layer that is averaged; 0 is the embedding, the number of layers the last one"""

    def scores(self, features: Tensor) -> Tensor:
        """(B,) scores of (B, 2 D) features."""
        return (features.double() - self.mean) / self.scale @ self.weight


def bradley_terry_head(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int] | None] | None = None,
    *,
    folder: str,
    base_model: str | None = None,
    device: str = "cpu",
    **columns: Any,
) -> list[float | None]:
    """Scores of a trained head (see `asn_rl.training.reward_model`), in nats relative to its training completions.

    It reads token ids as they were sampled: None for a completion without any, and for one that exceeds the base
    model's context. `bradley_terry_head.counts` has how many: `without_ids`, `too_long`.

    Args:
        folder: a head's folder.
        base_model: where its base model lies now; None: where it lay in training.
        device: torch device of the base model.

    Raises:
        CheckpointError: no head there, damaged, of a newer format, or trained on another base model.
        BackendError: the base model cannot be loaded.
    """
    head = load_head(folder)
    name = head.base_model.model if base_model is None else base_model
    backend = load_features(replace(head.base_model, model=name, device=device))
    if backend.fingerprint != head.fingerprint:
        raise CheckpointError(
            f"the head in {folder} was trained on base model {head.base_model.model!r} (fingerprint "
            f"{head.fingerprint}), {name!r} has fingerprint {backend.fingerprint}; give its base model, or train a new "
            "head"
        )
    given = [None] * len(completions) if completion_ids is None else list(completion_ids)
    rows = [(backend.encode(prompt), list(ids or ())) for prompt, ids in zip(prompts, given, strict=True)]
    known = [i for i, (_, ids) in enumerate(rows) if ids]
    fits = [i for i in known if len(rows[i][0]) + len(rows[i][1]) <= backend.max_context]
    COUNTS["without_ids"] += len(rows) - len(known)
    COUNTS["too_long"] += len(known) - len(fits)
    scores: list[float | None] = [None] * len(rows)
    if fits:
        found = head.scores(features(backend, [rows[i] for i in fits], head.layer)).tolist()
        for i, value in zip(fits, found, strict=True):
            scores[i] = value
    return scores


@torch.inference_mode()
def features(backend: HFBackend, rows: Sequence[tuple[Sequence[int], Sequence[int]]], layer: int) -> Tensor:
    """(B, 2 D) fp32 features of B (prompt ids, completion ids), on the CPU; no completion may be empty.

    Batches of similar length, padded on the right, where a causal model does not see it: in float32 a row's features
    do not depend on its batch beyond rounding.
    """
    layers = backend.model.config.get_text_config().num_hidden_layers
    if not 0 <= layer <= layers:
        raise InvalidValue("layer", layer, f"in [0, {layers}], the base model's hidden layers")
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    found = torch.empty(len(rows), 2 * _width(backend))
    for part in chunks_of_similar_length(lengths, BATCH_TOKENS):
        width = lengths[part[-1]]
        ids = torch.zeros(len(part), width, dtype=torch.long)
        inside = torch.zeros(len(part), width, dtype=torch.bool)
        for row, i in enumerate(part):
            prompt, completion = rows[i]
            ids[row, : lengths[i]] = torch.tensor([*prompt, *completion])
            inside[row, len(prompt) : lengths[i]] = True
        ends = torch.tensor([lengths[i] - 1 for i in part], device=backend.device)
        last, inner = _states(backend, ids, ends, layer)
        mask = inside.to(inner.device).unsqueeze(-1)
        mean = (inner.float() * mask).sum(1) / mask.sum(1)
        found[part] = torch.cat([last.float(), mean], -1).cpu()
    return found


def _states(backend: HFBackend, ids: Tensor, ends: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """(B, D) final hidden states at column `ends` of each row, and (B, T, D) states of an inner layer."""
    ids = ids.to(backend.device)
    mask = (torch.arange(ids.shape[1], device=backend.device) <= ends.unsqueeze(1)).long()
    output = backend.model(
        input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True, logits_to_keep=1
    )
    states = output.hidden_states
    return states[-1][torch.arange(len(ids), device=backend.device), ends], states[layer]


def _width(backend: HFBackend) -> int:
    return backend.model.config.get_text_config().hidden_size


def save_head(folder: str | Path, head: Head, notes: dict[str, Any]) -> None:
    """Write a head's folder, whole or not at all: `config.json` and `model.safetensors`."""
    config = {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        # Where it computes is no property of the head.
        "base_model": {name: value for name, value in to_dict(head.base_model).items() if name != "device"},
        "fingerprint": head.fingerprint,
        "layer": head.layer,
        "features": f"last token of the final hidden state, then mean of hidden layer {head.layer} over the completion",
        "notes": notes,
    }
    with atomic_folder(Path(folder)) as scratch:
        try:
            save_file(_tensors(head), scratch / WEIGHTS)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_head(folder: str | Path) -> Head:
    """What `save_head` wrote.

    Raises:
        CheckpointError: no head there, damaged, or of a newer format.
    """
    path = Path(folder) / CONFIG
    try:
        raw = json.loads(path.read_text())
        if raw.get("kind") != KIND:
            raise CheckpointError(f"{folder} holds no {KIND} but {raw.get('kind', raw.get('policy'))!r}")
        if raw["format_version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {raw['format_version']}, this library reads up to {FORMAT_VERSION}; "
                "upgrade asn_rl"
            )
        tensors = load_file(Path(folder) / WEIGHTS)
        base_model = from_dict(BackendConfig, raw["base_model"])
        parts = {name: tensors[name] for name in _TENSORS}
        head = Head(base_model=base_model, fingerprint=str(raw["fingerprint"]), layer=int(raw["layer"]), **parts)
        if len({tensor.shape for tensor in tensors.values()}) != 1 or not (head.scale > 0).all():
            raise ValueError("its tensors do not fit together")
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no {KIND} ({error}); train one with train_reward_model") from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError, AsnError, SafetensorError) as error:
        raise CheckpointError(f"the head in {folder} is damaged: {error}. Train it again") from error
    return head


_TENSORS = ("weight", "mean", "scale")


def _tensors(head: Head) -> dict[str, Tensor]:
    return {name: getattr(head, name).contiguous() for name in _TENSORS}


def load_features(base_model: BackendConfig) -> HFBackend:
    """The process-wide base model of these settings.

    Raises:
        RewardError: a backend other than transformers; others do not show inner layers.
    """
    if base_model.kind != "hf":
        raise RewardError(f"features need the backend kind 'hf', which shows inner layers, got {base_model.kind!r}")
    from asn_rl.backends.hf import HFBackend

    backend = shared_backend(base_model)
    assert isinstance(backend, HFBackend)
    return backend


COUNTS: Counter[str] = Counter()
bradley_terry_head.__dict__["counts"] = COUNTS
