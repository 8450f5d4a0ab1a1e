"""Getting up, by a script over readings alone: fold the legs, kick over if it lies on its back or a side, rise.

The kick was found by drawing poses at random in the twin: a dog on its back that swings folded legs over its head
and past it pushes itself off the ground and rolls over. `tests/get_up.py` measures it.
"""

from __future__ import annotations

import numpy as np

from ..drivers.base import Command, Reading

LEFT = np.array([-1.0, 1.0, -1.0, 1.0])  # legs FR, FL, RR, RL: which way a positive hip turns a leg outwards
KICK_LOW = (0.37, 3.84, -2.29)  # rad: hip outwards, thigh, calf, of the legs on the side that lies lower
KICK_HIGH = (0.28, 4.12, -2.73)
OVER = 0.8  # cosine of the tilt (37 degrees) above which its legs are under it
FOLD_S, KICK_S, RISE_S = 0.4, 1.0, 1.0
TURN_RADPS = 6.0  # how fast the joints are led: at three times that it rolls no surer, and half as hard again
HIGH_RAD = 0.5  # further than this from folded it goes on folding, for LONG_S at most
LONG_S = 1.5
STILL_S, LATE_S = 0.3, 1.5  # it stood for so long; it does not stand so long after it rose
# cosine of the tilt (14 degrees); the calves yield by 0.25 rad under its weight, and by 0.4 with 3 kg on its back
STANDS, NEAR_RAD = 0.97, 0.55
TRIES = 8  # to get up, then it asks for a hand
HAND_S = 2.0  # upright for so long, and a hand is done


def stands(reading: Reading, pose: np.ndarray) -> bool:
    """Whether it is upright with its joints near `pose` (n,) in rad."""
    joints, up = reading.values["joint_position"].astype(np.float64), -float(reading.values["gravity"][2])
    return up > STANDS and bool(np.abs(joints - pose).max() < NEAR_RAD)


class StandUp:
    """A `Recovery` for a robot with a dog's four legs, which reads gravity and joint_position.

    Standing is the middle of the command's action box, folded is what is safe.
    """

    def __init__(self, command: Command, hz: float) -> None:
        self.needs_hand = False
        self._command, self._hz = command, hz
        self._standing, self._folded = command.to_command(np.zeros(command.size)), np.array(command.safe)
        self._target: np.ndarray | None = None  # rad: where the joints are led
        self._phase, self._ticks = "fold", 0
        self.kicks = 0  # so far, for reports
        self._tries, self._side = 0, 0.0
        self._still = 0  # ticks in a row

    def wish(self, reading: Reading) -> np.ndarray | None:
        """(12,) action-unit wish, or None when it stands."""
        joints, up = reading.values["joint_position"].astype(np.float64), -float(reading.values["gravity"][2])
        if self._target is None:
            self._target = joints
        self._ticks += 1
        elapsed = self._ticks / self._hz
        if self.needs_hand:
            self._still = self._still + 1 if up > OVER else 0
            if self._still >= HAND_S * self._hz:
                self.needs_hand, self._tries, self.kicks = False, 0, 0
                self._enter("fold")
            return self._lead(self._folded)
        if self._phase == "rise":
            self._still = self._still + 1 if stands(reading, self._standing) else 0
            if elapsed > RISE_S and self._still >= STILL_S * self._hz:
                return None
            if up < OVER or elapsed > RISE_S + LATE_S:
                self._again()
        elif self._phase == "kick":
            if up > OVER or elapsed > KICK_S:
                self._enter("fold")
        elif elapsed >= FOLD_S and (elapsed >= LONG_S or np.abs(joints - self._folded).max() < HIGH_RAD):
            if up > OVER:
                self._enter("rise")
            else:
                self._kick(reading)
        if self._phase == "rise":  # a straight way there, from folded
            part = min(self._ticks / self._hz / RISE_S, 1.0)
            return self._lead(self._folded + part * (self._standing - self._folded))
        return self._lead(self._folded if self._phase == "fold" else self._kicking())

    def _kick(self, reading: Reading) -> None:
        """Roll towards the side that lies lower; from the third kick on every other one the other way."""
        lower = 1.0 if reading.values["gravity"][1] > 0.0 else -1.0
        self._side = -lower if self.kicks >= 2 and self.kicks % 2 else lower
        self.kicks += 1
        self._enter("kick")
        if self.kicks > 1:
            self._count()

    def _kicking(self) -> np.ndarray:
        low = self._side * LEFT[:, None] > 0.0
        legs = np.where(low, KICK_LOW, KICK_HIGH)
        legs[:, 0] *= LEFT
        return legs.ravel()

    def _again(self) -> None:
        """It did not stand: from the beginning."""
        self._enter("fold")
        self._count()

    def _count(self) -> None:
        self._tries += 1
        self.needs_hand = self._tries >= TRIES

    def _enter(self, phase: str) -> None:
        self._phase, self._ticks, self._still = phase, 0, 0

    def _lead(self, pose: np.ndarray) -> np.ndarray:
        most = TURN_RADPS / self._hz
        assert self._target is not None
        self._target = self._target + np.clip(pose - self._target, -most, most)
        return self._command.to_action(self._target)
