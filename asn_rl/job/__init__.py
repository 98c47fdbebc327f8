"""The main job in one run folder: generate -> verify -> label -> select -> distil -> RL -> compare."""

from asn_rl.job.config import CompareConfig, GenerateConfig, HeuristicSpec, JobConfig, PolicySpec
from asn_rl.job.evaluation import evaluate
from asn_rl.job.guarding import guard
from asn_rl.job.job import Job
from asn_rl.job.labelling import fit_reward_model, generate, label, select, verify
from asn_rl.job.learning import compare, distil, reinforce
from asn_rl.job.logs import headroom, reward_log
from asn_rl.job.promotion import promote

__all__ = [
    "CompareConfig",
    "GenerateConfig",
    "HeuristicSpec",
    "Job",
    "JobConfig",
    "PolicySpec",
    "compare",
    "distil",
    "evaluate",
    "fit_reward_model",
    "generate",
    "guard",
    "headroom",
    "label",
    "promote",
    "reinforce",
    "reward_log",
    "select",
    "verify",
]
