"""The errors every policy shares.

Exception
+-- Rejected             a policy refused the call; it never started
|   +-- CircuitOpenError, BulkheadFullError, RateLimitedError ...   (beside their policies)
+-- TimeoutError
    +-- CallTimeoutError (beside the Timeout policy)
"""

from __future__ import annotations


class Rejected(Exception):
    """A policy refused the call before it started, so nothing needs undoing and trying again is safe.

    Catch this to answer "too busy" whatever the reason was; catch a subclass to tell the reasons apart.

    Attributes:
        policy: name of the policy that refused.
        retry_after: seconds after which a new call has a chance, or None where nobody knows.
    """

    reason = "refused"

    def __init__(self, policy: str, retry_after: float | None = None) -> None:
        super().__init__(policy, retry_after)
        self.policy = policy
        self.retry_after = retry_after

    def __str__(self) -> str:
        when = "" if self.retry_after is None else f"; try again in {self.retry_after:.3g} s"
        return f"{self.policy!r} {self.reason}{when}"
