"""The gate: what holds for any sequence of anything, chosen attacks, and the attacks against every mutation of it."""

from __future__ import annotations

import ast
import copy
import importlib.util
import sys
from dataclasses import FrozenInstanceError, replace
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tether.drivers.base import Channel, Command, Reading
from tether.robot_env import safety

CHANNELS = (
    Channel("fast", 1, "m/s", 100.0, 0.04, (1.0,)),  # may be 0.04 + 5 / 100 s old
    Channel("slow", 2, "m", 10.0, 0.0, (1.0, 1.0), noisy=True),  # 0.5 s, and may repeat for 0.5 s
)
COMMAND = Command(
    ("speed", "steering"), ("m/s", "rad"), (0.5, -0.4), (4.5, 0.4), (-1.5, -0.4), (4.5, 0.4), (9.0, 4.0), (0.0, 0.1),
    (False, True), ("fast", ""), (2.0, np.inf), (1.0, np.inf),
)  # fmt: skip
LOW, HIGH, RATE, SAFE = (np.array(v) for v in (COMMAND.low, COMMAND.high, COMMAND.rate, COMMAND.safe))


def wish(speed: float, steering: float) -> np.ndarray:
    return COMMAND.to_action(np.array([speed, steering]))


GO = wish(4, 0)


class Rig:
    """A gate between a robot that follows at once and whoever attacks."""

    def __init__(self, m: ModuleType, armed: bool = True, **wanted: float) -> None:
        self.gate = m.Gate(COMMAND, m.Limits.of(CHANNELS, COMMAND, wanted))
        self.now, self.out = 0.0, SAFE
        if armed:
            for _ in range(12):
                state = self.tick(None, ("arm",))[1]
            assert state == "armed"

    def tick(self, wish, events=(), dt=0.1, speed=None, value=None, ages=()):
        """One tick later, with the speed the robot was told (or `speed`), a new value of "slow" (or `value`), and
        channels that are so old (None: that never came)."""
        self.now += dt
        stamps = {"fast": self.now, "slow": self.now}
        for name, age in dict(ages).items():
            stamps[name] = None if age is None else self.now - age
        new = (self.now, -1.0) if value is None else value
        values = {"fast": np.array([self.out[0] if speed is None else speed]), "slow": np.array(new)}
        reading = Reading(values, {k: v for k, v in stamps.items() if v is not None})
        self.out, state, faults = self.gate.step(self.now, reading, wish, events)
        return self.out, state, faults

    def run(self, ticks, wish=GO, **changes):
        for _ in range(ticks):
            found = self.tick(wish, **changes)
        return found


# --- properties, for any sequence of anything

ANY = st.one_of(
    st.none(),
    st.lists(st.floats(width=32), min_size=0, max_size=3).map(lambda v: np.array(v, np.float32)),
    st.tuples(st.floats(-3, 3), st.floats(-3, 3)).map(np.array),
)
TICK = st.tuples(
    st.sampled_from([0.1, 0.1, 0.02, 0.0, 1.5]), ANY, st.sampled_from([0.0, 0.0, 0.0, 0.2, 0.6, -0.1]),
    st.sampled_from([None, None, 0.0, 9.0, np.nan]), st.sampled_from([None, None, None, (0.0, 0.0)]),
    st.lists(st.sampled_from(["estop", "clear", "arm", "alive"]), max_size=2).map(tuple),
)  # fmt: skip
# from each state, where a tick may lead without an e-stop; clear and arm are looked at by themselves
LEADS = {
    "disarmed": {"disarmed", "armed", "run", "hold"}, "armed": {"armed", "run", "hold", "stopping"},
    "run": {"armed", "run", "hold", "stopping"}, "hold": {"armed", "run", "hold", "stopping"},
    "stopping": {"stopping", "stopped"}, "stopped": {"stopped", "disarmed"}, "estop": {"estop", "disarmed"},
}  # fmt: skip


def check(rig: Rig, before: str, last: np.ndarray, most: float, wanted, found, events, dt, speed) -> None:
    """What must hold after any tick."""
    out, state, faults = found
    assert np.isfinite(out).all()
    assert (out >= np.maximum(LOW, [-most, -9]) - 1e-9).all() and (out <= np.minimum(HIGH, [most, 9]) + 1e-9).all()
    assert state == "estop" if "estop" in events else state in LEADS[before]
    if before == "disarmed" and state not in ("disarmed", "estop"):
        assert "arm" in events and "clear" not in events
    if before in ("stopped", "estop") and state == "disarmed":
        assert "clear" in events
    if state == "run":
        assert wanted is not None and wanted.shape == (2,) and np.isfinite(wanted).all()
        assert not set(faults) - {"limit", "rate", "reach"}
        assert (np.abs(out - last) <= RATE * min(max(dt, 0.0), 0.25) + 1e-6).all()
        far = abs(out[0] - speed) - 2.0  # beyond the reach only where the last command and the box demand it
        step = RATE[0] * min(dt, 0.25)
        edge = min(last[0] + step, most, 4.5) if speed > out[0] else max(last[0] - step, -most, -1.5)
        assert far <= 1e-9 or out[0] == pytest.approx(edge, abs=1e-6)
    else:
        assert out[0] == SAFE[0] and out[1] == (last[1] if state in ("armed", "hold") else SAFE[1])
    if state in ("hold", "stopping", "stopped", "estop"):
        assert state in faults and (state == "estop" or rig.gate.cause)


@settings(max_examples=300)
@given(st.lists(TICK, max_size=40), st.floats(0.2, 4.5), st.booleans())
def test_whatever_is_wished_the_limits_hold(sequence, most, armed):
    rig = Rig(safety, armed, max_speed_mps=most)
    for dt, wanted, age, speed, value, events in sequence:
        before, last = rig.gate.state, rig.out
        found = rig.tick(wanted, events, dt, speed, value, {"fast": age})
        check(rig, before, last, most, wanted, found, events, dt, last[0] if speed is None else speed)


def at_random(steps: int, seed: int) -> None:
    """The same for a long random walk, in which the robot is armed again whenever it may be."""
    print("seed", seed)
    rng, rig = np.random.default_rng(seed), Rig(safety)
    visited: dict[str, int] = {}
    for _ in range(steps):
        odd = rng.random(6) < 0.02
        wanted = rng.uniform(-3, 3, 2) if not odd[0] else rng.choice([np.nan, np.inf, 1e38, 0.0], 3 - rng.integers(2))
        wanted = None if odd[5] else wanted
        speed = float(rng.uniform(-20, 20)) if odd[1] else None
        dt = float(rng.choice([0.0, 0.6, 3.0])) if odd[2] else 0.1
        events = ("estop",) if rng.random() < 0.002 else tuple(rng.choice(["clear", "arm", "alive"], rng.integers(3)))
        before, last = rig.gate.state, rig.out
        found = rig.tick(wanted, events, dt, speed, (0.0, 0.0) if odd[3] else None, {"slow": 0.7} if odd[4] else {})
        check(rig, before, last, 4.5, wanted, found, events, dt, last[0] if speed is None else speed)
        visited[rig.gate.state] = visited.get(rig.gate.state, 0) + 1
    assert set(visited) == set(LEADS), visited


def test_a_long_random_walk():
    at_random(10_000, seed=7)


@pytest.mark.slow
def test_a_million_random_steps():
    at_random(1_000_000, seed=8)


def latching(sequences: int, seed: int) -> None:
    """Random events, nothing wished for badly: what is latched is left by clear, and left for good by arm alone."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for _ in range(sequences):
        rig = Rig(safety, armed=bool(rng.integers(2)))
        cleared = armed = rig.gate.state == "armed"
        for _ in range(15):
            events = tuple(rng.choice(["estop", "clear", "arm", "alive"], rng.integers(3)))
            bad = rng.random() < 0.3
            before = rig.gate.state
            out, state, _ = rig.tick(np.full(2, np.nan) if bad else GO, events, dt=float(rng.choice([0.1, 1.0])))
            if before in ("stopping", "stopped", "estop"):
                cleared, armed = "clear" in events and before != "stopping" and "estop" not in events, False
            armed = armed or (before == "disarmed" and "arm" in events)
            if state in ("armed", "run", "hold"):
                assert armed and before not in ("stopping", "stopped", "estop")
            if before in ("stopped", "estop"):
                assert (state == "disarmed") == cleared and (out == SAFE).all()


def test_what_is_latched_stays_latched():
    latching(150, seed=9)


@pytest.mark.slow
def test_ten_thousand_sequences_of_events():
    latching(10_000, seed=10)


# --- attacks: each takes a module that should be the gate, and asserts


def limits_are_declared(m):
    limits = m.Limits.of(CHANNELS, COMMAND, {})
    assert limits.max_age_s == {"fast": pytest.approx(0.09), "slow": pytest.approx(0.5)}
    assert limits.max_same_s == {"slow": pytest.approx(0.5)}
    for got, want in ((limits.low, LOW), (limits.high, HIGH), (limits.rate, RATE), (limits.safe, SAFE)):
        assert (got == want).all()
    assert limits.reach.tolist() == [2.0, np.inf] and limits.tolerance.tolist() == [1.0, np.inf]
    assert limits.keeps.tolist() == [False, True] and limits.deadman_s == np.inf
    assert limits.measured == ("fast", "") and limits.place == (0, 0)
    with pytest.raises(FrozenInstanceError):
        limits.low = HIGH
    bare = m.Limits.of((), Command(("v",), ("m/s",), (-1.0,), (1.0,), (-1.0,), (1.0,), (5.0,), (0.0,)), {})
    assert (bare.reach == np.inf).all() and (bare.tolerance == np.inf).all() and bare.measured == ("",)
    assert bare.keeps.tolist() == [False] and bare.max_age_s == {}


def what_measures_a_value_may_be_one_number_of_a_channel(m):
    limits = m.Limits.of(CHANNELS, replace(COMMAND, measured=("slow[1]", "slow")), {})
    assert limits.measured == ("slow", "slow") and limits.place == (1, 0)
    for bad in ("none", "none[0]", "slow[2]", "fast[1]", "slow[-1]", "slow[x]", "slow[1", "[0]"):
        with pytest.raises(m.SafetyError, match="no channel has"):
            m.Limits.of(CHANNELS, replace(COMMAND, measured=(bad, "")), {})
    free = replace(COMMAND, rate=(np.inf, np.inf), reach=(2.0, 0.1), measured=("slow[1]", "slow[0]"))
    gate = m.Gate(free, m.Limits.of(CHANNELS, free, {}))
    for k in range(14):
        reading = Reading(
            {"fast": np.array([9.0]), "slow": np.array([0.01 * k, 1.0])}, {"fast": 0.1 * k, "slow": 0.1 * k}
        )
        out, state, _ = gate.step(0.1 * k, reading, None if k < 13 else wish(4.5, 0.4), ("arm",))
    assert state == m.RUN and out == pytest.approx([3.0, 0.23])  # 2.0 from slow[1], 0.1 from slow[0]


def what_stays_stops_where_it_is(m):
    """And not where it rests: where it was told to be, as long as it is near that; else by what is measured."""
    stays = replace(COMMAND, stays=True, keeps=(), measured=("slow[0]", "slow[1]"), reach=(1.0, 0.05), tolerance=())
    assert m.Limits.of(CHANNELS, stays, {}).stays and not m.Limits.of(CHANNELS, COMMAND, {}).stays
    gate, now = m.Gate(stays, m.Limits.of(CHANNELS, stays, {})), 0.0

    def tick(wish, *events, at=(1.0, 0.1)):
        nonlocal now
        now += 0.1
        reading = Reading({"fast": np.zeros(1), "slow": np.array(at) + 1e-9 * now}, {"fast": now, "slow": now})
        return gate.step(now, reading, wish, events)[:2]

    for k in range(12):
        out, state = tick(None, "arm", at=(0.9 + 1.1 * (k % 3), 0.1))  # carried about
        assert out == pytest.approx([0.9 + 1.1 * (k % 3), 0.1])
    for sunk in (0.1, 0.2, 0.9):  # by its own weight
        out, state = tick(None, at=(3.1 - sunk, 0.1))
        assert out == pytest.approx([3.1, 0.1]) and state == m.ARMED
    out, state = tick(wish(4.5, 0.1), at=(3.1, 0.1))
    assert state == m.RUN and out == pytest.approx([4.0, 0.1])  # 9 m/s^2 from where it is
    out, state = tick(None, at=(3.1, 0.1))
    assert state == m.ARMED and out == pytest.approx([4.0, 0.1])
    for expected in (m.HOLD, m.HOLD, m.STOPPING, m.STOPPING):
        out, state = tick(np.array([np.nan, 0.0]), at=(0.0, 0.0))
        assert state == expected and out == pytest.approx([4.0, 0.1])
    for _ in range(8):
        out, state = tick(None, at=(0.0, 0.0))
    assert state == m.STOPPED and out == pytest.approx([4.0, 0.1])
    for events in (("clear",), ()):
        out, state = tick(None, *events, at=(3.5, 0.1))
        assert state == m.DISARMED and out == pytest.approx([4.0, 0.1])
    out, state = tick(None, at=(0.5, 0.1))
    assert state == m.DISARMED and out == pytest.approx([0.5, 0.1])
    for at in (0.7, 3.0):
        out, state = tick(None, "estop", at=(at, 0.1))
        assert state == m.ESTOP and out == pytest.approx([0.5, 0.1])
    gate = m.Gate(stays, m.Limits.of(CHANNELS, stays, {}))
    assert tick(None, "estop", at=(0.7, 0.1))[0] == pytest.approx([0.7, 0.1])  # never told anything


def what_is_kept_stays_as_it_was(m):
    """While nobody drives it: where it is measured until it is armed, and then where it was told to be."""
    keeps = replace(COMMAND, measured=("", "slow[0]"), reach=(), tolerance=())
    gate, now = m.Gate(keeps, m.Limits.of(CHANNELS, keeps, {})), 0.0

    def tick(wish, *events, at=0.3):
        nonlocal now
        now += 0.1
        reading = Reading({"fast": np.zeros(1), "slow": np.array([at, now])}, {"fast": now, "slow": now})
        return gate.step(now, reading, wish, events)[:2]

    for at in (0.3, -0.2, 0.35) * 4:
        out, state = tick(None, at=at)
        assert state == m.DISARMED and out == pytest.approx([0.0, at])
    assert tick(None, at=np.nan)[0] == pytest.approx(SAFE)  # nobody knows where it is
    for at, most in ((9.0, 0.4), (-9.0, -0.4)):
        assert tick(None, at=at)[0] == pytest.approx([0.0, most])  # it cannot be there
    for _ in range(12):
        out, state = tick(None, at=0.3)
    for at in (0.25, 0.0, -0.3):
        out, state = tick(None, "arm", at=at)
        assert state == m.ARMED and out == pytest.approx([0.0, 0.3])
    assert tick(wish(0.5, 0.2)) == (pytest.approx([0.5, 0.2]), m.RUN)
    for at in (0.2, -0.3):
        assert tick(None, at=at) == (pytest.approx([0.0, 0.2]), m.ARMED)
    gate.placed()
    for at in (-0.1, 0.3):
        assert tick(None, at=at) == (pytest.approx([0.0, -0.1]), m.ARMED)
    for at in (0.0, 0.3):
        assert tick(np.full(2, np.nan), at=at) == (pytest.approx([0.0, -0.1]), m.HOLD)
    for expected in (m.STOPPING, m.STOPPING):
        assert tick(np.full(2, np.nan)) == (pytest.approx(SAFE), expected)
    assert tick(None, "estop") == (pytest.approx(SAFE), m.ESTOP)
    assert tick(None, "clear", at=0.1) == (pytest.approx([0.0, 0.1]), m.DISARMED)


def outside_its_box_it_comes_back_at_its_rate(m):
    stays = replace(COMMAND, stays=True, keeps=(), measured=("slow[0]", "slow[1]"), tolerance=())
    gate = m.Gate(stays, m.Limits.of(CHANNELS, stays, {}))

    def tick(now, wish, at):
        reading = Reading({"fast": np.zeros(1), "slow": np.array([at, 0.1 + 1e-9 * now])}, {"fast": now, "slow": now})
        return gate.step(now, reading, wish, ("arm",))[0]

    for k in range(12):
        assert tick(0.1 * k, None, 6.0) == pytest.approx([6.0, 0.1])
    for now, at, speed in ((1.2, 6.0, 5.1), (1.3, 5.1, 4.5), (1.4, 4.5, 4.5)):
        assert tick(now, wish(4.5, 0.1), at) == pytest.approx([speed, 0.1])


def a_task_only_tightens(m):
    tight = m.Limits.of(CHANNELS, COMMAND, {"max_speed_mps": 1.0, "max_steering_rad": 0.2, "deadman_s": 0.3})
    assert tight.high.tolist() == [1.0, 0.2] and tight.low.tolist() == [-1.0, -0.2] and tight.deadman_s == 0.3
    assert m.Limits.of(CHANNELS, COMMAND, {"max_speed_mps": 4.5}).low.tolist() == LOW.tolist()  # stays at -1.5
    for bad in ({"max_speed_mps": 4.6}, {"max_speed_mps": 0.0}, {"max_speed_mps": -1.0}, {"speed": 1.0}):
        with pytest.raises(m.SafetyError, match=r"max_speed_mps"):
            m.Limits.of(CHANNELS, COMMAND, bad)
    with pytest.raises(m.SafetyError, match=r"deadman_s = 0"):
        m.Limits.of(CHANNELS, COMMAND, {"deadman_s": 0.0})


def it_arms_when_every_channel_was_well_for_a_second(m):
    rig = Rig(m, armed=False)
    assert rig.gate.cause == ()
    for _ in range(10):
        out, state, faults = rig.tick(GO, ("arm",))
        assert (out == SAFE).all() and (state, faults) == (m.DISARMED, ())
    assert rig.tick(GO)[1] == m.DISARMED  # nobody armed it
    out, state, faults = rig.tick(None, ("arm",))
    assert (out == SAFE).all() and (state, faults) == (m.ARMED, ())
    assert rig.tick(None)[:2] != m.RUN and rig.gate.state == m.ARMED
    out, state, _ = rig.tick(GO)
    assert state == m.RUN and out == pytest.approx([0.9, 0.0])  # from rest: 9 m/s^2 for 0.1 s
    assert rig.tick(None)[1] == m.ARMED and rig.out == pytest.approx([0.0, 0.0])  # its wheels as they are
    rig = Rig(m, armed=False)
    rig.run(8, ages={"slow": 0.0})
    assert rig.tick(None, ("arm",), ages={"slow": 0.6})[1:] == (m.DISARMED, ("stale_slow",))
    assert rig.gate.cause == ("stale_slow",)
    rig.tick(None)
    assert rig.gate.cause == ()
    assert rig.run(9)[1] == m.DISARMED and rig.tick(None, ("arm",), dt=0.05)[1] == m.DISARMED
    assert rig.tick(GO, ("arm",), dt=0.05 + 1e-6)[1] == m.RUN  # the second begins when it is well again
    rig = Rig(m, armed=False)
    rig.tick(None)
    assert rig.tick(GO, ("arm",), dt=1.0)[1] == m.RUN


def boxes_and_rates_are_per_second(m):
    for hz in (10, 50):
        rig = Rig(m)
        for _ in range(hz // 5):  # 0.2 s
            out, _, faults = rig.tick(GO, dt=1 / hz)
            assert faults == ("rate",)
        assert out == pytest.approx([1.8, 0.0])
    rig = Rig(m)
    assert rig.tick(wish(2, 0.4), dt=10.0)[0] == pytest.approx([2.0, 0.4])  # a pause buys a quarter of a second
    rig = Rig(m)
    assert rig.tick(wish(2, -0.4), dt=10.0)[0][1] == pytest.approx(-0.4)
    assert rig.tick(wish(4, 0.4), dt=-1.0, ages={"fast": 0.0})[0] == pytest.approx([2.0, -0.4])  # going back: nothing
    assert rig.tick(wish(-4, 0.4))[0] == pytest.approx([1.1, 0.0])
    rig = Rig(m)
    rig.run(4, wish(-1.5, 0))
    assert rig.tick(GO, dt=9.0, speed=0.0)[0][0] == pytest.approx(0.75)
    rig = Rig(m)
    rig.run(1, wish(0.9, 0))
    assert rig.tick(GO, dt=9.0)[0][0] == pytest.approx(2.9)  # the reach, not 0.9 + 2.25
    rig = Rig(m)
    for _ in range(30):
        out, state, faults = rig.tick(wish(9, -9))
        assert "limit" in faults and state == m.RUN
    assert out == pytest.approx([4.5, -0.4]) and faults == ("limit",)
    out, _, faults = rig.run(30, wish(-1.0, 0.2))
    assert out == pytest.approx([-1.0, 0.2]) and faults == ()
    assert rig.tick(wish(-1.0, 0.2 + 0.5))[2] == ("limit",)
    assert rig.tick(wish(-1.0, 0.2), dt=0.01)[2] == ("rate",)  # 0.2 rad, of which 0.04 are allowed
    assert rig.gate.counts["limit"] == 31


def a_command_stays_near_what_is_measured(m):
    rig = Rig(m)
    rig.run(2)  # 1.8 m/s
    out, state, faults = rig.tick(GO, speed=0.5)
    assert out == pytest.approx([2.5, 0.0]) and state == m.RUN and faults == ("rate", "reach")
    assert rig.gate.counts == {"rate": 3, "reach": 1}
    out, _, faults = rig.tick(GO, speed=0.5)
    assert out == pytest.approx([2.5, 0.0]) and faults == ("rate", "reach")
    rig = Rig(m)
    rig.run(4)  # 3.6 m/s
    assert rig.tick(GO, speed=0.0)[0][0] == pytest.approx(2.7)  # the rate wins over the reach
    rig = Rig(m)
    assert rig.tick(wish(0.5, 0), speed=-9.0)[0][0] == pytest.approx(-0.9)
    rig = Rig(m)
    rig.run(4, wish(-1.5, 0))
    assert rig.tick(wish(-1.5, 0), speed=-9.0)[0][0] == pytest.approx(-1.5)  # and so does the box


def tightened_limits_bind(m):
    rig = Rig(m, max_speed_mps=1.0)
    assert rig.run(10)[0][0] == pytest.approx(1.0)
    assert rig.run(10, wish(-1.4, 0))[0][0] == pytest.approx(-1.0)


def bad_wishes_hold(m):
    for bad, fault in (
        (np.zeros(3), "shape"), (np.array([np.nan, 0]), "not_finite"),
        (np.array([0, np.inf]), "not_finite"), (np.zeros((1, 2)), "shape"),
    ):  # fmt: skip
        rig = Rig(m)
        rig.run(2, wish(4, 0.3))
        out, state, faults = rig.tick(bad)
        assert out == pytest.approx([0.0, 0.3]) and state == m.HOLD and faults == (fault, "hold")  # steering is kept
        assert rig.gate.cause == (fault,)
        for _ in range(4):
            out, state, faults = rig.tick(wish(0.8, 0.0))
            assert out == pytest.approx([0.0, 0.3]) and state == m.HOLD and faults == ("hold",)
        out, state, faults = rig.tick(wish(0.8, 0.0))  # the fifth good one; from rest
        assert state == m.RUN and out == pytest.approx([0.8, 0.0]) and faults == ()
    rig.tick(bad)
    rig.run(4)
    rig.tick(bad)
    rig.run(4)
    assert rig.gate.state == m.HOLD and rig.tick(None)[1] == m.ARMED


def three_wishes_in_a_row_that_are_not_finite_stop(m):
    nan = np.full(2, np.nan)
    rig = Rig(m)
    rig.run(3)
    states = [rig.tick(w)[1] for w in (nan, nan, GO, nan, nan, nan)]
    assert states == [m.HOLD] * 5 + [m.STOPPING] and (rig.out == SAFE).all()
    assert rig.gate.cause == ("not_finite",) and rig.gate.counts["not_finite"] == 5
    for _ in range(4):
        out, state, faults = rig.tick(GO, ("arm", "clear"))
        assert (out == SAFE).all() and (state, faults) == (m.STOPPING, ("stopping",))
    out, state, faults = rig.tick(GO, dt=0.1 + 1e-9)
    assert (out == SAFE).all() and (state, faults) == (m.STOPPED, ("stopped",))
    assert rig.tick(GO, ("arm",))[1] == m.STOPPED and rig.gate.cause == ("not_finite",)
    assert rig.tick(GO, ("arm", "clear"))[1] == m.DISARMED
    assert rig.tick(GO)[1] == m.DISARMED and rig.tick(GO, ("arm",))[1] == m.RUN
    rig = Rig(m)
    rig.run(2, nan)
    rig.run(5)
    rig.run(2, nan)
    assert rig.gate.state == m.HOLD
    rig = Rig(m, armed=False)
    rig.run(11, None)
    assert [rig.tick(nan, ("arm",))[1] for _ in range(3)] == [m.HOLD, m.HOLD, m.STOPPING]  # from the first on


def a_hold_that_does_not_end_stops(m):
    rig = Rig(m)
    rig.run(2)
    states = [rig.tick(GO, dt=0.25, ages={"slow": 0.6})[1] for _ in range(10)]
    assert states == [m.HOLD] * 9 + [m.STOPPING]  # at 2.25 s
    assert rig.gate.cause == ("stale_slow",) and rig.tick(GO, dt=0.49)[1] == m.STOPPING
    assert rig.tick(GO, dt=0.01 + 1e-9)[1] == m.STOPPED
    rig = Rig(m)  # good ticks between bad ones are no way out, and what was wrong is still known
    rig.run(2)
    for _ in range(4):
        rig.tick(GO, ages={"slow": 0.6})
        rig.run(4)
    rig.tick(GO, dt=0.1 + 1e-9)
    assert rig.gate.state == m.RUN
    rig.tick(GO, ages={"slow": 0.6})
    rig.run(4, dt=0.1)
    rig.tick(GO, ages={"slow": 0.6}, dt=1.6)
    assert rig.gate.state == m.HOLD and rig.tick(GO)[1] == m.STOPPING and rig.gate.cause == ("stale_slow",)


def too_many_holds_stop(m):
    for pause, last in ((11.35, "stopping"), (11.45, "hold")):  # the sixth 59.75 and 60.25 s after the first
        rig = Rig(m)
        for count in range(1, 7):
            assert rig.run(6)[1] == m.RUN
            state = rig.tick(GO, dt=pause, ages={"slow": 0.6})[1]
            assert state == (m.HOLD if count < 6 else last), count
    rig = Rig(m)
    for _ in range(5):
        rig.run(6)
        rig.tick(GO, ages={"slow": 0.6})
    rig.tick(None, ("estop",))
    rig.tick(None, ("clear",))
    rig.run(12)
    assert rig.tick(GO, ("arm",))[1] == m.RUN  # armed anew, it may be held anew
    assert rig.tick(GO, ages={"slow": 0.6})[1] == m.HOLD


def stale_is_counted_in_the_channels_own_periods(m):
    for ages, fault in (
        ({"fast": 0.0899}, ""), ({"fast": 0.0901}, "stale_fast"), ({"slow": 0.4999}, ""),
        ({"slow": 0.5001}, "stale_slow"),
        ({"fast": -0.01}, "stale_fast"), ({"fast": -5e-7}, ""), ({"fast": None}, "stale_fast"),
        ({"fast": np.nan}, "stale_fast"),
    ):  # fmt: skip
        rig = Rig(m)
        rig.run(1)
        out, state, faults = rig.tick(wish(1, 0), ages=ages)
        assert faults == ((fault, "hold") if fault else ()), (ages, faults)
        assert state == (m.HOLD if fault else m.RUN) and (not fault or out[0] == SAFE[0])
    for value in ((np.nan, 0.0), (0.0, np.inf)):
        rig = Rig(m)
        assert rig.tick(GO, value=value)[1:] == (m.HOLD, ("not_finite_slow", "hold"))
    assert rig.tick(GO, speed=np.nan)[2] == ("not_finite_fast", "hold")
    both = Rig(m).tick(GO, ages={"fast": 1.0, "slow": 1.0})[2]
    assert both == ("stale_fast", "stale_slow", "hold")


def a_noisy_channel_that_repeats_is_stuck(m):
    rig = Rig(m)
    rig.tick(GO, value=(5.0, 5.0))
    assert rig.run(4, wish(1, 0), value=(5.0, 5.0))[1] == m.RUN
    assert rig.tick(wish(1, 0), value=(5.0, 5.0), dt=0.1 + 1e-9)[1:] == (m.HOLD, ("stuck_slow", "hold"))
    rig.tick(wish(1, 0), value=(5.0, 5.1))
    assert rig.run(4, wish(1, 0))[1] == m.RUN
    rig = Rig(m)
    rig.tick(GO, value=(5.0, 5.0))
    for tick in range(1, 5):  # it is the stamps that count: nothing new has come, which is stale at most
        assert rig.tick(wish(1, 0), value=(5.0, 5.0), ages={"slow": 0.1 * tick})[2] == ()
    rig = Rig(m)  # a caller may reuse its array
    kept = np.zeros(2)
    for tick in range(12):
        kept[:] = tick
        assert rig.tick(wish(1, 0), value=kept)[2] in ((), ("rate",))
    assert rig.run(20, wish(1, 0), speed=1.0)[1] == m.RUN  # one that is not noisy may repeat


def an_actuator_that_does_not_follow_holds(m):
    rig = Rig(m)
    rig.run(2)  # 1.8 m/s
    for _ in range(3):
        assert rig.tick(wish(1.8, 0), speed=0.7)[1] == m.RUN
    assert rig.tick(wish(1.8, 0), speed=0.7, dt=0.1 + 1e-6)[1:] == (m.HOLD, ("lost_speed", "hold"))
    rig = Rig(m)
    rig.run(2)
    for _ in range(9):  # never for so long at a time
        rig.run(2, wish(1.8, 0), speed=0.7)
        assert rig.tick(wish(1.8, 0), speed=0.9)[1] == m.RUN
    rig = Rig(m)
    rig.run(2)
    rig.run(2, wish(1.8, 0), speed=0.7)
    rig.run(1, None, speed=5.0)  # nobody drives: it may be pushed by hand
    rig.run(9, None, speed=5.0)
    assert rig.tick(GO, speed=5.0)[1] == m.RUN
    rig = Rig(m)
    rig.run(2)
    rig.run(3, wish(1.8, 0), speed=2.9)
    assert rig.tick(wish(1.8, 0), speed=2.9, dt=0.1 + 1e-6)[2] == ("lost_speed", "hold")  # too fast is as wrong
    rig.run(2, GO, speed=2.9)
    assert "lost_speed" in rig.tick(GO, speed=2.9)[2]  # in HOLD, too


def without_the_dead_mans_switch_nobody_drives(m):
    rig = Rig(m, deadman_s=0.3)
    assert rig.tick(GO)[1:] == (m.ARMED, ("deadman",))
    assert rig.tick(GO, ("alive",))[1] == m.RUN
    assert rig.run(2)[1] == m.RUN and rig.tick(GO, dt=0.1 - 1e-9)[1] == m.RUN
    for _ in range(50):  # released, it stands, for as long as it takes
        out, state, faults = rig.tick(GO)
        assert out == pytest.approx([0.0, 0.0]) and (state, faults) == (m.ARMED, ("deadman",))
    assert rig.tick(GO, ("alive",))[:2][1] == m.RUN and rig.out[0] == pytest.approx(0.9)
    assert rig.tick(np.full(2, np.nan), dt=1.0)[2] == ("not_finite", "deadman", "hold")


def an_estop_is_latched_and_clear_never_moves(m):
    rig = Rig(m)
    rig.tick(GO)
    out, state, faults = rig.tick(GO, ("estop",))
    assert (out == SAFE).all() and state == m.ESTOP and faults == ("estop",) and rig.gate.cause == ("estop",)
    for events in ((), ("arm",), ("clear", "estop"), ("estop", "clear"), ("arm", "arm"), ("alive",)):
        out, state, _ = rig.tick(GO, events)
        assert (out == SAFE).all() and state == m.ESTOP
    rig.run(12)
    for events in (("clear",), (), ("clear", "arm"), ("clear",)):
        out, state, _ = rig.tick(GO, events)
        assert (out == SAFE).all() and state == m.DISARMED
    out, state, _ = rig.tick(GO, ("arm",))
    assert state == m.RUN and out[0] == pytest.approx(0.9)
    out, state, _ = rig.tick(GO, ("arm", "estop"))
    assert state == m.ESTOP and (out == SAFE).all()
    with pytest.raises(ValueError, match="unknown gate event 'go'"):
        rig.tick(None, ("go",))


def a_clear_while_running_changes_nothing(m):
    rig = Rig(m)
    assert rig.tick(GO, ("clear",))[1] == m.RUN
    rig.tick(np.zeros(3))
    assert rig.tick(GO, ("clear", "arm"))[1] == m.HOLD


def what_was_given_out_is_a_copy(m):
    rig = Rig(m)
    rig.tick(GO)[0][:] = 1e9
    rig.out = np.array([0.9, 0.0])
    assert rig.tick(GO)[0][0] == pytest.approx(1.8)
    for _ in range(2):
        assert rig.tick(None)[0] == pytest.approx([0.0, 0.0])
        rig.out[:] = 1e9
        rig.out = SAFE


ATTACKS = (
    limits_are_declared, what_measures_a_value_may_be_one_number_of_a_channel,
    what_stays_stops_where_it_is, what_is_kept_stays_as_it_was, outside_its_box_it_comes_back_at_its_rate,
    a_task_only_tightens,
    it_arms_when_every_channel_was_well_for_a_second,
    boxes_and_rates_are_per_second, a_command_stays_near_what_is_measured, tightened_limits_bind, bad_wishes_hold,
    three_wishes_in_a_row_that_are_not_finite_stop, a_hold_that_does_not_end_stops, too_many_holds_stop,
    stale_is_counted_in_the_channels_own_periods, a_noisy_channel_that_repeats_is_stuck,
    an_actuator_that_does_not_follow_holds, without_the_dead_mans_switch_nobody_drives,
    an_estop_is_latched_and_clear_never_moves, a_clear_while_running_changes_nothing, what_was_given_out_is_a_copy,
)  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
def test_attack(attack):
    attack(safety)


# --- and who guards the guards: every mutation of the gate must fail an attack

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip
# (code as mutated, why no attack can tell)
EQUIVALENT = {
    "np.abs(slewed - boxed) >= 1e-09": "a clamp of exactly the rounding tolerance",
    "error >= self.limits.tolerance": "an error to the last bit",
    "np.abs(where - self._last) < self.limits.reach": "a distance to the last bit",
    "now - self._holds[0] <= HOLDS_S": "a time to the last bit",
    "now - self._holds[-1] >= HOLD_S": "a time to the last bit",
    "now - self._stopping_at > STOP_S": "a time to the last bit",
    "now - self._off_since > FOLLOW_S": "a time to the last bit",
    "now - self._well_since > WELL_S": "a time to the last bit",
    "stamp - since > self.limits.max_same_s[name]": "a time to the last bit",
    "now - stamp < max_age": "an age to the last bit",
    "-1e-06 < now - stamp": "an age to the last bit",
    "-1e-06 < now - stamp <= max_age": "an age to the last bit",
    "-1e-06 <= now - stamp < max_age": "an age to the last bit",
}


def mutations(tree: ast.Module):
    """(line, code, mutated copy of the tree)."""
    nodes = [n for n in ast.walk(tree)]
    for i, node in enumerate(nodes):
        for change in _changes(node):
            mutant = copy.deepcopy(tree)
            target = list(ast.walk(mutant))[i]
            change(target)
            ast.fix_missing_locations(mutant)
            yield getattr(node, "lineno", 0), ast.unparse(target), mutant


def _changes(node: ast.AST):
    if isinstance(node, ast.Compare):
        for k, op in enumerate(node.ops):
            if type(op) in SWAPS:
                yield lambda n, k=k, op=op: n.ops.__setitem__(k, SWAPS[type(op)]())
    elif isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in SWAPS:
        yield lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield lambda n: setattr(n, "op", ast.UAdd()) if isinstance(n.op, ast.USub) else setattr(
            n, "operand", ast.UnaryOp(ast.Not(), n.operand))  # fmt: skip
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, float, int)):
        if isinstance(node.value, bool):
            yield lambda n: setattr(n, "value", not n.value)
        else:
            yield lambda n: setattr(n, "value", n.value + 1)
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("min", "max"):
        yield lambda n: setattr(n.func, "id", {"min": "max", "max": "min"}[n.func.id])
    elif isinstance(node, ast.FunctionDef):
        for k, line in enumerate(node.body):
            text = isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
            declared = isinstance(line, ast.AnnAssign) and line.value is None
            if not text and not declared and not isinstance(line, (ast.Return, ast.Assert)):
                yield lambda n, k=k: n.body.__setitem__(k, ast.Pass())


def loaded(tree: ast.Module) -> ModuleType:
    spec = importlib.util.spec_from_loader("tether.robot_env.mutant", None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__package__ = "tether.robot_env"
    sys.modules[spec.name] = module  # dataclasses look there
    exec(compile(tree, "mutant", "exec"), vars(module))
    return module


def survives(tree: ast.Module) -> bool:
    try:
        module = loaded(tree)
        for attack in ATTACKS:
            attack(module)
    except (Exception, pytest.fail.Exception):  # noqa: BLE001 - however it dies, it is noticed
        return False
    finally:
        sys.modules.pop("tether.robot_env.mutant", None)
    return True


def test_no_mutation_of_the_gate_survives():
    with open(safety.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    assert survives(tree)
    total, alive = 0, []
    with np.errstate(all="ignore"):
        for line, code, mutant in mutations(tree):
            total += 1
            if survives(mutant) and code not in EQUIVALENT:
                alive.append(f"safety.py:{line}: {code}")
    assert total > 60
    assert not alive, "\n".join(["no attack notices:", *alive])
