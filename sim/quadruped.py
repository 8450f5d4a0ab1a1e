"""The quadruped's MuJoCo twin: its channels and command over `models/quadruped.xml`, on three kinds of ground.

Sources: Unitree's Go1 description (the model), A Walk in the Park (bumps, systems.md 2.1), APRL (delays, 3.1).
`tests/test_sim_quadruped.py` holds the compiled model against their numbers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mujoco
import numpy as np

from ..drivers.base import Channel, DriverError, Reading
from ..drivers.leg_odometry import GRAVITY_MPS2, LegOdometry
from ..drivers.quadruped import CHANNELS, COMMAND, JOINTS, KD, KP, LEGS, NOMINAL, TORQUE_NM
from .twin import JITTER_S, KINDS, Sensor, World

MOTOR_DELAY_S = 0.01  # from a write to the motors: their bus and the 500 Hz of its own loop (own estimate, 10-20 ms)
SLOPE_RAD = math.radians(5.0)  # of the sloped ground, uphill along x
BUMP_M, BUMP_WAY_M = 0.025, 0.5  # A Walk in the Park: bumps up to 2.5 cm; from one to the next (own estimate)
FIELD_M, CELL_M = 20.0, 0.1  # the bumpy ground's side; it follows the dog by halves, of which one is like the other
BELOW_M = 0.02  # and the floor lies so far below it
REDRAW_S = 20.0  # what is drawn at random is so old at most: an episode of walking
SETTLE_S = 1.0  # for it to stand still when it is placed
TOUCH_GAP_S = 0.5  # the trunk on the ground after this long without is a new fall
WEAK = 0.5  # of its strength is left to a weak motor
ACCEL_NOISE = 0.1  # m/s^2: of the estimator's accelerometer, which has no channel

# Noise: attitude of an IMU that fuses gyro and accelerometer (0.01 rad) and its gyro; 15-bit joint encoders and
# their differences; foot pressure sensors. Velocity and pose have what the estimator makes of it.
NOISE = {
    "gravity": 0.01, "gyro": 0.02, "joint_position": 0.001, "joint_velocity": 0.05, "foot_force": 3.0,
    "velocity": 0.0, "pose": 0.0,
}  # fmt: skip

# (gain, offset) of a sensor that is `wrong`: readings that could be true
WRONG: dict[str, tuple[Sequence[float] | float, Sequence[float] | float]] = {
    "gravity": ((-1.0, -1.0, 1.0), 0.0),  # mounted the wrong way round
    "gyro": (-1.0, 0.0),  # swapped sign
    "joint_position": (1.0, 0.2),  # rad: zeroed in the wrong place
    "joint_velocity": (0.5, 0.0),  # another gear
    "foot_force": (0.5, 0.0),  # worn soles
    "velocity": (-1.0, 0.0),  # mounted the wrong way round
    "pose": (1.0, (0.0, 1.0, 0.0, 0.0)),  # m: a map that has shifted
}

MODEL = Path(__file__).parent / "models" / "quadruped.xml"
Setting = float | Sequence[float]  # a number, or the (low, high) that it is drawn from, every REDRAW_S anew


class QuadrupedTwin:
    """A simulated Go1-class quadruped; implements `drivers.base.Twin`.

    `terrain`: flat; bumpy, with smooth bumps of up to 2.5 cm; sloped, 5 degrees uphill along x. `friction` and
    `motor` (the strength of all motors) are factors, `payload_kg` is on its back; `weak` is a joint whose motor has
    half its strength. What is given as a pair is drawn when it is placed, and every REDRAW_S again, as nothing else
    may ever place it. `walls` are not built: a dog steps over what stops a car. Without noise the sensors keep their
    rates and latencies. With `realtime` simulated time follows the wall clock.
    """

    channels: tuple[Channel, ...] = CHANNELS
    command = COMMAND
    # what can fail, and how: a motor that is off gives no torque, not even damping
    failures = {c.name: KINDS for c in CHANNELS} | {joint: ("off",) for joint in JOINTS}
    # what the keywords may be: one of the choices, or a number or pair between low and high (`robot_env/fit.py` checks)
    settings: Mapping[str, tuple] = {
        "terrain": ("choices", "flat", "bumpy", "sloped"), "friction": (0.1, 2.0), "payload_kg": (0.0, 10.0),
        "motor": (0.3, 1.5), "weak": ("choices", "none", *JOINTS),
    }  # fmt: skip

    def __init__(
        self, walls: Sequence[np.ndarray] = (), start: tuple[float, float, float] = (0.0, 0.0, 0.0),
        seed: int = 0, realtime: bool = False, noise: bool = True, terrain: str = "flat", friction: Setting = 1.0,
        payload_kg: Setting = 0.0, motor: Setting = 1.0, weak: str = "none",
    ) -> None:  # fmt: skip
        if not noise:
            self.channels = tuple(replace(channel, noisy=False) for channel in CHANNELS)
        drawn = {"friction": friction, "payload_kg": payload_kg, "motor": motor}
        self._ranges = {name: np.broadcast_to(np.asarray(value, float), 2) for name, value in drawn.items()}
        self._draws, self._noises = np.random.default_rng([seed, 0]).spawn(2)
        self._vary = any(np.ptp(ends) > 0.0 for ends in self._ranges.values())
        self._terrain, self._bumps = terrain, bumps(seed) if terrain == "bumpy" else np.zeros((2, 2))
        self._accel_noise = noise * ACCEL_NOISE
        model = build(terrain, self._bumps)
        sensors = [
            Sensor(c, noise * NOISE[c.name], jitter_s=noise * JITTER_S, wrong=WRONG[c.name], early=True)
            for c in CHANNELS
        ]
        self.world = World(
            model, sensors, self._control, self._measure, lambda: None, seed, realtime, self._derive, self.failures
        )
        self._friction = model.geom_friction[:, 0].copy()
        self._payload = model.body("payload").id
        self._share = np.where(np.array(JOINTS) == weak, WEAK, 1.0)
        self._strength = self._share
        self._part = (model.geom_contype == _GROUND).astype(int)  # of each geom
        self._part[[model.geom(name).id for name in _TRUNK]] = _BODY
        self._waiting: deque[tuple[float, np.ndarray]] = deque()  # commands on their way to the motors
        self._target, self._damped = np.array(NOMINAL), False
        self._powered: tuple[bool, list[str]] | None = None  # what the motors are set to
        self._open, self._contacts = False, 0
        self.place(start)

    def open(self) -> None:
        """Ready to read and write. Idempotent."""
        self._open = True

    def read(self) -> Reading:
        """The newest values. Raises DriverError before `open` or when the physics fails."""
        self._check()
        return self.world.read()

    def write(self, command: np.ndarray) -> None:
        """(12,) joint angles in rad, clipped to the absolute limits; they reach the motors MOTOR_DELAY_S later.
        Raises DriverError for nonsense."""
        self._check()
        if np.shape(command) != (len(JOINTS),) or not np.isfinite(command).all():
            raise DriverError(f"quadruped twin: a command is {len(JOINTS)} joint angles, finite numbers, not {command}")
        self._waiting.append((self.world.now() + MOTOR_DELAY_S, np.clip(command, COMMAND.low, COMMAND.high)))

    def stop(self) -> None:
        """At once no more holding of any posture, only damping: it sinks to the ground. The next write ends that."""
        self._waiting.clear()
        self._damped = True

    def close(self) -> None:
        """Stop; `read` and `write` need another `open`."""
        self.stop()
        self._open = False

    def now(self) -> float:
        """Simulated time in s."""
        return self.world.now()

    def sleep(self, seconds: float) -> None:
        """Advance the physics by `seconds`."""
        self.world.sleep(seconds)

    def place(self, pose: tuple[float, float, float]) -> None:
        """Standing at rest in the nominal pose at (x m, y m, heading rad), which it holds until a command comes; the
        sensors read that at once, and the estimator starts from there. Friction, payload and motor are drawn anew."""
        self._waiting.clear()
        self._target, self._damped = np.array(NOMINAL), False
        self._draw()
        self.settle(self._standing(pose), pose)

    def settle(self, qpos: np.ndarray, pose: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        """At rest in any state: (19,) position, quaternion and joints. `pose` is what the estimator believes."""
        self._odometry = LegOdometry(pose)
        self._samples: dict[str, np.ndarray] = {}
        self._velocity, self._sampled = np.zeros(3), -math.inf  # world frame, at the last sample
        self._touched, self._touching = -math.inf, False
        self.world.settle(qpos)

    def fail(self, part: str, kind: str, start: float, lasts: float = math.inf) -> None:
        """Let a part of `failures` fail at `start` (s on this twin's clock) for `lasts` seconds."""
        self.world.fail(part, kind, start, lasts)

    def truth(self) -> dict[str, float]:
        """x, y (m), heading (rad), speed (m/s, forward), upright (1 on its feet, -1 on its back), height (m, of the
        trunk's centre above the ground), contacts (running count of falls: the trunk, its hips included, on the
        ground), touching (0/1). For eval, report and tests only."""
        rotation, data = self._rotation(), self.world.data
        x, y, z = (float(v) for v in data.qpos[:3])
        return {
            "x": x, "y": y, "heading": math.atan2(rotation[1, 0], rotation[0, 0]),
            "speed": float(rotation[:, 0] @ data.qvel[:3]), "upright": float(rotation[2, 2]),
            "height": z - self._ground(x, y), "contacts": float(self._contacts), "touching": float(self._touching),
        }  # fmt: skip

    def _check(self) -> None:
        if not self._open:
            raise DriverError("quadruped twin: not open; call open() first")

    def _draw(self) -> None:
        """Friction, payload and motor, each of its range."""
        model, self._drawn = self.world.model, self.world.data.time
        friction, payload, motor = (float(self._draws.uniform(*self._ranges[name])) for name in self._ranges)
        model.geom_friction[:, 0] = friction * self._friction
        share = payload / _PAYLOAD_KG
        model.body_mass[self._payload] = share * _PAYLOAD_KG
        model.body_inertia[self._payload] = share * np.array(_PAYLOAD_INERTIA)
        mujoco.mj_setConst(model, mujoco.MjData(model))  # it works on the data that it is given
        self._strength, self._powered = motor * self._share, None

    def _standing(self, pose: tuple[float, float, float]) -> np.ndarray:
        """(19,) where it comes to rest when it is set down there."""
        x, y, heading = pose
        qpos = np.concatenate([np.zeros(7), NOMINAL])
        qpos[:3] = x, y, self._ground(x, y) + _DROP_M
        yaw, tilt = np.zeros(4), np.array([1.0, 0.0, 0.0, 0.0])
        yaw[[0, 3]] = math.cos(heading / 2), math.sin(heading / 2)
        if self._terrain == "sloped":
            tilt[[0, 2]] = math.cos(SLOPE_RAD / 2), -math.sin(SLOPE_RAD / 2)
        mujoco.mju_mulQuat(qpos[3:7], tilt, yaw)
        scratch = mujoco.MjData(self.world.model)
        self._power()
        for _ in range(2):  # once more where it moved while its legs gave way
            scratch.qpos[:], scratch.qvel[:], scratch.ctrl[:] = qpos, 0.0, NOMINAL
            self._follow(scratch)
            mujoco.mj_step(self.world.model, scratch, round(SETTLE_S / self.world.dt))
            qpos = scratch.qpos.copy()
            qpos[2] += self._ground(x, y) - self._ground(*qpos[:2])
            qpos[:2] = x, y
        return qpos

    def _ground(self, x: float, y: float) -> float:
        """Height of the ground in m."""
        if self._terrain == "sloped":
            return x * math.tan(SLOPE_RAD)
        if self._terrain == "flat":
            return 0.0
        column, row = (x % (FIELD_M / 2)) / CELL_M, (y % (FIELD_M / 2)) / CELL_M
        i, j = math.floor(row), math.floor(column)
        corners = self._bumps[i : i + 2, j : j + 2]
        up, right = row - i, column - j
        return float(np.array([1 - up, up]) @ corners @ np.array([1 - right, right]))

    def _follow(self, data: mujoco.MjData) -> None:
        """Bring the bumps to where the dog is."""
        if self._terrain == "bumpy":  # else there are none
            data.mocap_pos[:, :2] = np.round(data.qpos[:2] / (FIELD_M / 2)) * FIELD_M / 2

    def _control(self, dt: float) -> None:
        data = self.world.data
        self._follow(data)
        if self._vary and data.time - self._drawn >= REDRAW_S:
            self._draw()
        while self._waiting and self._waiting[0][0] <= data.time + 1e-6:
            self._target, self._damped = self._waiting.popleft()[1], False
        self._power()
        data.ctrl[:] = self._target

    def _power(self) -> None:
        """What each motor gives: its strength, nothing where it failed, no stiffness while stopped."""
        model = self.world.model
        off = list(self.world.broken())
        if (self._damped, off) == self._powered:
            return
        self._powered = self._damped, off
        strength = np.where(np.isin(JOINTS, off), 0.0, self._strength)
        stiffness = 0.0 if self._damped else KP
        model.actuator_gainprm[:, 0] = stiffness * strength
        model.actuator_biasprm[:, 1], model.actuator_biasprm[:, 2] = -stiffness * strength, -KD * strength
        model.actuator_forcerange[:] = np.outer(strength * np.tile(TORQUE_NM, len(LEGS)), (-1.0, 1.0))

    def _measure(self) -> dict[str, np.ndarray]:
        data, rotation = self.world.data, self._rotation()
        velocity = data.qvel[:3].copy()
        dt = data.time - self._sampled or math.inf  # just placed
        # an IMU averages over its sample: the change of velocity, so that no impact falls between samples
        self._accel = rotation.T @ ((velocity - self._velocity) / dt + (0.0, 0.0, GRAVITY_MPS2))
        self._velocity, self._sampled = velocity, data.time
        self._feel()
        return {
            "gravity": -rotation[2], "gyro": data.qvel[3:6].copy(), "joint_position": data.qpos[7:].copy(),
            "joint_velocity": data.qvel[6:].copy(), "foot_force": data.sensordata.copy(),
        }  # fmt: skip

    def _derive(self, carried: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray]:
        """What the estimator makes of the samples. It keeps the one before where none came, or nonsense."""
        for name, value in carried.items():
            if value is not None and (np.abs(value) <= _RANGES[name]).all():
                self._samples[name] = value
        accel = self._accel + self._accel_noise * self._noises.standard_normal(3)
        odometry = self._odometry
        if len(self._samples) == len(_ESTIMATED_FROM):
            odometry.update(1.0 / CHANNELS[0].hz, accel=accel, **self._samples)
        heading = odometry.heading
        return {
            "velocity": np.array(odometry.velocity),
            "pose": np.array([*odometry.position, math.cos(heading), math.sin(heading)]),
        }

    def _rotation(self) -> np.ndarray:
        """(3, 3) body to world."""
        rotation = np.empty(9)
        mujoco.mju_quat2Mat(rotation, self.world.data.qpos[3:7])
        return rotation.reshape(3, 3)

    def _feel(self) -> None:
        parts = self._part[self.world.data.contact.geom]  # (n, 2)
        self._touching = _GROUND + _BODY in parts.sum(axis=1)
        if self._touching:
            self._contacts += self.world.data.time - self._touched >= TOUCH_GAP_S
            self._touched = self.world.data.time


_GROUND, _BODY = 1, 2  # what touches what: the floor (its bit, too), and trunk or hip
_RANGES = {channel.name: channel.range for channel in CHANNELS}
_TRUNK = ("trunk", *(f"{leg}_hip" for leg in LEGS))
_ESTIMATED_FROM = ("gravity", "gyro", "joint_position", "joint_velocity", "foot_force")
_PAYLOAD_KG, _PAYLOAD_INERTIA = 1.0, (0.003, 0.008, 0.01)  # what the model file's payload weighs, kg m^2: a flat box
_DROP_M = 0.34  # the trunk's height when it is set down: its feet are clear of a bump


def bumps(seed: int) -> np.ndarray:
    """(n, n) heights in m, rows along y: random ones BUMP_WAY_M apart, and smooth between them. Both halves of a side
    are alike."""
    half = np.random.default_rng([seed, 1]).uniform(0.0, BUMP_M, (round(FIELD_M / 2 / BUMP_WAY_M),) * 2)
    coarse = np.pad(np.tile(half, (2, 2)), (0, 1), mode="wrap")
    fine = np.linspace(0.0, len(coarse) - 1, round(FIELD_M / CELL_M) + 1)
    whole = np.minimum(fine.astype(int), len(coarse) - 2)
    part = fine - whole
    weight = np.zeros((len(fine), len(coarse)))
    rows = np.arange(len(fine))
    weight[rows, whole + 1] = part * part * (3.0 - 2.0 * part)  # no kinks where two meet
    weight[rows, whole] += 1.0 - weight[rows, whole + 1]
    heights = weight @ coarse @ weight.T
    return BUMP_M * (heights - heights.min()) / np.ptp(heights)


def build(terrain: str = "flat", heights: np.ndarray | None = None) -> mujoco.MjModel:
    """The compiled dog on its ground, with the model's 1 kg as payload; `heights` are those of the bumpy one."""
    spec = mujoco.MjSpec.from_file(str(MODEL))
    floor = spec.geom("floor")
    if terrain == "sloped":
        floor.quat = [math.cos(SLOPE_RAD / 2), 0.0, -math.sin(SLOPE_RAD / 2), 0.0]
    if terrain == "bumpy" and heights is not None:
        floor.pos = [0.0, 0.0, -BELOW_M]
        spec.add_hfield(
            name="bumps", nrow=len(heights), ncol=len(heights), size=[FIELD_M / 2, FIELD_M / 2, BUMP_M, BELOW_M],
            userdata=(heights / BUMP_M).ravel(),
        )  # fmt: skip
        spec.worldbody.add_body(name="bumps", mocap=True).add_geom(
            name="bumps", type=mujoco.mjtGeom.mjGEOM_HFIELD, hfieldname="bumps", material="floor",
            contype=1, conaffinity=0, friction=[0.0, 0.005, 0.0001],
        )  # fmt: skip
    return spec.compile()
