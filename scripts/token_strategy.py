"""A gate over four heuristics at every token, with the embedded model: trained, then compared.

    python scripts/token_strategy.py                      # in runs/token-strategy
    python scripts/token_strategy.py --seed 1 --run runs/token-strategy-1
    python scripts/token_strategy.py grpo.steps=5         # any setting of the configuration

Does what `asn-rl run` does with configs/token-strategy.yaml, and says what happens. Interrupted, it continues.
"""

from __future__ import annotations

import sys

from asn_rl.threads import limit_spinning

limit_spinning()

import _stages

if __name__ == "__main__":
    sys.exit(_stages.main(__doc__, config="token-strategy.yaml", run="token-strategy"))
