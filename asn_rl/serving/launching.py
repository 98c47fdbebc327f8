"""What the launchers of engines share: their options, the folder of reports, and what the engine is told."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from asn_rl.backends.fingerprint import base_model_fingerprint
from asn_rl.serving.settings import ServingSettings


def launcher_parser(module: str, description: str | None, *, port: int, reports: str) -> argparse.ArgumentParser:
    """Options that every launcher has.

    Args:
        reports: what becomes of the folder for reports that is not given.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="base model: short name, folder or hub id")
    parser.add_argument("--policies", required=True, type=Path, help="folder of policy folders")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=port, help=f"default {port}")
    parser.add_argument("--status", type=Path, help=f"folder for reports (default: {reports})")
    parser.add_argument("--any-base-model", action="store_true", help="serve policies of other base models too")
    parser.add_argument("--tracked", type=int, default=32, help="tracked tokens, as in training (default 32)")
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and what follows `--`, which is the engine's. None: those of this process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    return parser.parse_args(given[:cut]), given[cut + 1 :]


def serving_settings(options: argparse.Namespace, model: str) -> ServingSettings:
    """What the engine's processes are told about policies; an earlier engine's reports are removed.

    Args:
        model: folder or hub id of the base model.

    Raises:
        InvalidValue: there is no folder of policies, or `tracked` is out of range.
    """
    status = options.status or Path(tempfile.mkdtemp(prefix="asn_rl-status-"))
    fingerprint = None if options.any_base_model else base_model_fingerprint(model)
    settings = ServingSettings(options.policies, status, fingerprint, options.tracked)
    for path in status.glob("status-*.json"):
        path.unlink()
    return settings
