"""RobotEnv: records, episodes, resets and the gate, on the fake robot; never a teleport on hardware."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tether.drivers.base import DriverError, Reading, Twin
from tether.drivers.car import COMMAND
from tether.drivers.fake import Fake
from tether.launch import catalog
from tether.robot_env.env import RobotEnv
from tether.robot_env.rate import Rate
from tether.robot_env.record import Record
from tether.robot_env.safety import Gate, SafetyError
from tether.robot_env.sample import Fold
from tether.robot_env.task import Outcome, parse

from tests.conftest import square


class Hardware:
    """The five verbs and the clock of a fake, and nothing of a twin; `up` is what its accelerometer says."""

    def __init__(self, robot: Fake) -> None:
        self.robot, self.up = robot, 9.81
        self.channels, self.command = robot.channels, robot.command
        self.open, self.write, self.stop, self.close = robot.open, robot.write, robot.stop, robot.close
        self.now, self.sleep = robot.now, robot.sleep

    def read(self) -> Reading:
        reading = self.robot.read()
        reading.values["accel"][2] = self.up
        return reading


def make(robot, episode_s: float = 60.0) -> tuple[RobotEnv, list[Record]]:
    task = catalog.make_task(parse(square(episode_s=episode_s), "square"))
    env = RobotEnv(
        robot, task, Gate(robot.command, catalog.limits(task.spec)), Rate(10, robot.now, robot.sleep)
    )
    records: list[Record] = []
    env.on_record.append(records.append)
    return env, records


def wish(speed: float, steering: float) -> np.ndarray:
    return COMMAND.to_action(np.array([speed, steering]))


def drive(env: RobotEnv, ticks: int, seed: int = 0) -> list[tuple]:
    """(observation, action executed before, and then, reward, terminated, truncated) of random driving."""
    rng, out = np.random.default_rng(seed), []
    obs, _ = env.reset()
    for _ in range(ticks):
        before = env.action.copy()
        then, reward, terminated, truncated, info = env.step(rng.uniform(-1, 1, 2))
        out.append((obs, before, info["executed"].copy(), reward, terminated, truncated))
        obs = then
        if terminated or truncated:
            obs, _ = env.reset()
    return out


def test_the_records_fold_to_what_the_policy_saw():
    env, records = make(Fake(), 3.0)
    seen = drive(env, 400)
    env.close()
    fold = Fold(env.task)
    samples = [(r, s) for r in records for s in fold.push(r)]
    assert len(samples) == len(records)
    by_policy = [(r, s) for r, s in samples if r.action is not None and r.source == "policy"]
    assert len(by_policy) == len(seen) and any(r.source == "reset" for r in records)
    for (record, sample), (obs, before, action, reward, terminated, truncated) in zip(
        by_policy, seen, strict=True
    ):
        assert (sample.obs == obs).all()
        assert (sample.prev_action == np.clip(before, -1, 1)).all()
        assert (sample.action == np.clip(action, -1, 1)).all() and (record.action == action).all()
        assert (sample.reward, sample.terminated, sample.truncated) == (reward, terminated, truncated)


def test_records_are_numbered_and_every_segment_ends_with_a_reading_only():
    env, records = make(Fake(), 2.0)
    drive(env, 150)
    env.close()
    assert [r.seq for r in records] == list(range(1, len(records) + 1))
    assert records[-1].action is None
    for before, after in zip(records, records[1:], strict=False):
        ended = before.terminated or before.truncated
        assert (after.action is None) >= ended  # what ended is followed by its last reading
        assert before.action is None or after.action is None or before.source == after.source
    times = [r.time for r in records]
    assert times == sorted(times)


def test_a_tick_outside_the_action_box_is_recorded_but_not_trained_on():
    env, records = make(Fake())
    env.reset()
    for _ in range(10):
        env.step(wish(-1.0, 0.0))  # backwards: for resets
    for _ in range(20):
        env.step(wish(2.0, 0.0))
    env.close()
    fold = Fold(env.task)
    samples = [s for r in records for s in fold.push(r)]
    assert [s.train for s in samples if s.action is not None] == [
        bool((np.abs(r.action) <= 1.0001).all()) for r in records if r.action is not None
    ]
    assert not samples[5].train and samples[-3].train


def test_a_time_limit_truncates_and_a_collision_terminates():
    env, _ = make(Fake(), 2.0)
    env.reset()
    outcomes = [env.step(wish(0.6, 0.0))[2:4] for _ in range(20)]
    assert outcomes == [(False, False)] * 19 + [(False, True)]
    pose = env.reading.values["pose"].copy()
    env.reset()  # goes on where it is
    assert (env.reading.values["pose"] == pose).all()
    assert [env.step(wish(0.6, 0.0))[3] for _ in range(20)][-1]
    env.reset()
    for _ in range(20):
        _, _, terminated, truncated, info = env.step(wish(4.5, 0.38))
        if terminated:
            break
    assert terminated and not truncated and "collision" in info
    env.close()


def test_an_end_and_the_time_limit_together_are_an_end():
    env, records = make(Fake(), 0.1)
    env.reset()
    env.task.advance = lambda progress, action, reading: Outcome(0.0, True, False, {})
    assert env.step(wish(0.5, 0))[2:4] == (True, False)
    env.close()
    assert records[0].terminated and not records[0].truncated


def test_leaving_an_episode_in_the_middle_ends_its_segment():
    env, records = make(Fake())
    env.reset()
    env.step(wish(1, 0))
    env.reset()
    assert [r.action is None for r in records] == [False, True]
    env.step(wish(1, 0))
    env.reset(seed=1)
    env.step(wish(1, 0))
    env.close()
    assert [r.action is None for r in records] == [False, True] * 3


def test_a_reset_drives_and_only_a_seed_places_a_twin():
    robot = Fake()
    placed, place = [], robot.place
    robot.place = lambda pose: (placed.append(pose), place(pose))[1]
    env, records = make(robot, 5.0)
    drive(env, 300)
    assert len(placed) == 1  # where it starts
    assert sum(r.events.get("reset", 0) for r in records) >= 2
    assert not sum(r.events.get("intervention", 0) for r in records)
    moved = [np.linalg.norm(b.reading.values["pose"][:2] - a.reading.values["pose"][:2])
             for a, b in zip(records, records[1:], strict=False)]  # fmt: skip
    assert max(moved) < 4.6 * 0.1
    env.reset(seed=3)
    assert len(placed) == 2 and env.reading.values["pose"][:2] == pytest.approx(env.task.start[:2])
    env.close()


def flipped(env: RobotEnv) -> None:
    """As if the last tick had ended on the roof."""
    env.step(wish(0.5, 0.0))
    env._outcome = Outcome(-10.0, True, False, {"flip": 1.0}, reset=True)


def test_on_its_roof_the_twin_is_set_on_its_wheels_by_one_intervention():
    robot = Fake()
    env, records = make(robot)
    env.reset()
    for _ in range(40):
        env.step(wish(1.0, 0.05))
    flipped(env)
    env.reset()
    pose = env.reading.values["pose"]
    assert env.task.line.project(pose[:2])[1] == pytest.approx(0.0, abs=1e-3)
    env.step(wish(0.5, 0.0))
    env.close()
    assert [r.events.get("intervention", 0) for r in records].count(1.0) == 1
    assert [r.events.get("reset", 0) for r in records].count(1.0) == 1
    fold = Fold(env.task)  # the learner sees the same
    assert all(s.obs.shape == (env.task.observation_size,) for r in records for s in fold.push(r))


def test_on_its_roof_hardware_waits_with_its_motors_at_rest_for_a_person():
    robot = Hardware(Fake())
    assert not isinstance(robot, Twin)
    env, records = make(robot)
    env.reset()
    for _ in range(10):
        env.step(wish(1.0, 0.0))
    robot.up = -9.81
    _, _, terminated, _, info = env.step(wish(1.0, 0.0))
    assert terminated and "flip" in info
    before = len(records), len(robot.robot.written)

    def person(record: Record) -> None:
        if len(records) - before[0] == 40:
            robot.up = 9.81

    env.on_record.append(person)
    env.reset()
    waited = robot.robot.written[before[1] + 2 : before[1] + 38]  # once it has braked
    assert np.abs(waited).max() < 1e-6
    ticks = [r for r in records[before[0] :] if r.action is not None]
    assert len(ticks) > 40 and {r.source for r in ticks} == {"reset"}
    assert [r.events.get("intervention", 0) for r in records].count(1.0) == 1
    jumps = [np.linalg.norm(b.reading.values["pose"][:2] - a.reading.values["pose"][:2])
             for a, b in zip(records, records[1:], strict=False)]  # fmt: skip
    assert max(jumps) < 0.3
    env.close()


def test_without_auto_reset_nothing_moves_between_episodes():
    env, records = make(Fake(), 5.0)
    env.auto_reset = False
    drive(env, 200)
    env.close()
    assert any(r.terminated for r in records) and {r.source for r in records} == {"policy"}


def test_an_estop_ends_the_episode_and_no_reset_moves_the_robot():
    robot = Fake()
    env, records = make(robot)
    env.reset()
    for _ in range(5):
        env.step(wish(2.0, 0.0))
    pressed = [("estop",)]
    env.events = lambda: pressed.pop() if pressed else ()
    _, _, terminated, truncated, info = env.step(wish(2.0, 0.0))
    assert truncated and not terminated and info["gate"] == "estop"
    assert robot.written[-1][0] == 0.0 and records[-1].events["gate_estop"] == 1.0
    written = len(robot.written)
    with pytest.raises(SafetyError, match=r"the gate is estop \(estop\): make the robot safe, then clear and arm it"):
        env.reset()
    assert len(robot.written) == written
    env.close()


def test_after_an_estop_a_person_clears_and_arms():
    robot = Fake()
    env, _ = make(robot)
    env.reset()
    pressed = [("estop",)]
    env.events = lambda: pressed.pop(0) if pressed else ()
    env.step(wish(2.0, 0.0))
    pressed[:] = [("clear",)]
    with pytest.raises(SafetyError, match=r"the gate is disarmed \(nothing is wrong now\)"):
        env.reset()  # nobody armed it
    assert all((command == COMMAND.safe).all() for command in robot.written[-50:])
    pressed[:] = [()] * 12 + [("arm",)]
    env.reset()
    assert env.step(wish(0.9, 0.0))[4]["gate"] == "run"
    env.close()


class Failing(Hardware):
    """Its `pose` is spoilt by `how` from `begins` on."""

    def __init__(self, robot: Fake, how, begins: float) -> None:
        super().__init__(robot)
        self.how, self.begins = how, begins

    def read(self) -> Reading:
        reading = super().read()
        if self.now() >= self.begins:
            self.how(reading)
        return reading


def lose(reading: Reading) -> None:
    reading.stamps["pose"] = -1.0


def spoil(reading: Reading) -> None:
    reading.values["pose"][:] = np.nan


def exaggerate(reading: Reading) -> None:
    reading.values["pose"][0] = 1e6


@pytest.mark.parametrize("how", [lose, spoil, exaggerate])
def test_a_channel_that_fails_holds_the_robot_and_then_stops_it(how):
    robot = Failing(Fake(), how, 3.0)
    env, records = make(robot)
    env.reset()
    states = []
    while not states or states[-1] != "stopping":
        obs, _, terminated, truncated, info = env.step(wish(2.0, 0.1))
        assert np.isfinite(obs).all() and not terminated
        states.append(info["gate"])
        if robot.now() > 3.3:  # two periods and the channel's 0.15 s
            assert states[-1] != "run" and robot.robot._command[0] == 0.0
    assert truncated and states.count("hold") == 21
    assert all(np.isfinite(r.reading.values["pose"]).all() for r in records)
    with pytest.raises(SafetyError, match=r"the gate is stopping \(stale_pose\)"):
        env.reset()
    env.close()


def test_one_bad_value_is_not_used_and_stops_nothing():
    robot = Failing(Fake(), spoil, math.inf)
    env, records = make(robot)
    env.reset()
    for tick in range(30):
        robot.begins = 0.0 if tick % 10 == 5 else math.inf
        assert env.step(wish(0.8, 0.0))[4]["gate"] == "run"
    assert all(np.isfinite(r.reading.values["pose"]).all() for r in records)
    env.close()


@pytest.mark.parametrize("how", [lose, spoil])
def test_a_robot_whose_channel_never_came_is_not_armed(how):
    robot = Failing(Fake(), how, 0.0)
    env, records = make(robot)
    with pytest.raises(SafetyError, match=r"the gate is disarmed \((stale|not_finite)_pose\)"):
        env.reset()
    assert not records and all((command == COMMAND.safe).all() for command in robot.robot.written)
    env.close()


def test_an_estop_in_a_reset_stops_it():
    robot = Hardware(Fake())
    env, _ = make(robot)
    env.reset()
    flipped(env)
    robot.up = -9.81
    env.events = lambda: ("estop",)
    with pytest.raises(SafetyError):
        env.reset()
    assert (robot.robot._command == 0.0).all()
    env.close()


def test_what_was_executed_is_what_the_gate_let_through():
    robot = Fake()
    env, records = make(robot)
    env.reset()
    env.step(wish(4.5, 0.0))
    env.close()
    assert robot.written[0] == pytest.approx([0.0, 0.0]) or robot.written[0][0] <= 0.9 + 1e-6
    assert COMMAND.to_command(records[0].action) == pytest.approx(robot.written[0], abs=1e-6)
    assert records[0].events["gate_rate"] == 1.0


def test_ticks_come_at_the_rate_and_a_reading_is_the_newest():
    robot = Fake()
    env, records = make(robot)
    env.reset()
    for _ in range(20):
        env.step(wish(1.0, 0.0))
        assert env.reading.stamps["pose"] == robot.now()
    env.close()
    assert np.diff([r.time for r in records]) == pytest.approx(0.1)
    assert env.rate.late == 0


@pytest.mark.parametrize("error", [DriverError("gone"), ValueError("bug"), KeyboardInterrupt()])
def test_whatever_fails_the_motors_stop_and_the_robot_is_let_go_of(error):
    robot = Fake()
    env, _ = make(robot)
    env.reset()
    env.step(wish(2.0, 0.0))

    def fail(record):
        raise error

    env.on_record.append(fail)
    stops = robot.stops
    with pytest.raises(type(error)):
        env.step(wish(2.0, 0.0))
    assert robot.stops == stops + 1 and (robot._command == 0.0).all()
    with pytest.raises(type(error)):  # the observer fails at the last reading, too
        env.close()
    with pytest.raises(DriverError, match="open"):
        robot.read()
    env.close()


def test_a_step_moves_the_fake_as_its_model_says():
    robot = Fake((0.0, 0.0, 0.0))
    robot.open()
    robot.write(np.array([2.0, 0.2]))
    for _ in range(100):
        robot.sleep(0.01)
    turn = 2.0 * math.tan(0.2) / 0.3
    x, y, c, s = robot.read().values["pose"]
    assert (x, y) == pytest.approx((2 / turn * math.sin(turn), 2 / turn * (1 - math.cos(turn))), abs=1e-3)
    assert math.atan2(s, c) == pytest.approx(turn, abs=1e-5)
