"""How far an answer has come in its constraint: ahead over drafts and back, compiled once."""

import gc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall.inference import Choice, Greedy, Regex, Sampling
from seawall.inference.generate import grammars
from seawall.inference.generate.choosing import Chooser
from seawall.inference.generate.constraints import Course
from tests.inference.constraints.spelling import words


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_going_ahead_and_back_over_drafts_leaves_no_trace(data):
    vocabulary = words("a", "b", "c", "ab", "bc", "abc", "ca")
    setting = Regex("(ab*c|ca){1,3}")
    course, decided = Course(setting.matcher(vocabulary), vocabulary.ends), []
    for _ in range(data.draw(st.integers(1, 12))):
        drafted = data.draw(st.lists(st.integers(0, 7), max_size=4))
        fresh = setting.matcher(vocabulary)
        possible = all(token and fresh.consume(token) for token in [*decided, *drafted])
        mask = course.allowed(drafted)
        assert (mask is None) == (not possible)
        if possible:
            np.testing.assert_array_equal(mask, fresh.allowed())
        if possible and drafted and data.draw(st.booleans()):  # as a verification decides
            decided.append(drafted[0])
            course.decide(drafted[0])
            continue
        choices = np.flatnonzero(course.allowed()[1:]) + 1
        if len(choices) and data.draw(st.booleans()):
            decided.append(int(data.draw(st.sampled_from(choices.tolist()))))
            course.decide(decided[-1])


def test_probabilities_are_those_of_the_allowed_tokens_and_draws_follow_them():
    vocabulary = words("a", "b", "c", "d")
    logits = np.array([3.0, 1.0, 2.0, 0.5, 0.0], np.float32)
    draws = Counter()
    for seed in range(3000):
        chooser = Chooser(Sampling(seed=seed), vocabulary=vocabulary, constraint=Choice(["a", "c", "d"]))
        draws[chooser.choose(logits)] += 1
    weights = np.exp(logits[[1, 3, 4]])
    expected = weights / weights.sum()
    np.testing.assert_allclose(chooser.probabilities(logits)[[1, 3, 4]], expected, atol=1e-7)
    assert set(draws) == {1, 3, 4}
    counts = np.array([draws[1], draws[3], draws[4]])
    assert ((counts - 3000 * expected) ** 2 / (3000 * expected)).sum() < 13.8  # chi-square, p = 0.001
    greedy = Chooser(Greedy(), vocabulary=vocabulary, constraint=Choice(["a", "c", "d"]))
    assert greedy.choose_with_lead(logits) == (1, 0.5)
    assert greedy.likelihood(logits, 2) == 0
    assert greedy.likelihood(logits, 1) == pytest.approx(expected[0])


def test_one_grammar_is_compiled_once_for_a_vocabulary_and_only_so_many_are_kept(monkeypatch):
    made = []
    real = grammars.LLMatcher

    class Counting:
        validate_grammar_with_warnings = real.validate_grammar_with_warnings
        grammar_from_regex = real.grammar_from_regex

        def __new__(cls, tokenizer, grammar, **settings):
            made.append(grammar)
            return real(tokenizer, grammar, **settings)

    monkeypatch.setattr(grammars, "LLMatcher", Counting)
    vocabulary = words(*"ab")
    for _ in range(3):
        Regex("a+").matcher(vocabulary)
    assert len(made) == 1
    for count in range(1, 80):
        Regex(f"b{{{count}}}").matcher(vocabulary)
    assert len(grammars._compilers[vocabulary]._compiled) == 64
    Regex("a+").matcher(vocabulary)
    assert len(made) == 81


def test_what_was_compiled_for_a_vocabulary_goes_with_it():
    vocabulary = words(*"ab")
    Regex("a+").matcher(vocabulary)
    assert vocabulary in grammars._compilers
    before = len(grammars._compilers)
    del vocabulary
    gc.collect()
    assert len(grammars._compilers) == before - 1
