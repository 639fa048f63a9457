"""Drafters propose what stood after the same words, and nothing of anybody else's."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall.inference import Greedy
from seawall.inference.errors import InvalidSettingError
from seawall.inference.generate.choosing import Chooser
from seawall.inference.generate.speculation import Corpus, CorpusDraft, NGram, SuffixAutomaton, Turn


def longest_repeat(text):
    """Length of the longest suffix that also ends earlier, by looking everywhere."""
    for length in range(len(text) - 1, 0, -1):
        if any(text[end - length : end] == text[-length:] for end in range(length, len(text))):
            return length
    return 0


@given(st.lists(st.integers(0, 3), max_size=60))
@settings(max_examples=200, deadline=None)
def test_the_automaton_finds_the_longest_suffix_that_stood_in_the_text_before(text):
    automaton = SuffixAutomaton()
    for place, token in enumerate(text):
        automaton.append(token)
        so_far = text[: place + 1]
        assert automaton.matched == longest_repeat(so_far)
        if automaton.matched:
            assert automaton.source <= place
            assert so_far[automaton.source - automaton.matched : automaton.source] == so_far[-automaton.matched :]


def test_the_automaton_grows_in_step_with_the_text_even_where_everything_repeats():
    automaton = SuffixAutomaton()
    for _ in range(5000):
        automaton.append(7)
    assert len(automaton._link) <= 2 * 5000
    assert automaton.matched == 4999


def test_a_continuation_may_run_on_into_itself():
    automaton = SuffixAutomaton()
    for token in [1, 2, 3, 1, 2, 3, 1]:
        automaton.append(token)
    assert automaton.following(7) == [2, 3, 1, 2, 3, 1, 2]


def proposals(drafting, most=8):
    return [p.token for p in drafting.propose(Turn(most, Chooser(Greedy())))]


def test_prompt_lookup_proposes_what_followed_the_last_time():
    drafting = NGram().start([5, 6, 7, 8, 9, 1, 5, 6])
    assert proposals(drafting, 3) == [7, 8, 9]
    drafting.extend(7)
    assert proposals(drafting, 2) == [8, 9]
    drafting.extend(4)
    assert proposals(drafting) == []


def test_longer_matches_are_more_confident():
    long, short = list(range(20)), [50]
    drafting = NGram().start([*long, *short, *long])
    strengths = [p.strength for p in drafting.propose(Turn(4, Chooser(Greedy())))]
    drafting.extend(99)
    drafting.extend(50)
    assert strengths[0] == 5
    assert next(drafting.propose(Turn(4, Chooser(Greedy())))).strength == 0


def test_a_sequence_knows_nothing_of_another_one():
    drafter = NGram()
    first = drafter.start([1, 2, 3, 4])
    first.extend(1)
    second = drafter.start([1, 2, 9, 1])
    assert proposals(first, 1) == [2]
    second.extend(2)
    assert proposals(second, 1) == [9]


def test_a_corpus_proposes_its_commonest_continuation():
    corpus = Corpus([[1, 2, 3, 4], [7, 1, 2, 3, 5], [1, 2, 8]])
    drafting = CorpusDraft(corpus=corpus).start([0, 1, 2])
    assert proposals(drafting, 1) == [3]
    assert proposals(CorpusDraft(corpus=corpus).start([7, 1, 2]), 4) == [3, 5]  # a draft ends with its document
    assert proposals(CorpusDraft(corpus=corpus).start([4, 7])) == []  # no match crosses documents


@given(seed=st.integers(0, 500), prompt=st.lists(st.integers(0, 4), max_size=12))
@settings(max_examples=60, deadline=None)
def test_what_a_corpus_proposes_stands_in_it_after_the_end_of_the_sequence(seed, prompt):
    rng = random.Random(seed)
    documents = [[rng.randrange(5) for _ in range(rng.randrange(40))] for _ in range(4)]
    drafting = CorpusDraft(corpus=Corpus(documents), shortest=1).start([])
    for token in prompt:
        drafting.extend(token)
    found = proposals(drafting, 3)
    matched = drafting._matched
    if found:
        wanted = [*prompt[len(prompt) - matched :], *found]
        assert any(document[at : at + len(wanted)] == wanted for document in documents for at in range(len(document)))


def test_a_corpus_sorts_its_places_like_a_plain_sort():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, 300).tolist()
    corpus = Corpus([tokens])
    stored = corpus._tokens.tolist()
    keys = [tuple(stored[place : place + 16]) for place in corpus._places]
    assert keys == sorted(keys)


def test_a_corpus_of_anything_but_tokens_is_refused():
    for bad in ([[-1, 2]], [[[1, 2]]], [[1, [2]]], ["text"], "text", [[1.5]], [[1 << 31]], [None]):
        with pytest.raises(InvalidSettingError, match="a document must be a list of tokens"):
            Corpus(bad)


def test_an_empty_corpus_proposes_nothing():
    assert proposals(CorpusDraft(corpus=Corpus([])).start([1, 2, 3])) == []
