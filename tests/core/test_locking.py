"""The one lock of the process, where processes fork and calls are interrupted."""

from __future__ import annotations

import os
import threading
import warnings

import pytest

from seawall.core.locking import held, lock, release_if_held


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_forked_while_another_thread_decides_finds_the_lock_free():
    taken = threading.Event()

    def decide():
        with lock:
            taken.set()
            threading.Event().wait(0.1)  # which the fork must wait for

    deciding = threading.Thread(target=decide)
    deciding.start()
    taken.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of the very thing
        child = os.fork()
    if not child:
        os._exit(0 if lock.acquire(timeout=5) else 1)
    deciding.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lock.acquire(timeout=5)
    lock.release()


def test_giving_back_after_an_interruption_gives_back_what_is_held_and_nothing_else():
    release_if_held()  # it is not held, and that is no error
    assert not held()
    lock.acquire()
    assert held()
    release_if_held()
    assert not held()
