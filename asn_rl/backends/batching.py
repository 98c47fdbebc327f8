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


def scoring_chunks(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], batch_tokens: int, shared: int = 0
) -> list[list[int]]:
    """Indices of the completions that have tokens, cut so that a padded chunk holds at most `batch_tokens` positions of
    completions, whose logits are held, and a few times as many with the prompts, whose keys and values are held.

    With equal prompts side by side a prompt is computed once; with equal lengths side by side nothing is padded. The
    order that computes fewer positions is taken.

    Args:
        shared: tokens that all prompts begin with, which are computed once at any rate.
    """
    present = [i for i, row in enumerate(completion_ids) if len(row)]
    length, prompt = [len(row) for row in completion_ids], [tuple(ids) for ids in prompt_ids]
    by_prompt = sorted(present, key=lambda i: (len(prompt[i]), prompt[i], length[i]))
    by_length = sorted(present, key=lambda i: (length[i], len(prompt[i]), prompt[i]))

    def cut(order: Sequence[int]) -> list[list[int]]:
        chunks: list[list[int]] = []
        longest = longest_prompt = 0
        for i in order:
            longest, longest_prompt = max(longest, length[i]), max(longest_prompt, len(prompt[i]))
            rows = len(chunks[-1]) + 1 if chunks else 1
            behind_prompts = rows * (longest_prompt + longest) <= CACHED_PER_SCORED * batch_tokens
            if chunks and rows * longest <= batch_tokens and behind_prompts:
                chunks[-1].append(i)
            else:
                chunks.append([i])
                longest, longest_prompt = length[i], len(prompt[i])
        return chunks

    def computed(chunks: Sequence[Sequence[int]]) -> int:
        return sum(
            len(chunk) * (max(length[i] for i in chunk) - 1)
            + sum(len(ids) - shared for ids in {prompt[i] for i in chunk})
            for chunk in chunks
        )

    return min(cut(by_prompt), cut(by_length), key=computed)
