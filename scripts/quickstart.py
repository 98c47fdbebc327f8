"""The main job in one go, on the embedded model: distil, improve by GRPO, compare on held-out prompts.

    python scripts/quickstart.py                      # the demo, in runs/demo
    python scripts/quickstart.py --seed 1 --run runs/demo-1
    python scripts/quickstart.py grpo.steps=5         # any setting of the configuration

Does what `asn-rl run --config configs/demo.yaml --run runs/demo` does and says what happens. Interrupted, it continues.
"""

from __future__ import annotations

import sys

from asn_rl.threads import limit_spinning

limit_spinning()

import _stages

if __name__ == "__main__":
    sys.exit(_stages.main(__doc__, config="demo.yaml", run="demo"))
