"""Calls to other hosts, behind policies of their own for each host.

`seawall.web.outgoing.httpx` has the transports of httpx, `seawall.web.outgoing.requests` the adapter of requests.
"""

from __future__ import annotations

from seawall.web.outgoing.call import OutgoingCall, by_host
from seawall.web.outgoing.faults import is_fault
from seawall.web.outgoing.policies import HedgePerHost, HostPolicies, host_policies

__all__ = ["HedgePerHost", "HostPolicies", "OutgoingCall", "by_host", "host_policies", "is_fault"]
