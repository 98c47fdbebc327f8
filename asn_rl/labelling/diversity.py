"""How much the completions that a heuristic gives to one prompt differ, for the labelling page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from asn_rl.evaluation.statistics import as_plain
from asn_rl.labelling.rating import interval
from asn_rl.labelling.store import CandidateStore, read_candidates
from asn_rl.ops.kernels import von_neumann_entropy
from asn_rl.ops.ngrams import distinct_n, self_bleu
from asn_rl.rewards.embedding_diversity import group_kernels, load_encoder
from asn_rl.runs import progress

LEXICAL = ("self_bleu", "distinct_1", "distinct_2", "distinct_3")
SEMANTIC = ("vendi", "embedding_entropy")


def heuristic_diversity(
    store: CandidateStore, prompts: Sequence[int], strata: Sequence[str], encoder: str = ""
) -> dict[str, dict[str, Any]]:
    """Diversity of each heuristic's completions of a prompt: mean over prompts with its interval, strata weighing the
    same; None where no prompt has two completions.

    Args:
        prompts: indices of the prompts to read.
        strata: a label for each of the P prompts.
        encoder: sentence encoder of `vendi` and `embedding_entropy`, as `vendi_diversity` takes it; empty: these two
            are left out.

    Returns:
        {heuristic: {measure: {mean, low, high}}}.

    Raises:
        RewardError: the encoder is not installed or cannot be loaded.
    """
    heuristics = store.grid.heuristics
    measures = (*LEXICAL, *SEMANTIC) if encoder else LEXICAL
    found = np.full((len(measures), len(prompts), len(heuristics)), np.nan)
    with progress("diversity", len(prompts)) as advance:
        for row, prompt in enumerate(prompts):
            found[:, row] = _of_prompt(_texts(store, prompt), measures, encoder)
            advance(1, "")
    part = [strata[prompt] for prompt in prompts]

    def plain(values: np.ndarray) -> dict[str, float | None] | None:
        about = interval(values, part)
        return None if about is None else as_plain(about)

    return {
        heuristic: {measure: plain(found[i, :, j]) for i, measure in enumerate(measures)}
        for j, heuristic in enumerate(heuristics)
    }


def group_diversity(texts: Sequence[str], kernel: Tensor | None = None) -> dict[str, float]:
    """Diversity of a group of at least two texts.

    `self_bleu`: mean over the texts, in [0, 1], lower is more diverse (`ops.ngrams.self_bleu`). `distinct_1`,
    `distinct_2`, `distinct_3`: distinct word n-grams over all, in [0, 1]. `vendi`: effective number of different texts,
    in [1, n] (`ops.kernels.vendi_score`). `embedding_entropy`: its logarithm, nats. Words are what whitespace
    separates. Nothing is left out: a text without words has self-BLEU 0, and an embedding like any other.

    Args:
        kernel: (n, n) similarities of the texts; without it there is no `vendi` and no `embedding_entropy`.
    """
    words = [text.split() for text in texts]
    lexical = {
        "self_bleu": sum(self_bleu(words)) / len(words), **{f"distinct_{n}": distinct_n(words, n) for n in (1, 2, 3)}
    }  # fmt: skip
    if kernel is None:
        return lexical
    entropy = von_neumann_entropy(kernel)
    return {**lexical, "vendi": float(entropy.exp()), "embedding_entropy": float(entropy)}


def _texts(store: CandidateStore, prompt: int) -> list[list[str]]:
    """The completions of a prompt, by heuristic."""
    cells = np.argwhere(store.present[prompt]).tolist()
    candidates = read_candidates([store.location((prompt, j, k)) for j, k in cells])
    groups: list[list[str]] = [[] for _ in store.grid.heuristics]
    for (j, _), candidate in zip(cells, candidates, strict=True):
        groups[j].append(candidate.completion)
    return groups


def _of_prompt(groups: Sequence[Sequence[str]], measures: Sequence[str], encoder: str) -> np.ndarray:
    """(measures, A); NaN for a heuristic with fewer than two completions."""
    # All heuristics at once: they share many completions.
    kernels = group_kernels(groups, load_encoder(encoder)) if encoder else [None] * len(groups)
    found = np.full((len(measures), len(groups)), np.nan)
    for j, (group, kernel) in enumerate(zip(groups, kernels, strict=True)):
        if len(group) > 1:
            figures = group_diversity(group, kernel)
            found[:, j] = [figures[measure] for measure in measures]
    return found
