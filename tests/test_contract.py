"""The contract of a robot, for every row of the catalog: `python -m pytest tests/test_contract.py`."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module
from pkgutil import resolve_name

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from tether.drivers.base import DriverError, Robot, Twin
from tether.drivers.fake import Fake
from tether.launch import catalog
from tether.robot_env.env import RobotEnv
from tether.robot_env.rate import Rate
from tether.robot_env.safety import Gate, Limits
from tether.robot_env.task import parse, shipped

SQUARE = np.array([[-6.0, -6.0], [6.0, -6.0], [6.0, 6.0], [-6.0, 6.0]])
ROWS = sorted(catalog.ROBOTS)
COURSE = """
[task]
robot = "{robot}"
kind = "course"
hz = 10
episode_s = 5
[[checkpoint]]
at = [3.0, 0.0]
[[checkpoint]]
at = [0.0, 3.0]
[[checkpoint]]
at = [-3.0, 0.0]
[[checkpoint]]
at = [0.0, -3.0]
"""
WALK = """
[task]
robot = "{robot}"
kind = "walk"
hz = 20
episode_s = 5
"""
MANIPULATE = """
[task]
robot = "{robot}"
kind = "manipulate"
hz = 10
episode_s = 5
[manipulate]
area = [[0.1, -0.1], [0.3, 0.1]]
[[checkpoint]]
at = [0.2, 0.0, 0.05]
"""
BOLTED = {"arm", "arm-joints"}  # down: what is placed is what lies before it
TASKS = {"car": COURSE, "fake": COURSE, "quadruped": WALK, "arm": MANIPULATE, "arm-joints": MANIPULATE}


def make(row: str) -> Twin:
    try:
        twin = resolve_name(catalog.ROBOTS[row].twin)
    except ModuleNotFoundError as error:
        pytest.skip(f"needs {error.name}")
    return twin(walls=[SQUARE], start=(1.0, 2.0, 0.5), seed=3, realtime=False)


@pytest.fixture(params=ROWS)
def row(request) -> str:
    return request.param


@pytest.fixture
def robot(row):
    robot = make(row)
    yield robot
    robot.close()


def middle(robot: Robot) -> np.ndarray:
    return robot.command.to_command(np.zeros(robot.command.size))


def moving(robot: Twin) -> float:
    """How fast its motors turn, or it goes: m/s or rad/s, whichever it has."""
    joints = robot.read().values.get("joint_velocity", np.zeros(1))
    return max(abs(robot.truth()["speed"]), float(np.abs(joints).max()))


def test_the_declaration_is_the_robots_own_and_makes_sense(row, robot):
    module = import_module(catalog.ROBOTS[row].declaration)
    assert robot.channels == module.CHANNELS and robot.command == module.COMMAND
    assert isinstance(robot, Twin)
    names = [c.name for c in robot.channels]
    assert len(set(names)) == len(names)
    for channel in robot.channels:
        assert channel.size > 0 and channel.hz > 0 and channel.latency_s >= 0 and channel.unit
        assert all(s > 0 and np.isfinite(s) for s in channel.scale)
    command = robot.command
    columns = (
        command.names, command.units, command.action_low, command.action_high, command.low, command.high,
        command.rate, command.safe,
    )  # fmt: skip
    assert {len(c) for c in columns} == {command.size}
    low, high = np.array(command.low), np.array(command.high)
    assert (low <= command.action_low).all() and (np.array(command.action_low) < command.action_high).all()
    assert (np.array(command.action_high) <= high).all() and (np.array(command.rate) > 0).all()
    assert (low <= command.safe).all() and (np.array(command.safe) <= high).all()
    action = np.linspace(-1.5, 1.5, command.size)
    assert command.to_action(command.to_command(action)) == pytest.approx(action, abs=1e-6)


def test_it_reads_what_it_declares(robot):
    robot.open()
    for _ in range(30):
        robot.write(middle(robot))
        robot.sleep(0.02)
        reading = robot.read()
        assert list(reading.values) == [c.name for c in robot.channels] == list(reading.stamps)
        for channel in robot.channels:
            value = reading.values[channel.name]
            assert value.shape == (channel.size,) and value.dtype == np.float32 and np.isfinite(value).all()


def test_readings_are_copies(robot):
    robot.open()
    first = robot.read()
    kept = {k: v.copy() for k, v in first.values.items()}
    robot.write(middle(robot))
    robot.sleep(0.5)
    second = robot.read()
    assert all((first.values[k] == kept[k]).all() for k in kept)
    for value in second.values.values():
        value[:] = np.nan
    assert all(np.isfinite(v).all() for v in robot.read().values.values())


def test_what_was_written_is_a_copy(robot):
    robot.open()
    command = middle(robot)
    robot.write(command)
    command[:] = np.nan
    robot.sleep(0.2)
    assert all(np.isfinite(v).all() for v in robot.read().values.values())


def test_stamps_never_go_back_lie_in_the_past_and_are_as_old_as_declared(robot):
    robot.open()
    before = robot.read().stamps
    for _ in range(60):
        robot.write(middle(robot))
        robot.sleep(0.013)
        now, stamps = robot.now(), robot.read().stamps
        for channel in robot.channels:
            stamp = stamps[channel.name]
            assert before[channel.name] <= stamp <= now + 1e-9
            assert now - stamp <= channel.latency_s + 2 / channel.hz
        before = stamps


def test_time_passes_by_sleeping_and_only_by_it(robot):
    robot.open()
    start = robot.now()
    robot.read()
    robot.write(middle(robot))
    assert robot.now() == start
    for _ in range(7):
        robot.sleep(0.03)
    assert robot.now() - start == pytest.approx(0.21, abs=0.005)


def test_reading_and_writing_before_open_raise(robot):
    for verb in (robot.read, lambda: robot.write(middle(robot))):
        with pytest.raises(DriverError, match="open"):
            verb()
    robot.open()
    robot.read()
    robot.close()
    robot.close()
    with pytest.raises(DriverError, match="open"):
        robot.read()
    with pytest.raises(DriverError, match="open"):
        robot.write(middle(robot))
    robot.open()  # and again
    robot.read()


def test_stop_is_idempotent_in_any_state_and_stops(robot):
    robot.stop()
    robot.open()
    robot.stop()
    # a robot whose middle is standing still is kept moving from there towards where it is safe, and back
    away = [middle(robot), np.array(robot.command.safe)] if "joint_velocity" in robot.read().values else [middle(robot)]
    for k in range(21):  # 0.15 s on its last way
        robot.write(away[k // 3 % len(away)])
        robot.sleep(0.05)
    assert moving(robot) > 0.5
    robot.stop()
    robot.stop()
    robot.sleep(2.0)
    assert abs(robot.truth()["speed"]) < 0.05
    robot.sleep(1.0)  # what stood has sunk to the ground
    assert moving(robot) < 0.25  # a reading of a joint at rest has noise: this is five times that
    robot.close()
    robot.stop()


def test_it_can_be_placed_and_tells_the_truth(row, robot):
    robot.open()
    robot.place((2.0, -1.0, 2.0))
    truth = robot.truth()
    if row not in BOLTED:
        assert (truth["x"], truth["y"], truth["heading"]) == pytest.approx((2.0, -1.0, 2.0), abs=0.01)
    assert truth["upright"] > 0.99 and truth["contacts"] == 0 and abs(truth["speed"]) < 0.01


def test_its_sensors_are_fresh_enough_for_its_own_gate(robot):
    limits = Limits.of(robot.channels, robot.command, {})
    gate = Gate(robot.command, limits)
    robot.open()
    for _ in range(52):  # a second, and what rounding costs
        gate.step(robot.now(), robot.read(), None, ("arm",))
        robot.sleep(0.02)
    for _ in range(50):
        out, state, faults = gate.step(robot.now(), robot.read(), np.zeros(robot.command.size))
        assert state == "run" and not set(faults) - {"rate"}
        robot.write(out)
        robot.sleep(0.02)


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_driver_error_stops_the_motors_first(row, verb):
    robot, order = make(row), []
    env = environment(row, robot)
    env.reset()
    stop, real = robot.stop, getattr(robot, verb)

    def fail(*arguments):
        order.append("failed")
        raise DriverError("pulled out")

    robot.stop = lambda: (order.append("stopped"), stop())[1]
    setattr(robot, verb, fail)
    with pytest.raises(DriverError, match="pulled out"):
        env.step(np.zeros(robot.command.size))
    assert order == ["failed", "stopped"]
    setattr(robot, verb, real)
    env.close()
    env.close()


def test_a_failure_of_the_fake_on_schedule():
    robot = Fake()
    env = environment("fake", robot)
    env.reset()
    robot.fail_after = len(robot.written) + 3
    for _ in range(3):
        env.step(np.zeros(2))
    stops = robot.stops
    with pytest.raises(DriverError, match="failed as scheduled"):
        env.step(np.zeros(2))
    assert robot.stops == stops + 1


def environment(row: str, robot: Robot) -> RobotEnv:
    task = catalog.make_task(parse(TASKS[row].format(robot=row), "contract"))
    gate = Gate(robot.command, catalog.limits(task.spec))
    return RobotEnv(robot, task, gate, Rate(task.spec.hz, robot.now, robot.sleep))


def check(env: gymnasium.Env) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about infinite bounds: channels have no declared range
        check_env(env, skip_render_check=True)


def test_gymnasiums_own_checker_passes(row):
    env = environment(row, make(row))
    env.spec = gymnasium.envs.registration.EnvSpec(
        "test-v0", entry_point=lambda: environment(row, make(row)), nondeterministic=True
    )
    check(env)


def test_twins_are_registered_ids_and_mujoco_waits_until_one_is_made():
    code = (
        "import sys, gymnasium, tether.launch.twins as t\n"
        "assert 'mujoco' not in sys.modules and 'jax' not in sys.modules\n"
        "ids = [i for i in gymnasium.registry if i.startswith('tether/')]\n"
        "assert all(gymnasium.spec(i).nondeterministic for i in ids)\n"
        "print(*ids)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [f"tether/{name}-v0" for name in shipped()]


def test_a_registered_twin_passes_the_checker_and_repeats_itself_with_a_seed():
    pytest.importorskip("mujoco")
    env = gymnasium.make("tether.launch.twins:tether/car-loop-v0")
    assert isinstance(env.unwrapped, RobotEnv)
    check(env.unwrapped)
    start = np.array(env.unwrapped.task.start)
    for _ in range(2):
        env.reset(seed=1)
        truth = env.unwrapped.robot.truth()
        assert (truth["x"], truth["y"]) == pytest.approx(start[:2], abs=0.01)
        for _ in range(10):
            env.step(env.action_space.sample())
    env.close()
