"""The RC car's declaration, which its twin and its hardware driver share (the driver comes later).

Sources: systems.md 1.1-1.4 (FastRLAP, RACER): VESC in speed mode, servo steering, IMU at 100 Hz, tracking
camera at 50 Hz; latencies are RACER's per-topic constants (IMU 40 ms, odometry 50 ms).
"""

from __future__ import annotations

from .base import Channel, Command

G = 9.81
CHANNELS = (
    # range +-16 g and +-2000 deg/s (InvenSense MPU-6050, the usual hobby IMU); means since the last read, gravity in
    Channel("accel", 3, "m/s^2", 100.0, 0.04, (10.0, 10.0, 10.0), most=(16 * G,) * 3, noisy=True),
    Channel("gyro", 3, "rad/s", 100.0, 0.04, (3.0, 3.0, 3.0), most=(34.9,) * 3, noisy=True),
    # peak horizontal |a| since the last read
    Channel("shock", 1, "m/s^2", 100.0, 0.04, (10.0,), observed=False, most=(16 * 2**0.5 * G,), noisy=True),
    # body frame, forward and left
    Channel("velocity", 2, "m/s", 50.0, 0.05, (3.0, 1.0), most=(15.0, 15.0), noisy=True),
    Channel("wheel_speed", 1, "m/s", 50.0, 0.04, (3.0,), most=(15.0,)),
    Channel("steering", 1, "rad", 50.0, 0.04, (0.38,), most=(0.6,)),
    # map frame; beyond 10 km a float32 is coarser than 1 mm
    Channel("pose", 4, "m, m, cos, sin", 50.0, 0.05, (5.0, 5.0, 1.0, 1.0), most=(1e4, 1e4, 1.2, 1.2), noisy=True),
)

COMMAND = Command(
    names=("speed", "steering"),
    units=("m/s", "rad"),
    action_low=(0.5, -0.38),  # FastRLAP: speed 2.5 + 2.0 a
    action_high=(4.5, 0.38),
    low=(-1.5, -0.38),  # backwards is for resets
    high=(4.5, 0.38),
    rate=(9.0, 4.0),  # VESC's maximum acceleration (RACER); servo: lock to lock in 0.2 s
    safe=(0.0, 0.0),
    keeps=(False, True),  # to brake in a bend
    # Over two trainings of 12,000 steps, crashes included: commands at most 1.9 m/s and 0.54 rad from what was
    # measured (99.9 %: 1.8 and 0.4); what was measured a tick later at most 1.0 m/s and 0.22 rad from them.
    measured=("wheel_speed", "steering"),
    reach=(2.0, 0.6),
    tolerance=(1.0, 0.25),
)
