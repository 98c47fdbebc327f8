"""Decoding policies: learned networks and fixed heuristics, all distributions over the points of a sketch."""

from asn_policies.attention import SamplingNetwork
from asn_policies.base import PolicyModule
from asn_policies.distribution import DistributionAwareTransform
from asn_policies.heuristics import Pipeline
from asn_policies.local import LocalTransform
from asn_policies.order_statistics import OrderStatisticsNetwork

__all__ = [
    "DistributionAwareTransform",
    "LocalTransform",
    "OrderStatisticsNetwork",
    "Pipeline",
    "PolicyModule",
    "SamplingNetwork",
]
