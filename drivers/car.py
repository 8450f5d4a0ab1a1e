"""The RC car's declaration, which its twin and its hardware driver share (the driver comes later).

Sources: systems.md 1.1-1.4 (FastRLAP, RACER): VESC in speed mode, servo steering, IMU at 100 Hz, tracking
camera at 50 Hz; latencies are RACER's per-topic constants (IMU 40 ms, odometry 50 ms).
"""

from __future__ import annotations

from .base import Channel, Command

CHANNELS = (
    Channel("accel", 3, "m/s^2", 100.0, 0.04, (10.0, 10.0, 10.0)),  # mean since the last read, gravity in
    Channel("gyro", 3, "rad/s", 100.0, 0.04, (3.0, 3.0, 3.0)),  # mean since the last read
    Channel("shock", 1, "m/s^2", 100.0, 0.04, (10.0,), observed=False),  # peak horizontal |a| since the last
    Channel("velocity", 2, "m/s", 50.0, 0.05, (3.0, 1.0)),  # body frame, forward and left
    Channel("wheel_speed", 1, "m/s", 50.0, 0.04, (3.0,)),
    Channel("steering", 1, "rad", 50.0, 0.04, (0.38,)),
    Channel("pose", 4, "m, m, cos, sin", 50.0, 0.05, (5.0, 5.0, 1.0, 1.0)),  # map frame
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
)
