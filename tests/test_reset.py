"""Reset by driving in the twin, from anywhere between the walls; what that cannot undo waits for a hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tether.drivers.base import Reading
from tether.drivers.car import CHANNELS, COMMAND
from tether.launch import catalog
from tether.robot_env.env import RobotEnv
from tether.robot_env.reset import DOWN_S, UPRIGHT_S, DriveReset
from tether.robot_env.task import Outcome
from tether.robot_env.track import Line

HIT = Outcome(-10.0, True, False, {"collision": 1.0}, reset=True)
POSES = 40


def straight(flipped: bool = False) -> DriveReset:
    line = Line(np.array([[0.0, 0.0], [100.0, 0.0]]), False)
    return DriveReset(COMMAND, line, 1.5, 10.0, flipped)


def reading(x=10.0, y=0.0, heading=0.0, speed=0.0, up=9.81) -> Reading:
    values = {c.name: np.zeros(c.size, np.float32) for c in CHANNELS}
    values["pose"] = np.array([x, y, math.cos(heading), math.sin(heading)], np.float32)
    values["velocity"] = np.array([speed, 0.0], np.float32)
    values["accel"] = np.array([0.0, 0.0, up], np.float32)
    return Reading(values, dict.fromkeys(values, 0.0))


def commands(recovery: DriveReset, readings: list[Reading]) -> list[tuple[float, float]]:
    out = []
    for one in readings:
        wish = recovery.wish(one)
        assert wish is not None
        out.append(tuple(COMMAND.to_command(wish)))
    return out


def test_it_pauses_backs_off_and_steers_towards_the_course():
    driven = commands(straight(), [reading(heading=2.0)] * 6)
    assert driven[:2] == [pytest.approx((0.0, 0.0), abs=1e-6)] * 2
    assert driven[-1][0] < 0 and driven[-1][1] > 0.3  # backwards, turning the nose to the right


def test_it_is_done_only_when_it_has_driven_forward_unblocked():
    recovery = straight()
    commands(recovery, [reading()] * 4)
    assert commands(recovery, [reading(x=10.1, speed=0.8)])[0][0] > 0
    assert recovery.wish(reading(x=10.6, speed=0.8)) is None


def test_blocked_it_tries_the_other_way():
    recovery = straight()
    signs = [math.copysign(1, v) for v, _ in commands(recovery, [reading()] * 60)[5:]]
    assert {1.0, -1.0} == set(signs) and sum(a != b for a, b in zip(signs, signs[1:], strict=False)) >= 4


def test_a_car_that_comes_down_on_its_roof_during_a_reset_needs_a_hand():
    recovery = straight()
    commands(recovery, [reading()] * 5)
    ticks = round(DOWN_S * 10)
    commands(recovery, [reading(up=-9.0)] * (ticks - 1))
    assert not recovery.needs_hand  # a bump
    commands(recovery, [reading()])
    assert commands(recovery, [reading(up=-9.0)] * ticks)[-1] == pytest.approx((0.0, 0.0), abs=1e-6)
    assert recovery.needs_hand
    assert commands(recovery, [reading(up=-9.0)] * 50) == [pytest.approx((0.0, 0.0), abs=1e-6)] * 50
    ticks = round(UPRIGHT_S * 10)
    assert commands(recovery, [reading()] * (ticks - 1)) == [pytest.approx((0.0, 0.0), abs=1e-6)] * (
        ticks - 1
    )
    assert recovery.needs_hand  # still in the hand, perhaps
    commands(recovery, [reading()])
    assert not recovery.needs_hand


def recoveries(seed: int, poses: int):
    """(simulated s, poses (k, 2) on the way, interventions) of resets from random poses between the walls."""
    env = catalog.make_env(catalog.make_task(catalog.load_spec("car-loop")), seed=seed)
    assert isinstance(env, RobotEnv)
    rng, line = np.random.default_rng(seed), env.task.line
    env.reset()
    try:
        for _ in range(poses):
            s, offset = rng.uniform(0, line.length), rng.uniform(-0.5, 0.5)
            along = float(line.heading(s))
            x, y = line.at(s) + offset * np.array([-math.sin(along), math.cos(along)])
            env.robot.place((float(x), float(y), along + rng.uniform(-math.pi, math.pi)))
            place, seen = env.robot.place, []
            env.robot.place = lambda pose: pytest.fail("teleported")
            env.on_record[:] = [seen.append]
            env.reading, env._outcome, env._segment = env.robot.read(), HIT, 1
            began = env.robot.now()
            env.reset()
            env.robot.place = place
            yield env.robot.now() - began, seen, env.reading, line
    finally:
        env.on_record.clear()
        env.close()


def test_from_any_pose_between_the_walls_it_drives_itself_free():
    pytest.importorskip("mujoco")
    times = []
    for seconds, seen, last, line in recoveries(0, POSES):
        times.append(seconds)
        track = np.array([r.reading.values["pose"][:2] for r in seen])
        assert np.linalg.norm(np.diff(track, axis=0), axis=1).max(initial=0.0) < 0.3  # it drove there
        assert sum(r.events.get("reset", 0) for r in seen) == 1
        assert not any("intervention" in r.events for r in seen)
        x, y, c, s = map(float, last.values["pose"])
        assert (
            abs(math.remainder(float(line.heading(line.project((x, y))[0])) - math.atan2(s, c), 2 * math.pi))
            < 1.2
        )
    assert len(times) == POSES
    print("simulated s (median, 95 %, longest):", np.percentile(times, [50, 95, 100]).round(1))
    assert np.percentile(times, 95) <= 5.0
