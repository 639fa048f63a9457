"""Adaptive bulkhead: a bulkhead whose limit finds itself."""

from seawall.policies.adaptive_bulkhead.bulkhead import AdaptiveBulkhead, AdaptiveBulkheadSnapshot, LimitChanged
from seawall.policies.adaptive_bulkhead.limits import AIMDLimit, GradientLimit, Limit, VegasLimit

__all__ = [
    "AIMDLimit",
    "AdaptiveBulkhead",
    "AdaptiveBulkheadSnapshot",
    "GradientLimit",
    "Limit",
    "LimitChanged",
    "VegasLimit",
]
