"""The main job in one run folder: generate -> verify -> label -> select -> distil -> GRPO -> compare."""

from asn_rl.job.config import CompareConfig, GenerateConfig, HeuristicSpec, JobConfig, PolicySpec
from asn_rl.job.job import Job
from asn_rl.job.labelling import fit_reward_model, generate, label, select, verify
from asn_rl.job.learning import compare, distil, reinforce

__all__ = [
    "CompareConfig",
    "GenerateConfig",
    "HeuristicSpec",
    "Job",
    "JobConfig",
    "PolicySpec",
    "compare",
    "distil",
    "fit_reward_model",
    "generate",
    "label",
    "reinforce",
    "select",
    "verify",
]
