"""Short arithmetic with one-digit operands: mid-range for a 135M model, needs no download."""

from __future__ import annotations

import random

from asn_rl.data.splits import split_slice
from asn_rl.errors import InvalidValue
from asn_rl.types import Prompt

_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def arithmetic(split: str, *, operations: str = "+", seed: int = 0) -> list[Prompt]:
    """`What is 3 + 4?` for one-digit operands; columns `task` and `answer`.

    Unordered operand pairs are divided among the splits: a pair seen in training occurs in no other split, in neither
    order and under no operation.
    """
    unknown = set(operations) - set(_OPERATIONS)
    if unknown or not operations:
        raise InvalidValue("operations", operations, f"some of {''.join(_OPERATIONS)}")
    pairs = [(a, b) for a in range(10) for b in range(a, 10)]
    random.Random(seed).shuffle(pairs)
    prompts = [
        Prompt(
            f"arithmetic/{x}{operation}{y}",
            f"What is {x} {operation} {y}?",
            {"task": "arithmetic", "answer": str(_OPERATIONS[operation](x, y))},
        )
        for a, b in split_slice(pairs, split)
        for operation in operations
        for x, y in {(a, b), (b, a)}
    ]
    return sorted(prompts, key=lambda prompt: prompt.id)
