"""A policy with a memory, distilled from the heuristics that won, improved by PPO, then compared.

    python scripts/recurrent.py                      # in runs/recurrent
    python scripts/recurrent.py --seed 1 --run runs/recurrent-1
    python scripts/recurrent.py ppo.steps=5         # any setting of the configuration

Does what `asn-rl run` does with configs/recurrent.yaml, and says what happens. Interrupted, it continues.
"""

from __future__ import annotations

import sys

from asn_rl.threads import limit_spinning

limit_spinning()

import _stages

if __name__ == "__main__":
    sys.exit(_stages.main(__doc__, config="recurrent.yaml", run="recurrent"))
