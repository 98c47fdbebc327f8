"""Fixed sampling rules as policies."""

from asn_policies.heuristics.grid import grid
from asn_policies.heuristics.pipeline import Pipeline, make_rule, read_pipelines
from asn_policies.heuristics.rules import RULES

__all__ = ["RULES", "Pipeline", "grid", "make_rule", "read_pipelines"]
