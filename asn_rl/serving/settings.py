"""What an engine process is told about policies. The launchers write it to the environment, the processors read it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from asn_rl.errors import ConfigError, InvalidValue

POLICIES, STATUS = "ASN_RL_POLICIES", "ASN_RL_STATUS"
FINGERPRINT, TRACKED = "ASN_RL_FINGERPRINT", "ASN_RL_TRACKED"
"""environment variables of `ServingSettings`"""

POLICY_ARGUMENT, BUDGET_ARGUMENT, REQUEST_ARGUMENT = "asn_policy", "asn_budget", "asn_request"
"""names of a request's own arguments: the policy, the tokens it may have in all, the name of the request in reports"""

STATUS_PATH = "/asn_rl/status"
"""where servers answer GET with what `asn_rl.serving.status.read_status` says"""


@dataclass(frozen=True)
class ServingSettings:
    """Where policies are and what they are checked against."""

    policies: Path
    """folder of policy folders; a request names one of them"""
    status: Path
    """folder to which every process of the engine writes `status-PID.json` (`asn_rl.serving.status`)"""
    fingerprint: str | None = None
    """of the base model: policies made for another one are refused; None: not checked"""
    tracked: int = 32
    """see `RolloutConfig.tracked`"""

    def __post_init__(self) -> None:
        if not self.policies.is_dir():
            raise InvalidValue("the folder of policies", str(self.policies), "an existing folder of policy folders")
        if self.tracked < 1:
            raise InvalidValue("tracked", self.tracked, ">= 1")

    def environment(self) -> dict[str, str]:
        """The environment variables that hand these settings to an engine."""
        return {
            POLICIES: str(self.policies.absolute()), STATUS: str(self.status.absolute()),
            FINGERPRINT: self.fingerprint or "", TRACKED: str(self.tracked),
        }  # fmt: skip


def settings_from_environment(environment: Mapping[str, str] = os.environ) -> ServingSettings:
    """The settings a launcher wrote.

    Raises:
        ConfigError: a variable is missing, or is no number.
        InvalidValue: there is no folder of policies.
    """
    missing = [name for name in (POLICIES, STATUS) if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"the environment variables {', '.join(missing)} are not set; start the engine with our launcher, or set "
            f"{POLICIES} to the folder of policies and {STATUS} to a folder for reports"
        )
    tracked = environment.get(TRACKED) or "32"
    if not tracked.isdecimal():
        raise ConfigError(f"the environment variable {TRACKED} must be a whole number, got {tracked!r}")
    return ServingSettings(
        Path(environment[POLICIES]), Path(environment[STATUS]), environment.get(FINGERPRINT) or None, int(tracked)
    )
