"""What a signal does to a process that imports, trains or drives."""

from __future__ import annotations

import signal

import pytest
from tether.launch.signals import stoppable, uninterrupted


def test_an_interrupt_waits_for_an_import():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("imported")
        done.append("gone on")
    assert done == ["imported"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_asks_and_a_second_one_ends(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stoppable(lambda: "") as stopped:
        assert stopped() == ""
        signal.raise_signal(number)
        assert stopped() == number.name
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_there_are_other_causes_to_stop():
    with stoppable(lambda: "enough") as stopped:
        assert stopped() == "enough"
