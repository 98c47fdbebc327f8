"""Programs of `scripts/`, run as Python runs them, in this process: another one would import torch and transformers
again, which takes longer than most programs do."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """What a program printed, and its exit status."""

    returncode: int
    stdout: str
    stderr: str


def script(name: str, *arguments: str, cwd: Path) -> Ended:
    path, status = ROOT / "scripts" / name, 0
    with (
        contextlib.chdir(cwd),
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(io.StringIO()) as complained,
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    return Ended(status, said.getvalue(), complained.getvalue())
