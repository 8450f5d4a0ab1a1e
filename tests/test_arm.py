"""The arm's kinematics against its ranges and lengths, and its servos' speed."""

from __future__ import annotations

import numpy as np
import pytest
from tether.drivers import arm

LOW, HIGH = np.array(arm.COMMAND.action_low[:3]), np.array(arm.COMMAND.action_high[:3])


def places(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(LOW, HIGH, (n, 3))


def lean(joints: np.ndarray) -> float:
    """rad of the tool's axis from straight down."""
    return np.pi / 2 - joints[1:4].sum()


def test_at_zero_the_tool_is_level_ahead():
    """The chain of the URDF, its frames multiplied out: gripper frame at zero, less the pan's 38.8 mm."""
    place = 0.0304 + 0.028 + 0.1349 + 0.1592, 0.0, 0.1166 + 0.11257 + 0.0052
    assert arm.forward(np.zeros(5)) == pytest.approx(place, 1e-3)


def test_the_tool_comes_where_it_is_told_to():
    """All over the workspace but next to the base and above it, where the shoulder's range ends."""
    off = np.array([np.linalg.norm(arm.forward(arm.inverse(place)) - place) for place in places(4000)])
    near = np.array([np.hypot(*place[:2]) < 0.11 and place[2] > 0.05 for place in places(4000)])
    assert off[~near].max() < 1e-6 and off.max() < 0.1


def test_joints_stay_within_their_ranges_wherever_it_is_told_to_be():
    for place in np.random.default_rng(1).uniform(-1, 1, (2000, 3)):
        joints = arm.inverse(place)
        assert (arm.LOW[:5] <= joints).all() and (joints <= arm.HIGH[:5]).all()


def test_it_points_down_at_the_table_and_leans_out_only_as_far_as_it_must():
    assert lean(arm.inverse(np.array([0.2, 0.1, 0.015]))) == pytest.approx(0.0, abs=1e-6)
    far = np.array([0.37, 0.15, 0.015])
    joints = arm.inverse(far)
    assert lean(joints) > 0.5
    wrist = far[2] + arm.TOOL_M * np.cos(lean(joints)) - arm.SHOULDER_M[1]
    out = np.hypot(*far[:2]) - arm.TOOL_M * np.sin(lean(joints)) - arm.SHOULDER_M[0]
    assert np.hypot(out, wrist) == pytest.approx(arm.REACH_M)  # a straight arm: less would not reach


@pytest.mark.parametrize("place", [(0.0, 0.0, 0.1166), (0.0304, 0.0, 0.1166), (0.0, 0.0, 0.0), (9.0, 9.0, 9.0)])
def test_a_place_that_cannot_be_gives_an_angle_all_the_same(place):
    assert np.isfinite(arm.inverse(np.array(place))).all()


def test_no_joint_target_moves_faster_than_it_may():
    servos, rng = arm.Servos(np.append(arm.inverse(np.array(arm.HOME[:3])), 0.3)), np.random.default_rng(0)
    before = servos.target.copy()
    for _ in range(500):
        target = servos.step(rng.uniform(arm.COMMAND.low, arm.COMMAND.high))
        assert np.abs(target - before).max() <= arm.JOINT_RADPS / arm.SERVO_HZ + 1e-9
        assert (arm.LOW <= target).all() and (target <= arm.HIGH).all()
        before = target
    for _ in range(200):
        target = servos.step(np.array(arm.HOME))
    assert arm.forward(target) == pytest.approx(arm.HOME[:3], abs=1e-6) and target[5] == pytest.approx(arm.HOME[3])


def test_a_joint_measured_beyond_its_range_is_not_told_to_be_there():
    past = np.array(arm.HIGH) + 0.0015  # a step of an encoder
    for command in (np.array(arm.HOME), past):  # led by its tool, and by its joints
        assert (arm.Servos(past).step(command) <= arm.HIGH).all()
