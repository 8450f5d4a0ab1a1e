"""Getting up: from any pose in the twin, and what the script does when it cannot."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from tether.drivers.base import Reading
from tether.drivers.quadruped import COMMAND, FOLDED, NOMINAL
from tether.robot_env.stand_up import KICK_HIGH, KICK_LOW, LATE_S, RISE_S, TRIES, TURN_RADPS, StandUp

HZ = 20.0
UPRIGHT, LEFT_SIDE, RIGHT_SIDE, BACK = (0.0, 0.0, -1.0), (0.0, 1.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.1, 0.99)


def reading(gravity, joints) -> Reading:
    values = {"gravity": np.array(gravity, np.float32), "joint_position": np.array(joints, np.float32)}
    return Reading(values, dict.fromkeys(values, 0.0))


class Body:
    """A robot that does not move but for its joints, which go where they are led."""

    def __init__(self, gravity=UPRIGHT, joints=FOLDED) -> None:
        self.gravity, self.joints = gravity, np.array(joints, float)
        self.recovery = StandUp(COMMAND, HZ)

    def tick(self) -> np.ndarray | None:
        wish = self.recovery.wish(reading(self.gravity, self.joints))
        if wish is not None:
            self.joints = COMMAND.to_command(wish)
        return wish

    def until_hand(self, seconds: float) -> float:
        for k in range(round(seconds * HZ)):
            if self.recovery.needs_hand:
                return k / HZ
            assert self.tick() is not None
        raise AssertionError("it asks for no hand")


def test_lying_on_its_belly_it_folds_and_rises_slowly():
    body = Body(joints=(0.3, 2.0, -1.0) * 4)
    trail = [body.joints.copy()]
    while body.tick() is not None:
        trail.append(body.joints.copy())
        assert len(trail) < 5.0 * HZ
    steps = np.abs(np.diff(trail, axis=0)).max(axis=1)
    assert steps.max() < TURN_RADPS / HZ + 1e-5  # from where the joints were: no jump at the start, either
    assert min(np.abs(joints - FOLDED).max() for joints in trail) < 1e-5  # it was folded
    assert trail[-1] == pytest.approx(NOMINAL, abs=1e-5)
    assert np.flatnonzero(steps > 1e-5)[-1] / HZ >= RISE_S  # and led to standing over a second
    assert body.recovery.kicks == 0 and not body.recovery.needs_hand


@pytest.mark.parametrize("gravity, lower", [(LEFT_SIDE, "left"), (RIGHT_SIDE, "right"), (BACK, "left")])
def test_lying_otherwise_it_kicks_with_the_lower_legs_first_in_the_table(gravity, lower):
    body = Body(gravity)
    while body.recovery.kicks == 0:
        assert body.tick() is not None
    for _ in range(round(0.9 * HZ)):
        body.tick()
    legs = dict(zip(("FR", "FL", "RR", "RL"), body.joints.reshape(4, 3), strict=True))
    for name, (hip, *others) in legs.items():
        left = name[1] == "L"
        outwards, *rest = KICK_LOW if left == (lower == "left") else KICK_HIGH
        assert [hip if left else -hip, *others] == pytest.approx([outwards, *rest], abs=1e-5)


def test_it_tries_both_sides_and_then_asks_for_a_hand():
    body, sides = Body(BACK), []
    kicks = 0
    while not body.recovery.needs_hand:
        body.tick()
        if body.recovery.kicks > kicks:
            kicks = body.recovery.kicks
            sides.append(body.recovery._side)
    assert set(sides) == {1.0, -1.0} and TRIES <= kicks <= TRIES + 1
    for _ in range(round(2.0 * HZ)):  # it waits, folded
        wish = body.tick()
    assert COMMAND.to_command(wish) == pytest.approx(FOLDED, abs=1e-5) and body.recovery.needs_hand
    body.gravity = UPRIGHT  # somebody turns it over
    for _ in range(round(8.0 * HZ)):
        if body.tick() is None:
            break
    else:
        raise AssertionError("it does not get up")
    assert not body.recovery.needs_hand


def test_rising_without_standing_is_tried_again_but_not_for_ever():
    body = Body()
    body.tick = lambda: body.recovery.wish(reading(body.gravity, FOLDED))  # too weak
    assert body.until_hand(60.0) > 0.9 * TRIES * (RISE_S + LATE_S)
    assert body.recovery.kicks == 0


def test_it_starts_again_when_it_falls_over_while_it_rises():
    body = Body()
    while body.joints == pytest.approx(FOLDED):
        body.tick()
    body.gravity = LEFT_SIDE
    while body.recovery.kicks == 0:
        assert body.tick() is not None
    assert not body.recovery.needs_hand


def test_from_fallen_poses_in_the_twin():
    pytest.importorskip("mujoco")
    from tests.get_up import WITHIN_S, campaign

    results = campaign(4, seed=6)
    assert {r["kind"] for r in results} >= {"back", "side"} and max(r["upright"] for r in results) < 0.87  # 30 degrees
    assert all(r["stands"] and r["seconds"] < WITHIN_S for r in results), results
    assert all(math.isfinite(r["turning_radps"]) and r["turning_radps"] < 12.0 for r in results)


def test_after_a_fall_the_environment_lets_it_get_up_by_itself():
    pytest.importorskip("mujoco")
    from tether.launch import catalog

    env = catalog.make_env(catalog.make_task(catalog.load_spec("dog-walk")), seed=0)
    records = []
    env.on_record.append(records.append)
    env.reset(seed=0)
    tipped = [0.0, 0.0, 0.2, math.cos(1.0), math.sin(1.0), 0.0, 0.0, *FOLDED]  # somebody tips it over
    env.robot.settle(np.array(tipped))
    for _ in range(20):
        terminated = env.step(np.zeros(12, np.float32))[2]
        if terminated:
            break
    assert terminated and env.robot.truth()["upright"] < 0.5
    env.reset()
    truth = env.robot.truth()
    assert truth["upright"] > 0.97 and truth["height"] > 0.25
    names = {name for record in records for name in record.events}
    assert "reset" in names and "fall" in names and "intervention" not in names
    assert any(record.source == "reset" for record in records)
    env.close()


def test_set_on_its_feet_by_a_hand_it_goes_on_from_there(monkeypatch):
    pytest.importorskip("mujoco")
    from tether.launch import catalog

    env = catalog.make_env(catalog.make_task(catalog.load_spec("dog-walk")), seed=0)
    env.reset(seed=0)
    env.robot.settle(np.array([0.0, 0.0, 0.2, math.cos(1.0), math.sin(1.0), 0.0, 0.0, *FOLDED]))
    while not env.step(np.zeros(12, np.float32))[2]:
        pass
    helpless = SimpleNamespace(needs_hand=True)
    monkeypatch.setattr(env.task, "recover", lambda reading, outcome: helpless)
    records = []
    env.on_record.append(records.append)
    env.reset()
    assert records[-1].events["intervention"] == 1.0
    heights = []
    for _ in range(20):
        heights.append(env.robot.truth()["height"])
        assert not env.step(np.zeros(12, np.float32))[2]
    assert min(heights) > 0.25  # it does not sink to where it was told to be before
    env.close()
