"""Service level objectives: what counts as good, how much bad is left, how fast it goes."""

from seawall.slo.objective import SLO, BudgetExhausted, SLOSnapshot

__all__ = ["SLO", "BudgetExhausted", "SLOSnapshot"]
