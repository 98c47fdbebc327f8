"""Rows of different lengths, cut into padded chunks that hold a bounded number of positions."""

from __future__ import annotations

from collections.abc import Sequence

CACHED_PER_SCORED = 4
"""cached positions, prompts included, for each position that is scored"""


def chunks_of_similar_length(lengths: Sequence[int], positions: int) -> list[list[int]]:
    """Indices in ascending length; a padded chunk holds `positions` at most, or one row."""
    chunks: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if chunks and (len(chunks[-1]) + 1) * lengths[i] <= positions:
            chunks[-1].append(i)
        else:
            chunks.append([i])
    return chunks


def chunks_by_prompt(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], batch_tokens: int
) -> list[list[int]]:
    """Indices of the completions that have tokens, equal prompts side by side, cut so that a padded chunk holds at
    most `batch_tokens` positions of completions, whose logits are held, and a few times as many with the prompts, whose
    keys and values are held."""
    chunks: list[list[int]] = []
    longest = 0
    present = [i for i, row in enumerate(completion_ids) if len(row)]
    for i in sorted(present, key=lambda i: (len(prompt_ids[i]), tuple(prompt_ids[i]), len(completion_ids[i]))):
        wider = max(longest, len(completion_ids[i]))
        rows = len(chunks[-1]) + 1 if chunks else 1
        behind_prompts = rows * (len(prompt_ids[i]) + wider) <= CACHED_PER_SCORED * batch_tokens
        if chunks and rows * wider <= batch_tokens and behind_prompts:
            chunks[-1].append(i)
            longest = wider
        else:
            chunks.append([i])
            longest = len(completion_ids[i])
    return chunks
