"""What policies read beside the points: a summary of the distribution, the context, and the optional entries.

Parameters of policies that share this: `inputs` names the optional entries, `hidden_size` and `condition_size` say how
long they are, `projection` how many units each is projected to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from asn_policies.layers import token_counts, token_inputs
from asn_rl.errors import InvalidValue
from asn_rl.ops.context import CONTEXT_SIZE, collision_entropy, entropy, varentropy
from asn_rl.ops.sketch import Sketch
from asn_rl.types import Observation

GLOBAL_FEATURES = ("entropy", "varentropy", "max_logprob", "effective_support", "logit_spread")
INPUTS = ("hidden", "prompt_embedding", "condition")
HIDDEN_STATES = ("hidden", "prompt_embedding")


def input_projections(
    inputs: Sequence[str],
    hidden_size: int,
    condition_size: int,
    projection: int,
    *,
    allowed: Collection[str] = INPUTS,
) -> nn.ModuleDict:
    """A linear map for each optional entry that a policy reads.

    Hidden states are brought to mean 0 and deviation 1 first. A condition is of order one as it is; normalised, a
    single number would become 0, and of two numbers only their order would be left.

    Args:
        inputs: names among `allowed`, each once.

    Raises:
        InvalidValue: an unknown or repeated entry, or one whose size is not given.
    """
    sizes = {"hidden": hidden_size, "prompt_embedding": hidden_size, "condition": condition_size}
    known = {name: size for name, size in sizes.items() if name in allowed}
    for name in inputs:
        if not known.get(name):
            given_by = {"condition": "with condition_size"}
            listed = ", ".join(f"'{entry}' ({given_by.get(entry, 'with hidden_size')})" for entry in known)
            raise InvalidValue("inputs", name, f"among {listed}")
    if len(set(inputs)) != len(inputs):
        raise InvalidValue("inputs", list(inputs), "names that differ")
    return nn.ModuleDict(
        {
            name: nn.Sequential(
                nn.LayerNorm(sizes[name], elementwise_affine=False) if name in HIDDEN_STATES else nn.Identity(),
                nn.Linear(sizes[name], projection),
            )
            for name in inputs
        }
    )


def projected(obs: Observation, projections: nn.ModuleDict) -> list[Tensor]:
    """(..., projection) in (-1, 1) for each optional entry that is read.

    Raises:
        InvalidValue: the observation lacks one.
    """
    parts = []
    for name, layer in projections.items():
        value = getattr(obs, name)
        if value is None:
            raise InvalidValue(f"observation.{name}", None, "a tensor", "the policy reads it; list it in `needs`")
        parts.append(torch.tanh(layer(value)))
    return parts


def summary_size(inputs: Sequence[str], projection: int) -> int:
    """Length of `summary_inputs`."""
    return len(GLOBAL_FEATURES) + CONTEXT_SIZE + projection * len(inputs)


def summary_inputs(obs: Observation, projections: nn.ModuleDict) -> Tensor:
    """(..., summary_size) global features, the context, and the projected optional entries, each of order one."""
    context = obs.context * _context_scale(obs.context.device)
    return torch.cat([global_features(obs), context, *projected(obs, projections)], -1)


def summary_network(size: int, width: int) -> nn.Sequential:
    """(..., size) -> (..., width), two layers of SiLU."""
    return nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())


@torch.no_grad()
def global_features(obs: Observation) -> Tensor:
    """(..., G) entropy / 5, varentropy / 10, largest log-probability / 5, collision entropy / 5 and the standard
    deviation of the logits / 5."""
    sketch = obs.sketch
    scaled = (
        entropy(sketch) / 5,
        varentropy(sketch) / 10,
        sketch.logprobs.amax(-1) / 5,
        collision_entropy(sketch) / 5,
        logit_spread(sketch) / 5,
    )
    return torch.stack(scaled, -1)


@torch.no_grad()
def logit_spread(sketch: Sketch) -> Tensor:
    """(...) standard deviation of all finite logits (population form), nats; a tail point has no spread inside."""
    counts, values = token_counts(sketch).squeeze(-1), token_inputs(sketch).squeeze(-1)
    total = counts.sum(-1)
    mean = (counts * values).sum(-1) / total
    return ((counts * (values - mean.unsqueeze(-1)).square()).sum(-1) / total).sqrt()


def _context_scale(device: torch.device) -> Tensor:
    """Brings the context entries (asn_rl.ops.context.CONTEXT) to order one."""
    return torch.tensor([0.2, 0.2, 0.2, 0.1, 0.2, 0.2, 0.2, 0.2], device=device)
