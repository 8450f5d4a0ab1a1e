"""What every twin shares: simulated time, physics in batches, and sensors with rate, latency and noise.

A robot's twin holds one `World` and gives it three functions; nothing is inherited.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from ..drivers.base import Channel, DriverError, Reading

KEEP_S = 2.0  # how much unread history a channel holds: what an aggregate can span


@dataclass(frozen=True)
class Sensor:
    """How a twin imitates one channel."""

    channel: Channel
    noise: float | tuple[float, ...] = 0.0  # standard deviation, in the channel's unit
    combine: str = "last"  # "last", or "mean" / "max" over the samples since the last read
    jitter_s: float = 0.004  # latency varies by up to this much (USB and scheduling of a Linux host)


class World:
    """The physics of one twin, its clock and its sensor buffers.

    `control(dt)` is called before every batch of physics steps (at most the sensors' common period long),
    `measure()` whenever some channel samples; it returns the true present value of every channel as a tuple
    of floats; `watch()` after every step, so it must be cheap. Time is a whole number of steps: it does not
    drift.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        sensors: Sequence[Sensor],
        control: Callable[[float], None],
        measure: Callable[[], Mapping[str, Sequence[float]]],
        watch: Callable[[], None] = lambda: None,
        *,
        seed: int = 0,
        realtime: bool = False,
        noise: bool = True,
    ) -> None:
        self.model, self.data = model, mujoco.MjData(model)
        self.dt = float(model.opt.timestep)
        self._control, self._measure, self._watch = control, measure, watch
        self._realtime = realtime
        self._rng = np.random.default_rng(seed)
        self._buffers = [_Buffer(s, self.dt, noise) for s in sensors]
        self._batch = math.gcd(*(b.period for b in self._buffers))  # steps
        self._steps = 0
        self._target = 0.0  # s: where the sleeps add up to, between two steps
        self._wall0: float | None = None

    def now(self) -> float:
        """Simulated time in s. In real time it runs on while nobody sleeps, as a real robot's does."""
        if self._wall0 is None:
            return self._steps * self.dt
        elapsed = time.monotonic() - self._wall0
        self._advance(int(elapsed / self.dt) - self._steps)
        return max(elapsed, self._steps * self.dt)

    def sleep(self, seconds: float) -> None:
        """Advance by `seconds` in whole steps; what is left of a step is kept for the next sleep."""
        if not self._realtime:
            self._target += max(0.0, seconds)
            self._advance(round(self._target / self.dt) - self._steps)  # round, never //: 0.06 // 0.002 is 29
            return
        if self._wall0 is None:
            self._wall0 = time.monotonic() - self._steps * self.dt
        target = self.now() + max(0.0, seconds)
        self._advance(int(target / self.dt + 1e-6) - self._steps)  # first, so that waking up is on time
        time.sleep(max(0.0, self._wall0 + target - time.monotonic()))

    def read(self) -> Reading:
        """The newest delivered values with the times they were captured."""
        now, values, stamps = self.now(), {}, {}
        for buffer in self._buffers:
            values[buffer.name], stamps[buffer.name] = buffer.take(now, self._rng)
        return Reading(values, stamps)

    def settle(self, qpos: np.ndarray) -> None:
        """Put the robot at rest in the state `qpos` (nq,), and fill every sensor with it. Time goes on."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = qpos
        self.data.time = self._steps * self.dt
        mujoco.mj_forward(self.model, self.data)
        truth = self._measure()
        for buffer in self._buffers:
            buffer.fill(self._steps * self.dt, truth[buffer.name])

    def _advance(self, steps: int) -> None:
        end = self._steps + steps
        step, watch, model, data = mujoco.mj_step, self._watch, self.model, self.data
        while self._steps < end:
            n = min(end - self._steps, self._batch - self._steps % self._batch)
            self._control(n * self.dt)
            for _ in range(n):
                step(model, data)
                watch()
            self._steps += n
            if self._steps % self._batch == 0:
                self._sample()
        if self.data.warning.number.any():
            kinds = [mujoco.mjtWarning(i).name for i in np.flatnonzero(self.data.warning.number)]
            raise DriverError(f"twin: the physics failed ({', '.join(kinds)}); place the robot again")

    def _sample(self) -> None:
        now, truth = self._steps * self.dt, self._measure()
        for buffer in self._buffers:
            if self._steps % buffer.period == 0:
                buffer.put(now, truth[buffer.name], self._rng)


class _Buffer:
    """The samples of one channel on their way to the reader."""

    def __init__(self, sensor: Sensor, dt: float, noisy: bool) -> None:
        channel = sensor.channel
        self.name, self.period = channel.name, round(1.0 / channel.hz / dt)
        if self.period < 1 or abs(self.period * dt * channel.hz - 1.0) > 1e-6:
            raise ValueError(f"channel {channel.name}: {channel.hz} Hz is not a whole number of {dt} s steps")
        self._interval = self.period * dt
        self._latency, self._jitter = channel.latency_s, sensor.jitter_s if noisy else 0.0
        self._noise = np.asarray(sensor.noise, np.float64) if noisy else None  # () or (size,)
        self._combine = sensor.combine
        self._waiting: deque[tuple[float, float, Sequence[float]]] = deque(maxlen=round(KEEP_S * channel.hz))
        self._value = np.zeros(channel.size, np.float32)
        self._stamp = 0.0

    def put(self, now: float, value: Sequence[float], rng: np.random.Generator) -> None:
        """Capture `value` now; it is delivered a latency later."""
        delivery = now + self._latency + (self._jitter * rng.random() if self._jitter else 0.0)
        self._waiting.append((delivery, now, value))

    def fill(self, now: float, value: Sequence[float]) -> None:
        """As if `value` had been measured for a while: reads deliver it, with its due age, from now on."""
        self._waiting.clear()
        samples = math.ceil(self._latency / self._interval)
        for stamp in (now - self._latency, *(now - i * self._interval for i in reversed(range(samples)))):
            self._waiting.append((stamp + self._latency, stamp, value))

    def take(self, now: float, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """A copy of the newest delivered value (or aggregate), and its stamp."""
        waiting, fresh = self._waiting, []
        while waiting and waiting[0][0] <= now + 1e-9:
            _, self._stamp, value = waiting.popleft()
            fresh.append(value)
        if fresh:
            samples = np.array(fresh if self._combine != "last" else fresh[-1:])  # (n, size)
            if self._noise is not None:
                samples += self._noise * rng.standard_normal(samples.shape)
            combined = samples.max(axis=0) if self._combine == "max" else samples.mean(axis=0)
            self._value = combined.astype(np.float32)
        return self._value.copy(), self._stamp
