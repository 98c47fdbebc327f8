"""Files that are either whole or not there."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that an interruption leaves the old file or none."""
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text(text)
    scratch.rename(path)
