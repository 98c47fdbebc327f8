"""One of four heuristics for a whole completion, chosen by the prompt: trained, then compared.

    python scripts/sequence_strategy.py                      # in runs/sequence-strategy
    python scripts/sequence_strategy.py --seed 1 --run runs/sequence-strategy-1
    python scripts/sequence_strategy.py grpo.steps=5         # any setting of the configuration

Does what `asn-rl run` does with configs/sequence-strategy.yaml, and says what happens. Interrupted, it continues.
"""

from __future__ import annotations

import sys

from asn_rl.threads import limit_spinning

limit_spinning()

import _stages

if __name__ == "__main__":
    sys.exit(_stages.main(__doc__, config="sequence-strategy.yaml", run="sequence-strategy"))
