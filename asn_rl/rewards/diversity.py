"""Distinct valid answers within a group of completions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from asn_rl.errors import RewardError
from asn_rl.rewards.inputs import completion_text, group_keys, required_column, terminated_flags


def distinct_valid(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
) -> list[float | None]:
    """1 / (completions of the group with the same answer) for a valid answer, else 0: a group's sum is its number of
    distinct valid answers.

    The row's `valid` is a list of accepted phrases, singular, of one or more words. The answer is the first accepted
    phrase in the text, as whole words in any case, plurals in -s, -es and -ies included; of phrases that start at
    the same place the longest. Phrases that the prompt itself contains are no answers. A completion cut off by the
    token limit scores 0 and counts against no other. Rows whose `valid` is None do not apply.

    Groups are equal cells of the column `group`, else of `prompt_id`, else equal prompts.

    Raises:
        RewardError: no column `valid`, or a cell that is not a list of phrases.
    """
    accepted = required_column(columns, "valid", "distinct_valid")
    ended = terminated_flags(columns, len(completions))
    answers = [
        first_phrase(completion_text(text), _phrases(valid), completion_text(prompt)) if done and valid else None
        for prompt, text, valid, done in zip(prompts, completions, accepted, ended, strict=True)
    ]
    keyed = list(zip(group_keys(prompts, columns), answers, strict=True))
    sizes = Counter(keyed)
    return [
        None if valid is None else 0.0 if answer is None else 1.0 / sizes[group, answer]
        for valid, (group, answer) in zip(accepted, keyed, strict=True)
    ]


def first_phrase(text: str, phrases: tuple[str, ...], prompt: str = "") -> str | None:
    """The first of some lower-case phrases in a text, in its singular form; None without one.

    Phrases that occur in the prompt are passed over.
    """
    ordered, pattern = _matcher(phrases)
    text, echoes = text.lower(), _occurring(phrases, prompt.lower())
    found = pattern.search(text)
    while found is not None and found.lastindex is not None:
        phrase = ordered[found.lastindex - 1]
        if phrase not in echoes:
            return phrase
        found = pattern.search(text, found.start() + 1)
    return None


@lru_cache(maxsize=256)
def _matcher(phrases: tuple[str, ...]) -> tuple[list[str], re.Pattern[str]]:
    """Phrases, longest first, and a pattern whose n-th group is the n-th of them."""
    ordered = sorted(set(phrases), key=lambda phrase: (-len(phrase), phrase))
    return ordered, re.compile(_whole_words("|".join(f"({_forms(phrase)})" for phrase in ordered)))


@lru_cache(maxsize=4096)
def _occurring(phrases: tuple[str, ...], text: str) -> frozenset[str]:
    """All phrases that occur in a text, those inside longer phrases too."""
    # The first word without its last letter is in every form of a phrase: a cheap test before the exact one.
    likely = [phrase for phrase in phrases if phrase.split()[0][:-1] in text]
    return frozenset(phrase for phrase in likely if re.search(_whole_words(_forms(phrase)), text))


def _whole_words(pattern: str) -> str:
    return rf"(?<!\w)(?:{pattern})(?!\w)"


def _forms(phrase: str) -> str:
    """Pattern of a phrase and its simple plurals; words may be joined by spaces or hyphens."""
    words = r"[\s-]+".join(re.escape(word) for word in phrase.split())
    return rf"{words[:-1]}(?:y|ys|ies)" if words.endswith("y") else rf"{words}(?:e?s)?"


def _phrases(valid: Any) -> tuple[str, ...]:
    if isinstance(valid, list | tuple) and all(isinstance(phrase, str) and phrase.strip() for phrase in valid):
        return tuple(phrase.lower() for phrase in valid)
    raise RewardError(
        f"distinct_valid needs a list of accepted phrases in the column 'valid', got {valid!r:.100}; use null for "
        "rows it does not apply to"
    )


distinct_valid.__dict__["compares"] = "group"
