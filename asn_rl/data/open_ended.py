"""Open prompts ("Name an animal.") with lists of accepted answers, to be rewarded for distinct valid answers.

The 28 categories and three wordings are those of 40 and six for which SmolLM2-135M-Instruct, at temperature 0.5 and 32
tokens, gave a finished and valid answer in at least about one of ten samples; the others carry no signal.
"""

from __future__ import annotations

import json
import random
from functools import cache
from importlib import resources

from asn_rl.data.splits import split_slice
from asn_rl.types import Prompt

FORMS = ("Name {}.", "Pick {}.", "What is the name of {}?")


@cache
def categories() -> dict[str, list[str]]:
    """Category with its article -> accepted answers, lower case, singular."""
    return json.loads(resources.files("asn_rl.data").joinpath("categories.json").read_text())


def open_ended(split: str, *, forms: tuple[str, ...] | list[str] = FORMS, seed: int = 0) -> list[Prompt]:
    """Every wording of every category; columns `task` and `valid`. Categories are divided among the splits."""
    names = sorted(categories())
    random.Random(seed).shuffle(names)
    return [
        Prompt(
            f"open/{name.split(' ', 1)[1].replace(' ', '-')}/{i}",
            form.format(name),
            {"task": "open", "valid": categories()[name]},
        )
        for name in sorted(split_slice(names, split))
        for i, form in enumerate(forms)
    ]


def mixture(
    split: str, *, operations: str = "+", forms: tuple[str, ...] | list[str] = FORMS, seed: int = 0
) -> list[Prompt]:
    """Arithmetic, where the likeliest answer is best, and open prompts, where it is worst: no static rule fits both."""
    from asn_rl.data.arithmetic import arithmetic

    return arithmetic(split, operations=operations, seed=seed) + open_ended(split, forms=forms, seed=seed)
