"""Files that are either whole or not there, what they may hold, and where made ones are kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from asn_rl.errors import DataError


def write_whole(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that an interruption leaves the old file or none."""
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text(text)
    scratch.rename(path)


def check_unicode(value: Any, where: str) -> None:
    r"""JSON can escape half of a surrogate pair ("\ud800"), which is no character: no file, tokenizer or hash takes it.

    Raises:
        DataError: there is one, with its place in the value.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 20) : error.end + 20]
        raise DataError(f"{where} holds half of a surrogate pair, which is no character: {near!r}. Mend it") from error


def cache_dir() -> Path:
    """Where converted models and compiled code lie: $ASN_RL_CACHE, else the user's cache directory."""
    if override := os.environ.get("ASN_RL_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "asn_rl"
