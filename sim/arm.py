"""The arm's MuJoCo twin: its channels and command over `models/arm.xml`, with a cube, a peg in its jaws, or a mark.

Sources: TheRobotStudio's SO-101 description and Feetech's data sheet (the model), hardware.md 1.1 (the bus).
`tests/test_sim_arm.py` holds the compiled model against their numbers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import mujoco
import numpy as np

from ..drivers import arm_joints
from ..drivers.arm import CHANNELS, COMMAND, HOME, JOINTS, SERVO_HZ, Servos, forward, inverse
from ..drivers.base import Channel, DriverError, Reading
from .twin import JITTER_S, KINDS, Sensor, World

BUS_DELAY_S = 0.01  # from a write to the servos: a turn of the bus and the computer before it (own estimate)
BACKLASH_RAD = math.radians(0.5)  # STS3215's data sheet: so far a joint turns before its servo gives torque
ENCODER_RAD = 2.0 * math.pi / 4096  # 12 bits a turn
TRACKER_M = 0.0015  # noise of the camera that tracks the object (own estimate)
SETTLE_S = 2.0  # for it to come to rest when it is built
TOUCH_GAP_S = 0.5  # a touch of the table after this long without is a new one

SCENES = ("cube", "peg", "mark")
X_M, Y_M = (0.09, 0.37), (-0.15, 0.15)  # where the object is placed, unless the twin is told otherwise
CUBE_M = 0.03  # its side

# (gain, offset) of a sensor that is `wrong`: readings that could be true
WRONG: dict[str, tuple[Sequence[float] | float, Sequence[float] | float]] = {
    "joint_position": (1.0, 0.2),  # rad: a horn a tooth or two further
    "joint_velocity": (0.5, 0.0),  # another gear
    "load": (-1.0, 0.0),  # swapped sign
    "tool": (1.0, (0.0, 0.03, 0.0)),  # m: a finger that is bent
    "object": (1.0, (0.0, 0.05, 0.0)),  # m: a camera that was moved
}

MODEL = Path(__file__).parent / "models" / "arm.xml"
Setting = float | Sequence[float]  # a number, or the (low, high) that each placement draws it from


_HOME = np.append(inverse(np.array(HOME[:3])), HOME[3])  # its joints, rad


class ArmTwin:
    """A simulated SO-101-class arm, bolted to its table; implements `drivers.base.Twin`.

    `scene`: cube, one of 30 mm that lies there; peg, held fast in the jaws, over a block with a hole for it, and the
    object that is tracked is its tip; mark, a place to reach and no body. `x` and `y` (m) are where cube or mark are
    placed; `friction` is a factor on the object's and the jaws'. `walls` and `start` mean nothing to it. Without noise
    the sensors keep their rates and latencies. With `realtime` simulated time follows the wall clock.
    """

    channels: tuple[Channel, ...] = CHANNELS
    command = COMMAND
    # what can fail, and how: a servo that is off gives no torque; its gears still brake
    failures = {c.name: KINDS for c in CHANNELS} | {joint: ("off",) for joint in JOINTS}
    # what the keywords may be: one of the choices, or a number or pair between low and high (`robot_env/fit.py` checks)
    settings: Mapping[str, tuple] = {
        "scene": ("choices", *SCENES), "x": (0.07, 0.38), "y": (-0.16, 0.16), "friction": (0.1, 2.0),
    }  # fmt: skip

    def __init__(
        self, walls: Sequence[np.ndarray] = (), start: tuple[float, float, float] = (0.0, 0.0, 0.0),
        seed: int = 0, realtime: bool = False, noise: bool = True, scene: str = "cube", x: Setting = X_M,
        y: Setting = Y_M, friction: Setting = 1.0,
    ) -> None:  # fmt: skip
        drawn = {"x": x, "y": y, "friction": friction}
        self._ranges = {name: np.broadcast_to(np.asarray(value, float), 2) for name, value in drawn.items()}
        self._draws = np.random.default_rng([seed, 0])
        self._scene = scene
        model = build(scene)
        tracker = {"object": noise * TRACKER_M}
        sensors = [
            Sensor(c, tracker.get(c.name, 0.0), jitter_s=noise * JITTER_S, wrong=WRONG[c.name]) for c in CHANNELS
        ]
        self.world = World(
            model, sensors, self._control, self._measure, lambda: None, seed, realtime, self._derive, self.failures
        )
        self._friction = model.geom_friction[:, 0].copy()
        self._part = np.array([_PARTS.get(model.geom(i).name, 0) for i in range(model.ngeom)])
        self._torque = model.actuator_forcerange.copy()
        self._off: list[str] = []
        self._waiting: deque[tuple[float, np.ndarray]] = deque()  # commands on their way to the servos
        self._command: np.ndarray | None = None  # the newest that has reached them
        self._servos: Servos | None = None  # stopped
        self._mark = np.zeros(3)
        self._open, self._contacts = False, 0
        self._rest = self._resting()
        self.place(start)

    def open(self) -> None:
        """Ready to read and write. Idempotent."""
        self._open = True

    def read(self) -> Reading:
        """The newest values. Raises DriverError before `open` or when the physics fails."""
        self._check()
        return self.world.read()

    def write(self, command: np.ndarray) -> None:
        """(4,) x, y, z in m and grip in rad, or (6,) joints in rad, clipped to the absolute limits; it reaches the
        servos BUS_DELAY_S later, at their next turn. Raises DriverError for nonsense."""
        self._check()
        if np.shape(command) != (self.command.size,) or not np.isfinite(command).all():
            names = ", ".join(self.command.names)
            raise DriverError(f"arm twin: a command is ({names}), as many finite numbers, not {command}")
        within = np.clip(command, self.command.low, self.command.high)
        self._waiting.append((self.world.now() + BUS_DELAY_S, within))

    def stop(self) -> None:
        """At once every joint holds where it is, less the degree or two that it weighs on its servo: the tool sinks by
        some mm, and what is gripped is held by the gears' friction alone. The next write ends that."""
        self._waiting.clear()
        self._command, self._servos = None, None
        self._target = self._encoders()

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
        """At rest where HOME lets it sink to, its jaws open, and the object drawn anew, squarely before it; the sensors
        read that at once. An arm is bolted down: it has no use for `pose`. Friction is drawn anew, too."""
        x, y, friction = (float(self._draws.uniform(*self._ranges[name])) for name in self._ranges)
        self.world.model.geom_friction[:, 0] = friction * self._friction
        turn = math.atan2(y, x) / 2
        place = [x, y, CUBE_M / 2, math.cos(turn), 0.0, 0.0, math.sin(turn)]
        self._mark[:] = place[:3]
        if self._scene == "mark":
            self.world.model.site("mark").pos[:] = self._mark
        self.settle(np.append(self._rest, place if self._scene == "cube" else []))

    def settle(self, qpos: np.ndarray, target: np.ndarray = _HOME) -> None:
        """At rest in any state: (6,) joints, and (7,) place and quaternion of a cube. The servos hold `target` (6,)."""
        self._waiting.clear()
        self._command, self._servos = None, Servos(target)
        self._target, self._turn = np.array(target), -1
        self._touched, self._touching, self._gripped = -math.inf, False, self._scene == "peg"
        self._seen = self._rest
        self.world.settle(qpos)

    def fail(self, part: str, kind: str, start: float, lasts: float = math.inf) -> None:
        """Let a part of `failures` fail at `start` (s on this twin's clock) for `lasts` seconds."""
        self.world.fail(part, kind, start, lasts)

    def truth(self) -> dict[str, float]:
        """x, y (m) and heading (rad; without a cube the arm's) of the object; speed (m/s) of the tool; upright (1: it
        is bolted down); contacts (running count of times the arm or its peg hit the table), touching (0/1); object_x
        to _z and tool_x to _z (m), gripped (0/1: both jaws touch the object). For eval, report and tests only."""
        qpos, moment = self.world.data.qpos, 1e-6
        thing, tool = self._object(), forward(qpos)
        speed = np.linalg.norm(forward(qpos[:6] + moment * self.world.data.qvel[:6]) - tool) / moment
        heading = 2 * math.atan2(qpos[12], qpos[9]) if self._scene == "cube" else float(qpos[0])
        return {
            "x": float(thing[0]), "y": float(thing[1]), "heading": math.remainder(heading, 2 * math.pi),
            "speed": float(speed), "upright": 1.0, "contacts": float(self._contacts),
            "touching": float(self._touching), **{f"object_{a}": float(v) for a, v in zip("xyz", thing, strict=True)},
            **{f"tool_{a}": float(v) for a, v in zip("xyz", tool, strict=True)}, "gripped": float(self._gripped),
        }  # fmt: skip

    def _check(self) -> None:
        if not self._open:
            raise DriverError("arm twin: not open; call open() first")

    def _resting(self) -> np.ndarray:
        """(6,) joints where it comes to rest when it is told to be at HOME: it weighs on its servos."""
        model = self.world.model
        scratch = mujoco.MjData(model)
        scratch.qpos[:6] = _HOME
        for _ in range(round(SETTLE_S / self.world.dt)):
            scratch.ctrl[:] = _played(_HOME, scratch.qpos[:6])
            mujoco.mj_step(model, scratch)
        return scratch.qpos[:6].copy()

    def _control(self, dt: float) -> None:
        data = self.world.data
        while self._waiting and self._waiting[0][0] <= data.time + 1e-6:
            self._command = self._waiting.popleft()[1]
        turn = int(data.time * SERVO_HZ + 1e-6)
        if turn != self._turn and self._command is not None:
            self._servos = self._servos or Servos(self._encoders())  # after a stop: from where it is by now
            self._target = self._servos.step(self._command)
        self._turn = turn
        self._power()
        data.ctrl[:] = _played(self._target, data.qpos[:6])

    def _power(self) -> None:
        """What each servo can give: nothing where it failed."""
        off = list(self.world.broken())
        if off != self._off:
            self._off = off
            self.world.model.actuator_forcerange[:] = np.where(np.isin(JOINTS, off)[:, None], 0.0, self._torque)

    def _encoders(self) -> np.ndarray:
        """(6,) rad: the joints as they are measured."""
        return ENCODER_RAD * np.round(self.world.data.qpos[:6] / ENCODER_RAD)

    def _measure(self) -> dict[str, np.ndarray]:
        data = self.world.data
        self._feel()
        return {
            "joint_position": self._encoders(), "joint_velocity": data.qvel[:6].copy(),
            "load": data.actuator_force.copy(),
        }  # fmt: skip

    def _derive(self, carried: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray]:
        """The tool, by the joints as they were last measured, unless that was nonsense; and what the tracker sees."""
        joints = carried.get("joint_position")
        if joints is not None and (np.abs(joints) <= _RANGE).all():
            self._seen = joints
        return {"tool": forward(self._seen), "object": self._object()}

    def _object(self) -> np.ndarray:
        """(3,) m: the middle of the cube or mark, or the tip of the peg (as the last step of the physics found it)."""
        data = self.world.data
        if self._scene == "cube":
            return data.qpos[6:9].copy()
        return self._mark.copy() if self._scene == "mark" else data.site("peg_tip").xpos.copy()

    def _feel(self) -> None:
        """Who touches whom."""
        met = set(self._part[self.world.data.contact.geom].sum(axis=1).tolist())
        self._gripped = self._scene == "peg" or {_CUBE + _FINGER, _CUBE + _JAW} <= met
        self._touching = not met.isdisjoint((_TABLE + _ARM, _TABLE + _FINGER, _TABLE + _JAW))
        if self._touching:
            self._contacts += self.world.data.time - self._touched >= TOUCH_GAP_S
            self._touched = self.world.data.time


class JointArmTwin(ArmTwin):
    """The same, told its joints."""

    command = arm_joints.COMMAND


# parts that are told apart when they touch: the sum of two says which two
_TABLE, _ARM, _FINGER, _JAW, _CUBE = 1, 2, 4, 8, 16
_PARTS = {
    "table": _TABLE, "finger": _FINGER, "finger_tip": _FINGER, "jaw": _JAW, "jaw_tip": _JAW, "cube": _CUBE,
    **dict.fromkeys(("upper_arm", "forearm", "wrist", "palm", "peg_head", "peg"), _ARM),
}  # fmt: skip
_RANGE = next(channel.range for channel in CHANNELS if channel.name == "joint_position")
_ONLY = {"cube": ("cube",), "peg": ("peg", "block"), "mark": ("mark",)}  # what each scene has of its own


def _played(target: np.ndarray, joints: np.ndarray) -> np.ndarray:
    """(6,) what the servos pull towards: a joint within the backlash of its `target` may stay where it is."""
    return np.minimum(np.maximum(joints, target - BACKLASH_RAD / 2), target + BACKLASH_RAD / 2)


def build(scene: str = "cube") -> mujoco.MjModel:
    """The compiled arm at its table, with what belongs to the `scene`."""
    spec = mujoco.MjSpec.from_file(str(MODEL))
    for other, names in _ONLY.items():
        for name in names if other != scene else ():
            spec.delete(spec.body(name) or spec.site(name))
    return spec.compile()
