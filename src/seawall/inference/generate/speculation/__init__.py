"""Speculative decoding: drafters guess the next tokens, the target verifies them in one pass, the answer stays its own.

Read `verify` first: it holds the rules, and fits on a page. `controller` decides when to draft and how far,
`speculator` runs the rounds, `drafter` says what a drafter is.
"""

from __future__ import annotations

from .automaton import SuffixAutomaton
from .controller import Controller, Plan
from .corpus import Corpus, CorpusDraft
from .costs import Costs, Pace
from .drafter import Drafter, Drafting, Host, Proposal, Turn
from .model import ModelDraft
from .ngram import NGram
from .settings import Speculation
from .speculator import Speculator
from .statistics import DrafterStatistics, SpeculationStatistics
from .target import SlotTarget, Target
from .verify import accept, accept_or_reject, expected_tokens, residual, sample, verify_chosen, verify_drawn

__all__ = [
    "Controller",
    "Corpus",
    "CorpusDraft",
    "Costs",
    "Drafter",
    "DrafterStatistics",
    "Drafting",
    "Host",
    "ModelDraft",
    "NGram",
    "Pace",
    "Plan",
    "Proposal",
    "SlotTarget",
    "Speculation",
    "SpeculationStatistics",
    "Speculator",
    "SuffixAutomaton",
    "Target",
    "Turn",
    "accept",
    "accept_or_reject",
    "expected_tokens",
    "residual",
    "sample",
    "verify_chosen",
    "verify_drawn",
]
