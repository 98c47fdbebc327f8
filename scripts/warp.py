"""A bounded monotone warp of the log-probabilities at every token: trained, then compared.

    python scripts/warp.py                      # in runs/warp
    python scripts/warp.py --seed 1 --run runs/warp-1
    python scripts/warp.py grpo.steps=5         # any setting of the configuration

Does what `asn-rl run` does with configs/warp.yaml, and says what happens. Interrupted, it continues.
"""

from __future__ import annotations

import sys

from asn_rl.threads import limit_spinning

limit_spinning()

import _stages

if __name__ == "__main__":
    sys.exit(_stages.main(__doc__, config="warp.yaml", run="warp"))
