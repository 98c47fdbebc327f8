"""The contract of a reward function, checked before the first call and after every call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any, Self

from asn_rl.errors import RewardError, UnknownName
from asn_rl.registry import load_attribute

CALL_ARGUMENTS = ("prompts", "completions", "completion_ids")


class Estimate(float):
    """A score that knows its uncertainty: a reward function may return it in the place of a float."""

    stderr: float
    """standard deviation of the score, in its own unit"""

    def __new__(cls, value: float, stderr: float) -> Self:
        made = super().__new__(cls, value)
        made.stderr = stderr
        return made

    def __reduce__(self) -> tuple[type[Estimate], tuple[float, float]]:
        return Estimate, (float(self), self.stderr)


def load_function(target: str, arguments: Mapping[str, Any]) -> partial[Any]:
    """Import "module:function" and bind its keyword arguments.

    Raises:
        RewardError: not callable, or does not take `**columns`.
        UnknownName: an argument the function does not name (it would be swallowed by `**columns`).
        ConfigError: the module cannot be imported.
    """
    function = load_attribute(target)
    if not callable(function):
        raise RewardError(f"reward {target!r} is a {type(function).__name__}, not a function")
    check_signature(target, function, arguments)
    return partial(function, **arguments)


def check_signature(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse a reward function without `**columns`, and arguments that it does not name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some C callables have no signature to look at
        return
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise RewardError(
            f"reward {name!r} must accept every column of the data by keyword: add '**columns' to its signature "
            "f(prompts, completions, completion_ids=None, **columns)"
        )
    named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)} - {*CALL_ARGUMENTS}
    for argument in arguments:
        if argument not in named:
            raise UnknownName(f"argument of reward {name!r}", argument, named)


def checked_scores(name: str, scores: Any, count: int) -> list[float | None]:
    """What a reward function returned, as floats (`Estimate`s stay what they are); None stays None.

    Raises:
        RewardError: not a list, not `count` values, or a value that is neither a finite number nor None.
    """
    if not isinstance(scores, list):
        advice = "; return values.tolist()" if hasattr(scores, "tolist") else ""
        raise RewardError(f"reward {name!r} must return a list of numbers or None, got {type(scores).__name__}{advice}")
    if len(scores) != count:
        raise RewardError(
            f"reward {name!r} must return one value a completion: got {len(scores)} values for {count} completions"
        )
    return [_checked_score(name, i, score) for i, score in enumerate(scores)]


def _checked_score(name: str, i: int, score: Any) -> float | None:
    if score is None:
        return None
    if not isinstance(score, Real):
        raise RewardError(f"reward {name!r} must return numbers or None, got {score!r:.200} for completion {i}")
    if not math.isfinite(score):
        raise RewardError(
            f"reward {name!r} must return finite numbers, got {float(score)} for completion {i}; return None where it "
            "does not apply"
        )
    return score if isinstance(score, Estimate) else float(score)
