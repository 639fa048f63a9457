"""Many sequences in one step: a row of the batch for each, their memory, and the prompts that they share.

Read `continuous` first, then `stepping`. `pool` keeps the books of bytes, `memory` pages the caches, `prefix` knows
beginnings of prompts, `reading` sizes their parts, `drafting` decides about drafts.
"""

from __future__ import annotations

from .continuous import ContinuousBatch
from .prefix import PrefixStatistics
from .request import Request
from .row import Row
from .stepping import Advance

__all__ = ["Advance", "ContinuousBatch", "PrefixStatistics", "Request", "Row"]
