"""The errors every policy shares.

Exception
+-- Rejected             a policy refused the call; it never started
|   +-- CircuitOpenError, BulkheadFullError, RateLimitedError ...   (beside their policies)
+-- TimeoutError
    +-- CallTimeoutError             a call was cancelled because it took too long
        +-- DeadlineExceededError    ... with all it did, retries included (beside the Deadline policy)
"""

from __future__ import annotations


class Rejected(Exception):
    """A policy refused the call before it started, so nothing needs undoing and trying again is safe.

    Catch this to answer "too busy" whatever the reason was; catch a subclass to tell the reasons apart.

    Attributes:
        policy: name of the policy that refused.
        retry_after: seconds after which a new call has a chance, or None where nobody knows.
        sheds: whether the policy refused by choice, to spare the rest, rather than because it could not serve.
    """

    reason = "refused"
    sheds = False

    def __init__(self, policy: str, retry_after: float | None = None) -> None:
        super().__init__(policy, retry_after)
        self.policy = policy
        self.retry_after = retry_after

    def __str__(self) -> str:
        when = "" if self.retry_after is None else f"; try again in {self.retry_after:.3g} s"
        return f"{self.policy!r} {self.reason}{when}"


class CallTimeoutError(TimeoutError):
    """A call took longer than a policy allows. The user's own TimeoutErrors are never relabelled as this.

    Attributes:
        policy: name of the policy.
        after: seconds it allowed.
    """

    def __init__(self, policy: str, after: float) -> None:
        super().__init__(policy, after)
        self.policy = policy
        self.after = after

    def __str__(self) -> str:
        return f"{self.policy!r}: the call took longer than {self.after:g} s"
