"""Rewards under a limit on the mean number of tokens: trained with a Lagrange multiplier, then compared.

    python scripts/budget.py                      # in runs/budget
    python scripts/budget.py --seed 1 --run runs/budget-1
    python scripts/budget.py grpo.steps=5         # any setting of the configuration

Does what `asn-rl run` does with configs/budget.yaml, and says what happens. Interrupted, it continues.
"""

from __future__ import annotations

import sys

from asn_rl.threads import limit_spinning

limit_spinning()

import _stages

if __name__ == "__main__":
    sys.exit(_stages.main(__doc__, config="budget.yaml", run="budget"))
