"""The RC car's MuJoCo twin: the car's channels and command over `models/car.xml`, between walls.

Sources: FastRLAP and RACER simulations as read in the project's systems.md 1.1-1.3 and hardware.md 3.1.
`tests/test_sim_car.py` holds the compiled model against their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mujoco
import numpy as np

from ..drivers.base import Channel, DriverError, Reading
from ..drivers.car import CHANNELS, COMMAND
from .twin import JITTER_S, KINDS, Sensor, World

WHEEL_RADIUS_M = 0.0488  # FastRLAP: wheel-centre height
MOTOR_MPS2 = 9.0  # VESC: maximum acceleration (RACER); its smoother runs at 75 Hz, ours at 100 Hz
WALL_HEIGHT_M, WALL_THICKNESS_M = 0.3, 0.05
TOUCH_GAP_S = 0.5  # a touch after this long without is a new contact
GRAVITY_MPS2 = 9.81

# Noise: accel and gyro of a hobby IMU on a vibrating chassis (UM7 class); velocity and pose of a tracking
# camera (T265 class); wheel speed of a VESC at 4200 ERPM per m/s; steering of a servo's potentiometer.
SENSORS = {
    "accel": (0.3, "mean"), "gyro": (0.02, "mean"), "shock": (0.3, "max"), "velocity": (0.03, "last"),
    "wheel_speed": (0.02, "last"), "steering": (0.005, "last"), "pose": (0.01, "last"),
}

# (gain, offset) of a sensor that is `wrong`: readings that could be true
WRONG: dict[str, tuple[Sequence[float] | float, Sequence[float] | float]] = {
    "accel": ((-1.0, -1.0, 1.0), 0.0),  # mounted the wrong way round
    "gyro": (-1.0, 0.0),  # swapped sign
    "shock": (1.0, 10.0),  # m/s^2: half a collision
    "velocity": (-1.0, 0.0),  # mounted the wrong way round
    "wheel_speed": (0.5, 0.0),  # another gear
    "steering": (1.0, 0.1),  # rad: a trim that is off
    "pose": (1.0, (0.0, 1.0, 0.0, 0.0)),  # m: a map that has shifted
}
LOW_BATTERY_MPS2 = 0.5  # what the top speed falls by each second, from what the command allows
LOW_BATTERY_MPS = 1.0  # and where it ends

MODEL = Path(__file__).parent / "models" / "car.xml"


class CarTwin:
    """A simulated RC car between walls; implements `drivers.base.Twin`.

    `walls`: closed polylines (k, 2) in m, the free side on their left. Without noise the sensors keep their
    rates and latencies. With `realtime` simulated time follows the wall clock.
    """

    channels: tuple[Channel, ...] = CHANNELS
    command = COMMAND
    # what can fail, and how. There is no battery channel: a battery shows in the speed alone
    failures = {c.name: KINDS for c in CHANNELS} | {
        "motor": ("off",), "steering_servo": ("stuck",), "battery": ("low",)
    }  # fmt: skip

    def __init__(
        self, walls: Sequence[np.ndarray] = (), start: tuple[float, float, float] = (0.0, 0.0, 0.0),
        seed: int = 0, realtime: bool = False, noise: bool = True,
    ) -> None:  # fmt: skip
        if not noise:
            self.channels = tuple(replace(channel, noisy=False) for channel in CHANNELS)
        model = build(walls)
        sensors = [
            Sensor(c, noise * SENSORS[c.name][0], SENSORS[c.name][1], noise * JITTER_S, WRONG[c.name]) for c in CHANNELS
        ]
        self.world = World(
            model, sensors, self._control, self._measure, self._watch, seed, realtime, failures=self.failures
        )
        self._is_wall = model.geom_matid == model.material("wall").id
        self._hubs = [int(model.joint(f"hub_{w}").dofadr[0]) for w in ("fl", "fr", "rl", "rr")]
        self._servo = int(model.joint("servo").qposadr[0])
        self._motor_force = model.actuator("motor").forcerange  # a view into the model
        self._full_force = self._motor_force.copy()
        self._jammed_at: float | None = None  # rad
        self._open, self._contacts = False, 0
        bare = build([])
        standing = mujoco.MjData(bare)  # on its springs
        mujoco.mj_step(bare, standing, round(2.0 / bare.opt.timestep))
        self._home = standing.qpos.copy()
        self.place(start)

    def open(self) -> None:
        """Ready to read and write. Idempotent."""
        self._open = True

    def read(self) -> Reading:
        """The newest values. Raises DriverError before `open` or when the physics fails."""
        self._check()
        return self.world.read()

    def write(self, command: np.ndarray) -> None:
        """(2,) speed m/s and steering rad, clipped to the absolute limits. DriverError for nonsense."""
        self._check()
        if np.shape(command) != (2,) or not np.isfinite(command).all():
            raise DriverError(f"car twin: a command is (speed, steering), two finite numbers, not {command}")
        self._target = tuple(np.clip(command, COMMAND.low, COMMAND.high).tolist())

    def stop(self) -> None:
        """Brake at once, wheels straight."""
        self._target = COMMAND.safe
        self._speed = COMMAND.safe[0]  # setpoint of the motor controller, on its way to the target

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
        """At rest and upright at (x m, y m, heading rad); the sensors read that at once."""
        x, y, heading = pose
        self.stop()
        qpos = self._home.copy()
        qpos[:2] = x, y
        qpos[3:7] = math.cos(heading / 2), 0.0, 0.0, math.sin(heading / 2)
        self._velocity, self._sampled = np.zeros(3), -math.inf  # world frame, at the last sample
        self._touching, self._touched = False, -math.inf
        self.world.settle(qpos)

    def fail(self, part: str, kind: str, start: float, lasts: float = math.inf) -> None:
        """Let a part of `failures` fail at `start` (s on this twin's clock) for `lasts` seconds.

        motor off: no torque, it rolls on and cannot brake; steering_servo stuck: its angle stays; battery low: the
        top speed sinks.
        """
        self.world.fail(part, kind, start, lasts)

    def truth(self) -> dict[str, float]:
        """x, y (m), heading (rad), speed (m/s, forward), upright (1 on its wheels, -1 on its roof), contacts
        (running count of wall touches), touching (0/1). For eval, report and tests only."""
        rotation, data = self._rotation(), self.world.data
        return {
            "x": float(data.qpos[0]), "y": float(data.qpos[1]),
            "heading": math.atan2(rotation[1, 0], rotation[0, 0]), "speed": float(rotation[:, 0] @ data.qvel[:3]),
            "upright": float(rotation[2, 2]), "contacts": float(self._contacts), "touching": float(self._touching),
        }  # fmt: skip

    def _check(self) -> None:
        if not self._open:
            raise DriverError("car twin: not open; call open() first")

    def _control(self, dt: float) -> None:
        change = MOTOR_MPS2 * dt
        self._speed = min(max(self._target[0], self._speed - change), self._speed + change)
        self.world.data.ctrl[:] = self._suffer(self._speed, self._target[1])

    def _suffer(self, speed: float, steering: float) -> tuple[float, float]:
        """What becomes of the set speed and steering where actuators fail."""
        since = self.world.broken()
        self._motor_force[:] = 0.0 if "motor" in since else self._full_force
        if "steering_servo" not in since:
            self._jammed_at = None
        elif self._jammed_at is None:
            self._jammed_at = float(self.world.data.qpos[self._servo])
        if "battery" in since:
            top = max(COMMAND.high[0] - LOW_BATTERY_MPS2 * since["battery"], LOW_BATTERY_MPS)
            speed = min(max(speed, -top), top)
        return speed, steering if self._jammed_at is None else self._jammed_at

    def _measure(self) -> dict[str, np.ndarray]:
        data, rotation = self.world.data, self._rotation()
        velocity = data.qvel[:3].copy()
        dt = data.time - self._sampled or math.inf  # just placed
        # An IMU averages over its sample: the change of velocity, so that no shock falls between samples.
        accel = rotation.T @ ((velocity - self._velocity) / dt + (0.0, 0.0, GRAVITY_MPS2))
        self._velocity, self._sampled = velocity, data.time
        self._feel()
        return {
            "accel": accel,
            "gyro": data.qvel[3:6].copy(),
            "shock": np.hypot(accel[:1], accel[1:2]),
            "velocity": rotation.T[:2] @ velocity,
            "wheel_speed": WHEEL_RADIUS_M * data.qvel[self._hubs].mean(keepdims=True),
            "steering": data.qpos[[self._servo]],
            "pose": np.append(data.qpos[:2], rotation[:2, 0] / (math.hypot(*rotation[:2, 0]) or 1.0)),
        }

    def _rotation(self) -> np.ndarray:
        """(3, 3) body to world."""
        rotation = np.empty(9)
        mujoco.mju_quat2Mat(rotation, self.world.data.qpos[3:7])
        return rotation.reshape(3, 3)

    def _watch(self) -> None:
        if self.world.data.ncon > len(self._hubs):  # more than the tyres; glancing touches last few steps
            self._feel()

    def _feel(self) -> None:
        data = self.world.data
        self._touching = bool(self._is_wall[data.contact.geom].any())
        if self._touching:
            self._contacts += data.time - self._touched >= TOUCH_GAP_S
            self._touched = data.time


def build(walls: Sequence[np.ndarray]) -> mujoco.MjModel:
    """The compiled car between `walls`: a box behind each segment."""
    spec = mujoco.MjSpec.from_file(str(MODEL))
    like_a_wall = spec.find_default("wall")
    for wall in walls:
        for centre, half_length, angle in wall_boxes(np.asarray(wall, np.float64)):
            spec.worldbody.add_geom(
                like_a_wall,
                pos=[*centre, WALL_HEIGHT_M / 2],
                size=[half_length, WALL_THICKNESS_M / 2, WALL_HEIGHT_M / 2],
                quat=[math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)],
            )
    return spec.compile()


def wall_boxes(polyline: np.ndarray) -> list[tuple[np.ndarray, float, float]]:
    """(k, 2) closed polyline -> (centre, half length, angle) of boxes whose faces lie on it, to its right.
    Where the wall bends away, boxes are lengthened until their backs meet."""
    ahead = np.roll(polyline, -1, axis=0) - polyline
    lengths, angles = np.hypot(*ahead.T), np.arctan2(ahead[:, 1], ahead[:, 0])
    turns = np.remainder(angles - np.roll(angles, 1) + np.pi, 2 * np.pi) - np.pi  # where a segment starts
    before = WALL_THICKNESS_M * np.tan(np.clip(turns, 0.0, 2.0) / 2)
    after = np.roll(before, -1)
    along = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    right = np.stack((along[:, 1], -along[:, 0]), axis=1)
    centres = polyline + along * ((lengths + after - before) / 2)[:, None] + right * WALL_THICKNESS_M / 2
    return list(zip(centres, (lengths + before + after) / 2, angles, strict=True))
