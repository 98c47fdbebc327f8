"""What every policy of this package shares: identity start, saving and loading as on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import inspect
import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from asn_rl.checkpoint import PolicyConfig, check_compatible, load_weights, read_policy_config, write_policy
from asn_rl.errors import CheckpointError, InvalidValue
from asn_rl.ops.logprobs import shifted
from asn_rl.types import Observation, PolicyOutput, State


class PolicyModule(nn.Module):
    """Base class of policies: a subclass writes `shift(obs) -> (..., N)`, or `forward` when it needs state.

    Constructor arguments are recorded and must be JSON values, so that a folder can rebuild the policy.
    """

    needs: frozenset[str] = frozenset()
    paper: ClassVar[str] = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        # copy.deepcopy calls this without arguments and then copies the attributes, `arguments` among them.
        with contextlib.suppress(TypeError):
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            object.__setattr__(self, "arguments", dict(list(bound.arguments.items())[1:]))
        return self

    arguments: dict[str, Any]

    def initial_state(self, batch_size: int, device: torch.device) -> State | None:
        return None

    def shift(self, obs: Observation) -> Tensor:
        """(..., N) shift of the points' log-weights."""
        raise NotImplementedError(f"{type(self).__name__} must define shift() or forward()")

    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        return PolicyOutput(shifted(obs.sketch.log_mass, self.shift(obs)), state)

    @classmethod
    def path(cls) -> str:
        """ "module:attribute" of the class; public classes are exported by `asn_policies`."""
        module = "asn_policies" if cls.__module__.startswith("asn_policies.") else cls.__module__
        return f"{module}:{cls.__qualname__}"

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        base_model: str | None = None,
        fingerprint: str | None = None,
        sketch: dict[str, int] | None = None,
        notes: str = "",
    ) -> None:
        """Write `config.json`, `model.safetensors` and a model card."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = PolicyConfig(self.path(), self.arguments, base_model, fingerprint, sketch)
        write_policy(folder, self, config, self._card(config, notes))

    @classmethod
    def from_pretrained(cls, source: str | Path, *, fingerprint: str | None = None) -> Self:
        """Load from a folder, or from the Hub by "owner/name".

        Args:
            fingerprint: when given, a policy trained on another base model is refused.

        Raises:
            CheckpointError: damaged, of another class, or of another base model.
        """
        folder = Path(source)
        if not folder.is_dir() and str(source).count("/") == 1:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(source)))
        config = read_policy_config(folder)
        if config.policy != cls.path():
            raise CheckpointError(f"{source} holds a {config.policy}, not a {cls.path()}; load it with its own class")
        if fingerprint is not None:
            check_compatible(folder, fingerprint=fingerprint)
        policy = cls(**config.arguments)
        load_weights(policy, folder)
        return policy

    def push_to_hub(self, repo_id: str, *, token: str | None = None, **metadata: Any) -> None:
        """Create or update a Hub repository with this policy."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **metadata)
            api.upload_folder(repo_id=repo_id, folder_path=folder)

    def cost(self, points: int = 96, rows: int = 64) -> dict[str, float]:
        """Parameters, FLOPs a token and measured milliseconds a row (on this policy's device)."""
        from asn_policies.cost import measure_cost

        return measure_cost(self, points, rows)

    def _card(self, config: PolicyConfig, notes: str) -> str:
        count = sum(p.numel() for p in self.parameters())
        return "\n".join(
            [
                "---",
                "library_name: asn_rl",
                *([f"base_model: {config.base_model}"] if config.base_model else []),
                "tags: [decoding, sampling, reinforcement-learning]",
                "---",
                f"# {type(self).__name__}",
                "",
                f"A decoding policy with {count:,} parameters. {self.paper}".rstrip(),
                "",
                f"- base model: {config.base_model or 'any'} (fingerprint {config.fingerprint or 'unchecked'})",
                f"- sketch: {config.sketch or 'any size'}",
                f"- arguments: `{json.dumps(config.arguments)}`",
                "",
                *([notes, ""] if notes else []),
                "```python",
                "from asn_rl.checkpoint import load_policy",
                'policy = load_policy("path/to/this/folder")',
                "```",
                "",
            ]
        )


def check_rows(state: State | None, obs: Observation) -> None:
    """`InvalidValue` for a state of another number of rows than the observation."""
    for key, part in (state or {}).items():
        if len(part) != len(obs.context):
            advice = "carry the state of the same completions from step to step"
            raise InvalidValue(f"rows of state {key!r}", len(part), f"{len(obs.context)}, as the observation", advice)
