"""Pure pursuit on a kinematic bicycle."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tether.robot_env import track
from tether.robot_env.pursuit import LOOKAHEADS, SPEEDS, Pursuit
from tether.robot_env.track import Line

WHEELBASE = 0.2965


def loop() -> Line:
    a = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    r = 7 + 2 * np.sin(3 * a) + 0.8 * np.cos(4 * a)
    return Line(track.resample(np.stack((r * np.cos(a), r * np.sin(a)), axis=1), 0.5, True), True)


def drive(pursuit: Pursuit, x: float, y: float, heading: float, seconds: float) -> np.ndarray:
    """(n, 2) centre of a bicycle steered at 10 Hz; its rear axle is the state."""
    x, y = x - math.cos(heading) * WHEELBASE / 2, y - math.sin(heading) * WHEELBASE / 2
    centres = []
    for _ in range(round(seconds * 10)):
        c, s = math.cos(heading), math.sin(heading)
        centres.append((x + c * WHEELBASE / 2, y + s * WHEELBASE / 2))
        speed, steering = pursuit.act(np.array([*centres[-1], c, s], np.float32))
        for _ in range(20):
            x += 0.005 * speed * math.cos(heading)
            y += 0.005 * speed * math.sin(heading)
            heading += 0.005 * speed * math.tan(steering) / WHEELBASE
    return np.array(centres)


@pytest.mark.parametrize(("speed", "lookahead"), [(1.0, 0.6), (1.0, 1.0), (2.5, 1.0)])
def test_it_follows_the_loop(speed, lookahead):
    line = loop()
    (x, y), heading = line.at(0.0), float(line.heading(0.0))
    driven = drive(Pursuit(line, speed, lookahead), x, y, heading, 1.1 * line.length / speed)
    offsets = [abs(line.project(p)[1]) for p in driven]
    assert max(offsets) < 0.3
    assert np.hypot(*np.diff(driven, axis=0).T).sum() > line.length  # all the way round


def test_it_comes_back_to_the_line_from_any_heading():
    line = loop()
    (x, y), heading = line.at(10.0), float(line.heading(10.0))
    for turned in (1.5, -1.5, 3.0):
        driven = drive(Pursuit(line, 1.0, 0.8), x + 0.4, y, heading + turned, 15.0)
        assert max(abs(line.project(p)[1]) for p in driven[-30:]) < 0.3
        along = np.array([line.project(p)[0] for p in driven[-30:]])
        assert (np.diff(along) > 0).all()  # in the course's direction


def test_steering_is_coulters_arc():
    """On a circle the arc through the look-ahead point is the circle: tan(steering) = wheelbase / radius."""
    a = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    line = Line(3.0 * np.stack((np.cos(a), np.sin(a)), axis=1), True)
    pose = np.array([3.0, WHEELBASE / 2, 0.0, 1.0])  # rear axle on the line
    speed, steering = Pursuit(line, 1.5, 0.8).act(pose)
    assert speed == 1.5
    assert math.tan(steering) == pytest.approx(WHEELBASE / 3.0, rel=1e-3)
    tight = Pursuit(Line(line.points * 0.1, True), 1.0, 0.4).act(pose * [0.1, 1, 1, 1])
    assert tight[1] == 0.38  # at its limit, left


def test_it_does_not_jump_to_a_neighbouring_stretch():
    a = np.linspace(-np.pi / 2, np.pi / 2, 40)
    arc = 0.8 * np.stack((np.cos(a), np.sin(a)), axis=1)
    line = Line(track.resample(np.vstack((arc + [20.0, 0.0], -arc)), 0.25, True), True)
    pursuit = Pursuit(line, 1.0, 0.8)
    pursuit.act(np.array([10.0, -0.8, 1.0, 0.0]))  # eastwards on the southern leg
    _, steering = pursuit.act(np.array([10.1, 0.1, 1.0, 0.0]))  # pushed over, nearer to the northern leg
    assert steering < 0  # back to the own leg, to the right
    _, steering = pursuit.act(np.array([5.0, 3.0, -1.0, 0.0]))  # set down elsewhere: the nearest leg
    assert steering > 0


def test_the_tune_grid_is_the_issues():
    assert (SPEEDS[0], SPEEDS[1], SPEEDS[-1]) == (0.5, 0.75, 4.5)
    assert LOOKAHEADS == (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)
