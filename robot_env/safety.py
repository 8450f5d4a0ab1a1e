"""The gate: the last word before the motors. It knows no policy and no task.

    DISARMED --arm--> ARMED <--> RUN <--> HOLD --> STOPPING --> STOPPED --clear--> DISARMED
    any of them --estop--> ESTOP --clear--> DISARMED

Nothing moves but in RUN. What the robot `keeps` stays as it was told in ARMED and HOLD, and as it is measured in
DISARMED; all else is told what is safe, and all of it from STOPPING on. A fault can only lead to the right; HOLD alone
recovers by itself. Clearing never moves the robot: somebody has to arm it again.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..drivers.base import Channel, Command, Reading

DISARMED, ARMED, RUN, HOLD = "disarmed", "armed", "run", "hold"
STOPPING, STOPPED, ESTOP = "stopping", "stopped", "estop"
LATCHED = (STOPPING, STOPPED, ESTOP)
EVENTS = ("arm", "alive", "clear", "estop")  # alive: the dead-man's switch is held
CLAMPS = ("limit", "rate", "reach")  # what is counted but is no fault

STALE_PERIODS = 5.0  # a channel may miss this many of its own periods, on top of its latency
STUCK_PERIODS = 5.0  # a noisy channel may repeat a value for this many
MAX_DT_S = 0.25  # a pause does not save up permission for one big change
WELL_S = 1.0  # every channel must have been well for so long to arm (after PX4)
FOLLOW_S = 0.3  # an actuator may be off its command for so long
CLEAN_TICKS = 5  # without a fault, to leave HOLD
HOLD_S = 2.0  # longer than this in HOLD, or
HOLDS, HOLDS_S = 5, 60.0  # more often than this within so many seconds, and the robot stops
BAD_WISHES = 3  # so many in a row that are not finite stop it too
STOP_S = 0.5  # from STOPPING to STOPPED


class SafetyError(RuntimeError):
    """A limit that would widen the robot's own, or a robot that may not move until a person clears it."""


@dataclass(frozen=True)
class Limits:
    """What the gate lets through, in SI units, per second and never per step."""

    low: np.ndarray  # (n,)
    high: np.ndarray
    rate: np.ndarray  # largest change per second
    reach: np.ndarray  # largest distance of a command from what is measured
    tolerance: np.ndarray  # an actuator further than this from its command for FOLLOW_S does not follow it
    safe: np.ndarray  # what stops the robot
    stays: bool  # instead of that it stops where it is
    keeps: np.ndarray  # bool: what stays as it was while nobody drives it, e.g. the steering
    measured: tuple[str, ...]  # channel that measures each value; "": none
    place: tuple[int, ...]  # and which of its numbers does
    max_age_s: dict[str, float]  # channel -> oldest acceptable reading
    max_same_s: dict[str, float]  # noisy channel -> longest time over which a value may repeat
    deadman_s: float  # longest time without an `alive` event

    @classmethod
    def of(cls, channels: tuple[Channel, ...], command: Command, wanted: Mapping[str, float]) -> Limits:
        """The robot's own limits, from its declaration, tightened by a task's `[gate]` table: `max_<name>_<unit>`,
        e.g. max_speed_mps, and `deadman_s`. Raises SafetyError for an unknown key (naming the valid ones) or a
        value beyond the own; and where what measures a value is not there.
        """
        low, high, rate, safe = (np.array(v, float) for v in (command.low, command.high, command.rate, command.safe))
        free = (np.inf,) * command.size
        measures = [_measures(channels, text) for text in command.measured or ("",) * command.size]
        units = [unit.replace("/", "p") for unit in command.units]
        keys = {f"max_{name}_{units[i]}": i for i, name in enumerate(command.names)}
        for key, value in wanted.items():
            if key not in {*keys, "deadman_s"}:
                raise SafetyError(f"[gate] {key}: unknown limit; this robot has {', '.join(sorted(keys))}, deadman_s")
            i, least, most = keys.get(key), 0.0, np.inf
            if i is not None:  # of either sign; a calf, say, is always bent
                least, most = max(0.0, low[i], -high[i]), max(abs(low[i]), abs(high[i]))
            if not least < value <= most:
                raise SafetyError(
                    f"[gate] {key} = {value}: must be above {least:g} and at most the robot's own {most:g}; "
                    "a task may only tighten"
                )
            if i is not None:
                high[i], low[i] = min(high[i], value), max(low[i], -value)
        return cls(
            low, high, rate, np.array(command.reach or free), np.array(command.tolerance or free), safe,
            command.stays,
            np.array(command.keeps or (False,) * command.size),
            tuple(name for name, _ in measures), tuple(place for _, place in measures),
            {c.name: c.latency_s + STALE_PERIODS / c.hz for c in channels},
            {c.name: STUCK_PERIODS / c.hz for c in channels if c.noisy}, wanted.get("deadman_s", np.inf),
        )  # fmt: skip


def _measures(channels: tuple[Channel, ...], text: str) -> tuple[str, int]:
    """The channel and the number of it that `text` ("name" or "name[number]") says; ("", 0) of ""."""
    found = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", text)
    assert found is not None
    name, place = found[1], int(found[2] or 0)
    if text and place >= {c.name: c.size for c in channels}.get(name, 0):
        raise SafetyError(f"a command is measured by {text!r}, which no channel has: {[c.name for c in channels]}")
    return name, place


class Gate:
    """The states above, limits on every command, and what is wrong with a robot that can be seen without a model.

    `step` is deterministic in its arguments and those before; it does no I/O.
    """

    def __init__(self, command: Command, limits: Limits) -> None:
        self.command, self.limits = command, limits
        self.state = DISARMED
        self.cause: tuple[str, ...] = ()  # the newest faults: why it does not arm, is in HOLD, or is latched
        self.counts: dict[str, int] = {}  # how often each fault or clamp happened
        self._last: np.ndarray = limits.safe.copy()
        self._told = False  # that, or anything
        self._time: float  # of the last tick
        self._well_since: float | None = None  # no channel had a fault since
        self._alive = -np.inf  # time of the last `alive`
        self._values: dict[str, tuple[np.ndarray, float]] = {}  # of noisy channels, and the stamp each came with
        self._off_since: np.ndarray = np.full(command.size, np.inf)  # when each actuator began not to follow
        self._holds: deque[float] = deque(maxlen=HOLDS)  # when the robot was held
        self._clean: int  # ticks without a fault, in HOLD
        self._bad_wishes = 0  # in a row
        self._stopping_at: float

    def step(
        self, now: float, measurement: Reading, wish: np.ndarray | None, events: tuple[str, ...] = ()
    ) -> tuple[np.ndarray, str, tuple[str, ...]]:
        """One tick. now in s (robot clock); wish (n,) in action units, or None while nobody drives.

        Returns the (n,) SI command for the motors, the state, and the faults and clamps of this tick.
        """
        faults = self._unwell(now, measurement)
        if faults:
            self._well_since = None
        elif self._well_since is None:
            self._well_since = now
        self._take(now, events)
        if self.state in (RUN, HOLD):
            faults += self._lost(now, measurement)
        else:
            self._off_since[:] = np.inf
        if self.state in (ARMED, RUN, HOLD):
            faults += self._wrong(wish)
            self.cause = tuple(faults) or self.cause
            held = now - self._alive <= self.limits.deadman_s  # else nobody drives
            self._move(now, faults, held and wish is not None)
            if not held:
                faults.append("deadman")
        elif self.state == DISARMED:
            self.cause = tuple(faults)
        elif self.state == STOPPING and now - self._stopping_at >= STOP_S:
            self.state = STOPPED
        if self.state == RUN:
            assert wish is not None
            command, clamps = self._limit(now, measurement, self.command.to_command(wish))
            faults += clamps
        else:  # stopping is never rate-limited
            faults += [self.state] if self.state in (HOLD, *LATCHED) else []
            command = self._still(measurement)
        self._last, self._time, self._told = command, now, True
        for fault in faults:
            self.counts[fault] = self.counts.get(fault, 0) + 1
        return command.copy(), self.state, tuple(faults)

    def placed(self) -> None:
        """Somebody has set the robot down: where it was told to be counts no more."""
        self._told = False

    def _still(self, measurement: Reading) -> np.ndarray:
        """(n,) what keeps it from moving: what stops it, and of what it keeps where it was told to be or, disarmed or
        never told, where it is measured within the robot's own range. A robot that stays is where it was told to be:
        each value that was never told, or that somebody has moved out of its reach since, is where it is measured;
        told that at every tick, an arm would sink by its weight."""
        if not self.limits.stays:
            where = np.clip(self._measured(measurement, self.limits.safe), self.command.low, self.command.high)
            keeps = self.limits.keeps & (self.state not in LATCHED)
            return np.where(keeps, self._last if self._told and self.state != DISARMED else where, self.limits.safe)
        where = self._measured(measurement, self._last)
        holds = (self.state in (HOLD, *LATCHED)) | (np.abs(where - self._last) <= self.limits.reach)
        return np.where(self._told & holds, self._last, where)

    def _take(self, now: float, events: tuple[str, ...]) -> None:
        for event in events:
            if event not in EVENTS:
                raise ValueError(f"unknown gate event {event!r}; the gate knows {', '.join(EVENTS)}")
        if "alive" in events:
            self._alive = now
        if "clear" in events:
            if self.state in (STOPPED, ESTOP):
                self.state = DISARMED
        elif "arm" in events and self.state == DISARMED and self._well_since is not None:
            if now - self._well_since >= WELL_S:
                self.state = ARMED
                self._holds.clear()
        if "estop" in events:  # last, so that it wins over the others in the same tick
            self.state, self.cause = ESTOP, ("estop",)

    def _unwell(self, now: float, measurement: Reading) -> list[str]:
        """What is wrong with the channels."""
        faults = []
        for name, max_age in self.limits.max_age_s.items():
            stamp = measurement.stamps.get(name)
            # a stamp from the future is as wrong as an old one
            if stamp is None or not -1e-6 <= now - stamp <= max_age:
                faults.append(f"stale_{name}")
                continue
            value = measurement.values[name]
            if not np.isfinite(value).all():
                faults.append(f"not_finite_{name}")
            elif name in self.limits.max_same_s:
                before, since = self._values.get(name, (None, stamp))
                if before is None or (value != before).any():
                    self._values[name] = value.copy(), stamp
                elif stamp - since >= self.limits.max_same_s[name]:
                    faults.append(f"stuck_{name}")
        return faults

    def _lost(self, now: float, measurement: Reading) -> list[str]:
        """Which actuators do not follow what they were told."""
        error = np.abs(self._last - self._measured(measurement, self._last))
        self._off_since = np.where(error > self.limits.tolerance, np.minimum(self._off_since, now), np.inf)
        return [f"lost_{self.command.names[i]}" for i in np.flatnonzero(now - self._off_since >= FOLLOW_S)]

    def _wrong(self, wish: np.ndarray | None) -> list[str]:
        """What is wrong with the wish."""
        if wish is None:
            return []
        if np.shape(wish) != (self.command.size,):
            return ["shape"]
        return [] if np.isfinite(wish).all() else ["not_finite"]

    def _move(self, now: float, faults: list[str], driven: bool) -> None:
        """From ARMED, RUN or HOLD to where this tick leads."""
        if faults:
            self._clean = 0
        elif self.state == HOLD:
            self._clean += 1
        self._bad_wishes = self._bad_wishes + 1 if "not_finite" in faults else 0
        often = False
        if faults and self.state != HOLD:
            often = len(self._holds) == HOLDS and now - self._holds[0] < HOLDS_S
            self._holds.append(now)
            self.state = HOLD
        elif self.state != HOLD or self._clean >= CLEAN_TICKS:
            self.state = RUN if driven else ARMED
        if self.state == HOLD and (often or now - self._holds[-1] > HOLD_S or self._bad_wishes >= BAD_WISHES):
            self.state, self._stopping_at = STOPPING, now

    def _limit(self, now: float, measurement: Reading, command: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """The command within the box and what may change, and then as near to what is measured as that allows."""
        limits, clamps = self.limits, []
        boxed = np.clip(command, limits.low, limits.high)
        if (boxed != command).any():
            clamps.append("limit")
        dt = min(max(now - self._time, 0.0), MAX_DT_S)
        least, most = self._last - limits.rate * dt, self._last + limits.rate * dt
        slewed = np.clip(boxed, least, most)
        if (np.abs(slewed - boxed) > 1e-9).any():
            clamps.append("rate")
        measured = self._measured(measurement, slewed)
        near = np.clip(slewed, measured - limits.reach, measured + limits.reach)
        if (near != slewed).any():
            clamps.append("reach")
        # near may be outside the box, or further from the last command than may be, which wins where that was outside
        return np.clip(np.clip(near, limits.low, limits.high), least, most), clamps

    def _measured(self, measurement: Reading, default: np.ndarray) -> np.ndarray:
        """(n,) what is measured of each value of a command; `default` where nothing is, or not now."""
        found = np.array(default, float)
        for i, name in enumerate(self.limits.measured):
            place = self.limits.place[i]
            if name in measurement.values and np.isfinite(measurement.values[name][place]):
                found[i] = measurement.values[name][place]
        return found
