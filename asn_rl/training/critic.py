"""What PPO asks of a critic, and how it is made of its name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from asn_rl.errors import ConfigError
from asn_rl.protocols import LogitsBackend
from asn_rl.registry import load_attribute
from asn_rl.types import Observation


class Critic(Protocol):
    """An `nn.Module` that estimates returns."""

    needs: frozenset[str]
    """optional observation entries it reads"""

    def __call__(self, obs: Observation) -> Tensor:
        """(...) return to be expected from here, in units of the reward."""
        ...


def new_critic(name: str, arguments: Mapping[str, Any], backend: LogitsBackend, seed: int) -> Critic:
    """A critic on the base model's device, its weights drawn by `seed`.

    Args:
        name: class as module:attribute.
        arguments: of its constructor; `hidden_size` is filled in where it takes one and `inputs` are given.

    Raises:
        ConfigError: not the class of a critic, or other arguments than it takes.
    """
    cls, given = load_attribute(name), dict(arguments)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "needs")):
        raise ConfigError(f"critic {name!r} is not an nn.Module class with `needs`; see asn_rl.training.critic")
    if "hidden_size" in inspect.signature(cls.__init__).parameters and given.get("inputs"):
        given.setdefault("hidden_size", backend.hidden_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return cast(Critic, cls(**given).to(backend.device))
        except TypeError as error:
            raise ConfigError(f"critic_arguments {given} do not suit {name}: {error}") from error
