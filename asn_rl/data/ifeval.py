"""IFEval (arXiv:2311.07911): prompts whose instructions a program can check. Data: CC BY 4.0, 541 prompts.

The file is `instruction_following_eval/data/input_data.jsonl` of google-research; it does not come with this package.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asn_rl.data.splits import check_split, split_slice
from asn_rl.errors import DataError
from asn_rl.runs import read_jsonl
from asn_rl.types import Prompt

FILE = "input_data.jsonl"
SHORT_CHARACTERS = 500
LONG_INSTRUCTIONS = {
    "length_constraints:number_paragraphs",
    "length_constraints:nth_paragraph_first_word",
    "combination:repeat_prompt",
    "combination:two_responses",
}


def ifeval(split: str, *, path: str | None = None, short: bool = False, seed: int = 0) -> list[Prompt]:
    """The prompts of one split; columns `task`, `instruction_id_list` and `kwargs` (arguments that are None left out).

    The prompts are divided among the splits by `seed` before `short` chooses among them, so that no short prompt of
    one split is a prompt of another.

    Args:
        path: the file, or a folder that holds `input_data.jsonl`; by default the folder `ifeval` of the folder that
            the environment variable ASN_RL_DATA names.
        short: only what can be followed within about 128 tokens (374 of the 541): prompts under 500 characters that
            ask for neither counted paragraphs, nor their own repetition, nor two responses, nor at least 61 words,
            7 sentences or 3 sections.

    Raises:
        DataError: no such file, or a line that is no row of IFEval; the message names file and line.
    """
    check_split(split)
    file = _file(path)
    prompts = [_prompt(row, f"{file}, line {number}") for number, row in read_jsonl(file)]
    random.Random(seed).shuffle(prompts)
    return [prompt for prompt in split_slice(prompts, split) if not short or is_short(prompt)]


def is_short(prompt: Prompt) -> bool:
    """Whether a prompt's instructions can be followed within about 128 tokens."""
    checks = zip(prompt.columns["instruction_id_list"], prompt.columns["kwargs"], strict=True)
    return len(prompt.last_turn) < SHORT_CHARACTERS and not any(_is_long(*check) for check in checks)


def _is_long(instruction: str, kwargs: Mapping[str, Any]) -> bool:
    at_least = kwargs.get("relation") == "at least"
    return (
        instruction in LONG_INSTRUCTIONS
        or (instruction == "length_constraints:number_words" and at_least and kwargs.get("num_words", 0) > 60)
        or (instruction == "length_constraints:number_sentences" and at_least and kwargs.get("num_sentences", 0) > 6)
        or (instruction == "detectable_format:multiple_sections" and kwargs.get("num_sections", 0) > 2)
    )


def _file(path: str | None) -> Path:
    if path is None:
        root = os.environ.get("ASN_RL_DATA")
        if not root:
            raise DataError(
                "prompt source 'ifeval' needs a file: give data.arguments {path: input_data.jsonl}, or set the "
                f"environment variable ASN_RL_DATA to a folder that holds ifeval/{FILE} (from google-research, "
                "instruction_following_eval/data)"
            )
        path = os.path.join(root, "ifeval")
    return Path(path, FILE) if os.path.isdir(path) else Path(path)


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    text, instructions, kwargs = row.get("prompt"), row.get("instruction_id_list"), row.get("kwargs")
    if not (
        row.get("key") is not None
        and isinstance(text, str)
        and isinstance(instructions, list)
        and isinstance(kwargs, list)
        and all(isinstance(entry, Mapping) for entry in kwargs)
        and len(instructions) == len(kwargs)
    ):
        raise DataError(
            f"{where}: a row of IFEval has 'key', 'prompt' (text), and 'instruction_id_list' and 'kwargs' (lists of "
            f"equal length, of names and of objects), got {dict(row)!r:.300}"
        )
    given = [{name: value for name, value in entry.items() if value is not None} for entry in kwargs]
    return Prompt(
        f"ifeval/{row['key']}", text, {"task": "ifeval", "instruction_id_list": instructions, "kwargs": given}
    )
