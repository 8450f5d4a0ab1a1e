"""Where a legged robot thinks it is, from its IMU and its legs alone: a foot that carries weight does not move.

The scheme is A Walk in the Park's (systems.md 2.2): the accelerometer predicts, the legs in stance correct, in a
Kalman filter. Frames: the trunk's, x forward, y left, z up; legs and joints in the order of `quadruped`.
"""

from __future__ import annotations

import math

import numpy as np

from .quadruped import ABDUCTION_M, CALF_M, FOOT_RADIUS_M, HIP_X_M, HIP_Y_M, LEGS, THIGH_M

GRAVITY_MPS2 = 9.81
STANCE_N = 10.0  # a foot that carries more than this stands; a leg's share of the weight is 31 N
# Variances of what one sample adds to the velocity by the accelerometer, and of what one leg says of it: only their
# ratio counts. A Walk in the Park has 0.1 for both, which follows the legs at once, but it is their slips that hurt:
# these blend over 0.1 s. Over six trots of 20 s in the twin that halves the error (to 0.04 m/s forward), and an
# accelerometer that is 0.2 m/s^2 off costs 0.02 m/s. A higher STANCE_N misses the end of a step, and drifts more.
ACCEL_VARIANCE = 5e-5  # (m/s)^2
LEG_VARIANCE = 0.01  # (m/s)^2
STILL_VARIANCE = 1.0  # (m/s)^2: of "it does not move", where no leg knows better: it lies, or flies for a moment

_FRONT = np.array([1.0 if leg[0] == "F" else -1.0 for leg in LEGS])
_LEFT = np.array([1.0 if leg[1] == "L" else -1.0 for leg in LEGS])
_HIP = np.array([HIP_X_M * _FRONT, HIP_Y_M * _LEFT, np.zeros(4)]).T
_ABDUCTION = ABDUCTION_M * _LEFT


def feet(joints: np.ndarray) -> np.ndarray:
    """(12,) joint angles in rad -> (4, 3) centres of the feet in m."""
    return _Legs(joints).feet


def jacobians(joints: np.ndarray) -> np.ndarray:
    """(12,) joint angles in rad -> (4, 3, 3): how the centre of each foot (m) moves with its three joints (rad)."""
    return _Legs(joints).jacobians.transpose(2, 0, 1)


class _Legs:
    """Kinematics of the four legs in closed form. A leg's plane holds x and `down`; its normal is `axis`."""

    def __init__(self, joints: np.ndarray) -> None:
        angles = np.array(joints, np.float64).reshape(4, 3)
        angles[:, 2] += angles[:, 1]  # of the calf, from the vertical of the leg's plane
        (sin, sin_thigh, sin_calf), (cos, cos_thigh, cos_calf) = np.sin(angles).T, np.cos(angles).T
        calf_x, calf_down = -CALF_M * sin_calf, CALF_M * cos_calf
        x, down = calf_x - THIGH_M * sin_thigh, calf_down + THIGH_M * cos_thigh
        y, z = _ABDUCTION * cos + down * sin, _ABDUCTION * sin - down * cos
        self.axis_y, self.axis_z = cos, sin
        self.feet = _HIP + np.array([x, y, z]).T
        zero = np.zeros(4)
        self.jacobians = np.array([  # (3, 3, 4): of x, y, z, by the leg's joints, of each leg
            [zero, -down, -calf_down], [-z, sin * x, sin * calf_x], [y, -cos * x, -cos * calf_x],
        ])  # fmt: skip

    def moving(self, rates: np.ndarray, arm: np.ndarray) -> np.ndarray:
        """(4, 3) velocity in m/s of the point of each calf that is `arm` (m, (3,), trunk's axes) from its foot, when
        the (12,) joints turn at `rates` (rad/s)."""
        x, y, z = arm
        by = self.jacobians.copy()
        by[1, 0] -= z  # and what each joint's axis crossed with `arm` adds
        by[2, 0] += y
        by[0, 1:] += self.axis_y * z - self.axis_z * y
        by[1, 1:] += self.axis_z * x
        by[2, 1:] -= self.axis_y * x
        return (by * np.asarray(rates, np.float64).reshape(4, 3).T).sum(axis=1).T


class LegOdometry:
    """Velocity and pose from samples of the sensors, one `update` a sample.

    `velocity`: (3,) m/s, body frame. `position`: (2,) m, and `heading`: rad, in the frame it was started in; both
    drift, as nothing measures them.
    """

    def __init__(self, pose: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        self.velocity = np.zeros(3)
        self.position, self.heading = np.array(pose[:2], np.float64), float(pose[2])
        self._variance = LEG_VARIANCE  # of each component of the velocity: all are equally uncertain

    def update(
        self, dt: float, gravity: np.ndarray, gyro: np.ndarray, accel: np.ndarray, joint_position: np.ndarray,
        joint_velocity: np.ndarray, foot_force: np.ndarray,
    ) -> None:  # fmt: skip
        """Move on by dt (s). gravity: (3,) unit vector of it; gyro: (3,) rad/s; accel: (3,) m/s^2, with the reaction
        to gravity in; joints: (12,) rad and rad/s; foot_force: (4,) N."""
        up = -np.asarray(gravity, np.float64)
        x, y, z = (float(rate) for rate in gyro)
        turning = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])  # times a vector: the rates cross it
        self.velocity += dt * (accel - GRAVITY_MPS2 * up - turning @ self.velocity)
        self._variance += ACCEL_VARIANCE
        stance = np.asarray(foot_force) > STANCE_N
        n = int(stance.sum())
        if n:
            said = stance @ self._by_legs(up, turning, joint_position, joint_velocity) / n
            noise = LEG_VARIANCE / n
        else:
            said, noise = np.zeros(3), STILL_VARIANCE
        gain = self._variance / (self._variance + noise)
        self.velocity += gain * (said - self.velocity)
        self._variance *= 1.0 - gain
        self._move(dt, up, y, z)

    def _by_legs(self, up: np.ndarray, turning: np.ndarray, joints: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """(4, 3) velocity of the trunk if each foot stood. A round foot rolls: what stands still is its sole."""
        legs, sole = _Legs(joints), -FOOT_RADIUS_M * up
        return -legs.moving(rates, sole) - (legs.feet + sole) @ turning.T

    def _move(self, dt: float, up: np.ndarray, pitching: float, yawing: float) -> None:
        """Heading and position from the rates about y and z (rad/s) and the velocity."""
        level = math.hypot(up[1], up[2])  # cosine of the pitch
        if level < 0.1:  # it stands on its nose or tail, where a heading means nothing
            return
        roll_sin, roll_cos = up[1] / level, up[2] / level
        self.heading += dt * (pitching * roll_sin + yawing * roll_cos) / level
        vx, vy, vz = self.velocity
        ahead = level * vx - up[0] * (roll_sin * vy + roll_cos * vz)
        left = roll_cos * vy - roll_sin * vz
        c, s = math.cos(self.heading), math.sin(self.heading)
        self.position += dt * np.array([c * ahead - s * left, s * ahead + c * left])
