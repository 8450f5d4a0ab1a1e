"""The gate: the last word before the motors. It knows no policy and no task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..drivers.base import Channel, Command, Reading

RUN, HOLD, ESTOP = "run", "hold", "estop"
EVENTS = ("estop", "clear", "arm")
STALE_PERIODS = 5.0  # a channel may miss this many of its own periods, on top of its latency
MAX_DT_S = 0.25  # a pause does not save up permission for one big change


class SafetyError(RuntimeError):
    """A limit that would widen the robot's own, or a robot that may not move until a person clears it."""


@dataclass(frozen=True)
class Limits:
    """What the gate lets through, in SI units, per second and never per step."""

    low: np.ndarray  # (n,)
    high: np.ndarray
    rate: np.ndarray  # largest change per second
    safe: np.ndarray  # what stops the robot
    max_age_s: dict[str, float]  # channel -> oldest acceptable reading

    @classmethod
    def of(cls, channels: tuple[Channel, ...], command: Command, wanted: Mapping[str, float]) -> Limits:
        """The robot's own limits, from its declaration, tightened by a task's `[gate]` table: `max_<name>_<unit>`,
        e.g. max_speed_mps. Raises SafetyError for an unknown key (naming the valid ones) or a value beyond the own.
        """
        low, high, rate, safe = (np.array(v, float) for v in (command.low, command.high, command.rate, command.safe))
        units = [unit.replace("/", "p") for unit in command.units]
        keys = {f"max_{name}_{units[i]}": i for i, name in enumerate(command.names)}
        for key, value in wanted.items():
            if key not in keys:
                raise SafetyError(f"[gate] {key}: unknown limit; this robot has {', '.join(sorted(keys))}")
            i = keys[key]
            if not 0 < value <= high[i]:
                raise SafetyError(
                    f"[gate] {key} = {value}: must be above 0 and at most the robot's own {high[i]:g}; "
                    "a task may only tighten"
                )
            high[i] = value
            low[i] = max(low[i], -value)
        return cls(low, high, rate, safe, {c.name: c.latency_s + STALE_PERIODS / c.hz for c in channels})


class Gate:
    """Absolute and per-second limits, staleness, non-finite wishes, and a latched e-stop.

    `step` is deterministic in its arguments and the previous output; it does no I/O. States: `hold` (the
    safe command goes out; recovers by itself when the cause is gone), `run`, `estop` (latched). A gate
    starts in `hold` and moves nothing until it was armed once; after an e-stop `clear` leads back to that
    unarmed hold, so clearing never moves the robot.
    """

    def __init__(self, command: Command, limits: Limits) -> None:
        self.command, self.limits = command, limits
        self.state = HOLD
        self.counts: dict[str, int] = {}  # how often each fault or clamp happened
        self._armed = False
        self._last: np.ndarray = limits.safe.copy()
        self._time: float | None = None

    def step(
        self, now: float, measurement: Reading, wish: np.ndarray | None, events: tuple[str, ...] = ()
    ) -> tuple[np.ndarray, str, tuple[str, ...]]:
        """One tick. now in s (robot clock); wish (n,) in action units or None for "no wish".

        Returns the (n,) SI command for the motors, the state, and the faults and clamps of this tick.
        """
        self._take(events)
        faults = self._faults(now, measurement, wish)
        if self.state == ESTOP:
            faults.append("estop")
        else:
            self.state = RUN if self._armed and not faults else HOLD
        if self.state == RUN:
            assert wish is not None
            command, clamps = self._limit(now, self.command.to_command(wish))
            faults += clamps
        else:
            command = self.limits.safe.copy()  # stopping is never rate-limited
        self._last, self._time = command, now
        for fault in faults:
            self.counts[fault] = self.counts.get(fault, 0) + 1
        return command.copy(), self.state, tuple(faults)

    def _take(self, events: tuple[str, ...]) -> None:
        for event in events:
            if event not in EVENTS:
                raise ValueError(f"unknown gate event {event!r}; the gate knows {', '.join(EVENTS)}")
        if "clear" in events and self.state == ESTOP:
            self.state = HOLD
        if "arm" in events and self.state != ESTOP and "clear" not in events:
            self._armed = True
        if "estop" in events:  # last, so that it wins over a clear in the same tick
            self.state, self._armed = ESTOP, False

    def _faults(self, now: float, measurement: Reading, wish: np.ndarray | None) -> list[str]:
        faults = []
        if wish is None:
            faults.append("no_wish")
        elif np.shape(wish) != (self.command.size,):
            faults.append("shape")
        elif not np.isfinite(wish).all():
            faults.append("not_finite")
        for name, max_age in self.limits.max_age_s.items():
            stamp = measurement.stamps.get(name)
            # a stamp from the future is as wrong as an old one
            if stamp is None or not -1e-6 <= now - stamp <= max_age:
                faults.append(f"stale_{name}")
            elif not np.isfinite(measurement.values[name]).all():
                faults.append(f"not_finite_{name}")
        return faults

    def _limit(self, now: float, command: np.ndarray) -> tuple[np.ndarray, list[str]]:
        clamps = []
        boxed = np.clip(command, self.limits.low, self.limits.high)
        if (boxed != command).any():
            clamps.append("limit")
        dt = 0.0 if self._time is None else min(max(now - self._time, 0.0), MAX_DT_S)
        change = self.limits.rate * dt
        slewed = np.clip(boxed, self._last - change, self._last + change)
        if (np.abs(slewed - boxed) > 1e-9).any():
            clamps.append("rate")
        return slewed, clamps
