"""Service level objectives: what counts as good, how much bad is left, how fast it goes, and who is told."""

from seawall.slo.alerts import BurnAlertFired, BurnAlertResolved
from seawall.slo.burn import Burn, BurnAction
from seawall.slo.objective import SLO, BudgetExhausted, SLOSnapshot
from seawall.slo.tracker import TrackerState
from seawall.slo.windows import Severity, WindowPair, pairs_for

__all__ = [
    "SLO",
    "BudgetExhausted",
    "Burn",
    "BurnAction",
    "BurnAlertFired",
    "BurnAlertResolved",
    "SLOSnapshot",
    "Severity",
    "TrackerState",
    "WindowPair",
    "pairs_for",
]
