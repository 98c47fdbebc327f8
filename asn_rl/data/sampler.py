"""Which prompts a training step sees: a function of (seed, step) alone, so that a resumed run sees the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asn_rl.errors import DataError
from asn_rl.types import Prompt


class PromptSampler:
    """Epochs of shuffled prompts, `per_step` at a time.

    Args:
        balance: column whose values get equal shares of every step (the first ones one more where it does not divide).

    Raises:
        DataError: no prompts, or a prompt without the balancing column.
    """

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int, balance: str | None = None) -> None:
        if not prompts:
            raise DataError("the prompt list is empty; check the data source and its split")
        strata: dict[object, list[Prompt]] = {}
        for prompt in prompts:
            if balance is not None and balance not in prompt.columns:
                raise DataError(f"prompt {prompt.id!r} lacks the column {balance!r} that steps are balanced by")
            strata.setdefault(prompt.columns[balance] if balance else None, []).append(prompt)
        self.strata = [strata[key] for key in sorted(strata, key=str)]
        if per_step < len(self.strata):
            raise DataError(f"a draw of {per_step} prompts cannot hold all {len(self.strata)} values of {balance!r}")
        base, extra = divmod(per_step, len(self.strata))
        self.shares = [base + (i < extra) for i in range(len(self.strata))]
        for key, stratum, share in zip(sorted(strata, key=str), self.strata, self.shares, strict=True):
            if share > len(stratum):
                what = f"prompts with {balance} {key!r}" if balance else "prompts"
                raise DataError(
                    f"a draw needs {share} {what}, there are {len(stratum)}; lower grpo.prompts_per_step or "
                    "generate.train_prompts"
                )
        self.seed = seed

    def draw(self, step: int) -> list[Prompt]:
        """Prompts of one step, all different. What does not fill a step is left out of an epoch, at random."""
        chosen: list[Prompt] = []
        for number, (stratum, share) in enumerate(zip(self.strata, self.shares, strict=True)):
            epoch, position = divmod(step, len(stratum) // share)
            order = np.random.default_rng([self.seed, number, epoch]).permutation(len(stratum))
            chosen += [stratum[i] for i in order[position * share : (position + 1) * share]]
        return chosen
