"""The window pairs that burn rates are judged over, after the SRE workbook's chapter on alerting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
MONTH = 30 * DAY
Severity: TypeAlias = Literal["page", "ticket"]
SEVERITIES: tuple[Severity, ...] = ("page", "ticket")


@dataclass(frozen=True, slots=True)
class WindowPair:
    """Two look backs, in seconds: the alert fires while the burn rate of both is above `factor`.

    The long one says that much of the budget went, the short one that it still goes, so that an alert ends soon
    after its cause.
    """

    severity: Severity
    long: float
    short: float
    factor: float


_WORKBOOK: tuple[tuple[Severity, float, float, float], ...] = (  # with the share of the budget gone in the long window
    ("page", HOUR, 5 * MINUTE, 0.02),
    ("page", 6 * HOUR, 30 * MINUTE, 0.05),
    ("ticket", DAY, 2 * HOUR, 0.10),
    ("ticket", 3 * DAY, 6 * HOUR, 0.10),
)


def pairs_for(window: float) -> tuple[WindowPair, ...]:
    """The workbook's four pairs for an objective over `window` seconds, the quickest first.

    From four weeks to a month the look backs are the workbook's, and the factors follow the window (14.4, 6, 3 and 1
    for 30 days). Of other windows the look backs grow or shrink with it, and the factors stay.

    Examples:
        >>> [pair.factor for pair in pairs_for(30 * DAY)]
        [14.4, 6.0, 3.0, 1.0]
        >>> [pair.factor for pair in pairs_for(28 * DAY)]
        [13.44, 5.6, 2.8, 0.933333]
        >>> pairs_for(7 * DAY)[0]
        WindowPair(severity='page', long=840.0, short=70.0, factor=14.4)
    """
    monthly = 28 * DAY <= window <= 31 * DAY
    period, scale = (window, 1.0) if monthly else (MONTH, window / MONTH)
    return tuple(
        WindowPair(severity, long * scale, short * scale, round(share * period / long, 6))
        for severity, long, short, share in _WORKBOOK
    )


def duration(seconds: float) -> str:
    """`seconds` as Prometheus and OpenSLO write them, to within a millisecond.

    Examples:
        >>> duration(300.0), duration(30 * DAY), duration(5400.0), duration(0.25)
        ('5m', '30d', '1h30m', '250ms')
    """
    left = round(seconds * 1000)
    text = ""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        amount, left = divmod(left, size)
        text += f"{amount}{unit}" if amount else ""
    return text or "0s"
