"""A Go1-class quadruped's declaration, which its twin and its hardware driver share (the driver comes later).

Legs FR, FL, RR, RL; joints hip (abduction), thigh, calf, as Unitree's SDK orders them. Sources: Unitree's Go1 URDF
(lengths, ranges, torques, speeds: unitree_ros, BSD-3); hardware.md 3.2 (gains); APRL (systems.md 3.1: delay).
"""

from __future__ import annotations

from .base import Channel, Command

LEGS = ("FR", "FL", "RR", "RL")
JOINTS = tuple(f"{leg}_{joint}" for leg in LEGS for joint in ("hip", "thigh", "calf"))
KP, KD = 20.0, 1.0  # N m/rad, N m s/rad: of the motors' own position loop (APRL on a Go1)
TORQUE_NM = (23.7, 23.7, 35.55)  # a leg's motors
HIP_X_M, HIP_Y_M = 0.1881, 0.04675  # from the trunk's centre to a leg's abduction axis
ABDUCTION_M, THIGH_M, CALF_M, FOOT_RADIUS_M = 0.08, 0.213, 0.213, 0.023

# rad: standing, and the middle of the action box; legged_gym's for these legs at KP 20. They yield by a quarter of a
# radian under its weight: it stands 0.29 m high. With the hind feet no further back it would sit down on them.
NOMINAL = (0.0, 0.8, -1.5) * 2 + (0.0, 1.0, -1.5) * 2
# rad: lying with its legs under it, the hind feet so far back that it rises level, with 3 kg on its back as well
FOLDED = (0.0, 1.4, -2.7) * 2 + (0.0, 1.8, -2.7) * 2
SPREAD = (0.2, 0.4, 0.4) * 4  # rad: half the width of the action box (A Walk in the Park)

# 50 ms of delay from measurement to reading: APRL's, ten of its physics steps
CHANNELS = (
    # IMU: unit vector of gravity in the body frame, (0, 0, -1) upright; turning rates
    Channel("gravity", 3, "1", 100.0, 0.05, (1.0, 1.0, 1.0), most=(1.05,) * 3, noisy=True),
    Channel("gyro", 3, "rad/s", 100.0, 0.05, (3.0, 3.0, 3.0), most=(34.9,) * 3, noisy=True),
    Channel("joint_position", 12, "rad", 100.0, 0.05, (1.0,) * 12, most=(7.0,) * 12, noisy=True),
    Channel("joint_velocity", 12, "rad/s", 100.0, 0.05, (10.0,) * 12, most=(60.0,) * 12, noisy=True),
    Channel("foot_force", 4, "N", 100.0, 0.05, (100.0,) * 4, most=(1000.0,) * 4),
    # of the estimator, from the above: body frame, forward, left, up; x, y and heading since it began
    Channel("velocity", 3, "m/s", 100.0, 0.05, (1.0, 1.0, 1.0), most=(10.0,) * 3),
    Channel("pose", 4, "m, m, cos, sin", 100.0, 0.05, (5.0, 5.0, 1.0, 1.0), observed=False, most=(1e4, 1e4, 1.2, 1.2)),
)

COMMAND = Command(
    names=JOINTS,
    units=("rad",) * 12,
    action_low=tuple(n - s for n, s in zip(NOMINAL, SPREAD, strict=True)),
    action_high=tuple(n + s for n, s in zip(NOMINAL, SPREAD, strict=True)),
    low=(-0.863, -0.686, -2.818) * 4,
    high=(0.863, 4.501, -0.888) * 4,
    rate=(20.0,) * 12,  # rad/s: the slowest of its motors
    safe=FOLDED,
    keeps=(True,) * 12,  # it keeps its posture while held or not driven, and lies down when it stops
    measured=tuple(f"joint_position[{i}]" for i in range(12)),
    reach=(1.2,) * 12,  # rad: at KP, the torque of its hips and thighs
)
