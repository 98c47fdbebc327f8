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
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], batch_tokens: int, shared: int | None
) -> list[list[int]]:
    """Indices of the completions that have tokens, cut so that a padded chunk holds at most `batch_tokens` positions of
    completions, whose logits are held, and a few times as many with the prompts, whose keys and values are held.

    With equal prompts side by side a prompt is computed once; with equal lengths side by side nothing is padded. The
    order that computes fewer positions is taken.

    Args:
        shared: tokens that all prompts begin with, which are computed once at any rate; None: prompts are computed in
            every row, and logits are held from the end of a chunk's shortest one.
    """
    present = [i for i, row in enumerate(completion_ids) if len(row)]
    length, prompt = [len(row) for row in completion_ids], [tuple(ids) for ids in prompt_ids]
    by_prompt = sorted(present, key=lambda i: (len(prompt[i]), prompt[i], length[i]))
    by_length = sorted(present, key=lambda i: (length[i], len(prompt[i]), prompt[i]))

    def cut(order: Sequence[int]) -> list[list[int]]:
        chunks: list[list[int]] = []
        longest = shortest_prompt = longest_prompt = 0
        for i in order:
            if chunks:
                longest, longest_prompt = max(longest, length[i]), max(longest_prompt, len(prompt[i]))
                shortest_prompt = min(shortest_prompt, len(prompt[i]))
                rows, beside = len(chunks[-1]) + 1, longest_prompt - shortest_prompt if shared is None else 0
                cached = rows * (longest_prompt + longest) <= CACHED_PER_SCORED * batch_tokens
                if rows * (longest + beside) <= batch_tokens and cached:
                    chunks[-1].append(i)
                    continue
            chunks.append([i])
            longest, shortest_prompt, longest_prompt = length[i], len(prompt[i]), len(prompt[i])
        return chunks

    def computed(chunk: Sequence[int]) -> int:
        width, prompts = max(length[i] for i in chunk), {prompt[i] for i in chunk}
        if shared is None:
            return len(chunk) * (width + max(map(len, prompts)))
        return len(chunk) * (width - 1) + sum(len(ids) - shared for ids in prompts)

    return min(cut(by_prompt), cut(by_length), key=lambda chunks: sum(map(computed, chunks)))
