"""The labelling pipeline in one go: generate -> verify -> label -> select -> distil -> GRPO -> compare.

    python scripts/label.py                                     # embedded model, about 11 minutes on 2 CPU cores
    python scripts/label.py --config configs/pipeline-3b.yaml --run runs/3b     # a 3B model on a GPU node
    python scripts/label.py generate.num_generations=4          # any setting of the configuration

Candidates under a grid of heuristics are scored by verifiers, embedding diversity and repetition; what wins is
distilled, and the same labellers are the rewards of GRPO. Stage by stage: `asn-rl generate`, `verify`,
`label`, `select`, `distill`, `reinforce`, `compare`, `report`. Interrupted, it continues.
"""

from __future__ import annotations

import sys

from asn_rl.threads import limit_spinning

limit_spinning()

import _stages

if __name__ == "__main__":
    sys.exit(_stages.main(__doc__, config="pipeline.yaml", run="pipeline"))
