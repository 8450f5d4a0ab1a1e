"""The arm's twin: its numbers against their sources, its servos and sensors, how it grips, lets go and is stopped, and
its three scenes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco")

from tether.drivers.arm import (  # noqa: E402
    CHANNELS,
    COMMAND,
    HIGH,
    HOME,
    JOINT_RADPS,
    JOINTS,
    LOW,
    SERVO_HZ,
    SPEED_RADPS,
    TORQUE_NM,
    forward,
    inverse,
)  # fmt: skip
from tether.drivers.base import DriverError, Twin  # noqa: E402
from tether.launch import catalog, teach  # noqa: E402
from tether.launch.evaluate import Tally  # noqa: E402
from tether.robot_env.fit import check_twin  # noqa: E402
from tether.robot_env.task import TaskError, load  # noqa: E402
from tether.sim import arm  # noqa: E402
from tether.sim.arm import ArmTwin  # noqa: E402
from tether.sim.twin import JITTER_S  # noqa: E402

# TheRobotStudio's SO-101 URDF, new calibration: kg, m from the joint, kg m^2 about the arm's directions at zero
BODIES = {
    "base": (0.147, (-0.0251, 0.0, 0.0335), (114.7, 136.1, 130.4)),
    "shoulder": (0.100, (0.0308, 0.0, 0.0877), (83.8, 81.0, 24.0)),
    "upper_arm": (0.103, (0.0084, 0.0, 0.0898), (147.3, 142.5, 40.8)),
    "forearm": (0.104, (0.0981, 0.0, 0.0032), (28.7, 145.3, 159.8)),
    "wrist": (0.079, (0.0386, 0.0098, 0.0), (25.4, 21.0, 36.8)),
    "gripper": (0.087, (0.0252, 0.0, 0.0), (34.5, 27.5, 43.4)),
    "moving_jaw": (0.012, (0.03, -0.0016, 0.0), (1.9, 6.6, 5.3)),
}
DAMPING, FRICTION_LOSS, ARMATURE = 0.60, 0.052, 0.028  # its MuJoCo model, after Open Duck Mini
KP, KV = 36.0, 1.2  # N m/rad, N m s/rad
HOLE = np.array([0.20, 0.06])  # m: its axis
TOP_M = 0.030  # of the block
TIP_M = 0.045  # of the peg, ahead of the tool


def twin(**options) -> ArmTwin:
    robot = ArmTwin(**options)
    robot.open()
    return robot


def still(joints, **options) -> ArmTwin:
    """At rest in these (6,) joints, its servos told to stay there, and no cube."""
    robot = twin(scene="mark", noise=False, **options)
    robot.settle(np.array(joints), np.array(joints))
    return robot


def seen(robot: ArmTwin, thing: str) -> np.ndarray:
    """(3,) m: where the object or the tool really is."""
    truth = robot.truth()
    return np.array([truth[f"{thing}_{axis}"] for axis in "xyz"])


class Hand:
    """A script at the stick. The arm weighs on its servos, so it asks for more until the tool is where it shall be."""

    def __init__(self, robot: ArmTwin) -> None:
        self.robot, self.more, self.at = robot, np.zeros(3), robot.read().values["tool"].astype(float)

    def go(self, place, grip: float, seconds: float = 1.0, wait: float = 0.6, press: bool = False) -> None:
        """A straight way in this time, then wait. With `press` it asks for no more where something is in the way."""
        start = self.at
        for k in range(1, round((seconds + wait) / 0.05) + 1):
            self.at = start + (np.array(place) - start) * min(1.0, k * 0.05 / seconds)
            if k * 0.05 > seconds and not press:
                self.more = np.clip(self.more + 0.25 * (self.at - self.robot.read().values["tool"]), -0.03, 0.03)
            self.robot.write(np.append(self.at + self.more, grip))
            self.robot.sleep(0.05)


def grasped(x: float, y: float, **options) -> tuple[ArmTwin, Hand]:
    """A cube that lay there, 10 cm above the table. The jaws came down with the fixed one clear of it."""
    robot = twin(x=x, y=y, **options)
    hand, clear = Hand(robot), 0.008 * np.array([y, -x]) / math.hypot(x, y)
    hand.go([x + clear[0], y + clear[1], 0.06], 0.8)
    hand.go([x + clear[0], y + clear[1], 0.016], 0.8)
    hand.go([x, y, 0.016], 0.0, 0.4)
    hand.go([x, y, 0.116], 0.0)
    return robot, hand


def in_the_hand(robot: ArmTwin) -> np.ndarray:
    """(3,) m: where the cube is, in the gripper's directions."""
    mujoco.mj_kinematics(robot.world.model, robot.world.data)
    rotation = robot.world.data.body("gripper").xmat.reshape(3, 3)
    return rotation.T @ (seen(robot, "object") - seen(robot, "tool"))


def lowered(off: tuple[float, float], deep: float) -> ArmTwin:
    """The peg over the hole, its tip so far off the axis (m), then lowered until it is so deep in it, or would be."""
    robot = twin(scene="peg", noise=False)
    hand, place = Hand(robot), np.array([*HOLE, TOP_M + TIP_M + 0.002])
    hand.go(place, 0.4)
    for _ in range(3):  # it leans a little: it is the tip that counts
        place[:2] += HOLE + off - seen(robot, "object")[:2]
        hand.go(place, 0.4, 0.5, 1.0)
    assert seen(robot, "object")[:2] == pytest.approx(HOLE + off, abs=4e-4)
    hand.go(place - [0.0, 0.0, 0.002 + deep], 0.4, press=True)
    return robot


# --- the model against its sources


def test_compiled_model_has_the_numbers_of_the_sources():
    m = arm.build("cube")
    for name, (mass, centre, inertia) in BODIES.items():
        body = m.body(name)
        assert body.mass[0] == mass and tuple(body.ipos) == centre
        assert body.inertia == pytest.approx(np.array(inertia) * 1e-6, rel=0.01), name
    assert [m.joint(i).name for i in range(6)] == [m.actuator(i).name for i in range(6)] == list(JOINTS)
    assert m.jnt_range[:6, 0].tolist() == list(LOW) and m.jnt_range[:6, 1].tolist() == list(HIGH)
    assert (m.dof_armature[:6] == ARMATURE).all() and (m.dof_frictionloss[:6] == FRICTION_LOSS).all()
    assert (np.reshape(m.dof_damping, (m.nv, -1))[:6, 0] == DAMPING).all()
    assert m.actuator_forcerange[:, 1].tolist() == [TORQUE_NM] * 5 + [TORQUE_NM / 2]
    assert (m.actuator_forcerange[:, 0] == -m.actuator_forcerange[:, 1]).all()
    assert (m.actuator_gainprm[:, 0] == KP).all() and (m.actuator_biasprm[:, 1:3] == (-KP, -KV)).all()
    assert m.body("cube").mass[0] == 0.03 and tuple(m.geom("cube").size) == (0.015,) * 3
    table = m.geom("table")
    assert table.pos[2] + table.size[2] == 0.0 and tuple(2 * table.size[:2]) == (0.8, 0.8)


def test_model_file_is_small_and_has_no_meshes():
    text = arm.MODEL.read_bytes()
    assert len(text) <= 15_000
    assert b"mesh" not in text


def test_declaration_fits_the_twin():
    assert set(arm.WRONG) == {c.name for c in CHANNELS}
    assert isinstance(ArmTwin(), Twin)
    for scene, has in {"cube": {"cube"}, "peg": {"peg", "block"}, "mark": set()}.items():
        m = arm.build(scene)
        assert {m.body(i).name for i in range(1, m.nbody)} - set(BODIES) == has
        assert ("mark" in {m.site(i).name for i in range(m.nsite)}) == (scene == "mark")


def test_kinematics_are_mujocos():
    m = arm.build("mark")
    data, rng = mujoco.MjData(m), np.random.default_rng(0)
    for _ in range(200):
        data.qpos[:] = rng.uniform(LOW, HIGH)
        mujoco.mj_kinematics(m, data)
        assert data.site("tool").xpos == pytest.approx(forward(data.qpos), abs=1e-6)


def test_the_jaws_close_level_and_across_the_arm_and_open_as_far_as_is_stated():
    m = arm.build("mark")
    data, rng = mujoco.MjData(m), np.random.default_rng(0)
    finger, tip = m.geom("finger").id, m.geom("jaw_tip").id
    gaps = []
    for grip in (0.0, 0.2, 0.415, 0.8):
        place = rng.uniform(COMMAND.action_low[:3], COMMAND.action_high[:3])
        data.qpos[:] = np.append(inverse(place), grip)
        mujoco.mj_kinematics(m, data)
        across = data.body("gripper").xmat.reshape(3, 3)[:, 1]
        assert across == pytest.approx([-math.sin(data.qpos[0]), math.cos(data.qpos[0]), 0.0], abs=1e-9)
        gaps.append(mujoco.mj_geomDistance(m, data, finger, tip, 1.0, None))
    assert abs(gaps[0]) < 1e-4 and gaps == sorted(gaps)
    assert gaps[2] == pytest.approx(arm.CUBE_M, abs=5e-4) and gaps[3] > 0.05
    # the fixed finger's face is clear of a cube that lies askew before the tool
    face = m.geom("finger").pos[1] + m.geom("finger").size[1]
    assert face == pytest.approx(-0.024) and face < -arm.CUBE_M / math.sqrt(2) and m.site("tool").pos[1] == 0.0


def test_the_hole_is_as_wide_and_deep_as_stated():
    robot = twin(scene="peg")
    m, data = robot.world.model, robot.world.data
    hit = np.zeros(1, np.int32)

    def far(start, towards) -> float:
        return mujoco.mj_ray(m, data, np.array(start), np.array(towards), None, 1, -1, hit)

    for angle in np.arange(0.0, 2 * math.pi, math.pi / 12):  # walls' middles, and the corners between them
        out = np.array([math.cos(angle), math.sin(angle), 0.0])
        for z in (0.006, 0.015, 0.028):
            assert 0.009 - 1e-6 <= far([*HOLE, z], out) <= 0.00933
        mouth = [*HOLE, TOP_M - 0.0001]
        assert 0.0103 < far(mouth, out) < 0.0110  # the chamfer
        assert 1.0 - far([*(HOLE + 0.018 * out[:2]), 1.0], [0.0, 0.0, -1.0]) == pytest.approx(TOP_M, abs=1e-6)
    assert 1.0 - far([*HOLE, 1.0], [0.0, 0.0, -1.0]) == pytest.approx(TOP_M - 0.025, abs=1e-6)
    assert m.geom("peg").size[0] == 0.008  # 1 mm less than the hole's
    assert np.linalg.norm(seen(robot, "object") - seen(robot, "tool")) == pytest.approx(TIP_M, abs=1e-5)


# --- servos


@pytest.mark.parametrize("load, degrees", [(1.0, 1.8), (1.5, 2.6)])  # SO-ARM100, issue 134
def test_a_servo_gives_way_under_a_load_as_the_real_one_does(load, degrees):
    robot = still(np.zeros(6))
    robot.world.data.qfrc_applied[0] = load  # the pan: it carries no weight
    robot.sleep(2.0)
    assert math.degrees(robot.world.data.qpos[0]) == pytest.approx(degrees, abs=math.degrees(FRICTION_LOSS / KP))


def test_within_the_backlash_a_servo_gives_nothing():
    robot, half = still(np.zeros(6)), arm.BACKLASH_RAD / 2
    assert math.degrees(half) == pytest.approx(0.25)
    robot._target[4] = 0.9 * half  # the wrist's roll: it carries no weight
    robot.sleep(0.5)
    assert abs(robot.world.data.actuator_force[4]) < 0.01 and abs(robot.world.data.qpos[4]) < 1e-4
    rests = []
    for side in (0.2, -0.2):  # where it comes to rest depends on where it came from
        for target in (side, 0.0):
            robot._target[4] = target
            robot.sleep(1.0)
        rests.append(robot.world.data.qpos[4])
    assert half - 1e-4 < rests[0] < half + 1.5 * FRICTION_LOSS / KP and rests[1] == pytest.approx(-rests[0], abs=3e-4)


def test_joints_are_well_damped():
    for joints in (np.zeros(6), np.append(inverse(np.array([0.38, 0.0, 0.15])), 0.4)):
        for i in range(6):
            robot = still(joints)
            robot.sleep(1.0)
            before, path = robot.world.data.qpos[i], []
            robot._target[i] += 0.2 if i in (0, 4, 5) else -0.2
            for _ in range(60):
                robot.sleep(0.01)
                path.append((robot.world.data.qpos[i] - before) / 0.2)
            way = abs(path[-1])
            assert 0.9 < way < 1.05 and np.abs(path).max() < 1.06 * way, JOINTS[i]
            assert abs(path[14]) > 0.8 * way, JOINTS[i]


def test_free_speed_and_torque_are_the_servos():
    robot, fastest = still(np.zeros(6)), 0.0
    robot._target[[0, 4]] = HIGH[0], HIGH[4]  # no trajectory: as fast as it can
    for _ in range(60):
        robot.sleep(0.005)
        fastest = max(fastest, float(np.abs(robot.world.data.qvel[[0, 4]]).max()))
        assert (np.abs(robot.world.data.actuator_force[:5]) <= TORQUE_NM + 1e-9).all()
        assert abs(robot.world.data.actuator_force[5]) <= TORQUE_NM / 2 + 1e-9
    assert fastest == pytest.approx(SPEED_RADPS, rel=0.03)


def test_no_wish_is_a_jerk():
    robot, rng = twin(scene="mark"), np.random.default_rng(0)
    for _ in range(20):
        robot.write(rng.uniform(COMMAND.low, COMMAND.high))
        for _ in range(10):
            robot.sleep(0.02)
            assert np.abs(robot.world.data.qvel[:6]).max() < 1.15 * JOINT_RADPS


def test_a_command_reaches_the_servos_at_their_first_turn_after_the_bus():
    robot = twin(noise=False)
    robot.sleep(0.1)
    before = robot._target.copy()
    robot.write(np.array([0.3, 0.1, 0.1, 0.2]))
    robot.sleep(0.0178)
    assert (robot._target == before).all()  # at 10 ms it had not arrived at the turn of 0 ms
    robot.sleep(0.005)
    assert np.abs(robot._target - before).max() == pytest.approx(JOINT_RADPS / SERVO_HZ)
    robot.sleep(0.02)
    assert np.abs(robot._target - before).max() == pytest.approx(2 * JOINT_RADPS / SERVO_HZ)


def test_stop_holds_where_it_is_until_the_next_write():
    robot = twin(noise=False, scene="mark")
    for _ in range(8):
        robot.write(np.array([0.35, 0.1, 0.06, 0.0]))
        robot.sleep(0.05)
    robot.write(np.array(HOME))
    robot.stop()  # what was on its way to the servos does not come
    where = seen(robot, "tool")
    robot.sleep(0.4)
    assert np.abs(robot.world.data.qvel[:6]).max() < 0.05
    robot.sleep(2.0)
    rest = seen(robot, "tool")
    assert rest == pytest.approx(where, abs=0.03)  # it ran on, and weighs on its servos
    assert rest[2] > 0.03 and np.abs(robot.world.data.qvel[:6]).max() < 3e-3
    joints = robot.world.data.qpos[:6].copy()
    robot.write(np.array(HOME))
    robot.sleep(0.0223)
    most = JOINT_RADPS / SERVO_HZ + arm.ENCODER_RAD
    assert 0.0 < np.abs(robot._target - joints).max() < most  # from where it is
    robot.sleep(2.0)
    assert seen(robot, "tool") == pytest.approx(HOME[:3], abs=0.012)


def test_a_servo_that_is_off_gives_nothing_and_the_arm_falls_on_the_table():
    robot = twin(noise=False)
    robot.fail("shoulder_lift", "off", robot.now(), 3.0)
    robot.sleep(0.1)
    assert robot.world.data.actuator_force[1] == 0.0 and robot.truth()["contacts"] == 0.0
    robot.sleep(2.5)
    truth = robot.truth()
    assert truth["contacts"] == 1.0 and truth["touching"] == 1.0 and abs(truth["speed"]) < 0.02
    assert truth["tool_z"] < 0.06
    robot.sleep(2.0)
    assert robot.truth()["contacts"] == 1.0 and abs(robot.world.data.actuator_force[1]) > 0.2
    assert robot.truth()["tool_z"] == pytest.approx(HOME[2], abs=0.012)
    with pytest.raises(ValueError, match="gripper:stuck"):
        robot.fail("gripper", "stuck", 0.0)


# --- sensors


def test_readings_have_their_shapes_and_a_due_age_at_any_time():
    robot, rng = twin(), np.random.default_rng(0)
    for k in range(100):
        if k == 50:
            robot.place((0.0, 0.0, 0.0))
        reading, now = robot.read(), robot.now()
        for c in CHANNELS:
            value = reading.values[c.name]
            assert value.shape == (c.size,) and value.dtype == np.float32 and np.isfinite(value).all()
            age = now - reading.stamps[c.name]
            assert c.latency_s - 1e-9 <= age <= c.latency_s + 1 / c.hz + JITTER_S + 1e-9, c.name
        robot.write(np.array(HOME))
        robot.sleep(float(rng.uniform(0.005, 0.1)))


def test_encoders_have_twelve_bits_and_the_tool_is_what_they_say():
    robot, off = twin(noise=False, scene="mark"), []
    for k in range(40):
        robot.write(np.array([0.25, 0.1 * math.sin(k / 5), 0.1, 0.3]))
        robot.sleep(0.05)
        values = robot.read().values
        ticks = values["joint_position"] / (2 * math.pi / 4096)
        assert ticks == pytest.approx(np.round(ticks), abs=1e-3)
        assert values["tool"] == pytest.approx(forward(values["joint_position"]), abs=1e-6)
        off.append(values["joint_position"] - robot.world.data.qpos[:6])
    assert np.ptp(off) > 0.5 * arm.ENCODER_RAD


def test_load_is_what_the_servos_give():
    robot = twin(noise=False, scene="mark")
    robot.sleep(1.0)
    weight = robot.world.data.qfrc_bias[:6]  # nothing moves: what holds the arm
    load = robot.read().values["load"]
    assert load[1] == pytest.approx(weight[1], abs=FRICTION_LOSS + 1e-3) and load[1] < -0.2
    assert load == pytest.approx(robot.world.data.actuator_force, abs=1e-3)


def test_the_tracker_has_its_rate_latency_and_noise():
    robot, values, stamps = twin(seed=3, x=0.25, y=0.1), [], []
    declared = next(c for c in CHANNELS if c.name == "object")
    for _ in range(2000):
        robot.sleep(0.01)
        reading = robot.read()
        values.append(reading.values["object"])
        stamps.append(reading.stamps["object"])
        assert declared.latency_s - 1e-9 <= robot.now() - stamps[-1] <= declared.latency_s + 1 / 30 + JITTER_S + 1e-9
    fresh = np.unique(stamps, return_index=True)[1]
    assert len(fresh) == pytest.approx(20.0 * declared.hz, abs=2)
    found = np.array(values)[fresh]
    assert found.std(axis=0) == pytest.approx(0.0015, rel=0.12)
    assert found.mean(axis=0) == pytest.approx([0.25, 0.1, 0.015], abs=3e-4)


def test_the_tool_is_computed_from_what_the_encoders_carry():
    robot = twin(noise=False, scene="mark")
    robot.fail("joint_position", "wrong", robot.now(), 1.0)
    robot.sleep(0.5)
    values = robot.read().values
    assert values["tool"] == pytest.approx(forward(values["joint_position"]), abs=1e-6)
    assert np.linalg.norm(values["tool"] - seen(robot, "tool")) > 0.02
    robot.sleep(1.0)
    before = robot.read().values["tool"]
    robot.fail("joint_position", "garbage", robot.now())  # NaN, infinity and a billion are not believed
    for _ in range(7):
        robot.sleep(0.5)
        assert (robot.read().values["tool"] == before).all()


def test_nothing_is_measured_where_no_sensor_samples():
    """50 and 30 Hz meet ten times a second, and the physics runs in batches of 150 Hz."""
    robot, times = twin(), []
    measure = robot.world._measure
    robot.world._measure = lambda: (times.append(robot.world.data.time), measure())[1]
    robot.sleep(1.0)
    assert len(times) == 50 + 30 - 10


def test_same_seed_same_readings():
    def run(seed: int) -> np.ndarray:
        robot, rng = twin(seed=seed, friction=(0.5, 1.0)), np.random.default_rng(0)
        out = []
        for k in range(20):
            if k == 10:
                robot.place((0.0, 0.0, 0.0))
            robot.write(rng.uniform(COMMAND.action_low, COMMAND.action_high))
            robot.sleep(0.05)
            reading = robot.read()
            out.append(np.concatenate([*reading.values.values(), list(reading.stamps.values())]))
        return np.array(out)

    assert np.array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))


# --- gripping


@pytest.mark.parametrize(
    "x, y", [(0.25, 0.0), (0.15, -0.1), (0.09, 0.12), (0.30, 0.10), (0.37, 0.15), (0.37, -0.15)]
)  # at the last two the tool leans out by 50 degrees
def test_a_cube_is_gripped_lifted_carried_and_dropped(x, y):
    robot, hand = grasped(x, y, seed=1)
    assert robot.truth()["gripped"] == 1.0 and robot.truth()["contacts"] == 0.0
    assert robot.truth()["object_z"] == pytest.approx(0.115, abs=0.006)
    values = robot.read().values
    assert 0.35 < values["joint_position"][5] < 0.45 and values["load"][5] == pytest.approx(-TORQUE_NM / 2)
    assert in_the_hand(robot) == pytest.approx([0.0, -0.009, 0.0], abs=0.003)  # at the fixed finger
    held = in_the_hand(robot)
    robot.sleep(3.0)
    assert in_the_hand(robot) == pytest.approx(held, abs=2e-4)  # no creep
    for place in ((0.30, -0.12, 0.12), (0.15, 0.10, 0.06), (0.25, 0.0, 0.11)):
        hand.go(place, 0.0, 0.8, 0.2)
        assert robot.truth()["gripped"] == 1.0
        assert in_the_hand(robot) == pytest.approx(held, abs=0.004)
    robot.stop()  # the gears keep hold of it
    robot.sleep(1.0)
    assert robot.truth()["gripped"] == 1.0 and robot.truth()["object_z"] > 0.09
    hand.go((0.25, 0.0, 0.10), 0.8)
    assert robot.truth()["gripped"] == 0.0 and robot.truth()["object_z"] == pytest.approx(0.015, abs=0.001)


def test_a_cube_beside_the_jaws_is_not_gripped():
    robot = twin(x=0.25, y=0.0)
    hand = Hand(robot)
    hand.go([0.25, 0.06, 0.05], 0.8)
    hand.go([0.25, 0.06, 0.016], 0.8)
    hand.go([0.25, 0.06, 0.016], 0.0, 0.4)
    assert robot.truth()["gripped"] == 0.0 and robot.read().values["joint_position"][5] < 0.02
    hand.go([0.25, 0.06, 0.1], 0.0)
    assert seen(robot, "object") == pytest.approx([0.25, 0.0, 0.015], abs=0.001)


@pytest.mark.parametrize("side", [-1.0, 1.0])  # the moving jaw pushes it, or the fixed one
def test_a_cube_that_one_jaw_pushes_is_not_gripped(side):
    robot = twin(x=0.25, y=0.0)
    hand = Hand(robot)
    for z in (0.05, 0.016):
        hand.go([0.25, 0.06 * side, z], 0.0)
    for y in np.linspace(0.06, -0.02, 16) * side:
        hand.go([0.25, y, 0.016], 0.0, 0.1, 0.0)
        assert robot.truth()["gripped"] == 0.0
    assert robot.truth()["object_y"] * side < -0.01


def test_what_is_pushed_over_the_edge_falls():
    robot = twin()
    qpos = robot.world.data.qpos.copy()
    qpos[6:9] = 0.59, 0.0, 0.015  # almost half of it over the edge
    robot.settle(qpos)
    robot.sleep(1.0)
    assert robot.truth()["object_z"] == pytest.approx(0.015, abs=0.001)
    robot.world.data.qvel[6] = 0.5
    robot.sleep(2.0)
    truth = robot.truth()
    assert truth["object_z"] < -0.6 and truth["x"] == truth["object_x"] > 0.6
    assert robot.read().values["object"][2] < -0.6
    robot.place((0.0, 0.0, 0.0))
    assert robot.truth()["object_z"] == pytest.approx(0.015, abs=0.001)


# --- the peg and its hole


@pytest.mark.parametrize("off", [(0.0, 0.0), (0.0005, 0.0), (-0.0005, 0.0), (0.0, 0.0005), (0.0, -0.0005)])
def test_a_peg_above_the_hole_goes_in(off):
    robot = lowered(off, 0.024)
    assert seen(robot, "object")[2] < TOP_M - 0.020
    assert robot.truth()["gripped"] == 1.0 and robot.truth()["contacts"] == 0.0


@pytest.mark.parametrize("off", [(0.004, 0.0), (-0.004, 0.0), (0.0, 0.004), (0.0, -0.004)])
def test_a_peg_beside_the_hole_stands_on_the_block(off):
    robot = lowered(off, 0.006)  # harder, and its servos give way until it slides
    assert seen(robot, "object")[2] > TOP_M - 0.0005


def test_a_peg_that_hits_the_table_is_counted_and_the_block_is_not_the_table():
    robot = twin(scene="peg", noise=False)
    hand = Hand(robot)
    for expected in (1.0, 2.0):
        hand.go([0.22, -0.08, 0.1], 0.4)
        assert robot.truth()["contacts"] == expected - 1.0 and robot.truth()["touching"] == 0.0
        hand.go([0.22, -0.08, TIP_M - 0.004], 0.4)
        assert robot.truth()["contacts"] == expected and robot.truth()["touching"] == 1.0


# --- placing and settings


def test_placed_it_rests_at_home_and_the_object_is_drawn_anew_in_its_range():
    robot = twin(x=(0.1, 0.3), y=(-0.1, 0.05), friction=(0.5, 1.5))
    pads, drawn = robot.world.model.geom("jaw_tip"), []
    for _ in range(12):
        robot.write(np.array([0.3, 0.1, 0.05, 0.0]))
        robot.sleep(0.3)
        robot.place((2.0, -1.0, 2.0))
        before = robot.truth()
        assert seen(robot, "tool") == pytest.approx(HOME[:3], abs=0.008)  # it weighs on its servos
        assert robot.read().values["joint_position"][5] == pytest.approx(HOME[3], abs=0.01)
        robot.sleep(0.3)
        after = robot.truth()
        assert [after[k] for k in after] == pytest.approx([before[k] for k in after], abs=0.001)
        assert after["contacts"] == after["gripped"] == 0.0 and after["upright"] == 1.0
        assert after["heading"] == pytest.approx(math.atan2(after["y"], after["x"]), abs=0.01)  # squarely before it
        drawn.append((after["x"], after["y"], pads.friction[0]))
    low, high = np.min(drawn, axis=0), np.max(drawn, axis=0)
    assert (low >= (0.1 - 1e-4, -0.1 - 1e-4, 0.5)).all() and (high <= (0.3 + 1e-4, 0.05 + 1e-4, 1.5)).all()
    assert (high - low > (0.08, 0.06, 0.4)).all()


def test_a_mark_has_no_body():
    robot = twin(scene="mark", x=0.25, y=0.1, noise=False)
    hand = Hand(robot)
    hand.go([0.25, 0.1, 0.06], 0.0)
    hand.go([0.25, 0.1, 0.015], 0.0)
    mark = [0.25, 0.1, 0.015]
    assert seen(robot, "tool") == pytest.approx(mark, abs=0.002) and robot.truth()["contacts"] == 0.0
    assert seen(robot, "object") == pytest.approx(mark) and robot.read().values["object"] == pytest.approx(mark)
    assert robot.world.data.site("mark").xpos == pytest.approx(mark) and robot.truth()["gripped"] == 0.0


@pytest.mark.parametrize("options", [
    {"scene": "ball"}, {"x": 0.5}, {"x": [0.0, 0.3]}, {"y": 0.2}, {"friction": 0.0}, {"friction": float("nan")},
    {"wings": 2.0},
])  # fmt: skip
def test_settings_that_are_none_are_refused_with_what_is_valid(options):
    with pytest.raises(TaskError, match=f"twin.{next(iter(options))}"):
        check_twin(SimpleNamespace(name="mine", robot="arm", twin=options), ArmTwin)


def test_every_declared_setting_is_taken_to_its_limits():
    for name, valid in ArmTwin.settings.items():
        for value in valid[1:] if valid[0] == "choices" else (*valid, list(valid)):
            robot = twin(**{name: value})
            robot.sleep(0.5)
            assert robot.truth()["object_z"] > 0.01


def test_verbs_in_the_wrong_state_and_nonsense_are_refused():
    robot = ArmTwin()
    with pytest.raises(DriverError, match="open"):
        robot.write(np.array(HOME))
    robot.open()
    for bad in (np.zeros(2), np.full(4, np.nan), np.zeros((1, 4))):
        with pytest.raises(DriverError, match="command"):
            robot.write(bad)
    robot.write(np.full(4, 100.0))
    robot.sleep(2.0)
    assert robot._command.tolist() == list(COMMAND.high)


# --- the tasks


def test_the_checkpoints_of_arm_insert_are_above_and_in_the_hole():
    above, inside = load("arm-insert").checkpoints
    block = twin(scene="peg").world.model.body("block").pos
    assert above.at[:2] == inside.at[:2] == pytest.approx(tuple(block[:2]))
    assert above.at[2] - above.radius_m >= 0.030 and inside.at[2] + inside.radius_m < 0.030 - 0.010  # the block's top


@pytest.mark.parametrize("name, speed_mps", [("arm-pick", 0.15), ("arm-insert", 0.1), ("arm-reach", 0.15)])
def test_a_script_can_do_it(name, speed_mps):
    env = catalog.make_env(catalog.make_task(load(name)), seed=1)
    tally, teacher = Tally(env), teach.shown(env, speed_mps, 1.0, 0)
    obs, _ = env.reset()
    while len(tally.returns) < 6:
        obs, _, terminated, truncated, _ = env.step(teacher(obs, env.action))
        if terminated or truncated:
            obs, _ = env.reset()
    assert sum(tally.successes) >= (4 if name == "arm-insert" else 6) and tally.episodes.interventions == 0
