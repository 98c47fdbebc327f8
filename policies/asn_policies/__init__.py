"""Decoding policies: learned networks and fixed heuristics, all distributions over the points of a sketch."""

from asn_policies.asked import Asked
from asn_policies.attention import SamplingNetwork
from asn_policies.base import PolicyModule
from asn_policies.distribution import DistributionAwareTransform
from asn_policies.fallback import Fallback
from asn_policies.heuristics import Pipeline
from asn_policies.local import LocalTransform
from asn_policies.order_statistics import OrderStatisticsNetwork
from asn_policies.recurrent import RecurrentPolicy
from asn_policies.strategy import SequenceStrategy, TokenStrategy
from asn_policies.token_features import TokenFeatureNetwork
from asn_policies.value import ValueNetwork
from asn_policies.warp import TemperatureTopP, TwoSlopeWarp

__all__ = [
    "Asked",
    "DistributionAwareTransform",
    "Fallback",
    "LocalTransform",
    "OrderStatisticsNetwork",
    "Pipeline",
    "PolicyModule",
    "RecurrentPolicy",
    "SamplingNetwork",
    "SequenceStrategy",
    "TemperatureTopP",
    "TokenFeatureNetwork",
    "TokenStrategy",
    "TwoSlopeWarp",
    "ValueNetwork",
]
