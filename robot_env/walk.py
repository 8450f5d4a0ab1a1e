"""Walking: no goal but to go forward at a speed, or to stand up. Success is a speed, never a return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..drivers.base import Channel, Command, Reading
from .fit import check_channels
from .legs import Tumble, tilt, walking
from .stand_up import stands
from .task import Batch, Body, Observer, Outcome, Recovery, TaskError, TaskSpec

# APRL's reward (SepRew: rail_walker_gym/joystick_policy/reward_providers.py; weights in systems.md 3.1)
KP, KD = 20.0, 1.0  # N m/rad, N m s/rad: of the motors' position loop, as on the robot
POSE_RAD = (0.2, 0.4, 0.4)  # hip, thigh, calf: so far from standing a pose is free, and as far again it costs 0.4
TURN_RADPS = math.radians(45.0)
# The reset reward of A Walk in the Park (motion_imitation's reset_task.py; systems.md 2.2)
WEIGHTS = (1.0, 0.75, 0.5)  # of a leg's joints
UP = math.cos(0.2 * math.pi)  # more upright than this, the pose counts


@dataclass
class Progress:
    """What is remembered of a stream of readings."""

    body: Any
    torque: np.ndarray | None = None  # (n,) N m, of the step before


class Walk:
    """A `Task` of kind "walk" for a robot on legs. What it observes: the channels, and the previous action."""

    relabels = True
    start = (0.0, 0.0, 0.0)

    def __init__(self, spec: TaskSpec, channels: tuple[Channel, ...], command: Command, body: Body) -> None:
        check_channels(spec, channels, ("gravity", "gyro", "velocity", "joint_position", "joint_velocity", *body.needs))
        sizes = {c.name: c.size for c in channels}
        if not command.size == sizes["joint_position"] == sizes["joint_velocity"] or command.size % 3:
            raise TaskError(f"{spec.name}: robot {spec.robot} has no legs of hip, thigh and calf to walk on")
        if spec.hindsight:
            raise TaskError(f"{spec.name}: task.hindsight must be 0: a walk has no goals to draw again")
        self.spec, self._body, self._command = spec, body, command
        self._observer = Observer(channels)
        self._stands = spec.walk.reward == "stand"
        self.from_rest = self._stands or body.from_rest
        self._pose = command.to_command(np.zeros(command.size))  # standing: the middle of the action box
        self.rest = command.to_action(np.asarray(command.safe))
        self.observation_size = self._observer.size + command.size

    def walls(self) -> list[np.ndarray]:
        """None."""
        return []

    def begin(self, reading: Reading) -> Progress:
        """Nothing yet."""
        return Progress(self._body.begin())

    def observe(self, progress: Progress, reading: Reading, action: np.ndarray) -> np.ndarray:
        """Channels; previous action."""
        return np.concatenate([self._observer(reading), np.clip(action, -1, 1)]).astype(np.float32)

    def advance(self, progress: Progress, action: np.ndarray, reading: Reading) -> Outcome:
        """The reward of `[walk]`. Trouble of the body ends an episode; while standing up there is none, and who stands
        at the end has succeeded."""
        if self._stands:  # reset: when the time is over, it lies down again
            done = {"progress": float(stands(reading, self._pose))}
            return Outcome(standing(reading, self._pose), False, False, done, reset=True)
        trouble = self._body.trouble(progress.body, reading)
        ended = trouble in self._body.terminal
        if self.spec.walk.reward == "aprl":
            target = self._command.to_command(action)
            torque = KP * (target - reading.values["joint_position"]) - KD * reading.values["joint_velocity"]
            change = torque - (torque if progress.torque is None else progress.torque)
            progress.torque = torque
            reward = striding(reading, self.spec.walk.speed_mps, self._pose, change)
        else:
            reward = walking(reading, self.spec.walk.speed_mps)
        return Outcome(reward, ended, bool(trouble) and not ended, {trouble: 1.0} if trouble else {}, bool(trouble))

    def recover(self, reading: Reading, outcome: Outcome) -> Recovery:
        """Get up; where that is the task, fall."""
        if self._stands:
            return Tumble(self._command, self.spec.hz)
        return self._body.recover(outcome.events, None, 0.0)

    def spot(self, reading: Reading) -> tuple[float, float, float]:
        """Where it is, as far as it knows."""
        x, y, cos, sin = (float(v) for v in reading.values.get("pose", (0.0, 0.0, 1.0, 0.0)))
        return x, y, math.atan2(sin, cos)

    def in_hindsight(self, batch: Batch, future: np.ndarray, rng: np.random.Generator) -> Batch:
        """There is no goal to draw again."""
        return batch


def striding(reading: Reading, wanted_mps: float, pose: np.ndarray, change: np.ndarray) -> float:
    """APRL's reward, from readings. `pose` (n,) in rad is standing, `change` (n,) in N m that of the torques.

    Torques are what the motors' position loop makes of the command (KP, KD): no channel measures them. In place
    of the turning towards a goal, which this task has not, going straight on is worth something: a turning rate of
    0 by the gyro. Its Gaussian tail is not added where it should not reach (the published code lifts the peak from
    1 to 1.1). It terminates as the body does, at 30 degrees either way, not at 25 and 20 of pitch.
    """
    values = reading.values
    up = -float(values["gravity"][2])
    level = math.cos(tilt(values["gravity"])[1]) * float(values["velocity"][0])
    short, turn = abs(level - wanted_mps) / wanted_mps, abs(float(values["gyro"][2])) / TURN_RADPS
    speed = 1.0 - min(short, 1.0) ** 1.6 - max(short - 1.0, 0.0)
    straight = 1.0 - 0.9 * turn**1.6 if turn < 1.0 else 0.1 * math.exp(-((turn - 1.0) ** 2) / 0.25)
    free = np.resize(POSE_RAD, len(pose))
    beyond = np.maximum(np.abs(values["joint_position"] - pose) - free, 0.0) / free
    roll_rate, pitch_rate = (abs(float(v)) for v in values["gyro"][:2])
    return (
        20.0 * max(wanted_mps, 0.2) * speed * (0.5 * up + 0.5) ** 2
        - 2.0 * (0.6 - float(np.prod(0.6 ** (beyond**2))))
        - 0.005 * (float(np.linalg.norm(change)) ** 1.5 - 150.0)
        - (0.2 * roll_rate**1.4 - 0.5)
        - (0.4 * pitch_rate**1.4 - 0.5)
        + 4.0 * (0.1 + float(np.linalg.norm(values["velocity"]))) * straight
    )


def standing(reading: Reading, pose: np.ndarray) -> float:
    """The reset reward of A Walk in the Park: from 0 on its back to 1 standing still in `pose` (n,) in rad.

    The height of the trunk, a fifth of its second half, is left out, as nothing measures it; the pose and the speed
    of the joints share its weight. As published the second half counts only where the robot is about upright.
    """
    up = -float(reading.values["gravity"][2])
    reward = 0.5 * (0.5 * up + 0.5) ** 2
    if up > UP:
        off = np.resize(WEIGHTS, len(pose)) * (reading.values["joint_position"] - pose)
        speed = reading.values["joint_velocity"]
        reward += 0.5 * (0.75 * math.exp(-0.6 * float(off @ off)) + 0.25 * math.exp(-0.02 * float(speed @ speed)))
    return reward
