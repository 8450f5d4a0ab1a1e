"""The RC car's MuJoCo twin: the car's channels and command over `models/car.xml`, between walls.

Sources: FastRLAP and RACER simulations as read in the project's systems.md 1.1-1.3 and hardware.md 3.1.
`tests/test_sim_car.py` holds the compiled model against the constants below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import mujoco
import numpy as np

from ..drivers.base import DriverError, Reading
from ..drivers.car import CHANNELS, COMMAND
from .twin import Sensor, World

MASS_KG = 4.66  # RACER: chassis 3.85, wheels 0.1 (FastRLAP counts the wheels twice)
WHEEL_MASS_KG = 0.1  # RACER
WHEELBASE_M = 0.2965  # FastRLAP: 0.1385 in front of the origin + 0.158 behind
FRONT_M, REAR_M = 0.1385, 0.158
TRACK_M = 0.23  # FastRLAP
WHEEL_RADIUS_M = 0.0488  # FastRLAP: wheel-centre height
STEERING_RAD = 0.38  # FastRLAP: virtual steering joint
STEERING_KP = 25.0  # N m/rad, FastRLAP
SERVO_NM, SERVO_DAMPING = 2.0, 0.4  # standard 20 kg cm servo, 5 rad/s at the wheels (own estimate)
SPRING_N_PER_M, SPRING_NS_PER_M, SPRING_TRAVEL_M = 1000.0, 50.0, 0.02  # RACER
MOTOR_N = 50.0  # FastRLAP: throttle force range
MOTOR_MPS = 9.5  # VESC: ERPM limit 40 000 at 4200 ERPM per m/s
MOTOR_MPS2 = 9.0  # VESC: maximum acceleration (RACER); its smoother runs at 75 Hz, ours at 100 Hz
FRICTION = 0.9  # rubber on a hard floor, 0.8-1.0
CENTRE_OF_GRAVITY_M = 0.0625  # height; the car tips beyond track / 2 / height = 1.8 g and slides at 0.9 g
WIDTH_M, LENGTH_M = 0.28, 0.44  # over the bumpers
WALL_HEIGHT_M, WALL_THICKNESS_M = 0.3, 0.05
WALL_TOLERANCE_M = 0.01  # wall vertices this close to a straight line are left out: fewer boxes
TOUCH_GAP_S = 0.5  # a touch after this long without is a new contact
BUMPER_SOLREF, BUMPER_SOLIMP = (0.01, 1.0), (0.8, 0.95, 0.003, 0.5, 2.0)  # as in the model file
GRAVITY_MPS2 = 9.81

# Noise: accel and gyro of a hobby IMU on a vibrating chassis (UM7 class); velocity and pose of a tracking
# camera (T265 class); wheel speed of a VESC at 4200 ERPM per m/s; steering of a servo's potentiometer.
SENSORS = {
    "accel": (0.3, "mean"), "gyro": (0.02, "mean"), "shock": (0.3, "max"), "velocity": (0.03, "last"),
    "wheel_speed": (0.02, "last"), "steering": (0.005, "last"), "pose": (0.01, "last"),
}

MODEL = Path(__file__).parent / "models" / "car.xml"
_WALL_BIT = 2  # as in the model file


class CarTwin:
    """A simulated RC car between walls; implements `drivers.base.Twin`.

    `walls`: closed polylines (k, 2) in m; the side that `start` is on is free. Without noise the sensors keep
    their rates and latencies. With `realtime` simulated time follows the wall clock.
    """

    channels, command = CHANNELS, COMMAND

    def __init__(
        self,
        walls: Sequence[np.ndarray] = (),
        start: tuple[float, float, float] = (0.0, 0.0, 0.0),
        seed: int = 0,
        realtime: bool = False,
        noise: bool = True,
    ) -> None:
        self.start = start
        model = build(walls, start)
        sensors = [Sensor(c, SENSORS[c.name][0], SENSORS[c.name][1]) for c in CHANNELS]
        self.world = World(
            model, sensors, self._control, self._measure, self._watch,
            seed=seed, realtime=realtime, noise=noise,
        )
        self._wall_ids = frozenset(
            i for i in range(model.ngeom) if int(model.geom_contype[i]) == _WALL_BIT
        )
        self._low, self._high = np.asarray(COMMAND.low), np.asarray(COMMAND.high)
        hubs = [model.joint(f"hub_{w}") for w in ("fl", "fr", "rl", "rr")]
        self._hubs = [int(j.dofadr[0]) for j in hubs]
        self._servo = int(model.joint("servo").qposadr[0])
        self._open = False
        self._target = (0.0, 0.0)
        self._speed = 0.0  # setpoint of the motor controller, on its way to the target
        self._velocity = (0.0, 0.0, 0.0)  # world frame, at the last sample
        self._sampled = 0.0
        self._contacts, self._touching, self._touched = 0, False, -math.inf
        self._home = _at_rest()
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
        wanted = np.asarray(command, np.float64)
        if wanted.shape != (2,) or not np.isfinite(wanted).all():
            raise DriverError(f"car twin: a command is (speed, steering), two finite numbers, not {command}")
        speed, steering = np.clip(wanted, self._low, self._high)
        self._target = (float(speed), float(steering))

    def stop(self) -> None:
        """Brake at once, wheels straight."""
        self._target, self._speed = (COMMAND.safe[0], COMMAND.safe[1]), COMMAND.safe[0]

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
        self._velocity, self._touching, self._touched = (0.0, 0.0, 0.0), False, -math.inf
        self._sampled = -math.inf
        self.world.settle(qpos)

    def truth(self) -> dict[str, float]:
        """x, y (m), heading (rad), speed (m/s, forward), upright (1 on its wheels, -1 on its roof), contacts
        (running count of wall touches), touching (0/1). For eval, report and tests only."""
        data = self.world.data
        x, y = float(data.qpos[0]), float(data.qpos[1])
        rotation = _rotation(*data.qpos[3:7].tolist())
        vx, vy, vz = data.qvel[:3].tolist()
        return {
            "x": x, "y": y, "heading": math.atan2(rotation[3], rotation[0]),
            "speed": rotation[0] * vx + rotation[3] * vy + rotation[6] * vz, "upright": rotation[8],
            "contacts": float(self._contacts), "touching": float(self._touching),
        }

    def _check(self) -> None:
        if not self._open:
            raise DriverError("car twin: not open; call open() first")

    def _control(self, dt: float) -> None:
        speed, steering = self._target
        change = MOTOR_MPS2 * dt
        self._speed = min(max(speed, self._speed - change), self._speed + change)
        self.world.data.ctrl[:] = self._speed, steering

    def _measure(self) -> dict[str, tuple[float, ...]]:
        data = self.world.data
        now = data.time
        qpos, qvel = data.qpos.tolist(), data.qvel.tolist()
        r = _rotation(*qpos[3:7])
        vx, vy, vz = qvel[:3]
        dt = now - self._sampled or math.inf  # just placed
        # An IMU averages over its sample: the change of velocity, so that no shock falls between samples.
        ux, uy, uz = self._velocity
        ax, ay, az = (vx - ux) / dt, (vy - uy) / dt, (vz - uz) / dt + GRAVITY_MPS2
        accel = (
            r[0] * ax + r[3] * ay + r[6] * az,
            r[1] * ax + r[4] * ay + r[7] * az,
            r[2] * ax + r[5] * ay + r[8] * az,
        )
        self._velocity, self._sampled = (vx, vy, vz), now
        self._feel()
        heading = math.hypot(r[0], r[3]) or 1.0
        return {
            "accel": accel,
            "gyro": tuple(qvel[3:6]),
            "shock": (math.hypot(accel[0], accel[1]),),
            "velocity": (r[0] * vx + r[3] * vy + r[6] * vz, r[1] * vx + r[4] * vy + r[7] * vz),
            "wheel_speed": (WHEEL_RADIUS_M * sum(qvel[i] for i in self._hubs) / 4.0,),
            "steering": (qpos[self._servo],),
            "pose": (qpos[0], qpos[1], r[0] / heading, r[3] / heading),
        }

    def _watch(self) -> None:
        if self.world.data.ncon > len(self._hubs):  # more than the tyres; glancing touches last few steps
            self._feel()

    def _feel(self) -> None:
        data = self.world.data
        self._touching = data.ncon > 0 and any(
            i in self._wall_ids or j in self._wall_ids for i, j in data.contact.geom.tolist()
        )
        if self._touching:
            self._contacts += data.time - self._touched >= TOUCH_GAP_S
            self._touched = data.time


def build(walls: Sequence[np.ndarray], start: tuple[float, float, float]) -> mujoco.MjModel:
    """The compiled car between `walls`: boxes behind each polyline, seen from `start`."""
    spec = mujoco.MjSpec.from_file(str(MODEL))
    for wall in walls:
        for centre, half_length, angle in wall_boxes(np.asarray(wall, np.float64), start[:2]):
            spec.worldbody.add_geom(
                type=mujoco.mjtGeom.mjGEOM_BOX,
                pos=[*centre, WALL_HEIGHT_M / 2],
                size=[half_length, WALL_THICKNESS_M / 2, WALL_HEIGHT_M / 2],
                quat=[math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)],
                material="wall", contype=_WALL_BIT, conaffinity=0,
                friction=[0.3, 0.005, 0.0001], solref=BUMPER_SOLREF, solimp=BUMPER_SOLIMP,
            )
    return spec.compile()


def _at_rest() -> np.ndarray:
    """(nq,) the car standing on its springs on an open floor."""
    model = build([], (0.0, 0.0, 0.0))
    data = mujoco.MjData(model)
    mujoco.mj_step(model, data, round(2.0 / model.opt.timestep))
    return data.qpos.copy()


def wall_boxes(
    polyline: np.ndarray, inside: tuple[float, float]
) -> list[tuple[tuple[float, float], float, float]]:
    """(k, 2) closed polyline -> (centre, half length, angle) of boxes whose faces lie on it, on the side that
    `inside` is not on. Where the wall bends away, boxes are lengthened until their backs meet."""
    points = _simplify(polyline, WALL_TOLERANCE_M)
    ahead = np.roll(points, -1, axis=0) - points
    area = float(np.sum(points[:, 0] * np.roll(points[:, 1], -1) - np.roll(points[:, 0], -1) * points[:, 1]))
    if (area > 0) != _contains(points, inside):  # go round with the free side on the left
        points = points[::-1]
        ahead = np.roll(points, -1, axis=0) - points
    angles = np.arctan2(ahead[:, 1], ahead[:, 0])
    lengths = np.hypot(ahead[:, 0], ahead[:, 1])
    turns = np.remainder(angles - np.roll(angles, 1) + np.pi, 2 * np.pi) - np.pi  # where a segment starts
    extra = WALL_THICKNESS_M * np.tan(np.clip(turns, 0.0, 2.0) / 2)
    boxes = []
    for i, (point, angle, length) in enumerate(zip(points, angles, lengths, strict=True)):
        before, after = extra[i], extra[(i + 1) % len(points)]
        middle = (length + after - before) / 2
        c, s = math.cos(angle), math.sin(angle)
        x = point[0] + c * middle + s * WALL_THICKNESS_M / 2
        y = point[1] + s * middle - c * WALL_THICKNESS_M / 2
        boxes.append(((float(x), float(y)), float(length + before + after) / 2, float(angle)))
    return boxes


def _simplify(points: np.ndarray, tolerance: float) -> np.ndarray:
    """Closed polyline without the vertices that lie within `tolerance` of the rest (Douglas-Peucker)."""
    if len(points) > 1 and np.allclose(points[0], points[-1]):
        points = points[:-1]
    far = int(np.argmax(np.hypot(*(points - points[0]).T)))
    closed = np.vstack([points, points[:1]])
    keep = np.zeros(len(closed), bool)
    keep[[0, far, -1]] = True
    todo = [(0, far), (far, len(points))]
    while todo:
        a, b = todo.pop()
        if b - a < 2:
            continue
        chord, offset = closed[b] - closed[a], closed[a + 1 : b] - closed[a]
        along = np.clip(offset @ chord / max(float(chord @ chord), 1e-12), 0.0, 1.0)
        distance = np.hypot(*(offset - along[:, None] * chord).T)
        worst = int(np.argmax(distance))
        if distance[worst] > tolerance:
            middle = a + 1 + worst
            keep[middle] = True
            todo += [(a, middle), (middle, b)]
    return points[keep[:-1]]


def _contains(polygon: np.ndarray, point: tuple[float, float]) -> bool:
    """Even-odd rule."""
    x, y = polygon[:, 0] - point[0], polygon[:, 1] - point[1]
    x2, y2 = np.roll(x, -1), np.roll(y, -1)
    crosses = (y > 0) != (y2 > 0)
    at = x + (x2 - x) * -y / np.where(crosses, y2 - y, 1.0)
    return bool(np.count_nonzero(crosses & (at > 0)) % 2)


def _rotation(w: float, x: float, y: float, z: float) -> tuple[float, ...]:
    """Unit quaternion -> rotation matrix, row by row; in floats because it runs 100 times a second."""
    return (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )
