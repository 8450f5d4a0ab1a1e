"""The quadruped's twin: its numbers against their sources, how it stands, falls and is stopped, its ground, and what
the estimator makes of its sensors."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco")

from tether.drivers import leg_odometry  # noqa: E402
from tether.drivers.base import DriverError, Twin  # noqa: E402
from tether.drivers.leg_odometry import LegOdometry  # noqa: E402
from tether.drivers.quadruped import (  # noqa: E402
    ABDUCTION_M,
    CALF_M,
    CHANNELS,
    COMMAND,
    FOLDED,
    FOOT_RADIUS_M,
    HIP_X_M,
    HIP_Y_M,
    JOINTS,
    KD,
    KP,
    LEGS,
    NOMINAL,
    THIGH_M,
    TORQUE_NM,
)  # fmt: skip
from tether.robot_env.fit import check_twin  # noqa: E402
from tether.robot_env.task import TaskError  # noqa: E402
from tether.sim import quadruped  # noqa: E402
from tether.sim.quadruped import QuadrupedTwin  # noqa: E402
from tether.sim.twin import JITTER_S  # noqa: E402

# Unitree's Go1 (unitree_ros, BSD-3): kg, m, kg m^2 about the principal axes
MASS_KG = 12.744  # hardware.md 3.2: 12.743
TRUNK = (5.204, (0.0223, 0.002, -0.0005), (0.0168101, 0.0630105, 0.0716565))
PARTS = {  # mass, how far out the centre of mass is, in the leg's own directions (forward, outward, up), inertia
    "hip": (0.68, (-0.005, -0.0076, 0.0), (0.0004, 0.00073, 0.00047)),
    "thigh": (1.009, (-0.003, -0.019, -0.0305), (0.0048, 0.0046, 0.0007)),
    "calf": (0.196, (0.0043, 0.0, -0.146), (0.0015, 0.0015, 0.000036)),
}
ARMATURE, DAMPING, FRICTION_LOSS, FOOT_FRICTION = 0.01, 0.01, 0.2, 0.8
SIZE_M = (0.3762, 0.0935, 0.114)  # of the trunk


def twin(**options) -> QuadrupedTwin:
    robot = QuadrupedTwin(**options)
    robot.open()
    return robot


def trot(t: float, hz: float = 2.88, swing: float = 0.27) -> np.ndarray:
    """Joint angles of a crude trot, found by trying: diagonal legs swing forward in turn with the calf drawn up."""
    legs = np.array(NOMINAL).reshape(4, 3).copy()
    for leg, phase in enumerate((0.0, math.pi, math.pi, 0.0)):
        angle = 2 * math.pi * hz * t + phase
        lift = max(0.0, -math.sin(angle))
        legs[leg, 1] += 0.13 - swing * math.cos(angle) + 0.39 * lift
        legs[leg, 2] += 0.12 - 0.78 * lift
    return legs.ravel()


def walk(robot: QuadrupedTwin, seconds: float) -> list[dict[str, float]]:
    """Truths every 50 ms."""
    truths, start = [], robot.now()
    for _ in range(round(seconds / 0.05)):
        robot.write(trot(robot.now() - start))
        robot.sleep(0.05)
        truths.append(robot.truth())
    return truths


def hold(robot: QuadrupedTwin, pose, seconds: float) -> None:
    robot.write(np.array(pose))
    robot.sleep(seconds)


def lying(robot: QuadrupedTwin, roll: float) -> None:
    """Dropped from 0.3 m, rolled by so much, its motors limp."""
    qpos = np.concatenate([[0.0, 0.0, 0.3, math.cos(roll / 2), math.sin(roll / 2), 0.0, 0.0], FOLDED])
    robot.stop()
    robot.settle(qpos)
    robot.sleep(2.0)


# --- the model against its sources


def test_compiled_model_has_the_numbers_of_the_sources():
    m = quadruped.build()
    robot = QuadrupedTwin()
    assert robot.world.model.body_mass.sum() == pytest.approx(MASS_KG, abs=1e-6)
    trunk = m.body("trunk")
    assert (trunk.mass[0], tuple(trunk.ipos), tuple(trunk.inertia)) == TRUNK
    assert tuple(2 * m.geom("trunk").size) == pytest.approx(SIZE_M)
    places = {"hip": (HIP_X_M, HIP_Y_M, 0.0), "thigh": (0.0, ABDUCTION_M, 0.0), "calf": (0.0, 0.0, -THIGH_M)}
    for leg in LEGS:
        front, left = 1 if leg[0] == "F" else -1, 1 if leg[1] == "L" else -1
        for part, (mass, centre, inertia) in PARTS.items():
            body = m.body(f"{leg}_{part}")
            along = front if part == "hip" else 1
            assert body.mass[0] == mass and tuple(body.inertia) == inertia
            assert tuple(body.ipos) == (along * centre[0], left * centre[1], centre[2])
            x, y, z = places[part]
            assert tuple(body.pos) == (front * x, left * y, z)
        foot = m.geom(f"{leg}_foot")
        assert tuple(foot.pos) == (0.0, 0.0, -CALF_M) and foot.size[0] == FOOT_RADIUS_M
        assert foot.friction[0] == FOOT_FRICTION
    assert m.geom("floor").friction[0] == 0.0  # MuJoCo takes the larger of two


def test_joints_and_motors_are_the_declared_ones_in_their_order():
    m = quadruped.build()
    assert [m.joint(i + 1).name for i in range(12)] == [m.actuator(i).name for i in range(12)] == list(JOINTS)
    assert [m.sensor(i).name for i in range(4)] == [f"{leg}_foot" for leg in LEGS]
    assert m.jnt_range[1:, 0].tolist() == list(COMMAND.low) and m.jnt_range[1:, 1].tolist() == list(COMMAND.high)
    assert (m.dof_armature[6:] == ARMATURE).all() and (m.dof_frictionloss[6:] == FRICTION_LOSS).all()
    assert (np.reshape(m.dof_damping, (m.nv, -1))[6:, 0] == DAMPING).all()
    assert (m.actuator_gainprm[:, 0] == KP).all()
    assert (m.actuator_biasprm[:, 1] == -KP).all() and (m.actuator_biasprm[:, 2] == -KD).all()
    assert m.actuator_forcerange[:, 1].tolist() == list(TORQUE_NM * 4)
    assert (m.actuator_forcerange[:, 0] == -m.actuator_forcerange[:, 1]).all()
    assert m.opt.timestep == 0.002


def test_model_file_is_small_and_has_no_meshes():
    text = quadruped.MODEL.read_bytes()
    assert len(text) <= 15_000
    assert b"mesh" not in text


def test_declaration_fits_the_twin():
    low, high = np.array(COMMAND.action_low), np.array(COMMAND.action_high)
    assert (np.array(COMMAND.low) <= low).all() and (high <= COMMAND.high).all()
    assert COMMAND.to_command(np.zeros(12)) == pytest.approx(NOMINAL)
    assert set(quadruped.NOISE) == set(quadruped.WRONG) == {c.name for c in CHANNELS}
    assert isinstance(QuadrupedTwin(), Twin)


# --- standing, walking, falling


def test_stands_in_the_nominal_pose_and_yields_a_little():
    robot = twin(noise=False)
    truth, before = robot.truth(), robot.read().values["foot_force"]
    assert truth["height"] == pytest.approx(0.29, abs=0.01) and truth["upright"] > 0.999
    robot.sleep(2.0)
    assert robot.truth()["height"] == pytest.approx(truth["height"], abs=0.002)
    reading = robot.read().values
    sag = (np.array(NOMINAL) - reading["joint_position"]).reshape(4, 3)
    # a calf holds a quarter of the weight, the foot 0.213 m sin(0.8) behind the knee: 31 N x 0.15 m / (20 N m/rad)
    assert sag[:, 2] == pytest.approx(0.24, abs=0.03) and np.abs(sag[:, :2]).max() < 0.05
    assert reading["foot_force"].sum() == pytest.approx(MASS_KG * 9.81, rel=0.02)
    assert reading["foot_force"].min() > 20.0
    assert robot.read().values["foot_force"] == pytest.approx(before, abs=2.0)
    assert reading["gravity"] == pytest.approx([0.0, 0.0, -1.0], abs=0.01)
    assert np.abs(reading["joint_velocity"]).max() < 0.01


@pytest.mark.parametrize("push", [-0.5, 0.5])
def test_the_nominal_pose_holds_against_a_push(push):
    robot = twin(noise=False)
    robot.world.data.qvel[0] = push
    robot.sleep(2.0)
    assert robot.truth()["upright"] > 0.99 and robot.truth()["height"] > 0.28


@pytest.mark.parametrize("payload_kg, height", [(0.0, 0.28), (3.0, 0.26)])
def test_lies_down_and_rises_level(payload_kg, height):
    robot = twin(payload_kg=payload_kg)
    hold(robot, FOLDED, 1.0)
    assert robot.truth()["height"] < 0.12 and robot.truth()["upright"] > 0.99
    for part in np.linspace(0.0, 1.0, 20):
        hold(robot, (1 - part) * np.array(FOLDED) + part * np.array(NOMINAL), 0.05)
    robot.sleep(1.0)
    assert robot.truth()["height"] > height and robot.truth()["upright"] > 0.995


def test_a_crude_trot_walks():
    truths = walk(twin(), 5.0)
    assert truths[-1]["x"] > 1.0 and min(t["upright"] for t in truths) > 0.9
    assert truths[-1]["contacts"] == 0.0


@pytest.mark.parametrize("roll", [math.pi, 1.8, -1.8])
def test_it_can_lie_on_its_back_and_sides(roll):
    robot = twin(noise=False)
    lying(robot, roll)
    truth = robot.truth()
    assert truth["upright"] < 0.3 and truth["contacts"] == 1.0 and truth["touching"] == 1.0
    assert np.abs(robot.world.data.qvel).max() < 0.5
    assert robot.world.data.qpos[2] > 0.04  # nothing sank in
    assert robot.read().values["gravity"] == pytest.approx(-robot._rotation()[2], abs=0.02)


def test_falls_are_counted_once_each():
    robot = twin()
    lying(robot, 1.8)
    lying_again = robot.truth()["contacts"]
    robot.sleep(3.0)
    assert robot.truth()["contacts"] == lying_again == 1.0
    robot.place((0.0, 0.0, 0.0))
    robot.sleep(1.0)
    assert robot.truth()["contacts"] == 1.0 and robot.truth()["touching"] == 0.0
    lying(robot, -1.8)
    assert robot.truth()["contacts"] == 2.0


def test_no_leg_can_reach_the_trunk():
    m = quadruped.build()
    data, rng = mujoco.MjData(m), np.random.default_rng(0)
    trunk = m.geom("trunk").id
    parts = [m.geom(f"{leg}_{part}").id for leg in LEGS for part in ("thigh", "calf", "foot")]
    nearest = 1.0
    for _ in range(200):
        data.qpos[:7], data.qpos[7:] = (0, 0, 0, 1, 0, 0, 0), rng.uniform(COMMAND.low, COMMAND.high)
        mujoco.mj_kinematics(m, data)
        nearest = min(nearest, *(mujoco.mj_geomDistance(m, data, trunk, part, 1.0, None) for part in parts))
    assert 0.0 < nearest < 0.1  # so the model need not let them meet


# --- motors


def test_a_command_reaches_the_motors_after_their_delay():
    robot = twin(noise=False)
    robot.sleep(0.1)
    assert robot.world.data.ctrl.tolist() == list(NOMINAL)
    robot.write(np.array(FOLDED))
    robot.sleep(quadruped.MOTOR_DELAY_S)
    assert robot.world.data.ctrl.tolist() == list(NOMINAL)
    robot.sleep(0.002)
    assert robot.world.data.ctrl.tolist() == list(FOLDED)


def test_stop_damps_until_the_next_write():
    robot = twin(noise=False)
    torque = robot.world.data.actuator_force
    robot.write(np.array(FOLDED))
    robot.stop()  # what was on its way to the motors does not come
    robot.sleep(0.1)
    speed = robot.world.data.qvel[6:]
    assert np.abs(torque + KD * speed).max() < 0.5  # no posture is held: it is all damping
    assert np.abs(speed).max() > 0.5  # and it sinks
    robot.sleep(3.0)
    assert robot.truth()["height"] < 0.1 and np.abs(speed).max() < 0.1
    hold(robot, FOLDED, 0.5)
    assert np.abs(torque).max() > 1.0


def test_torques_stay_within_the_motors():
    robot = twin(motor=0.5)
    most = 0.5 * np.array(TORQUE_NM * 4)
    rng = np.random.default_rng(0)
    for _ in range(40):
        hold(robot, rng.uniform(COMMAND.low, COMMAND.high), 0.05)
        assert (np.abs(robot.world.data.actuator_force) <= most + 1e-9).all()


def test_a_motor_that_is_off_gives_nothing():
    robot = twin(noise=False)
    robot.fail("FR_calf", "off", robot.now(), 0.5)
    robot.sleep(0.2)
    force = dict(zip(JOINTS, robot.world.data.actuator_force, strict=True))
    assert force["FR_calf"] == 0.0 and abs(force["FL_calf"]) > 1.0
    robot.sleep(0.5)
    assert robot.world.data.actuator_force[2] != 0.0
    with pytest.raises(ValueError, match="FR_calf:stuck"):
        robot.fail("FR_calf", "stuck", 0.0)


# --- sensors


def test_readings_have_their_shapes_and_a_due_age_at_any_time():
    robot, rng = twin(start=(1.0, 2.0, 0.5)), np.random.default_rng(0)
    for k in range(100):
        if k == 50:
            robot.place((0.0, 0.0, 0.0))
        reading, now = robot.read(), robot.now()
        for c in CHANNELS:
            value = reading.values[c.name]
            assert value.shape == (c.size,) and value.dtype == np.float32 and np.isfinite(value).all()
            age = now - reading.stamps[c.name]
            assert c.latency_s - 1e-9 <= age <= c.latency_s + 1 / c.hz + JITTER_S + 1e-9, c.name
        robot.write(np.array(NOMINAL))
        robot.sleep(float(rng.uniform(0.005, 0.1)))


def test_no_sample_is_like_the_one_before_not_even_after_placing():
    robot = twin()
    noisy = [c.name for c in CHANNELS if c.noisy]
    before = robot.read().values
    for _ in range(20):
        robot.sleep(0.05)
        values = robot.read().values
        assert all((values[name] != before[name]).all() for name in noisy)
        before = values


def test_noise_has_the_stated_size():
    robot = twin(seed=3)
    samples: dict[str, list[np.ndarray]] = {c.name: [] for c in CHANNELS}
    for _ in range(400):
        robot.sleep(0.02)
        for name, value in robot.read().values.items():
            samples[name].append(value)
    for name in ("gravity", "gyro", "joint_position", "joint_velocity", "foot_force"):
        spread = np.diff(samples[name], axis=0).std(axis=0) / math.sqrt(2)  # it sways slowly
        assert spread == pytest.approx(quadruped.NOISE[name], rel=0.2), name
    assert np.std(samples["velocity"]) < 0.01  # standing: the estimator smooths


def test_the_estimator_sees_what_the_channels_carry():
    robot = twin()
    seen, known = [], ("gravity", "gyro", "joint_position", "joint_velocity", "foot_force")
    again = copy.deepcopy(robot._odometry)
    update = robot._odometry.update
    robot._odometry.update = lambda dt, **samples: (seen.append(dict(samples)), update(dt, **samples))[1]
    robot.place = None  # no new start of the estimator
    walk(robot, 0.5)
    values = robot.read().values
    for name in known:
        assert any((values[name] == samples[name].astype(np.float32)).all() for samples in seen), name
    for samples in seen:
        again.update(0.01, **samples)
    assert again.velocity == robot._odometry.velocity and again.position == robot._odometry.position
    robot.fail("joint_velocity", "garbage", robot.now())  # NaN, infinity and a billion are not believed
    robot.sleep(3.5)
    velocity = robot.read().values["velocity"]
    assert np.isfinite(velocity).all() and np.abs(velocity).max() < 0.2
    robot.fail("gyro", "wrong", robot.now())
    robot.world.data.qvel[5] = 2.0
    robot.sleep(0.01)
    assert seen[-1]["gyro"][2] < -0.5  # what a failed sensor says is what it works with


def test_same_seed_same_readings():
    def run(seed: int) -> np.ndarray:
        robot = twin(seed=seed, friction=(0.5, 1.0), payload_kg=(0.0, 3.0))
        out = []
        for k in range(20):
            if k == 10:
                robot.place((0.5, 0.0, 0.3))
            robot.write(trot(robot.now()))
            robot.sleep(0.05)
            reading = robot.read()
            out.append(np.concatenate([*reading.values.values(), list(reading.stamps.values())]))
        return np.array(out)

    assert np.array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))


# --- the estimator


def test_kinematics_are_mujocos():
    m = quadruped.build()
    data, rng = mujoco.MjData(m), np.random.default_rng(0)
    for _ in range(20):
        joints = rng.uniform(COMMAND.low, COMMAND.high)
        data.qpos[:7], data.qpos[7:] = (0, 0, 0, 1, 0, 0, 0), joints
        mujoco.mj_forward(m, data)
        places = np.array([data.geom_xpos[m.geom(f"{leg}_foot").id] for leg in LEGS])
        arm, rates, jacobian = rng.normal(0.0, 0.02, 3), rng.normal(0.0, 1.0, (4, 3)), np.zeros((3, m.nv))
        for i, leg in enumerate(LEGS):
            body, of_leg = m.body(f"{leg}_calf").id, slice(6 + 3 * i, 9 + 3 * i)
            mujoco.mj_jac(m, data, jacobian, None, places[i] + arm, body)
            place, moves = leg_odometry.sole_moves(i, joints[3 * i : 3 * i + 3], rates[i], arm)
            assert place == pytest.approx(places[i] + arm, abs=1e-9)
            assert moves == pytest.approx(jacobian[:, of_leg] @ rates[i], abs=1e-9)


def estimates(robot: QuadrupedTwin, seconds: float) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Of a trot: (n, 3) estimated and true velocities in the body frame at the same moments, how far the estimated
    position is off at the end, and the way that was walked (m)."""
    pairs, trail = [], []
    derive = robot._derive

    def spy(carried):
        out = derive(carried)
        pairs.append((out["velocity"], robot._rotation().T @ robot.world.data.qvel[:3]))
        trail.append(robot.world.data.qpos[:2].copy())
        return out

    robot.world._derive = spy
    walk(robot, seconds)
    off = float(np.linalg.norm(np.array(robot._odometry.position) - trail[-1]))
    way = float(np.linalg.norm(np.diff(trail[::20], axis=0), axis=1).sum())
    said, true = np.array(pairs).transpose(1, 0, 2)
    return said, true, off, way


@pytest.mark.parametrize("terrain", ["flat", "bumpy", "sloped"])
def test_velocity_and_pose_of_the_estimator_follow_the_truth(terrain):
    said, true, off, way = estimates(twin(terrain=terrain, seed=1), 6.0)
    error = np.sqrt(((said - true) ** 2).mean(axis=0))
    assert way > 0.4 and true[:, 0].std() > 0.05  # it walked, and not evenly
    assert error[0] < 0.06 and error[1] < 0.09 and error[2] < 0.09  # feet slip more to the side
    assert abs((said - true)[:, 0].mean()) < 0.04
    assert off / way < 0.15


def test_kicking_on_its_back_is_no_walking():
    robot = twin(seed=1)
    lying(robot, math.pi)
    fastest, start = 0.0, robot.now()
    for _ in range(200):
        robot.write(trot(robot.now() - start))
        robot.sleep(0.05)
        fastest = max(fastest, float(np.abs(robot.read().values["velocity"]).max()))
    assert robot.truth()["upright"] < -0.9 and fastest < 0.3


def test_without_a_foot_on_the_ground_the_estimate_fades():
    odometry, rest = LegOdometry(), np.zeros(12)
    still = {"gravity": np.array([0.0, 0.0, -1.0]), "gyro": np.zeros(3), "joint_position": rest}
    fast = still | {"joint_velocity": np.tile([0.0, 3.0, 0.0], 4), "foot_force": np.full(4, 30.0)}
    for _ in range(100):
        odometry.update(0.01, accel=np.array([0.0, 0.0, 9.81]), **fast)
    # a leg that hangs straight down and swings back at 3 rad/s, rolling on its sole
    assert odometry.velocity == pytest.approx([3.0 * (THIGH_M + CALF_M + FOOT_RADIUS_M), 0.0, 0.0], rel=1e-3)
    lifted = still | {"joint_velocity": rest, "foot_force": np.zeros(4)}
    for _ in range(10):
        odometry.update(0.01, accel=np.array([0.0, 0.0, 9.81]), **lifted)
    assert odometry.velocity[0] > 1.2  # a moment in the air
    for _ in range(1000):
        odometry.update(0.01, accel=np.array([0.0, 0.0, 9.81]), **lifted)
    assert abs(odometry.velocity[0]) < 0.05  # it lies


def test_heading_is_integrated_whatever_the_tilt():
    for roll, pitch in ((0.0, 0.0), (0.4, 0.0), (0.0, -0.3), (0.3, 0.5)):
        odometry = LegOdometry((1.0, 2.0, 0.5))
        up = np.array([-math.sin(pitch), math.cos(pitch) * math.sin(roll), math.cos(pitch) * math.cos(roll)])
        for _ in range(100):  # turning about the vertical at 1 rad/s, off the ground
            odometry.update(0.01, -up, up, 9.81 * up, np.zeros(12), np.zeros(12), np.zeros(4))
        assert odometry.heading == pytest.approx(1.5, abs=1e-9)
        assert odometry.position == pytest.approx((1.0, 2.0), abs=1e-9)


# --- placing, ground, randomisation


@pytest.mark.parametrize("terrain", ["flat", "bumpy", "sloped"])
def test_placed_it_stands_still_anywhere(terrain):
    robot = twin(terrain=terrain, noise=False)
    for pose in ((0.0, 0.0, 0.0), (2.0, -1.0, 2.0), (-3.0, 4.0, -1.0)):
        robot.place(pose)
        truth, reading = robot.truth(), robot.read()
        assert (truth["x"], truth["y"]) == pytest.approx(pose[:2], abs=1e-6)
        assert truth["heading"] == pytest.approx(pose[2], abs=0.05)
        x, y, c, s = reading.values["pose"]
        assert (x, y, math.atan2(s, c)) == pytest.approx(pose, abs=0.01)
        robot.sleep(0.5)
        after = robot.truth()
        assert math.hypot(after["x"] - pose[0], after["y"] - pose[1]) < 0.02
        assert after["upright"] > 0.97 and 0.24 < after["height"] < 0.32 and abs(after["speed"]) < 0.02
        assert robot.read().values["foot_force"].min() > 3.0
    assert after["contacts"] == 0.0


def test_bumps_are_smooth_and_no_higher_than_stated():
    heights = quadruped.bumps(0)
    assert heights.min() == 0.0 and heights.max() == pytest.approx(quadruped.BUMP_M) and quadruped.BUMP_M == 0.025
    steps = np.abs(np.diff(heights, axis=0))
    assert steps.max() < 1.6 * quadruped.BUMP_M * quadruped.CELL_M / quadruped.BUMP_WAY_M  # smoothstep: 1.5
    assert np.abs(np.diff(heights, 2, axis=0)).max() < 0.0065  # joined by straight lines: 0.01
    assert heights.std() > 0.003 and not np.array_equal(heights, quadruped.bumps(1))


def test_bumps_go_on_under_a_dog_that_walks_away():
    robot = twin(terrain="bumpy", noise=False)
    model, data, geom = robot.world.model, robot.world.data, np.zeros(1, np.int32)
    heights = []
    for x in np.arange(0.0, 30.0, 0.05):
        data.qpos[0] = x
        robot._control(0.0)
        mujoco.mj_kinematics(model, data)
        ray = np.array([x + 1.0, 0.5, 5.0]), np.array([0.0, 0.0, -1.0])
        heights.append(5.0 - mujoco.mj_ray(model, data, *ray, None, 1, -1, geom))
    assert np.ptp(heights) > 0.015 and np.abs(np.diff(heights)).max() < 0.005  # no edge: a bump is 0.004 steep


def test_what_is_drawn_is_drawn_again_while_nobody_places_it():
    fixed, drawn = twin(friction=0.7), twin(friction=(0.5, 1.5))
    seen = set()
    for robot in (fixed, drawn):
        before = robot.truth()
        for _ in range(4):
            seen.add(robot.world.model.geom("FR_foot").friction[0])
            robot.sleep(1.1 * quadruped.REDRAW_S)
        after = robot.truth()
        assert math.hypot(after["x"] - before["x"], after["y"] - before["y"]) < 0.05  # it was not set down anew
    assert len(seen) == 1 + 4


@pytest.mark.parametrize("terrain", ["bumpy", "sloped"])
def test_the_ground_is_where_it_is_said_to_be(terrain):
    robot = twin(terrain=terrain)
    model, data = robot.world.model, robot.world.data
    geom = np.zeros(1, np.int32)
    for x, y in ((0.0, 0.0), (1.23, -2.34), (-4.06, 3.9), (14.9, 0.31), (-123.4, 56.7)):
        robot.place((x - 2.0, y + 1.0, 0.0))  # near by, and out of the way
        hit = 5.0 - mujoco.mj_ray(model, data, np.array([x, y, 5.0]), np.array([0.0, 0.0, -1.0]), None, 1, -1, geom)
        assert robot._ground(x, y) == pytest.approx(hit, abs=0.002)
    if terrain == "sloped":
        assert robot._ground(1.0, 0.0) == pytest.approx(math.tan(math.radians(5.0)))


def test_friction_payload_and_motor_are_drawn_within_their_range_at_each_placement():
    robot = twin(friction=(0.5, 1.5), payload_kg=(0.0, 3.0), motor=(0.8, 1.2))
    model, drawn = robot.world.model, []
    for _ in range(8):
        robot.place((0.0, 0.0, 0.0))
        drawn.append((
            model.geom("FR_foot").friction[0] / FOOT_FRICTION, model.body_mass.sum() - MASS_KG,
            model.actuator_gainprm[0, 0] / KP,
        ))  # fmt: skip
        assert model.actuator_forcerange[5, 1] == pytest.approx(drawn[-1][2] * 35.55)
        assert model.actuator_biasprm[3, 2] == pytest.approx(-drawn[-1][2] * KD)
    low, high = np.min(drawn, axis=0), np.max(drawn, axis=0)
    assert (low >= (0.5, -1e-9, 0.8)).all() and (high <= (1.5, 3.0, 1.2)).all()
    assert (high - low > (0.3, 1.0, 0.1)).all()


def test_fixed_settings_are_what_was_asked_for():
    plain, loaded = twin(noise=False), twin(noise=False, payload_kg=3.0, friction=0.5, weak="FR_thigh")
    model = loaded.world.model
    assert model.body_mass.sum() == pytest.approx(MASS_KG + 3.0)
    assert model.geom("FR_foot").friction[0] == pytest.approx(0.4)
    assert model.actuator_gainprm[:, 0].tolist() == [20.0, 10.0] + [20.0] * 10
    assert model.actuator_forcerange[1, 1] == pytest.approx(0.5 * TORQUE_NM[1])
    loaded.sleep(1.0)
    assert loaded.read().values["foot_force"].sum() == pytest.approx((MASS_KG + 3.0) * 9.81, rel=0.02)
    assert loaded.truth()["height"] < plain.truth()["height"] - 0.01


@pytest.mark.parametrize("options", [
    {"terrain": "ice"}, {"weak": "FR_elbow"}, {"friction": 0.0}, {"payload_kg": [1.0, 20.0]},
    {"friction": float("nan")}, {"wings": 2.0},
])  # fmt: skip
def test_settings_that_are_none_are_refused_with_what_is_valid(options):
    with pytest.raises(TaskError, match=f"twin.{next(iter(options))}"):
        check_twin(SimpleNamespace(name="mine", robot="quadruped", twin=options), QuadrupedTwin)


def test_every_declared_setting_is_taken_to_its_limits():
    for name, valid in QuadrupedTwin.settings.items():
        for value in valid[1:] if valid[0] == "choices" else (*valid, list(valid)):
            robot = twin(**{name: value})
            robot.sleep(0.1)
            assert np.isfinite(robot.world.data.qpos).all(), (name, value)


def test_verbs_in_the_wrong_state_and_nonsense_are_refused():
    robot = QuadrupedTwin()
    with pytest.raises(DriverError, match="open"):
        robot.write(np.zeros(12))
    robot.open()
    for bad in (np.zeros(2), np.full(12, np.nan), np.zeros((1, 12))):
        with pytest.raises(DriverError, match="command"):
            robot.write(bad)
    hold(robot, np.full(12, 100.0), 0.1)
    assert robot.world.data.ctrl.tolist() == list(COMMAND.high)
