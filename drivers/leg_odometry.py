"""Where a legged robot thinks it is, from its IMU and its legs alone: a foot that carries weight does not move.

The scheme is A Walk in the Park's (systems.md 2.2): the accelerometer predicts, the legs in stance correct, in a
Kalman filter. Frames: the trunk's, x forward, y left, z up; legs and joints in the order of `quadruped`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .quadruped import ABDUCTION_M, CALF_M, FOOT_RADIUS_M, HIP_X_M, HIP_Y_M, LEGS, THIGH_M

GRAVITY_MPS2 = 9.81
# A foot that carries more than this stands. A leg's share of the weight is 31 N, and what foot sensors say of a leg in
# the air is within a few N: one such false stance is worth the speed at which that leg swings.
STANCE_N = 15.0
# Variances of what one sample adds to the velocity by the accelerometer, and of what one leg says of it: only their
# ratio counts. A Walk in the Park has 0.1 for both, which follows the legs at once, but it is their slips that hurt:
# these blend over 0.1 s. Over six trots of 20 s in the twin that halves the error (to 0.04 m/s forward), and an
# accelerometer that is 0.2 m/s^2 off costs 0.02 m/s.
ACCEL_VARIANCE = 5e-5  # (m/s)^2
LEG_VARIANCE = 0.01  # (m/s)^2
STILL_VARIANCE = 1.0  # (m/s)^2: of "it does not move", where no leg knows better: it lies, or flies for a moment

_HIPS = [  # of each leg: where its first axis is, x and y, and how far to its left its plane is
    (HIP_X_M if leg[0] == "F" else -HIP_X_M, HIP_Y_M if leg[1] == "L" else -HIP_Y_M,
     ABDUCTION_M if leg[1] == "L" else -ABDUCTION_M) for leg in LEGS
]  # fmt: skip
Three = Sequence[float]
_NONE = (0.0, 0.0, 0.0)


def sole_moves(leg: int, angles: Three, rates: Three, sole: Three) -> tuple[Three, Three]:
    """Where the sole of a leg is (m), and how fast it moves (m/s) when its joints at `angles` (rad) turn at `rates`.
    `sole` is the point of the foot that is meant, from its centre (m, trunk's axes). Numbers, not arrays: on so few
    NumPy takes three times as long."""
    hip_x, hip_y, out = _HIPS[leg]
    turn, swing, bend = rates
    arm_x, arm_y, arm_z = sole
    cos, sin = math.cos(angles[0]), math.sin(angles[0])
    x, down, calf_x, calf_down = _in_plane(angles[1], angles[2])
    y, z = out * cos + down * sin, out * sin - down * cos
    shank = swing + bend  # how fast the calf, and with it the sole, turns about the thigh's axis (0, cos, sin)
    sinking = x * swing + calf_x * bend + arm_x * shank
    moves = (
        shank * (cos * arm_z - sin * arm_y) - down * swing - calf_down * bend,
        sin * sinking - turn * (z + arm_z),
        turn * (y + arm_y) - cos * sinking,
    )
    return (hip_x + x + arm_x, hip_y + y + arm_y, z + arm_z), moves


def _in_plane(thigh: float, calf: float) -> tuple[float, float, float, float]:
    """In the leg's plane, of the foot from the hip and from the knee: ahead, down, ahead, down (m)."""
    calf_x, calf_down = -CALF_M * math.sin(thigh + calf), CALF_M * math.cos(thigh + calf)
    return calf_x - THIGH_M * math.sin(thigh), calf_down + THIGH_M * math.cos(thigh), calf_x, calf_down


class LegOdometry:
    """Velocity and pose from samples of the sensors, one `update` a sample.

    `velocity`: (3,) m/s, body frame. `position`: (2,) m, and `heading`: rad, in the frame it was started in; both
    drift, as nothing measures them.
    """

    def __init__(self, pose: Three = _NONE) -> None:
        self.velocity: Three = _NONE
        self.position, self.heading = (float(pose[0]), float(pose[1])), float(pose[2])
        self._variance = LEG_VARIANCE  # of each component of the velocity: all are equally uncertain

    def update(
        self, dt: float, gravity: np.ndarray, gyro: np.ndarray, accel: np.ndarray, joint_position: np.ndarray,
        joint_velocity: np.ndarray, foot_force: np.ndarray,
    ) -> None:  # fmt: skip
        """Move on by dt (s). gravity: (3,) unit vector of it; gyro: (3,) rad/s; accel: (3,) m/s^2, with the reaction
        to gravity in; joints: (12,) rad and rad/s; foot_force: (4,) N."""
        down, (p, q, r), (x, y, z) = gravity.tolist(), gyro.tolist(), self.velocity
        felt = [a + GRAVITY_MPS2 * g for a, g in zip(accel.tolist(), down, strict=True)]
        x, y, z = (
            x + dt * (felt[0] + r * y - q * z), y + dt * (felt[1] + p * z - r * x), z + dt * (felt[2] + q * x - p * y)
        )  # fmt: skip
        said = self._by_legs(down, (p, q, r), joint_position, joint_velocity, foot_force)
        noise = LEG_VARIANCE / len(said) if said else STILL_VARIANCE
        variance = self._variance + ACCEL_VARIANCE
        gain = variance / (variance + noise)
        self._variance = variance * (1.0 - gain)
        share = gain / max(len(said), 1)
        by_x, by_y, by_z = (share * sum(each) for each in zip(*said, strict=True)) if said else _NONE
        kept = 1.0 - gain
        self.velocity = kept * x + by_x, kept * y + by_y, kept * z + by_z
        self._move(dt, down, q, r)

    def _by_legs(
        self, down: Three, turning: Three, joints: np.ndarray, rates: np.ndarray, forces: np.ndarray
    ) -> list[Three]:
        """What each leg in stance says of the trunk's velocity. A round foot rolls: what stands still is its sole."""
        p, q, r = turning
        sole = [FOOT_RADIUS_M * g for g in down]
        angles, speeds = joints.tolist(), rates.tolist()
        said: list[Three] = []
        for leg, force in enumerate(forces.tolist()):
            if force > STANCE_N:
                of_leg = slice(3 * leg, 3 * leg + 3)
                (x, y, z), (vx, vy, vz) = sole_moves(leg, angles[of_leg], speeds[of_leg], sole)
                said.append((r * y - q * z - vx, p * z - r * x - vy, q * x - p * y - vz))
        return said

    def _move(self, dt: float, down: Three, pitching: float, yawing: float) -> None:
        """Heading and position from the rates about y and z (rad/s) and the velocity."""
        level = math.hypot(down[1], down[2])  # cosine of the pitch
        if level < 0.1:  # it stands on its nose or tail, where a heading means nothing
            return
        roll_sin, roll_cos, pitch_sin = -down[1] / level, -down[2] / level, down[0]
        self.heading += dt * (pitching * roll_sin + yawing * roll_cos) / level
        vx, vy, vz = self.velocity
        ahead = level * vx + pitch_sin * (roll_sin * vy + roll_cos * vz)
        left = roll_cos * vy - roll_sin * vz
        c, s = math.cos(self.heading), math.sin(self.heading)
        x, y = self.position
        self.position = x + dt * (c * ahead - s * left), y + dt * (s * ahead + c * left)
