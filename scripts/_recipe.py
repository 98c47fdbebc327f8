"""What the recipes share: options, loading, and exit statuses (2: an error that another command mends, 130: Ctrl-C)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from asn_rl.backends import BackendConfig, load_backend
from asn_rl.data import DataConfig, load_prompts
from asn_rl.errors import AsnError
from asn_rl.protocols import LogitsBackend
from asn_rl.registry import allow_local_plugins
from asn_rl.threads import set_threads
from asn_rl.types import Prompt


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring, examples included, as its help."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model_and_data(options: argparse.ArgumentParser, *, seed: int) -> None:
    """Which base model, which prompts, how long, and the seed."""
    options.add_argument("--model", default="smollm2-135m-instruct", help="embedded short name, hub id or folder")
    options.add_argument("--device", default="cpu", help="torch device")
    options.add_argument("--source", default="mixture", help="prompt source (asn_rl.data.SOURCES) or module:function")
    options.add_argument("--path", help="file of the jsonl source")
    options.add_argument("--max-new-tokens", type=int, default=24, help="token budget of a completion")
    options.add_argument("--seed", type=int, default=seed, help="keys every draw")


def load(options: argparse.Namespace, split: str) -> tuple[LogitsBackend, list[Prompt]]:
    """The base model and the prompts that `add_model_and_data` asked for."""
    arguments = {"path": options.path} if options.path else {}
    prompts = load_prompts(DataConfig(options.source, arguments), split)
    return load_backend(BackendConfig(model=options.model, device=options.device)), prompts


def exit_status(recipe: Callable[[], object]) -> int:
    """Run a recipe; errors that were raised on purpose end in a message."""
    set_threads(None)
    allow_local_plugins()
    try:
        recipe()
    except (AsnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
