"""A disk that fills up in the middle of a write."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest


def fill_disk(monkeypatch: pytest.MonkeyPatch, file_name: str) -> None:
    """From now on, writing text to files of this name stops half-way with the error a full disk gives."""
    write = Path.write_text

    def half(self: Path, text: str, *arguments: object, **options: object) -> int:
        if self.name != file_name:
            return write(self, text)
        write(self, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", half)
