"""Can adaptation help here at all? What choosing an action for each prompt would gain over the best single action.

The winner's curse is removed: what is chosen on some samples or prompts is scored on others. Two things bound what the
answer says. The oracle chooses on half of the samples, so it is below the best choice that exists; and it chooses once
a prompt, so it says nothing about policies that change their mind from token to token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.reward_log import RewardLog
from asn_rl.evaluation.statistics import Interval, Resampling, as_plain, bootstrap, split_half_choices
from asn_rl.evaluation.verdict import BETTER, signed, verdict
from asn_rl.training.bandit import BanditConfig, cross_fit, expected_rewards

ORACLE, STATIC, MIXTURE, CONTEXT, SHUFFLED = "oracle", "static", "mixture", "context", "shuffled context"
PAIRS = ((ORACLE, STATIC), (MIXTURE, STATIC), (CONTEXT, STATIC), (CONTEXT, MIXTURE), (CONTEXT, SHUFFLED))


@dataclass(frozen=True)
class HeadroomReport:
    """What adapting the action to the prompt gains, with paired intervals over prompts."""

    rewards: dict[str, Interval]
    """mean reward of: `oracle`, the best action of each prompt, chosen on one half of the samples and scored on the
    other; `static`, one action for all prompts, chosen and scored likewise; `mixture`, learned action probabilities
    without context; `context`, a bandit that reads the features; `shuffled context`, the same bandit given the features
    of other prompts. The learned ones decide prompts that they were not trained on"""
    gains: dict[str, Interval]
    """ "oracle - static" and so on: paired differences"""
    static: tuple[str, ...]
    """the action that was best on either half, named once if it is the same"""
    prompts: int
    """prompts that count: those with a reward"""
    actions: int
    samples: int

    @property
    def positive(self) -> bool:
        """The interval of oracle minus static allows to call the oracle better."""
        return verdict(self.gains[f"{ORACLE} - {STATIC}"]) == BETTER

    @property
    def verdict(self) -> str:
        """The answer in plain words."""
        gain, learned = self.gains[f"{ORACLE} - {STATIC}"], self.gains[f"{CONTEXT} - {STATIC}"]
        size = f"{self.actions} actions, {self.prompts} prompts, {self.samples} samples each"
        static, context = " or ".join(self.static), ", which the features already give in part:"
        if not self.positive:
            return (
                f"No headroom shown ({size}): choosing the action by prompt gains {signed(gain)} over {static}, and "
                "that interval does not show a gain. Do not train a policy that adapts by prompt on this; log more "
                f"prompts or samples if a gain of up to {gain.high:.3f} would be worth having."
            )
        if verdict(learned) != BETTER:
            context = "; the features do not give it yet:"
        return (
            f"Adaptation by prompt can help ({size}): choosing the action by prompt gains {signed(gain)} over "
            f"{static}{context} a bandit on them gains {signed(learned)}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        plain = ("static", "prompts", "actions", "samples", "positive", "verdict")
        return {
            "rewards": {name: as_plain(interval) for name, interval in self.rewards.items()},
            "gains": {name: as_plain(interval) for name, interval in self.gains.items()},
            **{name: getattr(self, name) for name in plain},
        }


def headroom(log: RewardLog, config: BanditConfig | None = None, how: Resampling | None = None) -> HeadroomReport:
    """The headroom test of a full-information log.

    A reward that compares the samples of a group makes the halves depend on each other: give rewards for which a half
    is compared within itself.

    Raises:
        InvalidValue: a log in which actions were drawn, of one action, or with fewer than two samples or two prompts a
            fold.
    """
    if log.propensities is not None:
        raise InvalidValue("log", "one with drawn actions", "a log in which every action was run on every prompt")
    count, actions, samples = log.rewards.shape
    if actions < 2:
        raise InvalidValue("actions", actions, ">= 2", "there is nothing to choose from")
    config, how = config or BanditConfig(), how or Resampling()
    means, strata = log.means, list(log.strata)
    oracle, static, chosen = split_half_choices(log.rewards.swapaxes(0, 1), strata)
    without = cross_fit(np.empty((count, 0)), means, strata, config)
    fitted = cross_fit(log.features, means, strata, config)
    values = {
        ORACLE: oracle,
        STATIC: static,
        MIXTURE: expected_rewards(without.probs, means),
        CONTEXT: expected_rewards(fitted.probs, means),
        SHUFFLED: expected_rewards(fitted.shuffled(), means),
    }

    def interval(part: np.ndarray) -> Interval:
        return bootstrap(part, strata, resamples=how.resamples, level=how.level, seed=how.seed)

    return HeadroomReport(
        rewards={name: interval(part) for name, part in values.items()},
        gains={f"{a} - {b}": interval(values[a] - values[b]) for a, b in PAIRS},
        static=tuple(dict.fromkeys(log.actions[i] for i in chosen)),
        prompts=int((~np.isnan(means)).any(-1).sum()),
        actions=actions,
        samples=samples,
    )
