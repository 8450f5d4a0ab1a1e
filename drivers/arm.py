"""An SO-101-class arm's declaration and kinematics, which its twin and its driver share (the driver comes later).

It is told where its tool shall be: five joints place a point, and point the tool as steeply down at it as they can. Or
it is told its joints (`arm_joints.py`). The map frame has its origin on the table below the first axis: x forward, y
left, z up.

Sources: TheRobotStudio's SO-101 URDF, new calibration (lengths, ranges: Apache-2.0); Feetech's STS3215 data sheet
(12 V: 30 kg cm, 45 rpm, backlash of 0.5 degrees); reliability.md 5.4 (speeds, tolerance); hardware.md 1.1 (the bus).
"""

from __future__ import annotations

import math

import numpy as np

from .base import Channel, Command

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
# rad, each from the middle of its range; of the gripper from where its jaws are parallel
LOW = (-1.91986, -1.74533, -1.69, -1.65806, -2.74385, -0.174533)
HIGH = (1.91986, 1.74533, 1.69, 1.65806, 2.84121, 1.74533)
SHOULDER_M = (0.0304, 0.1166)  # the lift's axis: ahead of the pan's, and above the table
UPPER_M, FORE_M, TOOL_M = 0.1160, 0.1350, 0.1592  # shoulder to elbow, to wrist, to between the tips of the jaws
# rad above level at zero: the upper arm leans forward, the forearm is almost level, and the tool is
UPPER_RAD, FORE_RAD = math.atan2(0.11257, 0.028), math.atan2(0.0052, 0.1349)
REACH_M = 0.245  # of the wrist from the shoulder; 6 mm short of straight
TORQUE_NM, SPEED_RADPS = 2.94, 4.71  # at 12 V: stalled, and free
SERVO_HZ = 50.0  # all six are read and written so often: 3.5 ms a turn of the bus (hardware.md 1.1)
JOINT_RADPS = math.radians(90.0)  # of each joint's target, so that no wish between here and there is a jerk
TOOL_MPS = 0.43  # of the tool, where joints are told: as fast as it may be along all three axes at once, where it is
CLEAR_M = 0.05  # elbow and wrist are no lower above the table, where joints are told

HOME = (0.16, 0.0, 0.10, 0.6)  # where it rests, jaws open: m, m, m, rad

CHANNELS = (
    Channel("joint_position", 6, "rad", SERVO_HZ, 0.01, (1.0,) * 6, most=(3.2,) * 6),
    Channel("joint_velocity", 6, "rad/s", SERVO_HZ, 0.01, (1.0,) * 6, most=(12.0,) * 6),
    Channel("load", 6, "N m", SERVO_HZ, 0.01, (1.0,) * 6, most=(4.0,) * 6),  # what the servos give
    Channel("tool", 3, "m", SERVO_HZ, 0.01, (0.1,) * 3, most=(0.6,) * 3),  # between the tips, by the joints
    # middle of the object, as a camera that tracks it has it
    Channel("object", 3, "m", 30.0, 0.05, (0.1,) * 3, most=(2.0,) * 3),
)

COMMAND = Command(
    names=("x", "y", "z", "grip"),
    units=("m", "m", "m", "rad"),
    action_low=(0.07, -0.16, 0.012, 0.0),
    action_high=(0.38, 0.16, 0.20, 0.8),
    # the workspace: in front of it and above the table; what little lies too near the base is approached
    low=(0.06, -0.17, 0.010, -0.1),
    high=(0.39, 0.17, 0.22, 1.0),
    rate=(0.25, 0.25, 0.25, 0.8),
    safe=HOME,
    stays=True,
    measured=("tool[0]", "tool[1]", "tool[2]", "joint_position[5]"),
    reach=(0.05, 0.05, 0.05, 2.0),  # m: how hard it can press
    tolerance=(0.1, 0.1, 0.1, 2.0),
)


def forward(joints: np.ndarray) -> np.ndarray:
    """Where the tool is: (5,) or (6,) joint angles in rad -> (3,) m."""
    return np.array(_places(joints)[2])


def _places(joints: np.ndarray) -> tuple[float, float, tuple[float, float, float]]:
    """Heights of elbow and wrist, and the place of the tool, m."""
    pan, lift, elbow, wrist = (float(q) for q in joints[:4])
    upper, fore, tool = UPPER_RAD - lift, FORE_RAD - lift - elbow, -lift - elbow - wrist
    high_elbow = SHOULDER_M[1] + UPPER_M * math.sin(upper)
    high_wrist = high_elbow + FORE_M * math.sin(fore)
    out = SHOULDER_M[0] + UPPER_M * math.cos(upper) + FORE_M * math.cos(fore) + TOOL_M * math.cos(tool)
    place = out * math.cos(pan), out * math.sin(pan), high_wrist + TOOL_M * math.sin(tool)
    return high_elbow, high_wrist, place


def outside(joints: np.ndarray) -> float:
    """m by which the tool is out of its workspace, and elbow and wrist nearer to the table than CLEAR_M, in all."""
    elbow, wrist, place = _places(joints)
    beyond = sum(max(a - p, p - b, 0.0) for p, a, b in zip(place, COMMAND.low, COMMAND.high, strict=False))
    return beyond + max(CLEAR_M - elbow, 0.0) + max(CLEAR_M - wrist, 0.0)


def inverse(place: np.ndarray) -> np.ndarray:
    """The (5,) joint angles in rad at which the tool is at `place` (3,) m, pointing down where arm and wrist allow it,
    else leaning out as little as they do. What cannot be reached is approached; angles stay within their ranges.
    """
    x, y, z = (float(v) for v in place)
    out, up = math.hypot(x, y) - SHOULDER_M[0], z - SHOULDER_M[1]  # of the tool, from the shoulder
    wrist_out, wrist_up = out, up + TOOL_M
    if math.hypot(wrist_out, wrist_up) > REACH_M:  # where circles around shoulder and tool meet, the upper one
        far = max(math.hypot(out, up), 1e-9)
        along = min((far * far + REACH_M**2 - TOOL_M**2) / (2.0 * far), REACH_M)
        across = math.sqrt(max(REACH_M**2 - along * along, 0.0))
        wrist_out, wrist_up = (along * out - across * up) / far, (along * up + across * out) / far
    upper, fore = _two_links(wrist_out, wrist_up, FORE_M)
    tool = math.atan2(up - wrist_up, out - wrist_out)
    if fore - FORE_RAD - tool > HIGH[3]:  # the wrist bends no further: forearm and tool are one link
        upper, hand = _two_links(out, up, _HAND_M)
        fore = hand + _HAND_RAD
        tool = fore - FORE_RAD - HIGH[3]
    lift = UPPER_RAD - upper
    elbow = FORE_RAD - fore - lift
    found = [math.atan2(y, x), lift, elbow, -tool - lift - elbow, 0.0]
    return np.clip([math.remainder(q, 2.0 * math.pi) for q in found], LOW[:5], HIGH[:5])


def _two_links(out: float, up: float, second_m: float) -> tuple[float, float]:
    """Angles above level of the upper arm and of a second link whose end is there, from the shoulder; elbow up."""
    span = max(math.hypot(out, up), 1e-9)
    bend = (UPPER_M**2 + span**2 - second_m**2) / (2.0 * UPPER_M * span)
    upper = math.atan2(up, out) + math.acos(min(max(bend, -1.0), 1.0))
    return upper, math.atan2(up - UPPER_M * math.sin(upper), out - UPPER_M * math.cos(upper))


# the forearm and the tool with the wrist bent as far as it goes: how long, and how far the forearm is above that line
_BENT_RAD = FORE_RAD + HIGH[3]
_HAND_M = math.sqrt(FORE_M**2 + TOOL_M**2 + 2.0 * FORE_M * TOOL_M * math.cos(_BENT_RAD))
_HAND_RAD = math.atan2(TOOL_M * math.sin(_BENT_RAD), FORE_M + TOOL_M * math.cos(_BENT_RAD))


class Servos:
    """From where the tool or the joints shall be to what the servos are told, at SERVO_HZ: no joint faster than
    JOINT_RADPS; and by joints the tool no faster than TOOL_MPS, and nothing further out of the workspace than it is."""

    def __init__(self, joints: np.ndarray) -> None:
        """`joints`: (6,) rad, where they are measured: at the end of a range perhaps a step of the encoder out."""
        self.target = np.clip(joints, LOW, HIGH)

    def step(self, command: np.ndarray) -> np.ndarray:
        """(4,) command for the tool, or (6,) for the joints -> (6,) joint targets in rad, within their ranges."""
        led = len(command) == COMMAND.size
        wanted = np.append(inverse(command[:3]), command[3]) if led else command
        most = JOINT_RADPS / SERVO_HZ
        then = np.clip(self.target + np.clip(wanted - self.target, -most, most), LOW, HIGH)
        self.target = then if led else self._within(then)
        return self.target.copy()

    def _within(self, then: np.ndarray) -> np.ndarray:
        """As near to `then` (6,) as may be, joint by joint: so the tool slides along the edge of its workspace."""
        now, place = self.target, forward(self.target)
        single = np.where(np.eye(len(now), dtype=bool), then, now)  # one joint moves at a time
        way = sum(float(np.linalg.norm(forward(joints) - place)) for joints in single)
        then = now + (then - now) * min(1.0, TOOL_MPS / SERVO_HZ / max(way, 1e-9))
        now, out = now.copy(), outside(now)
        for i, before in enumerate(now.tolist()):
            now[i] = then[i]
            if (moved := outside(now)) > out:
                now[i] = before
            else:
                out = moved
        return now
