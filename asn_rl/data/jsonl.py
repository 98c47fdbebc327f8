"""Prompts from local JSONL files: `prompt` (text or messages), optional `id` and `split`, any further columns."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

from asn_rl.data.splits import SPLITS, check_split, split_slice
from asn_rl.errors import DataError
from asn_rl.runs import read_jsonl
from asn_rl.types import Prompt


def jsonl(split: str, *, path: str, seed: int = 0) -> list[Prompt]:
    """Rows of a JSONL file, such as `{"prompt": "What is 2 + 2?", "answer": "4"}`.

    Rows with a `split` column go where it says; a file without that column is divided at random by `seed`.

    Raises:
        DataError: a line that is not JSON, or a row without a usable `prompt`; the message names file and line.
    """
    check_split(split)
    lines = list(read_jsonl(Path(path)))
    rows = [(as_prompt(row, f"{path}, line {n}", f"line-{n}"), _split(row, n, path)) for n, row in lines]
    marked = [mark is not None for _, mark in rows]
    if any(marked) and not all(marked):
        raise DataError(f"{path}: some rows have a 'split' and some do not; give all rows one, or none")
    if all(marked):
        return [prompt for prompt, mark in rows if mark == split]
    # A text that occurs twice goes to one split as a whole.
    groups: dict[str, list[Prompt]] = {}
    for prompt, _ in rows:
        groups.setdefault(json.dumps(prompt.content), []).append(prompt)
    texts = list(groups)
    random.Random(seed).shuffle(texts)
    return [prompt for text in split_slice(texts, split) for prompt in groups[text]]


def _split(row: dict[str, object], number: int, path: str) -> object:
    mark = row.get("split")
    if mark is not None and mark not in SPLITS:
        raise DataError(f"{path}, line {number}: 'split' must be one of {', '.join(SPLITS)}, got {mark!r}")
    return mark


def read_prompt_file(path: Path) -> list[Prompt]:
    """Every row of a JSONL file, whatever its split; rows as for `jsonl`, and the same errors."""
    return [as_prompt(row, f"{path}, line {n}", f"line-{n}") for n, row in read_jsonl(path)]


def as_prompt(row: Mapping[str, object], where: str, default_id: str) -> Prompt:
    """A prompt of a row `{"prompt": ..., "id": ..., further columns}`.

    Raises:
        DataError: no usable `prompt`; the message begins with `where`.
    """
    content = row.get("prompt")
    is_messages = isinstance(content, list) and all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in content
    )
    if not content or not (isinstance(content, str) or is_messages):
        raise DataError(f"{where}: 'prompt' must be text or a list of {{role, content}}, got {content!r}")
    columns = {key: value for key, value in row.items() if key not in {"prompt", "id", "split"}}
    return Prompt(str(row.get("id", default_id)), content, columns)  # type: ignore[arg-type]
