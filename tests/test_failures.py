"""Named failures of the twin: what each kind does to what is read, when, the same for the same seed; `--fail`."""

from __future__ import annotations

import math
import signal
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")

from tether.drivers.base import DriverError, Reading
from tether.drivers.car import CHANNELS, COMMAND
from tether.launch import catalog, cli
from tether.launch.transport import LearnerLink
from tether.robot_env.env import RobotEnv
from tether.robot_env.record import Meta, decode
from tether.sim import car, twin
from tether.sim.car import CarTwin

from tests.conftest import FAKE

NAMES = [c.name for c in CHANNELS]
TICK = 0.01  # at the fastest channels' rate: a mean or a peak is of one sample
START, LASTS, SECONDS = 1.0, 3.0, 5.0
SETTLED = 0.2  # s after the end: what was captured before it has come


@cache
def driven(kind: str, channel: str = "", seed: int = 0, noise: bool = False) -> tuple[tuple[float, Reading], ...]:
    """(time, reading) of every tick of the same drive, while `channel` (default: each) fails so; "" fails nothing."""
    robot = CarTwin(seed=seed, noise=noise)
    robot.open()
    for name in (channel,) if channel else NAMES:
        if kind:
            robot.fail(name, kind, START, LASTS)
    found = []
    for tick in range(round(SECONDS / TICK)):
        robot.write(np.array([2.0 + math.sin(tick / 23), 0.2 * math.sin(tick / 31)]))
        robot.sleep(TICK)
        found.append((robot.now(), robot.read()))
    return tuple(found)


def during(kind: str, name: str, late: float = 0.1, **options) -> list[tuple[float, np.ndarray, float]]:
    """(time, value, stamp) of a channel while it fails, from `late` after the start, when that can be seen."""
    return [
        (now, reading.values[name], reading.stamps[name])
        for now, reading in driven(kind, **options)
        if START + late <= now < START + LASTS
    ]


def same(one: Reading, other: Reading, name: str) -> bool:
    return one.stamps[name] == other.stamps[name] and np.array_equal(one.values[name], other.values[name])


def stamps(kind: str, name: str, **options) -> list[float]:
    return sorted({stamp for _, _, stamp in during(kind, name, **options)})


# --- sensors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", twin.KINDS)
def test_a_failure_begins_and_ends_at_its_time(kind, name):
    changed = [now for (now, healthy), (_, ill) in zip(driven(""), driven(kind), strict=True)
               if not same(healthy, ill, name)]  # fmt: skip
    assert START <= min(changed) <= START + 2 * twin.SPELL_S[0]
    assert START + LASTS - twin.SPELL_S[1] - SETTLED <= max(changed) <= START + LASTS + SETTLED


@pytest.mark.parametrize("name", NAMES)
def test_off_sends_nothing_more(name):
    values, seen = [v for _, v, _ in during("off", name)], stamps("off", name)
    assert len(seen) == 1 and seen[0] < START
    assert all(np.array_equal(value, values[0]) for value in values)


@pytest.mark.parametrize("name", NAMES)
def test_stuck_repeats_itself_with_fresh_stamps(name):
    values = [v for _, v, _ in during("stuck", name)]
    assert stamps("stuck", name) == stamps("", name)
    assert all(np.array_equal(value, values[0]) for value in values)
    assert np.ptp([v for _, v, _ in during("", name)], axis=0).max() > 0.05  # while the truth goes on
    before = {r.stamps[name]: r.values[name] for _, r in driven("") if r.stamps[name] < START}
    assert np.array_equal(values[0], before[max(before)])


@pytest.mark.parametrize("name", NAMES)
def test_garbage_is_not_a_number_infinite_and_absurd(name):
    ill = during("garbage", name)
    assert stamps("garbage", name) == stamps("", name)
    for test in (np.isnan, np.isinf, lambda v: v == 1e9):
        seconds = {math.floor(stamp - START + 1e-9) for _, value, stamp in ill if test(value).all()}
        assert len(seconds) == 1  # of the three, each has its own
    assert all(np.isnan(v).all() or (v >= 1e9).all() for _, v, _ in ill)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_is_as_documented_and_could_be_true(name):
    gain, offset = car.WRONG[name]
    (channel,) = (c for c in CHANNELS if c.name == name)
    for (_, ill, _), (_, healthy, _) in zip(during("wrong", name), during("", name), strict=True):
        assert ill == pytest.approx(healthy * np.array(gain) + np.array(offset), abs=1e-5)
        assert not np.allclose(ill, healthy, atol=0.02 * min(channel.scale)) or np.abs(healthy).max() < 0.1
        assert (np.abs(ill) <= 3.0 * np.array(channel.scale)).all()
    assert stamps("wrong", name) == stamps("", name)


@pytest.mark.parametrize("name", NAMES)
def test_slow_is_a_tenth_of_the_rate(name):
    (channel,) = (c for c in CHANNELS if c.name == name)
    seen = stamps("slow", name, late=0.3)
    assert np.diff(seen) == pytest.approx(10.0 / channel.hz) and len(seen) >= (LASTS - 0.4) * channel.hz / 10
    healthy = {r.stamps[name]: r.values[name] for _, r in driven("")}
    assert all(np.array_equal(value, healthy[stamp]) for _, value, stamp in during("slow", name))


@pytest.mark.parametrize("name", NAMES)
def test_delayed_is_half_a_second_later(name):
    ticks = round(0.5 / TICK)
    old, ill, now = driven(""), driven("delayed"), [time for time, _ in driven("")]
    for i in range(len(ill)):
        if START + 0.5 + TICK <= now[i] < START + LASTS - TICK / 2:
            assert same(ill[i][1], old[i - ticks][1], name), now[i]
        elif START <= now[i] < START + 0.5 - TICK / 2:
            assert ill[i][1].stamps[name] == ill[round(START / TICK) - 2][1].stamps[name], now[i]
    assert np.mean([time - s for time, _, s in during("delayed", name, late=0.6)]) == pytest.approx(
        0.5 + np.mean([time - s for time, _, s in during("", name, late=0.6)])
    )


@pytest.mark.parametrize("name", NAMES)
def test_intermittent_is_off_and_on_at_random(name):
    (channel,) = (c for c in CHANNELS if c.name == name)
    gaps = [b - a for a, b in pairwise(stamps("intermittent", name, late=0.0)) if b - a > 1.5 / channel.hz]
    assert set(stamps("intermittent", name)) < set(stamps("", name)) | {max(s for s in _until_start(name))}
    assert len(gaps) >= 2 and min(gaps) >= twin.SPELL_S[0] and max(gaps) <= twin.SPELL_S[1] + 2 / channel.hz
    healthy = {r.stamps[name]: r.values[name] for _, r in driven("")}
    assert all(np.array_equal(value, healthy[stamp]) for _, value, stamp in during("intermittent", name))
    assert stamps("intermittent", name, seed=1) != stamps("intermittent", name)


def _until_start(name: str) -> list[float]:
    return [reading.stamps[name] for _, reading in driven("") if reading.stamps[name] < START]


@pytest.mark.parametrize("kind", twin.KINDS)
def test_the_same_seed_fails_the_same_way_and_alone(kind):
    one, again = driven(kind, seed=3, noise=True), driven.__wrapped__(kind, seed=3, noise=True)
    for (_, a), (_, b) in zip(one, again, strict=True):
        assert a.stamps == b.stamps and all(np.array_equal(a.values[n], b.values[n], equal_nan=True) for n in NAMES)
    for (_, healthy), (_, ill) in zip(driven(""), driven(kind, "gyro"), strict=True):
        assert all(same(healthy, ill, name) for name in NAMES if name != "gyro")


def test_failures_of_one_sensor_add_up():
    robot = CarTwin(noise=False)
    robot.open()
    robot.fail("steering", "wrong", 0.5)
    robot.fail("steering", "off", 1.0, 0.5)
    seen = {}
    for _ in range(200):
        robot.sleep(TICK)
        reading = robot.read()
        seen[round(robot.now(), 2)] = reading.values["steering"][0], reading.stamps["steering"]
    assert seen[0.45][0] == pytest.approx(0.0, abs=0.01)
    assert seen[0.9][0] == pytest.approx(0.1, abs=0.01)
    assert seen[1.2][1] == seen[1.5][1] < 1.0
    assert seen[2.0] == (pytest.approx(0.1, abs=0.01), pytest.approx(1.96))


@pytest.mark.parametrize("kind", ["off", "stuck", "delayed"])
def test_a_sensor_that_fails_does_not_see_a_placement(kind):
    robot = CarTwin(noise=False)
    robot.open()
    robot.fail("pose", kind, 0.0)
    robot.sleep(1.0)
    before = robot.read()
    robot.place((3.0, 0.0, 0.0))
    robot.sleep(0.3)
    after = robot.read()
    assert np.array_equal(before.values["pose"], after.values["pose"])
    assert (after.stamps["pose"] > 1.2) == (kind == "stuck")
    assert after.stamps["velocity"] > 1.2
    robot.sleep(0.5)
    assert (robot.read().values["pose"][0] > 2.0) == (kind == "delayed")


# --- actuators


def speeds(part: str, kind: str, start: float, lasts: float, seconds: float) -> tuple[list[float], list[float]]:
    """Speed and steering angle, every tenth of a second, of driving at 3 m/s straight, then from 1 s on to the left."""
    robot = CarTwin(noise=False)
    robot.open()
    robot.fail(part, kind, start, lasts)
    speed, angle = [], []
    for tick in range(round(seconds / 0.1)):
        robot.write(np.array([3.0, 0.0 if tick < 10 else 0.2]))
        robot.sleep(0.1)
        speed.append(robot.truth()["speed"])
        angle.append(float(robot.read().values["steering"][0]))
    return speed, angle


def test_a_motor_that_is_off_rolls_until_it_is_on_again():
    speed, _ = speeds("motor", "off", 1.5, 1.0, 3.5)
    assert min(speed[8:15]) > 2.8
    assert all(after < before for before, after in pairwise(speed[14:25]))  # it rolls,
    assert 1.0 < speed[24] < 2.6  # and is not braked
    assert speed[-1] > 2.8


def test_a_motor_that_is_off_cannot_brake():
    robot = CarTwin(noise=False)
    robot.open()
    robot.write(np.array([3.0, 0.0]))
    robot.sleep(2.0)
    robot.fail("motor", "off", robot.now())
    robot.stop()
    robot.sleep(1.0)
    assert robot.truth()["speed"] > 2.0


def test_a_stuck_servo_keeps_its_angle():
    _, angle = speeds("steering_servo", "stuck", 0.8, 1.2, 3.0)
    assert np.abs(angle[8:20]).max() < 0.01 and angle[-1] == pytest.approx(0.2, abs=0.01)
    robot = CarTwin(noise=False)
    robot.open()
    robot.fail("steering_servo", "stuck", 1.0)
    for steering in (0.2, -0.2):
        robot.write(np.array([1.0, steering]))
        robot.sleep(1.0)
    assert robot.read().values["steering"][0] == pytest.approx(0.2, abs=0.01)
    robot.place((0.0, 0.0, 0.0))  # a hand does not free it
    robot.sleep(0.5)
    assert robot.read().values["steering"][0] == pytest.approx(0.2, abs=0.01)


def test_on_a_low_battery_the_top_speed_sinks_and_the_brakes_work():
    speed, _ = speeds("battery", "low", 1.0, 10.0, 13.0)
    assert min(speed[10:38]) > 2.7  # 4.5 - 0.5 * 3 = 3 m/s: no less than what is asked for, so far
    assert speed[79] == pytest.approx(car.LOW_BATTERY_MPS, abs=0.15)
    assert speed[99] == pytest.approx(car.LOW_BATTERY_MPS, abs=0.05)
    assert speed[-1] > 2.7
    robot = CarTwin(noise=False)
    robot.open()
    robot.fail("battery", "low", 0.0)
    robot.write(np.array([4.5, 0.0]))
    robot.sleep(2.0)
    assert 3.0 < robot.truth()["speed"] < COMMAND.high[0] - 2.0 * car.LOW_BATTERY_MPS2 + 0.1
    robot.stop()
    robot.sleep(1.0)
    assert abs(robot.truth()["speed"]) < 0.05


def test_what_the_twin_does_not_have_cannot_fail():
    for part, kind in (("camera", "off"), ("pose", "low"), ("motor", "stuck")):
        with pytest.raises(ValueError, match=f"{part}:{kind}"):
            CarTwin().fail(part, kind, 0.0)


# --- the command line


def test_how_a_failure_is_written():
    spec = catalog.load_spec("car-loop")
    written = ["pose:stuck@12s", "accel:garbage@5s+2.5s", "motor:off@0.5+1", "battery:low@0s"]
    assert catalog.failures(spec, written) == [
        ("pose", "stuck", 12.0, math.inf), ("accel", "garbage", 5.0, 2.5), ("motor", "off", 0.5, 1.0),
        ("battery", "low", 0.0, math.inf),
    ]  # fmt: skip


BAD = {
    "no time": ("car-loop", "pose:stuck", "write PART:KIND@TIME, as in accel:off@12s"),
    "no number": ("car-loop", "pose:stuck@noon", "write PART:KIND@TIME"),
    "before the beginning": ("car-loop", "pose:stuck@-1s", "write PART:KIND@TIME"),
    "no such channel": ("car-loop", "camera:stuck@1s", "no 'camera'; what can fail is accel, .*pose, motor,.*battery"),
    "no such kind": ("car-loop", "pose:lost@1s", "pose cannot be 'lost', only off, stuck, garbage, wrong, slow"),
    "not this kind": ("car-loop", "motor:stuck@1s", "motor cannot be 'stuck', only off"),
    "a robot that cannot": ("fake.toml", "pose:stuck@1s", "fake has no twin that can fail; leave out --fail"),
    "no robot": ("gym:Pendulum-v1", "pose:stuck@1s", "gym:Pendulum-v1 has no twin that can fail"),
}


@pytest.mark.parametrize("task, failure, says", BAD.values(), ids=BAD)
def test_a_failure_that_cannot_be_is_one_line_before_anything_starts(
    task, failure, says, capsys, tmp_path, monkeypatch
):
    import re

    pytest.importorskip("jax")
    monkeypatch.chdir(tmp_path)
    Path("fake.toml").write_text(FAKE)
    assert cli.main(["run", task, "--fail", failure]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(says, line) and failure in line
    assert not Path("runs").exists()


def test_hardware_is_not_broken_on_purpose(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["actor", "--real", "--fail", "pose:stuck@1s"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "argument --fail: not allowed with argument --real" in line
    with pytest.raises(DriverError, match="leave it out with --real"):
        catalog.make_env(catalog.make_task(catalog.load_spec("car-loop")), real=True, fail=["pose:off@1s"])


def test_the_environment_reads_the_failing_twin():
    env = catalog.make_env(catalog.make_task(catalog.load_spec("car-loop")), fail=["gyro:off@1s+1s"])
    assert isinstance(env, RobotEnv)
    env.reset(seed=0)
    found = {}
    for _ in range(30):
        env.step(np.zeros(2, np.float32))
        found[round(env.robot.now(), 2)] = env.reading.stamps["gyro"]
    env.close()
    assert found[1.2] == found[1.9] < 1.0 and found[2.2] > 2.1


class Orders:
    """A learner that teaches nothing: it lets the first actor go on for `steps` and keeps its records."""

    def __init__(self, task: str, steps: int) -> None:
        spec, self.steps, self.records = catalog.load_spec(task), steps, []
        size = catalog.make_task(spec).observation_size
        policy = {"observation_size": size, "action_size": 2, "hidden": [4], "max_delta": 0.2}
        orders = {"task": spec.text, "name": spec.name, "seed": 0, "auto_reset": True, "policy": policy}
        self.link = LearnerLink("tcp://127.0.0.1:*", catalog.stream_meta(spec), orders | {"random_steps": 1000},
                                self.keep, {})  # fmt: skip
        weights = {}
        for name, shape in {"dense0": (size, 4), "mean": (4, 2), "log_std": (4, 2)}.items():
            weights |= {f"{name}/kernel": np.zeros(shape, np.float32), f"{name}/bias": np.zeros(shape[1:], np.float32)}
        self.link.publish(1, weights)

    def keep(self, meta: Meta, first: int, payloads: list[bytes]) -> int:
        self.records += map(decode, payloads)
        self.link.set_run_until({meta.stream: self.steps})
        if sum(record.action is not None for record in self.records) >= self.steps - 1:
            self.link.stop("that will do")
        return len(payloads)


def test_a_run_drives_with_the_failures_of_its_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("jax")
    from tether.launch import run

    monkeypatch.chdir(tmp_path)
    given: list[str] = []
    monkeypatch.setattr(run, "train", lambda job, actor: given.extend(actor) or {"steps": 0, "train_s": 0.0})
    failures = ["--fail", "wheel_speed:off@1s+1s", "--fail", "shock:off@1s+1s"]
    assert cli.main(["run", "car-loop", *failures]) == 0
    assert given == failures

    orders = Orders("car-loop", 40)  # and now what `tether run` would have started
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert cli.main(["actor", "--learner", orders.link.address, "--spool", "spool", *given]) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    orders.link.close()
    said = capsys.readouterr().err
    assert "wheel_speed:off@1s+1s shock:off@1s+1s" in said and "spool has room for 99." in said
    for name in ("wheel_speed", "shock", "pose"):
        stamps = {round(r.time, 1): r.reading.stamps[name] for r in orders.records if r.action is not None}
        off = {stamp for time, stamp in stamps.items() if 1.15 < time < 1.95}
        assert len(off) == (8 if name == "pose" else 1), name
        assert len({stamp for time, stamp in stamps.items() if 2.15 < time < 2.95}) == 8
