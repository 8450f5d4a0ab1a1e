"""Walking: rewards by numbers worked out by hand, falls, task files, and a course on legs. No twin."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tether.drivers import quadruped
from tether.drivers.base import Reading
from tether.drivers.car import CHANNELS as CAR_CHANNELS
from tether.drivers.car import COMMAND as CAR_COMMAND
from tether.drivers.quadruped import CHANNELS, COMMAND, NOMINAL
from tether.launch import catalog, commands, config
from tether.launch.evaluate import Episodes, Tally, drive
from tether.robot_env import fit, walk
from tether.robot_env.course import Course
from tether.robot_env.env import RobotEnv
from tether.robot_env.legs import LIE_S, TUMBLE_S, Legged, Tumble, tilt
from tether.robot_env.rate import Rate
from tether.robot_env.record import Meta, Record
from tether.robot_env.reset import Wheeled
from tether.robot_env.safety import Gate, Limits, SafetyError
from tether.robot_env.sample import samples
from tether.robot_env.task import TaskError, TaskSpec, load, parse
from tether.robot_env.walk import Walk

STILL = np.zeros(12, np.float32)
UPRIGHT = (0.0, 0.0, -1.0)
WALK = """
[task]
robot = "quadruped"
kind = "walk"
hz = 20
episode_s = 2
[walk]
reward = "witp"
speed_mps = 0.5
"""
ROUND = """
[task]
robot = "quadruped"
kind = "course"
hz = 20
episode_s = 20
[[checkpoint]]
at = [0.0, 0.0]
[[checkpoint]]
at = [4.0, 0.0]
[[checkpoint]]
at = [4.0, 4.0]
[[checkpoint]]
at = [0.0, 4.0]
"""


def turned(roll: float, pitch: float) -> tuple[float, float, float]:
    """Gravity in the frame of a body at roll and pitch (rad; x forward, y left, z up; yaw, pitch, roll in turn)."""
    return math.sin(pitch), -math.cos(pitch) * math.sin(roll), -math.cos(pitch) * math.cos(roll)


def reading(v=(0, 0, 0), gravity=UPRIGHT, gyro=(0, 0, 0), q=NOMINAL, dq=0.0, pose=(0, 0, 0), time=0.0) -> Reading:
    values = {c.name: np.zeros(c.size, np.float32) for c in CHANNELS}
    x, y, heading = pose
    values |= {
        "velocity": np.array(v, np.float32), "gravity": np.array(gravity, np.float32),
        "gyro": np.array(gyro, np.float32), "joint_position": np.array(q, np.float32),
        "joint_velocity": np.full(12, dq, np.float32),
        "pose": np.array([x, y, math.cos(heading), math.sin(heading)], np.float32),
    }  # fmt: skip
    return Reading(values, dict.fromkeys(values, time))


def make(text: str = WALK, **changes: str) -> Walk:
    spec = parse(text, "walk")
    spec = replace(spec, walk=replace(spec.walk, **changes))
    return Walk(spec, CHANNELS, COMMAND, Legged(COMMAND, spec.hz))


def reward(task: Walk, **of: object) -> float:
    return task.advance(task.begin(reading()), STILL, reading(**of)).reward  # type: ignore[arg-type]


# --- tilt and falls


@given(st.floats(-3.1, 3.1), st.floats(-1.5, 1.5))
def test_roll_and_pitch_come_from_gravity_alone(roll, pitch):
    assert tilt(np.array(turned(roll, pitch))) == pytest.approx((roll, pitch), abs=1e-6)


@pytest.mark.parametrize("roll, pitch", [(31, 0), (-31, 0), (0, 31), (0, -31), (180, 0), (90, 0), (0, 90), (25, -40)])
@pytest.mark.parametrize("text, goes_to", [(WALK, "walk"), (WALK.replace("witp", "aprl"), "walk"), (ROUND, "course")])
def test_beyond_30_degrees_it_has_fallen_and_that_is_an_end(roll, pitch, text, goes_to):
    task = catalog.make_task(parse(text, "x"))
    assert task.spec.kind == goes_to
    progress, deg = task.begin(reading()), math.radians
    fine = math.copysign(29.0, roll or 1), math.copysign(29.0, pitch or 1)
    for one in ((fine[0], 0.0), (0.0, fine[1])):
        outcome = task.advance(progress, STILL, reading(gravity=turned(deg(one[0]), deg(one[1]))))
        assert not (outcome.terminated or outcome.truncated or outcome.reset or "fall" in outcome.events)
    outcome = task.advance(progress, STILL, reading(gravity=turned(deg(roll), deg(pitch))))
    assert outcome.terminated and not outcome.truncated and outcome.reset and outcome.events["fall"] == 1.0


def test_a_fall_while_getting_up_is_no_fall():
    outcome = make(reward="stand").advance(walk.Progress(None), STILL, reading(gravity=(0, 0, 1)))
    assert not outcome.terminated and not outcome.truncated and outcome.events == {"progress": 0.0}
    assert make(reward="stand").advance(walk.Progress(None), STILL, reading()).events == {"progress": 1.0}
    tipped = reading(gravity=turned(0.3, 0.0))
    assert make(reward="stand").advance(walk.Progress(None), STILL, tipped).events == {"progress": 0.0}
    assert outcome.reset  # when the time is over, it must lie again


# --- rewards


@pytest.mark.parametrize("v, worth", [
    (0.0, 5.0), (0.25, 7.5), (0.5, 10.0), (0.75, 10.0), (1.0, 10.0), (1.5, 5.0), (2.0, 0.0), (5.0, 0.0), (-0.25, 2.5),
    (-0.5, 0.0), (-3.0, 0.0),
])  # fmt: skip
def test_witp_by_speed(v, worth):
    assert reward(make(), v=(v, 0.3, -0.2)) == pytest.approx(worth, abs=1e-5)


def test_witp_for_turning_for_pitch_and_at_another_speed():
    assert reward(make(), v=(0.5, 0, 0), gyro=(3.0, -3.0, 1.0)) == pytest.approx(9.0)
    assert reward(make(), v=(0.5, 0, 0), gyro=(0.0, 0.0, -2.0)) == pytest.approx(8.0)
    for roll, pitch, worth in ((0.0, 0.4, 5 + 5 * math.cos(0.4)), (0.0, -0.4, 5 + 5 * math.cos(0.4)), (0.4, 0.0, 10.0)):
        assert reward(make(), v=(0.5, 0, 0), gravity=turned(roll, pitch)) == pytest.approx(worth, abs=1e-5)
    assert reward(make(speed_mps=1.0), v=(0.5, 0, 0)) == pytest.approx(7.5)  # 0.5 short, of a margin of 2


def test_witp_looks_at_nothing_else():
    pose = np.array(NOMINAL) + 1.0
    assert reward(make(), v=(0.5, 0, 0), q=pose, dq=9.0, pose=(3, 4, 2)) == pytest.approx(10.0)


# of the reward of standing still, 2.95: pose 0.8, steady torques 0.75, roll and pitch rates 0.5 each, straight 0.4
APRL = {
    "standing": ({}, 2.95),
    "at its speed": ({"v": (1.5, 0, 0)}, 30 + 2.95 + 6.0),
    "half its speed": ({"v": (0.75, 0, 0)}, 30 * (1 - 0.5**1.6) + 2.95 + 3.0),
    "too fast": ({"v": (2.25, 0, 0)}, 30 * (1 - 0.5**1.6) + 2.95 + 9.0),
    "much too fast": ({"v": (4.5, 0, 0)}, 30 * -1.0 + 2.95 + 18.0),
    "backwards": ({"v": (-0.75, 0, 0)}, 30 * -0.5 + 2.95 + 3.0),
    "sideways": ({"v": (0, 3.0, 4.0)}, 2.95 + 20.0),
    "rolling": ({"gyro": (-2.0, 0, 0)}, 2.95 - 0.2 * 2**1.4),
    "pitching": ({"gyro": (0, 2.0, 0)}, 2.95 - 0.4 * 2**1.4),
    "turning at 22.5 deg/s": ({"gyro": (0, 0, math.pi / 8)}, 2.55 + 0.4 * (1 - 0.9 * 0.5**1.6)),
    "turning at 45 deg/s": ({"gyro": (0, 0, -math.pi / 4 - 1e-6)}, 2.55 + 0.4 * 0.1),
    "turning at 90 deg/s": ({"gyro": (0, 0, math.pi / 2)}, 2.55 + 0.4 * 0.1 * math.exp(-4)),
    "a hip 0.19 rad off": ({"q": np.array(NOMINAL) + np.eye(12)[0] * 0.19}, 2.95),
    "a hip 0.4 rad off": ({"q": np.array(NOMINAL) - np.eye(12)[3] * 0.4}, 2.95 - 0.8),
    "a calf 0.8 rad off": ({"q": np.array(NOMINAL) + np.eye(12)[8] * 0.8}, 2.95 - 0.8),
    "two joints": ({"q": np.array(NOMINAL) + (np.eye(12)[1] + np.eye(12)[11]) * 0.8}, 2.95 - 2 * (1 - 0.36)),
    "nose down at speed": (
        {"v": (1.5 / math.cos(0.4), 0, 0), "gravity": turned(0, 0.4)},
        30 * (0.5 * math.cos(0.4) + 0.5) ** 2 + 2.95 + 4 * 1.5 / math.cos(0.4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("of, worth", APRL.values(), ids=APRL)
def test_aprl(of, worth):
    assert reward(make(reward="aprl", speed_mps=1.5), **of) == pytest.approx(worth, abs=2e-4)


def test_aprl_on_its_back_speed_is_worth_nothing():
    task = make(reward="aprl", speed_mps=1.5)
    assert reward(task, v=(1.5, 0, 0), gravity=(0, 0, 1)) == pytest.approx(2.95 + 6.0, abs=1e-4)


def test_aprl_takes_torques_from_the_command_and_what_it_came_to():
    assert (walk.KP, walk.KD) == (quadruped.KP, quadruped.KD)
    task = make(reward="aprl", speed_mps=1.5)
    progress, action = task.begin(reading()), STILL.copy()
    assert task.advance(progress, action, reading()).reward == pytest.approx(2.95)
    action[1] = 1.0  # a thigh's command moves by 0.4 rad, which is 8 N m
    assert task.advance(progress, action, reading()).reward == pytest.approx(2.95 - 0.005 * 8**1.5, abs=1e-4)
    assert task.advance(progress, action, reading()).reward == pytest.approx(2.95, abs=1e-4)
    # all twelve slow down by 1 rad/s: 1 N m each
    change = 12**0.75
    assert task.advance(progress, action, reading(dq=1.0)).reward == pytest.approx(2.95 - 0.005 * change, abs=1e-4)


@pytest.mark.parametrize("of, worth", [
    ({}, 1.0),
    ({"gravity": (0, 0, 1)}, 0.0),
    ({"gravity": turned(math.pi / 2, 0)}, 0.125),
    ({"gravity": turned(0, math.radians(37))}, 0.5 * (0.5 * math.cos(math.radians(37)) + 0.5) ** 2),
    ({"gravity": turned(0, math.radians(35))}, 0.5 * (0.5 * math.cos(math.radians(35)) + 0.5) ** 2 + 0.5),
    ({"q": np.array(NOMINAL) + np.eye(12)[3] * 0.5}, 0.5 + 0.5 * (0.75 * math.exp(-0.15) + 0.25)),
    ({"q": np.array(NOMINAL) + np.eye(12)[4] * 0.5}, 0.5 + 0.5 * (0.75 * math.exp(-0.15 * 0.75**2) + 0.25)),
    ({"q": np.array(NOMINAL) + np.eye(12)[5] * 0.5}, 0.5 + 0.5 * (0.75 * math.exp(-0.15 * 0.5**2) + 0.25)),
    ({"dq": 2.0}, 0.5 + 0.5 * (0.75 + 0.25 * math.exp(-0.96))),
])  # fmt: skip
def test_standing_up_is_worth(of, worth):
    assert reward(make(reward="stand"), **of) == pytest.approx(worth, abs=1e-5)


# --- the task


def test_it_observes_the_channels_and_the_previous_action():
    task = make()
    observed = sum(c.size for c in CHANNELS if c.observed)
    obs = task.observe(task.begin(reading()), reading(v=(0.3, 0, 0)), np.linspace(-3, 3, 12))
    assert obs.shape == (task.observation_size,) == (observed + 12,) and obs.dtype == np.float32
    assert (obs[-12:] == np.linspace(-3, 3, 12).clip(-1, 1).astype(np.float32)).all()
    assert obs[:3] == pytest.approx(UPRIGHT) and 0.3 in obs.round(5)
    assert task.walls() == [] and task.start == (0.0, 0.0, 0.0)
    assert task.spot(reading(pose=(1.0, 2.0, -0.5))) == pytest.approx((1.0, 2.0, -0.5), abs=1e-5)


def test_a_robot_without_legs_is_refused():
    spec = parse(WALK, "walk")
    with pytest.raises(TaskError, match="walk: robot car has no channel gravity, joint_position, joint_velocity for a"):
        catalog.make_task(parse(WALK.replace("quadruped", "car"), "walk"))
    arm = replace(COMMAND, **{k: v[:7] for k, v in vars(COMMAND).items() if type(v) is tuple})
    with pytest.raises(TaskError, match="has no legs of hip, thigh and calf"):
        Walk(spec, CHANNELS, arm, Legged(arm, 20))


WRONG = {  # what is replaced, with what, and what the error names
    "a reward": ('"witp"', '"fast"', "walk.reward must be one of witp, aprl, stand, not 'fast'"),
    "a speed": ("speed_mps = 0.5", 'speed_mps = "quick"', "walk.speed_mps must be a number from 0.05 to 10"),
    "a key": ("speed_mps = 0.5", "speed = 0.5", "unknown key walk.speed; valid are reward, speed_mps"),
    "checkpoints": ("[walk]", "[[checkpoint]]\nat = [1, 2]\n[walk]",
                    r"\[checkpoint\] is for tasks of kind course or manipulate, not walk"),
    "a course": ("[walk]", "[course]\nloop = true\n[walk]", r"\[course\] is for tasks of kind course, not walk"),
    "half an action": ("[walk]", "[action]\nlow = [1]\n[walk]", "action.high is missing; it must be a list of numbers"),
    "an action of text": ("[walk]", '[action]\nlow = ["a"]\nhigh = [1]\n[walk]', "action.low must be a list of"),
    "an action, no list": ("[walk]", "[action]\nlow = -1\nhigh = 1\n[walk]", "action.low must be a list of numbers"),
    "an unknown end": ("[walk]", "[action]\nmiddle = [1]\n[walk]", "unknown key action.middle"),
    "a twin of truths": ("[walk]", "[twin]\ngrip = true\n[walk]", "twin.grip must be a text, a number or a pair"),
    "a falling pair": ("[walk]", "[twin]\ngrip = [2, 1]\n[walk]", "twin.grip must be a text, a number or a pair"),
    "three": ("[walk]", "[twin]\ngrip = [1, 2, 3]\n[walk]", "twin.grip must be a text, a number or a pair"),
}  # fmt: skip


@pytest.mark.parametrize("old, new, says", WRONG.values(), ids=WRONG)
def test_what_is_wrong_in_a_file_is_named(old, new, says, tmp_path):
    file = tmp_path / "w.toml"
    file.write_text(WALK.replace(old, new, 1))
    with pytest.raises(TaskError, match=says) as error:
        load(str(file))
    assert str(error.value).startswith(str(file))


def test_a_course_takes_no_walk_and_a_walk_no_hindsight():
    with pytest.raises(TaskError, match=r"\[walk\] is for tasks of kind walk, not course"):
        parse(ROUND + '[walk]\nreward = "witp"\n', "x")
    for text in (WALK, ROUND):
        with pytest.raises(TaskError, match="x: task.hindsight must be 0"):
            catalog.make_task(parse(text.replace("hz = 20", "hz = 20\nhindsight = 0.5"), "x"))


# --- [action] and [twin]


def box(low: list[float], high: list[float]) -> TaskSpec:
    return parse(f"{WALK}[action]\nlow = {low}\nhigh = {high}\n", "boxed")


def test_an_action_box_is_what_the_task_says():
    low, high = [-0.3, 0.0, -2.5] * 4, [0.3, 1, -1.0] * 4
    spec = box(low, high)
    command = catalog.declaration(spec)[1]
    assert command.to_command(np.full(12, -1.0)) == pytest.approx(low)
    assert command.to_command(np.ones(12)) == pytest.approx(high)
    assert (command.low, command.high, command.safe) == (COMMAND.low, COMMAND.high, COMMAND.safe)
    assert catalog.declaration(parse(WALK, "x"))[1] == COMMAND
    assert [row[1:] for row in catalog.stream_meta(spec).command] == list(zip(low, high, strict=True))
    robot = Puppet()
    env = catalog_env(spec, robot)
    env.reset()
    env.auto_reset = False
    for _ in range(5):
        _, _, _, _, info = env.step(np.ones(12))
    assert robot.q == pytest.approx(high) and info["executed"] == pytest.approx(np.ones(12), abs=1e-6)
    env.close()


@pytest.mark.parametrize("low, high, says", [
    ([0.0], [0.1], "boxed: action.low has 1 values, quadruped takes FR_hip, FR_thigh"),
    ([*COMMAND.action_low], [0.1] * 13, "boxed: action.high has 13 values"),
    ([-9.0, *COMMAND.low[1:]], [*COMMAND.high], "FR_hip from -9 to 0.863: must rise, within the robot's own -0.863 to"),
    ([*COMMAND.low], [*COMMAND.high[:-1], 0.0], "RL_calf from -2.818 to 0: must rise, within .* -2.818 to -0.888"),
    ([*COMMAND.high], [*COMMAND.low], "FR_hip from 0.863 to -0.863: must rise"),
])  # fmt: skip
def test_an_action_box_that_cannot_be_is_named(low, high, says):
    with pytest.raises(TaskError, match=says):
        catalog.make_task(box(low, high))


def test_the_wide_boxes_are_as_wide_as_the_joints_allow_about_standing():
    crouch = np.add(NOMINAL, [0.0, 0.1, -0.3] * 4)
    for name, stance in (("dog-run", crouch), ("dog-stand-up", np.array(NOMINAL))):
        command = catalog.make_task(load(name))._command
        assert command.to_command(np.zeros(12)) == pytest.approx(stance)
        half = np.minimum(stance - COMMAND.low, COMMAND.high - stance)
        assert command.action_high - stance == pytest.approx(half)


class Takes:
    settings = {"terrain": ("choices", "flat", "bumpy"), "friction": (0.1, 2.0)}


@pytest.mark.parametrize("said, says", [
    ('terrain = "bumpy"\nfriction = [0.5, 1.0]', ""),
    ("friction = 2", ""),
    ("grip = 1", "x: unknown key twin.grip; the twin of quadruped takes terrain, friction"),
    ('terrain = "sand"', "twin.terrain must be one of flat, bumpy, not 'sand'"),
    ('terrain = "choices"', "twin.terrain must be one of flat, bumpy, not 'choices'"),
    ("terrain = 1", "twin.terrain must be one of flat, bumpy, not 1"),
    ('friction = "low"', "twin.friction must be a number from 0.1 to 2, or a pair of them, not 'low'"),
    ("friction = 2.1", "twin.friction must be a number from 0.1 to 2, or a pair"),
    ("friction = [0.0, 1.0]", "twin.friction must be a number from 0.1 to 2, or a pair"),
])  # fmt: skip
def test_what_a_twin_is_told_is_checked(said, says):
    spec = parse(f"{WALK}[twin]\n{said}\n", "x")
    if not says:
        fit.check_twin(spec, Takes)
        return
    with pytest.raises(TaskError, match=says):
        fit.check_twin(spec, Takes)


def test_a_twin_without_settings_takes_none():
    spec = parse(ROUND.replace("quadruped", "fake") + "[twin]\nfriction = 1\n", "x")
    with pytest.raises(TaskError, match="x: unknown key twin.friction; the twin of fake takes none: remove it"):
        catalog.make_env(catalog.make_task(spec))


# --- on a course


def test_on_a_course_it_is_paid_for_walking_forward_and_for_turning_to_the_checkpoint():
    task = catalog.make_task(parse(ROUND, "round"))
    assert isinstance(task, Course) and not task.from_rest
    progress = task.begin(reading(pose=(1.5, 0.0, 0.0)))
    assert progress.goal == 1
    for v, heading, turning, worth in (
        ((0.5, 0, 0), 0.0, 0.0, 10.0), ((0.25, 0, 0), 0.0, 0.0, 7.5), ((0.0, 0.5, 0), 0.0, 0.0, 5.0),
        ((0.5, 0, 0), 0.25, -0.25, 10.0), ((0.5, 0, 0), 0.25, 0.25, 8.0),  # a radian a second for each radian off
        ((0.5, 0, 0), math.pi / 2, -1.0, 10.0), ((0.5, 0, 0), math.pi / 2, 0.0, 6.0), ((0, 0, 0), 3.0, 0.0, 1.0),
    ):  # fmt: skip
        found = task.advance(progress, STILL, reading(v=v, pose=(1.5, 0, heading), gyro=(0, 0, turning)))
        assert found.reward == pytest.approx(worth, abs=1e-4) and not found.terminated
    tipped = task.advance(progress, STILL, reading(v=(0.5, 0, 0), pose=(1.5, 0, 0), gravity=turned(0, 0.6)))
    assert tipped.reward == pytest.approx(10 - 10 * 0.5 * (1 - math.cos(0.6)), abs=1e-3)  # and no penalty
    assert tipped.terminated and tipped.events == {"fall": 1.0} and not progress.lap_clean


def test_the_car_on_the_same_course_is_paid_as_ever():
    task = catalog.make_task(parse(ROUND.replace("quadruped", "car"), "round"))
    values = {c.name: np.zeros(c.size, np.float32) for c in CAR_CHANNELS}
    values |= {"pose": np.array([1.5, 0, 1, 0], np.float32), "velocity": np.array([0.25, 0.0], np.float32)}
    values["accel"][2] = 9.81
    now = Reading(values, dict.fromkeys(values, 0.0))
    assert task.advance(task.begin(now), np.zeros(2), now).reward == pytest.approx(0.25) and task.from_rest
    assert Wheeled(CAR_COMMAND, 10.0).pays_speed and not Legged(COMMAND, 20.0).pays_speed


def test_the_shipped_course_starts_at_the_origin_and_leads_forward():
    task = catalog.make_task(load("dog-course"))
    assert task.start == pytest.approx((0.0, 0.0, 0.0), abs=0.05)
    assert len(task.spec.checkpoints) == 4 and task.spec.hz == 20 and task.walls() == []
    gaps = np.diff([c.at for c in task.spec.checkpoints], axis=0)
    assert (np.linalg.norm(gaps, axis=1) > 2.0).all()


# --- in the environment, on a puppet


class Puppet:
    """A dog that goes where it is told, at 1 m/s along the map's x axis, and falls over at step `falls`."""

    channels, command = CHANNELS, COMMAND

    def __init__(self, falls: int = 0) -> None:
        self.falls, self.writes, self.q, self.time = falls, 0, np.array(NOMINAL), 0.0
        self.tipped = False
        self.rng = np.random.default_rng(0)
        self.placed: list[tuple[float, float, float]] = []
        self.x, self.stopped_at = 0.0, 0.0

    def open(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.x += seconds

    def write(self, command: np.ndarray) -> None:
        self.q, self.writes = command, self.writes + 1
        self.tipped |= self.writes == self.falls

    def read(self) -> Reading:
        found = reading((0.4, 0, 0), turned(1.0, 0) if self.tipped else UPRIGHT, q=self.q, time=self.time)
        for channel in CHANNELS:
            if channel.noisy:
                found.values[channel.name] += self.rng.normal(0, 1e-4, channel.size).astype(np.float32)
        return found


class TwinPuppet(Puppet):
    """The same, of which everything is known."""

    def place(self, pose) -> None:
        self.placed.append(pose)
        self.x, self.tipped = pose[0], False

    def truth(self) -> dict[str, float]:
        return {"x": self.x, "y": 0.0, "heading": math.pi / 3, "speed": 9.0, "upright": 1.0, "contacts": 0.0}


class Rise:
    """A stand-in for getting up: ten ticks of the nominal pose."""

    needs_hand = False

    def __init__(self, robot: Puppet) -> None:
        self.robot, self.ticks = robot, 0

    def wish(self, reading: Reading) -> np.ndarray | None:
        self.ticks += 1
        if self.ticks > 10:
            self.robot.tipped = False
            return None
        return np.zeros(12)


def catalog_env(spec: TaskSpec, robot: Puppet) -> RobotEnv:
    task = catalog.make_task(spec)
    task._body.recover = lambda trouble, line, width: Rise(robot)
    return RobotEnv(
        robot, task, Gate(catalog.declaration(spec)[1], catalog.limits(spec)), Rate(20, robot.now, robot.sleep)
    )


def walked(robot: Puppet, text: str, ticks: int) -> tuple[RobotEnv, list[Record], list[bool]]:
    """The environment after `ticks` steps, its records, and whether each step ended with a fall."""
    env, records, ends = catalog_env(parse(text, "walk"), robot), [], []
    env.on_record.append(records.append)
    env.reset()
    for _ in range(ticks):
        _, _, terminated, truncated, _ = env.step(np.zeros(12))
        if terminated or truncated:
            ends.append(terminated)
            env.reset()
    env.close()
    return env, records, ends


def test_it_gets_up_first_and_after_a_fall_and_goes_on_after_a_time_limit():
    robot = Puppet()
    robot.falls = 21 + 10 + 40 + 15  # 21 to arm, and the getting up
    _, records, ends = walked(robot, WALK, 100)
    assert ends == [False, True, False]
    sources = [(r.source, r.action is None) for r in records]
    assert sources[:10] == [("reset", False)] * 10 and records[10].events == {"reset": 1.0}
    assert sources[11:51] == [("policy", False)] * 40 and sources[51][1] and sources[52] == ("policy", False)
    fell = next(i for i, r in enumerate(records) if "fall" in r.events)
    assert records[fell].terminated and sources[fell + 1][1] and sources[fell + 2] == ("reset", False)
    assert sum(r.events.get("reset", 0) for r in records) == 2
    assert robot.placed == []


def test_who_learns_to_get_up_begins_where_it_lies_and_tumbles_before_the_next_try():
    _, records, ends = walked(Puppet(), WALK.replace("witp", "stand"), 50)
    assert ends == [False] and records[0].source == "policy"
    tumbled = [r for r in records if r.source == "reset" and r.action is not None]
    assert len(tumbled) == 20 * (TUMBLE_S + LIE_S)


def test_a_tumble_stays_within_the_limits_moves_all_joints_and_repeats_itself():
    one, two = (Tumble(COMMAND, 20.0) for _ in range(2))
    wishes = []
    while (wish := one.wish(reading())) is not None:
        assert (wish == two.wish(reading())).all()
        wishes.append(COMMAND.to_command(wish))
    assert len(wishes) == 60 and wishes[-1] == pytest.approx(COMMAND.safe, abs=1e-5)
    table = np.array(wishes)
    assert (table >= np.array(COMMAND.low) - 1e-5).all() and (table <= np.array(COMMAND.high) + 1e-5).all()
    assert (np.ptp(table, axis=0) > 0.3).all() and len(np.unique(table.round(4), axis=0)) == 6


def test_the_records_fold_to_the_rewards_and_ends_of_the_drive():
    robot = Puppet(falls=60)
    for text in (WALK, WALK.replace("witp", "aprl")):
        env, records, _ = walked(robot, text, 100)
        kept = [r for r in records if r.action is not None and r.source != "reset"]
        again = [s for s in samples(env.task, records) if s.action is not None]
        by_policy = [s for s, r in zip(again, [r for r in records if r.action is not None], strict=True)
                     if r.source != "reset"]  # fmt: skip
        assert [s.reward for s in by_policy] == pytest.approx([r.reward for r in kept], abs=1e-6)
        assert [s.terminated for s in by_policy] == [r.terminated for r in kept]


def test_metrics_tell_the_speed_of_every_episode_and_falls():
    _, records, _ = walked(Puppet(falls=50), WALK, 100)
    episodes, found = Episodes(), []
    for record in records:
        metrics = episodes.push(record)
        if "env/episode_return" in metrics:
            found.append(metrics)
    assert [m["env/speed_mps"] for m in found] == pytest.approx([0.4] * len(found)) and len(found) == 3
    assert found[-1]["env/falls"] == 1 == episodes.falls
    assert [m["env/success"] for m in found].count(0.0) == 1


@pytest.mark.parametrize("robot, speed", [(Puppet(60), 0.4), (TwinPuppet(60), 0.5)], ids=["robot", "twin"])
def test_speed_is_the_twins_truth_and_on_a_robot_what_is_measured(robot, speed):
    env = catalog_env(parse(WALK, "walk"), robot)  # the twin goes 1 m/s, 60 degrees off its heading
    found = drive(env, lambda obs, prev: np.zeros(12), episodes=4)
    assert found["speed_mps"] == pytest.approx(speed, abs=1e-3) and found["falls"] == 1 and found["episodes"] == 4
    assert found["interventions"] == 0
    assert "laps" not in found and found["success_rate"] == 0.75


def test_a_twin_that_is_placed_has_not_walked_there():
    robot = TwinPuppet()
    env = catalog_env(parse(WALK, "walk"), robot)
    tally = Tally(env)
    for _ in range(3):
        env.reset(seed=1)
        for _ in range(10):
            env.step(np.zeros(12))
        robot.x += 100.0  # carried
    tally.policy_ms, tally.returns, tally.successes = [1.0], [1.0], [1.0]
    env.close()
    assert tally.report()["speed_mps"] == pytest.approx(0.5, abs=1e-3)


# --- the rest of the package


@pytest.mark.parametrize("name", ["dog-walk", "dog-run", "dog-stand-up", "dog-course"])
def test_its_numbers_come_from_the_presets_for_walking(name):
    assert catalog.family(load(name)) == "walk" and catalog.family(load("car-loop")) == "course"
    found = config.load("full", catalog.family(load(name)))
    assert found.agent["gamma"] == 0.99 and found.agent["max_delta"] is None and found.learner.steps == 24_000


def test_nobody_can_steer_it():
    options = commands.Namespace(task="dog-course", source="", out=None)
    for call, what in ((commands.record, "be recorded"), (commands._pursue, "be driven by pure pursuit")):
        with pytest.raises(TaskError, match=f"dog-course: only robots that take speed and steering can {what}"):
            call(options)
        with pytest.raises(TaskError, match=f"dog-walk: only courses can {what}"):
            call(commands.Namespace(**vars(options) | {"task": "dog-walk"}))


def test_recorded_actions_keep_their_meaning_in_another_box():
    narrow, wide = load("dog-walk"), load("dog-run")
    meta, command = catalog.stream_meta(narrow), catalog.declaration(wide)[1]
    _, records, _ = walked(Puppet(), WALK, 5)
    records[-2] = records[-2]._replace(action=np.linspace(-1, 1, 12, dtype=np.float32))
    again = fit.translated(meta, records, command)
    assert [r.action is None for r in again] == [r.action is None for r in records]
    for old, new in zip(records, again, strict=True):
        if old.action is not None:
            assert command.to_command(new.action) == pytest.approx(COMMAND.to_command(old.action), abs=1e-5)
    assert fit.translated(Meta.from_json(meta.to_json()), records, COMMAND) is records
    with pytest.raises(TaskError, match="dog-run: in dog-walk an action is another command"):
        catalog.check_actions(wide, narrow)
    with pytest.raises(TaskError, match="dog-walk: car-loop was trained on car; this task's robot is quadruped"):
        catalog.check_actions(narrow, load("car-loop"))
    with pytest.raises(TaskError, match="dog-walk: runs at 50 Hz, and dog-walk at 20; same hz, please"):
        catalog.check_actions(replace(narrow, hz=50.0), narrow)
    assert catalog.check_start(load("dog-course"), narrow) == 49  # channels and the previous action: it can go on
    with pytest.raises(TaskError, match="dog-walk: dog-course observes what this task does not"):
        catalog.check_start(narrow, load("dog-course"))


def test_a_calf_that_is_always_bent_can_be_limited():
    limits = Limits.of(CHANNELS, COMMAND, {"max_FR_calf_rad": 1.5, "max_FL_thigh_rad": 0.9})
    assert (limits.low[2], limits.high[2]) == (-1.5, -0.888) and (limits.low[4], limits.high[4]) == (-0.686, 0.9)
    for wrong in (0.888, 2.9):
        with pytest.raises(SafetyError, match="must be above 0.888 and at most the robot's own 2.818"):
            Limits.of(CHANNELS, COMMAND, {"max_FR_calf_rad": wrong})


def test_the_gate_measures_every_joint():
    limits = Limits.of(CHANNELS, COMMAND, {})
    assert limits.measured == ("joint_position",) * 12 and limits.place == tuple(range(12))
