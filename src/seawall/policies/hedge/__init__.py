"""Hedge: when an answer takes long, ask again, and take whichever comes first."""

from seawall.policies.hedge.policy import Hedge, HedgeLost, HedgeSnapshot, HedgeStarted, HedgeWon
from seawall.policies.hedge.quantile import Estimate, Quantile
from seawall.policies.hedge.race import Budget

__all__ = [
    "Budget",
    "Estimate",
    "Hedge",
    "HedgeLost",
    "HedgeSnapshot",
    "HedgeStarted",
    "HedgeWon",
    "Quantile",
]
