"""The same arm, told its joints: for policies that turn the tool, too. Workspace and speed of the tool are held where
its servos are told (`arm.Servos`), as the ranges of its joints are where it is led by its tool."""

from __future__ import annotations

import numpy as np

from . import arm
from .arm import CHANNELS
from .base import Command, Led

__all__ = ["CHANNELS", "COMMAND"]

_GRIP = len(arm.JOINTS) - 1


def _of(command: np.ndarray) -> np.ndarray:
    return np.append(arm.forward(command), command[_GRIP])


def _by(command: np.ndarray) -> np.ndarray:
    return np.append(arm.inverse(command[:3]), command[3])


COMMAND = Command(
    names=arm.JOINTS,
    units=("rad",) * 6,
    # as far as the joints turn where the tool is led through all of its action box; a turn of the tool about itself
    action_low=(-1.25, -1.74533, -0.86, -0.25, -0.8, 0.0),
    action_high=(1.25, 1.36, 1.4, 1.65806, 0.8, 0.8),
    low=(*arm.LOW[:_GRIP], arm.COMMAND.low[3]),
    high=(*arm.HIGH[:_GRIP], arm.COMMAND.high[3]),
    rate=(*(arm.JOINT_RADPS,) * _GRIP, arm.COMMAND.rate[3]),
    safe=tuple(_by(np.array(arm.HOME)).tolist()),
    stays=True,
    measured=tuple(f"joint_position[{i}]" for i in range(len(arm.JOINTS))),
    # at full speed a joint is up to 0.2 rad late; how hard it presses is up to the servos, which stall at 0.08 rad
    reach=(*(0.3,) * _GRIP, arm.COMMAND.reach[3]),
    tolerance=(*(0.4,) * _GRIP, arm.COMMAND.tolerance[3]),
    tool=Led(arm.COMMAND, _of, _by),
)
