"""Rewards for the toy backend that read only the completion."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from asn_rl.backends.toy import ToyBackend

TOY = ToyBackend.random(vocab=32, seed=0)


def second_choice(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Share of the words that are the second most probable continuation of the word before.

    No temperature or truncation can make the second choice likelier than the first.
    """
    scores: list[float | None] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        words = [prompt.split()[-1], *completion.split()]
        ranks = [
            int((TOY.table[TOY.ids[before]] > TOY.table[TOY.ids[before], TOY.ids[word]]).sum())
            for before, word in pairwise(words)
        ]
        scores.append(sum(rank == 1 for rank in ranks) / len(ranks) if ranks else 0.0)
    return scores


def constant(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [0.5] * len(completions)


def interrupt(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Ctrl-C in the middle of the third call."""
    global calls
    calls += 1
    if calls == 3:
        raise KeyboardInterrupt
    return second_choice(prompts, completions)


calls = 0


def crash_on(prompts: list[str], completions: list[str], *, prompt: str, **columns: Any) -> list[float | None]:
    """1 for everything, unless one prompt is among them: then it raises."""
    if prompt in prompts:
        raise ZeroDivisionError(prompt)
    return [1.0] * len(completions)


def unreachable(
    prompts: list[Any], completions: list[str], *, folder: str, prompt_id: list[str], **columns: Any
) -> list[float | None]:
    """Characters, by a server that does not know the prompts that `folder` has a file for."""
    asked = [not Path(folder, key).exists() for key in prompt_id]
    return [float(len(text)) if known else None for text, known in zip(completions, asked, strict=True)]


def more_words(
    prompts: list[Any], completions: list[Any], *, references: list[Any], group: list[str], **columns: Any
) -> list[float | None]:
    """A judge of win rates: the longer one wins, as `judge_win` pairs them."""
    scores: list[float | None] = []
    for i, completion in enumerate(completions):
        reference = references[i][group[:i].count(group[i])]
        theirs = reference if isinstance(reference, str) else reference[-1]["content"]
        mine = completion[-1]["content"]
        scores.append(0.5 + 0.5 * ((len(mine) > len(theirs)) - (len(mine) < len(theirs))))
    return scores
