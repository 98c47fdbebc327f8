"""Errors: each message names the value, the allowed range and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AsnError(Exception):
    """Base of every error this project raises on purpose."""


class InvalidValue(AsnError, ValueError):
    """A parameter outside its range."""

    def __init__(self, name: str, value: object, allowed: str, advice: str = "") -> None:
        super().__init__(f"{name} must be {allowed}, got {value!r}" + (f"; {advice}" if advice else ""))


def check_at_least(config: object, minimum: float, *names: str) -> None:
    """`InvalidValue` for the first of these attributes that is not `minimum` or more (NaN is not)."""
    for name in names:
        if not getattr(config, name) >= minimum:
            raise InvalidValue(name, getattr(config, name), f">= {minimum:g}")


def check_positive(config: object, *names: str) -> None:
    """`InvalidValue` for the first of these attributes that is not above 0 (NaN is not)."""
    for name in names:
        if not getattr(config, name) > 0:
            raise InvalidValue(name, getattr(config, name), "> 0")


class UnknownName(AsnError, LookupError):
    """A name that no registry, package or configuration knows."""

    def __init__(self, what: str, name: str, known: Iterable[str], advice: str = "") -> None:
        known = sorted(known)
        close = difflib.get_close_matches(name, known, n=1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        listed = f"unknown {what} {name!r}.{guess} Known: {', '.join(known)}."
        super().__init__(f"{listed} {advice}".rstrip())


class InvalidLogits(AsnError, ValueError):
    """Logits that are no distribution."""


class InvalidPolicyOutput(AsnError, ValueError):
    """A policy's answer that is no distribution."""


class ConfigError(AsnError, ValueError):
    """A configuration that cannot be read or makes no sense."""


class BackendError(AsnError, RuntimeError):
    """The base model cannot be found, loaded or run as asked."""


class CheckpointError(AsnError, RuntimeError):
    """A checkpoint that is missing, truncated or belongs to something else."""


class RewardError(AsnError, RuntimeError):
    """A reward function that broke its contract."""


class DataError(AsnError, ValueError):
    """A record or prompt that cannot be used."""


class ServingError(AsnError, RuntimeError):
    """A request that a policy cannot decode."""


class TrainingError(AsnError, RuntimeError):
    """A training run that cannot learn."""
