"""Files that are either whole or not there, and where made ones are kept."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that an interruption leaves the old file or none."""
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text(text)
    scratch.rename(path)


def cache_dir() -> Path:
    """Where converted models and compiled code lie: $ASN_RL_CACHE, else the user's cache directory."""
    if override := os.environ.get("ASN_RL_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "asn_rl"
