"""Procedurally generated tasks of the reasoning-gym package (Apache-2.0)."""

from __future__ import annotations

from typing import Any

from asn_rl.data.splits import SPLITS, check_split
from asn_rl.errors import ConfigError, InvalidValue
from asn_rl.types import Prompt

# Found by running version 0.1.25: families whose stored answers or scorers are wrong or not repeatable.
REFUSED = {
    "basic_arithmetic": "wrong answers wherever '/' occurs without parentheses; use chain_sum or products",
    "game_of_life_halting": "every answer scores 1",
    "isomorphic_strings": "differs between processes",
    "knight_swap": "differs between processes",
    "polynomial_multiplication": "differs between processes",
    "ransom_note": "differs between processes",
    "word_ladder": "differs between processes",
    "list_functions": "not repeatable within a process",
    "graph_color": "has no stored answer",
    "propositional_logic": "has no stored answer",
    "rubiks_cube": "has no stored answer",
    "rush_hour": "has no stored answer",
}

# Question i of a data set is drawn from seed + i: with neighbouring seeds two splits would be the same questions.
_SEED_STRIDE = 1_000_000


def reasoning_gym(
    split: str, *, family: str = "chain_sum", size: int = 100, seed: int = 0, config: dict[str, Any] | None = None
) -> list[Prompt]:
    """Tasks of one family; columns `task`, `answer`. Splits draw from separate seeds; a question is in one split only.

    Args:
        family: data set name of reasoning-gym.
        size: number of distinct questions a split holds, at most.
        config: options of the family, for example {min_digits: 1, max_digits: 1, min_terms: 2, max_terms: 2}.
    """
    check_split(split)
    if not 1 <= size <= _SEED_STRIDE:
        raise InvalidValue("size", size, f"in [1, {_SEED_STRIDE}]")
    if family in REFUSED:
        raise InvalidValue("family", family, "one with verified answers", REFUSED[family])
    seen: set[str] = set()
    prompts: list[Prompt] = []
    for number, name in enumerate(SPLITS):  # earlier splits claim their questions first
        prompts = []
        for entry in _dataset(family, size, (seed * len(SPLITS) + number) * _SEED_STRIDE, config or {}):
            question = str(entry["question"])
            if question not in seen:
                seen.add(question)
                columns = {"task": family, "answer": str(entry["answer"])}
                prompts.append(Prompt(f"{family}/{name}/{len(prompts)}", question, columns))
        if name == split:
            break
    return prompts


def _dataset(family: str, size: int, seed: int, config: dict[str, Any]) -> Any:
    try:
        import reasoning_gym as package
    except ImportError as error:
        raise ConfigError("reasoning-gym is not installed; run: pip install 'asn_rl[tasks]'") from error
    try:
        return package.create_dataset(family, size=size, seed=seed, **config)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"reasoning-gym refuses family {family!r} with {config}: {error}") from error
