"""Pure pursuit, the scripted driver: R. C. Coulter, Implementation of the Pure Pursuit Path Tracking
Algorithm, CMU-RI-TR-92-01, 1992."""

from __future__ import annotations

import math

import numpy as np

from .track import Line

# the grid that is searched for the best baseline
SPEEDS = tuple(0.5 + 0.25 * k for k in range(17))  # m/s, 0.5 ... 4.5
LOOKAHEADS = tuple(round(0.4 + 0.2 * k, 1) for k in range(7))  # m, 0.4 ... 1.6

WHEELBASE_M, MAX_STEER_RAD = 0.2965, 0.38  # systems.md 1.2


class Pursuit:
    """Steers a car-like robot towards a point `lookahead_m` further along the line, at a constant speed.

    Progress is followed from call to call, so that a neighbouring stretch is never mistaken for the own one.
    """

    def __init__(self, line: Line, speed_mps: float, lookahead_m: float) -> None:
        self._line, self._speed, self._lookahead = line, speed_mps, lookahead_m
        self._along: float | None = None

    def act(self, pose: np.ndarray) -> tuple[float, float]:
        """(speed m/s, steering rad, left positive) for a pose (x m, y m, cos, sin heading) of the centre.

        Coulter's arc touches the heading at the rear axle, half a wheelbase behind the pose.
        """
        x, y, cos, sin = (float(v) for v in pose)
        s, offset = self._line.project((x, y), self._along)
        if abs(offset) > 2 * self._lookahead:  # it was set down elsewhere
            s, _ = self._line.project((x, y))
        self._along = s
        gx, gy = self._line.at(s + self._lookahead)
        dx, dy = gx - (x - cos * WHEELBASE_M / 2), gy - (y - sin * WHEELBASE_M / 2)
        ahead, left = cos * dx + sin * dy, cos * dy - sin * dx
        if ahead <= 0.0:  # the goal is behind: turn round on the tightest arc
            return self._speed, math.copysign(MAX_STEER_RAD, left)
        curvature = 2.0 * left / max(dx * dx + dy * dy, 1e-6)  # 2 sin(alpha) / distance
        steering = math.atan(WHEELBASE_M * curvature)
        return self._speed, min(max(steering, -MAX_STEER_RAD), MAX_STEER_RAD)
