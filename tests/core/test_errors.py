"""What an error carries comes along when it is copied or sent to another process."""

from __future__ import annotations

import copy
import pickle

import pytest

from seawall import Rejected
from seawall.core.errors import CallTimeoutError


@pytest.mark.parametrize("send", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("error", [Rejected("p"), Rejected("p", 2.5), CallTimeoutError("p", 1.5)])
def test_an_error_that_is_copied_or_sent_elsewhere_says_the_same(error, send):
    sent = send(error)
    assert type(sent) is type(error)
    assert (vars(sent), sent.args, str(sent)) == (vars(error), error.args, str(error))


def test_a_refusal_says_who_refuses_and_when_to_come_back():
    assert Rejected("p", 2.5).args == ("p", 2.5)
    assert CallTimeoutError("p", 1.5).args == ("p", 1.5)
    assert str(Rejected("p")) == "'p' refused"
    assert str(Rejected("p", 0.0)) == "'p' refused; try again in 0 s"
    assert str(Rejected("p", 12.3456)) == "'p' refused; try again in 12.3 s"
    assert str(CallTimeoutError("p", 1.5)) == "'p': the call took longer than 1.5 s"
