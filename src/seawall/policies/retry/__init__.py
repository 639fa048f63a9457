"""Retry: a call that failed is made again, after a pause, as long as that makes sense."""

from seawall.policies.retry.loop import Loop, Try
from seawall.policies.retry.policy import Retry, RetrySnapshot
from seawall.policies.retry.rules import Attempt, Budget, Reason
from seawall.policies.retry.run import RetryGivenUp, RetryScheduled

__all__ = [
    "Attempt",
    "Budget",
    "Loop",
    "Reason",
    "Retry",
    "RetryGivenUp",
    "RetryScheduled",
    "RetrySnapshot",
    "Try",
]
