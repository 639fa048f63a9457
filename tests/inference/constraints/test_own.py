"""A constraint of a user's own works like those that come with the kit; whoever asks for nothing pays nothing."""

import json

import numpy as np
import pytest

from seawall.inference import Constraint, Greedy, JsonSchema, Penalties, Sampling
from seawall.inference.errors import ConstraintError
from seawall.inference.generate.speculation import Speculation
from tests.inference.constraints.spelling import ADDRESS, EXACT, Guessing, answer


class Unlimited:
    def matcher(self, vocabulary):
        return self

    def allowed(self):
        return None

    def consume(self, token):
        return True

    def rollback(self, tokens):
        pass

    def forced(self):
        return ()


class Without:
    """A constraint of a user's own: some tokens never, and the answer has a fixed length."""

    def __init__(self, tokens, length):
        self.tokens, self.length = tokens, length

    def matcher(self, vocabulary):
        return WithoutMatcher(self, vocabulary)


class WithoutMatcher:
    def __init__(self, rule, vocabulary):
        self.rule, self.said = rule, []
        self.words = np.ones(vocabulary.size, bool)
        self.words[[*rule.tokens, *vocabulary.ends]] = False
        self.end = np.zeros(vocabulary.size, bool)
        self.end[list(vocabulary.ends)] = True

    def allowed(self):
        return self.end if len(self.said) == self.rule.length else self.words

    def consume(self, token):
        if not self.allowed()[token]:
            return False
        self.said.append(token)
        return True

    def rollback(self, tokens):
        del self.said[-tokens:]

    def forced(self):
        return ()


def test_a_constraint_of_ones_own_is_kept_with_every_drafter(speller):
    first = answer(speller, None, tokens=1)[2][0]
    rule = Without([first, 40, 41], 20)
    assert isinstance(rule, Constraint)
    _, finish, alone = answer(speller, rule)
    assert (finish, len(alone)) == ("stop", 21)
    assert not {first, 40, 41} & set(alone)
    for speculation in (Speculation(length=6), Speculation(drafters=(Guessing(),), length=6)):
        assert answer(speller, rule, speculation)[2] == alone


@pytest.mark.parametrize("sampling", [Greedy(), Sampling(seed=1), Sampling(top_p=0.8, seed=2)])
def test_a_constraint_that_forbids_nothing_is_bit_for_bit_none_at_all(speller, sampling):
    for penalties in (None, Penalties(repetition=1.2, presence=0.3)):
        free = answer(speller, None, sampling=sampling, penalties=penalties, tokens=60)
        assert answer(speller, Unlimited(), sampling=sampling, penalties=penalties, tokens=60) == free


def test_the_limit_of_tokens_cuts_a_constrained_answer_and_says_so(speller):
    text, finish, _ = answer(speller, JsonSchema(ADDRESS), tokens=5)
    assert finish == "length"
    with pytest.raises(ValueError):
        json.loads(text)


@pytest.mark.parametrize("mask", [True, {3}, "abc", np.ones(1, bool), np.ones((1, 400), bool), [True, False]])
def test_a_mask_of_another_shape_is_an_error_and_no_choice(speller, mask):
    class Odd(Unlimited):
        def allowed(self):
            return mask

    for speculation in (False, Speculation()):
        with pytest.raises(ConstraintError, match=f"each of the {speller.vocabulary} tokens, got"):
            answer(speller, Odd(), speculation)


def test_an_error_of_ones_own_matcher_is_not_masked(speller):
    class Broken(Unlimited):
        def allowed(self):
            raise ZeroDivisionError("mine")

    class Empty(Unlimited):
        def allowed(self):
            return np.zeros(speller.vocabulary, bool)

    for speculation in (False, EXACT, Speculation()):
        with pytest.raises(ZeroDivisionError, match="mine"):
            answer(speller, Broken(), speculation)
        with pytest.raises(ConstraintError, match="allows no token at all"):
            answer(speller, Empty(), speculation)
    assert speller.active_sequences == 0
