"""Inference servers that complete a job's prompts: by their own sampling, or with rules and policies served by name."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asn_rl.backends.server_generation import ServerGenerator
from asn_rl.checkpoint import CONFIG, WEIGHTS
from asn_rl.errors import BackendError, InvalidValue
from asn_rl.evaluation.comparison import Arm
from asn_rl.job.config import GenerationServers
from asn_rl.job.job import Job
from asn_rl.labelling import generate as generating
from asn_rl.labelling.store import CandidateStore
from asn_rl.observing import checked_needs
from asn_rl.protocols import LogitsBackend, Policy
from asn_rl.rollout import RolloutConfig
from asn_rl.serving.client import WITH_POLICY
from asn_rl.serving.decoder import SERVED_INPUTS
from asn_rl.types import Prompt


def generate_on_servers(
    servers: GenerationServers,
    candidates: CandidateStore,
    prompts: Mapping[str, Prompt],
    backend: LogitsBackend | None,
    rollout: RolloutConfig,
    deterministic: Sequence[str],
    *,
    processors: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    served: Mapping[str, str] | None = None,
    earlier: CandidateStore | None = None,
) -> None:
    """Complete what is missing in a store.

    Args:
        prompts: by id.
        backend: renders prompts; None with kind openai, whose servers do.
        rollout: token budget and stop strings.
        deterministic: heuristics that give every seed the same text.
        processors: steps of the heuristics that the servers' own sampling expresses.
        served: names on the servers of the others (`publish_arms`).
        earlier: candidates of the turn before, of a conversation.

    Raises:
        BackendError: cells that no server completed; the others are there.
    """
    options: dict[str, Any] = {}
    if backend is not None:
        options = {"encode": backend.encode, "decode": backend.decode, "eos_token_ids": backend.eos_token_ids}
    if served:
        options["with_policy"] = WITH_POLICY["router" if servers.router else servers.kind]
    tokens = rollout.max_new_tokens
    with ServerGenerator(servers.pool, servers.kind, model=servers.model, stop=rollout.stop, **options) as generator:
        source = generating.FromServers(
            generator, processors or {}, served or {}, prompts, tokens, deterministic, earlier
        )
        left_out = generating.generate(candidates, source, candidates.folder)
    if left_out:
        counts, examples = source.failures.most_common(), source.examples
        reasons = "; ".join(f"{count} cells: {reason}, such as {examples[reason]}" for reason, count in counts)
        raise BackendError(
            f"{left_out} of {candidates.grid.size} cells could not be generated ({reasons}). What was generated is "
            "kept; the same command tries the others again"
        )


def publish_arms(job: Job, servers: GenerationServers, arms: Sequence[Arm]) -> dict[str, str]:
    """Every arm's name on the servers, in whose folder it is; see `publish`."""
    assert servers.policies is not None
    return {arm.name: publish(arm.name, arm.policy, Path(servers.policies), job.metadata) for arm in arms}


def publish(name: str, policy: Policy, folder: Path, metadata: Mapping[str, Any]) -> str:
    """Write a policy to the servers' folder, under a name made of its own and its content: what is there stays, and
    runs that share servers do not meet.

    Raises:
        InvalidValue: the policy reads what no engine hands over, cannot be saved, or there is no such folder.
    """
    if not folder.is_dir():
        raise InvalidValue("generate.servers.policies", str(folder), "the folder that the servers were started with")
    if beyond := checked_needs(policy) - SERVED_INPUTS:
        allowed = f"some of {sorted(SERVED_INPUTS)} where servers sample"
        raise InvalidValue(f"inputs of {name!r}", sorted(beyond), allowed, "leave generate.servers.policies out")
    save = getattr(policy, "save_pretrained", None)
    if save is None:
        raise InvalidValue(f"policy of {name!r}", type(policy).__name__, "one with save_pretrained", "servers read it")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        made = Path(scratch, "policy")
        made.mkdir()
        save(made, **metadata)
        digest = hashlib.sha256((made / CONFIG).read_bytes() + (made / WEIGHTS).read_bytes()).hexdigest()[:16]
        readable = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip(".-")[:40]
        target = folder / f"{readable or 'policy'}-{digest}"
        try:
            made.rename(target)
        except OSError:
            if not (target / CONFIG).is_file():
                raise
    return target.name
