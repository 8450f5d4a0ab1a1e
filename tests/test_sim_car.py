"""The car's twin: its numbers against their sources, how it drives, what its sensors say, what walls do."""

from __future__ import annotations

import math
import time
from contextlib import closing

import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco")

from tether.drivers.base import Channel, DriverError, Twin  # noqa: E402
from tether.sim import car, render  # noqa: E402
from tether.sim.car import COMMAND, CarTwin  # noqa: E402
from tether.sim.twin import JITTER_S, Sensor, World  # noqa: E402

# What the sources say (systems.md 1.2-1.3, hardware.md 3.1): the model file is held against these.
MASS_KG = 4.66  # RACER: chassis 3.85, wheels 0.1 (FastRLAP counts the wheels twice)
WHEEL_MASS_KG = 0.1  # RACER
WHEELBASE_M = 0.2965  # FastRLAP: 0.1385 in front of the origin + 0.158 behind
FRONT_M, REAR_M = 0.1385, 0.158
TRACK_M = 0.23  # FastRLAP
STEERING_RAD = 0.38  # FastRLAP: virtual steering joint
STEERING_KP = 25.0  # N m/rad, FastRLAP
SERVO_NM, SERVO_DAMPING = 2.0, 0.4  # standard 20 kg cm servo, 5 rad/s at the wheels (own estimate)
SPRING_N_PER_M, SPRING_NS_PER_M, SPRING_TRAVEL_M = 1000.0, 50.0, 0.02  # RACER
MOTOR_N = 50.0  # FastRLAP: throttle force range
MOTOR_MPS = 9.5  # VESC: ERPM limit 40 000 at 4200 ERPM per m/s
FRICTION = 0.9  # rubber on a hard floor, 0.8-1.0
CENTRE_OF_GRAVITY_M = 0.0625  # height; the car tips beyond track / 2 / height = 1.8 g and slides at 0.9 g
WIDTH_M, LENGTH_M = 0.28, 0.44  # over the bumpers

ROOM = np.array([[-5.0, -5.0], [5.0, -5.0], [5.0, 5.0], [-5.0, 5.0]])


def twin(walls=(), start=(0.0, 0.0, 0.0), **options) -> CarTwin:
    robot = CarTwin(walls=walls, start=start, **options)
    robot.open()
    return robot


def drive(robot: CarTwin, speed: float, steering: float, seconds: float) -> list[dict[str, float]]:
    """Truths every 20 ms of holding one command."""
    robot.write(np.array([speed, steering]))
    truths = []
    for _ in range(round(seconds / 0.02)):
        robot.sleep(0.02)
        truths.append(robot.truth())
    return truths


def radius(robot: CarTwin) -> float:
    data = robot.world.data
    return float(np.hypot(*data.qvel[:2]) / abs(data.qvel[5]))


# --- the model against its sources


def test_compiled_model_has_the_numbers_of_the_sources():
    m = car.build([])
    wheel = {w: m.body(f"wheel_{w}") for w in ("fl", "fr", "rl", "rr")}
    assert m.body_mass.sum() == pytest.approx(MASS_KG, abs=1e-6)
    for body in wheel.values():
        assert float(body.mass[0]) == WHEEL_MASS_KG
    assert wheel["fl"].pos[0] == FRONT_M and wheel["rl"].pos[0] == -REAR_M
    assert pytest.approx(WHEELBASE_M) == FRONT_M + REAR_M
    assert wheel["fl"].pos[1] - wheel["fr"].pos[1] == pytest.approx(TRACK_M)
    assert m.body("chassis").pos[2] == car.WHEEL_RADIUS_M
    assert m.geom("tyre_fl").size[0] == m.geom("tyre_fl").size[2] == car.WHEEL_RADIUS_M
    for w in wheel:
        spring = m.joint(f"spring_{w}")
        dof = int(spring.dofadr[0])
        assert float(m.jnt_stiffness.reshape(m.njnt, -1)[spring.id, 0]) == SPRING_N_PER_M
        assert float(m.dof_damping.reshape(m.nv, -1)[dof, 0]) == SPRING_NS_PER_M
        assert spring.range.tolist() == [-SPRING_TRAVEL_M, SPRING_TRAVEL_M]
    servo, motor = m.actuator("servo"), m.actuator("motor")
    assert servo.ctrlrange.tolist() == [-STEERING_RAD, STEERING_RAD]
    assert servo.gainprm[0] == STEERING_KP
    assert servo.forcerange[1] == SERVO_NM
    assert m.dof_damping[int(m.joint("servo").dofadr[0])] == SERVO_DAMPING
    assert motor.forcerange.tolist() == [-MOTOR_N, MOTOR_N]
    assert motor.ctrlrange[1] == MOTOR_MPS
    assert m.tendon_num[0] == 4 and m.wrap_prm[:4] == pytest.approx(car.WHEEL_RADIUS_M / 4)
    assert m.pair_friction[:, :2] == pytest.approx(FRICTION)
    data = mujoco.MjData(m)
    mujoco.mj_forward(m, data)
    chassis = m.body("chassis").id
    assert data.xipos[chassis, 2] == pytest.approx(CENTRE_OF_GRAVITY_M, abs=0.002)
    left, front = m.geom("bumper_left"), m.geom("bumper_front")
    assert 2 * (left.pos[1] + left.size[0]) == pytest.approx(WIDTH_M)
    assert 2 * (front.pos[0] + front.size[0]) == pytest.approx(LENGTH_M)


def test_walls_are_as_hard_as_the_bumpers_and_meet_nothing_else():
    m = car.build([ROOM])
    walls, bumper = np.flatnonzero(m.geom_contype == 2), m.geom("bumper_left")
    assert len(walls) == 4 and (m.geom_type[walls] == mujoco.mjtGeom.mjGEOM_BOX).all()
    assert (m.geom_conaffinity[walls] == 0).all() and bumper.conaffinity[0] & 2
    for numbers in ("solref", "solimp", "friction"):
        assert (getattr(m, f"geom_{numbers}")[walls] == getattr(bumper, numbers)).all()


def test_steering_follows_ackermann():
    m = car.build([])
    c = TRACK_M / (2 * WHEELBASE_M)
    fourth = c**3 - c / 3
    expected = {"knuckle_fl": (0, 1, c, c * c, fourth), "knuckle_fr": (0, 1, -c, c * c, -fourth)}
    for row, joint in zip(m.eq_data, m.eq_obj1id, strict=True):
        assert row[:5] == pytest.approx(expected[m.joint(joint).name], abs=1e-4)
    robot = twin(noise=False)
    drive(robot, 0.5, 0.38, 1.0)
    for name, sign in (("fl", -1), ("fr", 1)):
        angle = float(robot.world.data.qpos[m.joint(f"knuckle_{name}").qposadr[0]])
        exact = math.atan(WHEELBASE_M / (WHEELBASE_M / math.tan(0.38) + sign * TRACK_M / 2))
        assert angle == pytest.approx(exact, abs=0.02)


def test_model_file_is_small_and_has_no_meshes():
    text = car.MODEL.read_bytes()
    assert len(text) <= 15_000
    assert b"mesh" not in text.replace(b"meshes", b"")


def test_declaration_fits_the_model():
    assert COMMAND.high[1] == COMMAND.action_high[1] == STEERING_RAD
    assert COMMAND.rate[0] == car.MOTOR_MPS2
    assert set(car.SENSORS) == {c.name for c in car.CHANNELS}
    assert isinstance(twin(), Twin)


# --- driving


@pytest.mark.parametrize("speed", [1.0, 2.5, 4.5, -1.5])
def test_reaches_the_commanded_speed_and_keeps_straight(speed):
    robot = twin()
    last = drive(robot, speed, 0.0, 2.5)[-1]
    assert last["speed"] == pytest.approx(speed, rel=0.03)
    assert abs(last["y"]) < 0.02 and abs(last["heading"]) < 0.01


def test_motor_ramps_its_setpoint_and_brakes():
    robot = twin()
    truths = drive(robot, 4.5, 0.0, 0.4)
    assert max(b["speed"] - a["speed"] for a, b in zip(truths, truths[1:], strict=False)) / 0.02 < 9.5
    assert truths[-1]["speed"] < 9.0 * 0.4 + 0.1
    drive(robot, 4.5, 0.0, 1.5)
    before = robot.truth()
    robot.stop()
    robot.sleep(1.0)
    after = robot.truth()
    assert abs(after["speed"]) < 0.05
    # v^2 / (2 mu g): tyres at their limit, not coasting and not a wall
    assert 0.9 < (after["x"] - before["x"]) / (before["speed"] ** 2 / (2 * FRICTION * 9.81)) < 1.2
    robot.stop()  # idempotent


def test_turns_on_its_smallest_circle():
    robot = twin()
    drive(robot, 0.5, STEERING_RAD, 3.0)
    assert radius(robot) == pytest.approx(WHEELBASE_M / math.tan(STEERING_RAD), rel=0.1)
    assert robot.world.data.qvel[5] > 0  # positive steering turns left
    robot.place((0.0, 0.0, 0.0))
    drive(robot, -0.8, STEERING_RAD, 3.0)
    assert robot.world.data.qvel[5] < 0
    assert radius(robot) == pytest.approx(WHEELBASE_M / math.tan(STEERING_RAD), rel=0.1)


@pytest.mark.parametrize("steering", [0.38, -0.38])
def test_slides_before_it_tips(steering):
    robot = twin(noise=False)
    drive(robot, 4.5, 0.0, 1.5)
    grip = []
    robot.write(np.array([4.5, steering]))
    for _ in range(20):
        robot.sleep(0.1)
        assert robot.truth()["upright"] > 0.95
        grip.append(float(np.hypot(*robot.read().values["accel"][:2])))
    limit = FRICTION * 9.81
    assert 0.85 * limit < np.median(grip[-10:]) < 1.05 * limit
    assert radius(robot) > 2 * WHEELBASE_M / math.tan(0.38)  # it slides: wider than its wheels point
    # and by geometry: it would tip at half its track over the height of its centre of gravity
    assert TRACK_M / 2 / CENTRE_OF_GRAVITY_M > 1.5 * FRICTION


def test_takes_bends_smoothly_up_to_its_grip():
    robot = twin(noise=False)
    for speed, steering in ((2.0, 0.28), (2.5, 0.2), (3.0, 0.15)):  # 3.8-4.4 m/s^2: below the limit
        robot.place((0.0, 0.0, 0.0))
        drive(robot, speed, steering, 3.0)
        turning = [robot.world.data.qvel[5] for t in drive(robot, speed, steering, 1.0)]
        assert np.ptp(turning) < 0.05 * np.mean(turning)
        assert radius(robot) == pytest.approx(WHEELBASE_M / math.tan(steering), rel=0.12)


def test_finer_steps_change_nothing():
    ends = []
    for dt in (0.0025, 0.0005):
        robot = CarTwin(noise=False)
        robot.world.model.opt.timestep = dt
        robot.world = World(
            robot.world.model, [Sensor(c) for c in car.CHANNELS], robot._control, robot._measure, lambda: None
        )
        robot.place((0.0, 0.0, 0.0))
        robot.open()
        drive(robot, 3.0, 0.1, 1.0)
        ends.append(drive(robot, 3.0, -0.3, 1.0)[-1])
    for key, tolerance in (("x", 0.05), ("y", 0.05), ("heading", 0.05), ("speed", 0.05)):
        assert ends[0][key] == pytest.approx(ends[1][key], abs=tolerance)


# --- clock


def test_sleep_adds_up_without_error():
    robot = twin()
    for _ in range(100):
        robot.sleep(0.06)
    assert robot.now() == pytest.approx(6.0, abs=1e-9)
    for _ in range(300):
        robot.sleep(1 / 30)  # not a whole number of steps
    assert robot.now() == pytest.approx(16.0, abs=1e-3)
    robot.sleep(-1.0)
    robot.sleep(0.0)
    assert robot.now() == pytest.approx(16.0, abs=1e-3)
    assert robot.world.data.time == pytest.approx(robot.now(), abs=1e-6)


def test_in_real_time_sleep_lasts_and_the_clock_runs_on():
    robot = twin(realtime=True)
    robot.sleep(0.0)
    began, start = time.monotonic(), robot.now()
    robot.sleep(0.05)
    assert time.monotonic() - began >= 0.05
    time.sleep(0.02)  # somebody is busy
    assert robot.now() - start == pytest.approx(time.monotonic() - began, abs=0.01)
    stamps = robot.read().stamps
    assert all(stamp <= robot.now() for stamp in stamps.values())


# --- sensors


def test_readings_have_their_shapes_and_a_due_age_at_any_time():
    robot = twin(start=(1.0, 2.0, 0.5))
    robot.write(np.array([1.0, 0.1]))
    rng = np.random.default_rng(0)
    for k in range(200):
        if k == 100:
            robot.place((0.0, 0.0, 0.0))
        reading, now = robot.read(), robot.now()
        assert set(reading.values) == set(reading.stamps) == {c.name for c in car.CHANNELS}
        for c in car.CHANNELS:
            value = reading.values[c.name]
            assert value.shape == (c.size,) and value.dtype == np.float32 and np.isfinite(value).all()
            age = now - reading.stamps[c.name]
            assert c.latency_s - 1e-9 <= age <= c.latency_s + 1 / c.hz + JITTER_S + 1e-9, c.name
        robot.sleep(float(rng.uniform(0.005, 0.1)))


def test_channels_are_sampled_at_their_rates():
    robot = twin()
    stamps: dict[str, set[float]] = {c.name: set() for c in car.CHANNELS}
    for _ in range(800):
        robot.sleep(0.0025)
        for name, stamp in robot.read().stamps.items():
            stamps[name].add(stamp)
    for c in car.CHANNELS:
        assert len(stamps[c.name]) == pytest.approx(2.0 * c.hz, rel=0.06), c.name


def test_a_value_is_what_was_true_at_its_stamp():
    robot = twin(noise=False)
    robot.write(np.array([2.0, 0.2]))
    history = {}
    for _ in range(300):
        robot.sleep(0.01)
        truth = robot.truth()
        history[round(robot.now(), 4)] = truth
    reading = robot.read()
    at = history[round(reading.stamps["pose"], 4)]
    x, y, c, s = reading.values["pose"]
    assert (x, y) == pytest.approx((at["x"], at["y"]), abs=1e-5)
    assert math.atan2(s, c) == pytest.approx(math.remainder(at["heading"], 2 * math.pi), abs=1e-5)
    at = history[round(reading.stamps["velocity"], 4)]
    assert reading.values["velocity"][0] == pytest.approx(at["speed"], abs=1e-5)
    assert reading.values["wheel_speed"][0] == pytest.approx(2.0, abs=0.1)
    assert reading.values["steering"][0] == pytest.approx(0.2, abs=0.01)
    assert reading.values["gyro"][2] == pytest.approx(float(robot.world.data.qvel[5]), rel=0.05)
    assert reading.values["accel"][1] > 0.5  # turning left pushes left
    assert reading.values["accel"][2] == pytest.approx(9.81, abs=0.3)


def test_accel_is_a_mean_and_shock_a_peak_since_the_last_read():
    robot = twin(walls=[ROOM], start=(3.5, 0.0, 0.0), noise=False)
    robot.write(np.array([2.0, 0.0]))
    robot.sleep(2.0)
    first = robot.read()
    assert first.values["shock"][0] > 20.0  # remembered though it happened long ago
    assert np.abs(first.values["accel"][:2]).max() < 5.0
    robot.sleep(0.2)
    assert robot.read().values["shock"][0] < 10.0  # pushing is not hitting


def test_noise_has_the_declared_size():
    robot = twin(seed=3)
    robot.write(np.zeros(2))
    samples: dict[str, list[np.ndarray]] = {c.name: [] for c in car.CHANNELS}
    for _ in range(400):
        robot.sleep(0.02)
        for name, value in robot.read().values.items():
            samples[name].append(value)
    for name, (noise, combine) in car.SENSORS.items():
        spread = np.std(np.array(samples[name]), axis=0)
        expected = noise / math.sqrt(2) if combine == "mean" else noise  # two IMU samples a read
        if combine != "max":
            assert spread == pytest.approx(expected, rel=0.2), name
    assert abs(np.mean(samples["accel"], axis=0)[2] - 9.81) < 0.1


def test_same_seed_same_readings():
    def run(seed: int) -> np.ndarray:
        robot = twin(walls=[ROOM], seed=seed)
        out = []
        for k in range(40):
            robot.write(np.array([3.0, 0.3 * math.sin(k / 3)]))
            robot.sleep(0.1)
            reading = robot.read()
            out.append(np.concatenate([*reading.values.values(), list(reading.stamps.values())]))
        return np.array(out)

    assert np.array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))


def test_unread_sensors_keep_bounded_history():
    robot = twin()
    robot.sleep(10.0)
    assert all(len(b._waiting) <= 2.0 / 0.01 + 1 for b in robot.world._sensors)
    reading = robot.read()
    assert robot.now() - reading.stamps["accel"] < 0.06


# --- the verbs


def test_place_can_be_read_at_once_and_again():
    robot = twin(noise=False)
    drive(robot, 3.0, 0.3, 1.0)
    now = robot.now()
    robot.place((-2.0, 1.5, 2.0))
    assert robot.now() == now
    reading, truth = robot.read(), robot.truth()
    x, y, c, s = reading.values["pose"]
    assert (x, y, math.atan2(s, c)) == pytest.approx((-2.0, 1.5, 2.0), abs=1e-5)
    assert (truth["x"], truth["y"], truth["heading"]) == pytest.approx((-2.0, 1.5, 2.0), abs=1e-6)
    assert reading.values["accel"] == pytest.approx([0.0, 0.0, 9.81], abs=1e-4)
    assert reading.values["velocity"] == pytest.approx([0.0, 0.0], abs=1e-6)
    reading.values["pose"][:] = 99.0  # a copy
    robot.place((-2.0, 1.5, 2.0))
    robot.sleep(0.5)  # it stands: nothing of the old command is left
    assert robot.read().values["pose"][:2] == pytest.approx([-2.0, 1.5], abs=0.005)
    assert abs(robot.truth()["speed"]) < 0.01


def test_verbs_in_the_wrong_state_and_nonsense_are_refused():
    robot = CarTwin()
    with pytest.raises(DriverError, match="open"):
        robot.read()
    with pytest.raises(DriverError, match="open"):
        robot.write(np.zeros(2))
    robot.stop()
    robot.open()
    for bad in (np.zeros(3), np.array([np.nan, 0.0]), np.array([0.0, np.inf]), np.zeros((1, 2))):
        with pytest.raises(DriverError, match="command"):
            robot.write(bad)
    robot.write(np.array([100.0, -9.0]))
    robot.sleep(2.0)
    assert robot.truth()["speed"] < 4.6
    assert robot.world.data.ctrl.tolist() == [4.5, -0.38]
    robot.close()
    robot.close()
    with pytest.raises(DriverError, match="open"):
        robot.read()


def test_a_channel_that_does_not_fit_the_steps_is_refused():
    odd = Sensor(Channel("odd", 1, "m", 30.0, 0.0, (1.0,)))
    with pytest.raises(ValueError, match="30"):
        World(car.build([]), [odd], lambda dt: None, dict, lambda: None)


def test_failed_physics_is_a_driver_error():
    robot = twin()
    robot.world.data.qvel[0] = np.nan
    with pytest.raises(DriverError, match="physics"):
        robot.sleep(0.1)
    robot.place((0.0, 0.0, 0.0))
    robot.sleep(0.1)
    assert np.isfinite(robot.read().values["pose"]).all()


# --- walls


def test_hitting_a_wall_is_a_shock_and_hard_driving_is_not():
    robot = twin(walls=[ROOM], start=(3.5, 0.0, 0.0))
    robot.write(np.array([2.0, 0.0]))
    robot.sleep(1.5)
    assert robot.truth()["contacts"] == 1.0
    assert robot.read().values["shock"][0] > 20.0

    robot = twin(seed=1)
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(300):  # speed and steering as fast as the gate lets them change
        robot.write(np.array([rng.uniform(1.0, 3.0), rng.choice([-0.38, 0.0, 0.38])]))
        robot.sleep(0.1)
        worst = max(worst, float(robot.read().values["shock"][0]))
        assert robot.truth()["upright"] > 0.95
    assert worst < 13.0


@pytest.mark.parametrize("heading", [0.0, 0.4, 0.8, 1.3])
def test_walls_hold_at_full_speed(heading):
    robot = twin(walls=[ROOM], start=(1.0, -2.0, heading))
    truths = drive(robot, 4.5, 0.0, 4.0)
    assert max(max(abs(t["x"]), abs(t["y"])) for t in truths) < 5.0 - WIDTH_M / 2 + 0.03
    assert truths[-1]["contacts"] >= 1
    assert min(t["upright"] for t in truths) > 0.8  # it does not climb
    back = drive(robot, -1.0, 0.0, 2.0)
    assert back[-1]["speed"] < -0.5 and back[-1]["touching"] == 0.0  # and comes free again


def test_walls_give_back_no_energy():
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    ring = 3.0 * np.column_stack([np.cos(angles), np.sin(angles)])
    robot = twin(walls=[ring], noise=False)
    data, rng = robot.world.data, np.random.default_rng(0)
    for _ in range(400):  # thrown at the wall at 4 m/s from close by, at any angle
        where = rng.uniform(0, 2 * np.pi)
        robot.place((2.65 * math.cos(where), 2.65 * math.sin(where), where + rng.uniform(-1.4, 1.4)))
        heading = robot.truth()["heading"] + rng.normal(0.0, 0.15)
        data.qvel[:2] = 4.0 * math.cos(heading), 4.0 * math.sin(heading)
        data.qvel[robot._hubs] = 4.0 / car.WHEEL_RADIUS_M
        robot.write(np.array([4.5, 0.0]))
        robot.sleep(0.1)
        truth = robot.truth()
        assert truth["touching"] or truth["contacts"]
        assert np.hypot(*data.qvel[:2]) < 4.3 and abs(data.qvel[5]) < 15.0
        assert data.qpos[2] < 0.08 and truth["upright"] > 0.9
        assert math.hypot(truth["x"], truth["y"]) < 2.9


def test_the_wall_face_is_where_the_polyline_is():
    robot = twin(walls=[ROOM], start=(3.0, 0.0, 0.0), noise=False)
    last = drive(robot, 0.5, 0.0, 5.0)[-1]
    assert last["x"] == pytest.approx(5.0 - LENGTH_M / 2, abs=0.01)
    island = np.array([[1.0, 1.0], [2.0, 1.0], [2.0, -1.0], [1.0, -1.0]])  # clockwise: free outside
    robot = twin(walls=[ROOM, island], noise=False)
    last = drive(robot, 0.5, 0.0, 4.0)[-1]
    assert last["x"] == pytest.approx(1.0 - LENGTH_M / 2, abs=0.01)


def test_contacts_are_counted_once_per_touch():
    robot = twin(walls=[ROOM], start=(4.0, 0.0, 0.0))
    drive(robot, 0.8, 0.0, 3.0)  # pushing all the time is one
    assert robot.truth()["contacts"] == 1.0 and robot.truth()["touching"] == 1.0
    drive(robot, -0.8, 0.0, 1.5)
    assert robot.truth()["touching"] == 0.0
    drive(robot, 0.8, 0.0, 3.0)
    assert robot.truth()["contacts"] == 2.0
    robot.place((0.0, 0.0, 0.0))
    assert robot.truth()["contacts"] == 2.0 and robot.truth()["touching"] == 0.0


def test_slides_along_a_wall_of_many_segments():
    angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    ring = 3.0 * np.column_stack([np.cos(angles), np.sin(angles)])
    robot = twin(walls=[ring], start=(2.5, 0.0, math.pi / 2))
    drive(robot, 2.0, 0.0, 1.0)
    truths = drive(robot, 2.0, 0.05, 4.0)
    assert min(t["speed"] for t in truths) > 1.0  # joints between segments do not stop it
    assert max(math.hypot(t["x"], t["y"]) for t in truths) < 3.0


def test_on_its_roof_is_seen_by_the_accelerometer():
    robot = twin()
    qpos = robot.world.model.qpos0.copy()
    qpos[2:7] = 0.25, math.cos(1.4), math.sin(1.4), 0.0, 0.0  # dropped from 160 degrees of roll
    robot.world.settle(qpos)
    drive(robot, 2.0, 0.3, 3.0)
    robot.read()
    robot.sleep(0.3)
    assert robot.read().values["accel"][2] < -8.0
    assert robot.truth()["upright"] < -0.9
    robot.place((0.0, 0.0, 0.0))
    robot.sleep(0.3)
    assert robot.read().values["accel"][2] > 8.0 and robot.truth()["upright"] > 0.99


def test_wall_boxes_meet_and_stay_off_the_free_side():
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    r = 7 + 2 * np.sin(3 * angles) + 0.8 * np.cos(4 * angles)
    loop = np.column_stack([r * np.cos(angles), r * np.sin(angles)])
    boxes = car.wall_boxes(loop)
    inner = 0.97 * loop  # on the free side; ~20 cm from the wall
    for point in inner:
        assert all(_depth(point, box) < 0 for box in boxes)
    behind = loop * (1 + 0.025 / np.hypot(*loop.T))[:, None]  # half a wall behind: no gaps
    assert sum(any(_depth(p, box) > 0 for box in boxes) for p in behind) > 0.97 * len(behind)


def _depth(point: np.ndarray, box: tuple[tuple[float, float], float, float]) -> float:
    centre, half, angle = box
    d = point - np.array(centre)
    c, s = math.cos(angle), math.sin(angle)
    return min(half - abs(c * d[0] + s * d[1]), car.WALL_THICKNESS_M / 2 - abs(c * d[1] - s * d[0]))


# --- pictures


def camera(robot: CarTwin, *options) -> render.Camera:
    try:
        return render.Camera(robot.world, *options)
    except DriverError as error:
        assert "EGL" in str(error)
        pytest.skip(str(error))


def test_frames_show_the_car_from_every_camera():
    robot = twin(walls=[ROOM])
    pictures = {}
    for name in ("chase", "top", "onboard"):
        with closing(camera(robot, 96, 64, name)) as eye:
            pictures[name] = eye.frame()
    for picture in pictures.values():
        assert picture.shape == (64, 96, 3) and picture.dtype == np.uint8 and picture.std() > 5
    blue = pictures["chase"].astype(int)
    assert ((blue[..., 2] - blue[..., 0]) > 60).any()  # the car is in the picture


def test_an_unknown_camera_is_refused_with_those_there_are():
    with pytest.raises(KeyError, match="nose.*chase.*onboard.*top"):
        render.Camera(twin().world, 96, 64, "nose")


def test_rendering_changes_nothing():
    ends = []
    for look in (False, True):
        robot = twin(walls=[ROOM], seed=5)
        with closing(camera(robot, 32, 32)) as eye:
            for _ in range(10):
                robot.write(np.array([2.0, 0.3]))
                robot.sleep(0.1)
                if look:
                    eye.frame()
        ends.append(robot.read().values["pose"])
    assert np.array_equal(*ends)


def test_viewer_without_a_display_says_so(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(DriverError, match="display"):
        render.view(twin())
