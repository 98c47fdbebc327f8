"""Names to objects: a short name that was registered, or "module:attribute"."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from asn_rl.errors import ConfigError, UnknownName


class Registry:
    """Short names for import paths of one kind of plug-in, so that nothing heavy is imported before it is used."""

    def __init__(self, what: str, entries: dict[str, str]) -> None:
        self.what = what
        self.entries = dict(entries)

    def register(self, name: str, target: str) -> None:
        """Add a short name for "module:attribute". Registering the same pair again is harmless."""
        if self.entries.get(name, target) != target:
            raise ConfigError(f"{self.what} {name!r} already means {self.entries[name]!r}; choose another name")
        self.entries[name] = target

    def resolve(self, name: str) -> Any:
        """The object behind a registered short name or a "module:attribute" path."""
        return load_attribute(self.path(name))

    def path(self, name: str) -> str:
        """The "module:attribute" path behind a registered short name, or the path given; nothing is imported."""
        if ":" not in name and name not in self.entries:
            advice = f"Or give a {self.what} of your own as 'module:attribute'."
            raise UnknownName(self.what, name, self.entries, advice)
        return self.entries.get(name, name)


def allow_local_plugins() -> None:
    """Let "module:attribute" name a module in the working folder, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def load_attribute(path: str) -> Any:
    """Import "module:attribute"."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise ConfigError(f"{path!r} is not of the form 'module:attribute', for example 'my_package.my_module:MyClass'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"cannot import {module_name!r} for {path!r}: {error}. Check the spelling, and that the module is "
            "installed or on PYTHONPATH"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UnknownName(f"attribute of module {module_name!r}", attribute, public) from None
