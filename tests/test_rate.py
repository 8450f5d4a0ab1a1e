"""The rate on a clock that moves only when it is told to."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tether.robot_env.rate import Rate

PERIOD = 0.1


class Clock:
    def __init__(self, overshoot: float = 0.0) -> None:
        self.time, self.overshoot = 0.0, overshoot

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0.0
        self.time += seconds + self.overshoot


def ticks(works: list[float], overshoot: float = 0.0) -> tuple[list[float], Rate]:
    """When each wait returned, for what was done before it."""
    clock = Clock(overshoot)
    rate = Rate(1 / PERIOD, clock.now, clock.sleep)
    out = []
    for work in works:
        clock.time += work
        rate.wait()
        out.append(clock.time)
    return out, rate


def test_a_stall_is_counted_and_its_ticks_are_skipped():
    at, rate = ticks([0.01, 0.02, 0.35, 0.01, 0.01])
    assert at == pytest.approx([0.11, 0.21, 0.56, 0.61, 0.71])
    assert rate.late == 3
    assert rate.lateness_ms()["max"] == pytest.approx(250.0)
    assert rate.lateness_ms()["p50"] == pytest.approx(0.0, abs=1e-6)


# no sum of these is a whole number of periods, where rounding alone says whether a tick was late
@given(st.lists(st.integers(0, 50).map(lambda n: n / 100 + 0.00313), min_size=1, max_size=60))
def test_the_phase_is_kept_and_no_two_late_ticks_follow_each_other_faster_than_the_work(works):
    at, rate = ticks(works)
    first, in_time = works[0] + PERIOD, 0
    for before, now, work in zip([0.0, *at], at, works, strict=False):
        phase = (now - first) / PERIOD
        on_phase = math.isclose(phase, round(phase), abs_tol=1e-6)
        assert on_phase or now == pytest.approx(before + work)  # late: at once, never earlier than the work
        assert now >= before + work - 1e-9
        in_time += now > before + work + 1e-9
    passed = math.floor((at[-1] - first) / PERIOD + 1e-6) + 1
    assert abs(in_time + rate.late - passed) <= 1  # every period had its tick in time or is counted
    # no burst: in any stretch of time there are at most as many ticks as it has periods, and one
    for i in range(len(at)):
        for j in range(i + 1, len(at)):
            assert j - i <= (at[j] - at[i]) / PERIOD + 1 + 1e-6


def test_sleeping_too_long_is_lateness_but_does_not_add_up():
    at, rate = ticks([0.0] * 50, overshoot=0.003)
    assert at == pytest.approx([PERIOD * (i + 1) + 0.003 for i in range(50)])
    assert rate.late == 0
    assert rate.lateness_ms()["p99"] == pytest.approx(3.0)


def test_a_restart_forgets_the_pause():
    clock = Clock()
    rate = Rate(10, clock.now, clock.sleep)
    rate.wait()
    clock.time += 60.0
    rate.restart()
    rate.wait()
    assert rate.late == 0 and clock.time == pytest.approx(60.2)


@pytest.mark.parametrize("hz", [0, -1, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(hz):
    with pytest.raises(ValueError, match="positive number"):
        Rate(hz, lambda: 0.0, lambda s: None)


def test_before_the_first_tick_there_is_no_lateness():
    assert Rate(10, lambda: 0.0, lambda s: None).lateness_ms() == {"p50": 0.0, "p99": 0.0, "max": 0.0}
