"""What every twin shares: simulated time, physics in batches, and sensors with rate, latency and noise.

A robot's twin holds one `World` and gives it three functions; nothing is inherited.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import mujoco
import numpy as np

from ..drivers.base import Channel, DriverError, Reading

KEEP_S = 2.0  # how much unread history a channel holds: what an aggregate can span
JITTER_S = 0.004  # latency varies by up to this much (USB and scheduling of a Linux host)

KINDS = ("off", "stuck", "garbage", "wrong", "slow", "delayed", "intermittent")  # of a sensor's failures
GARBAGE = (math.nan, math.inf, 1e9)
SLOW = 10  # one sample in so many comes
DELAY_S = 0.5  # on top of the latency
SPELL_S = 0.1, 1.0  # shortest and longest time that an intermittent sensor is off, or on


class World:
    """The physics of one twin, its clock and its sensors.

    `control(dt)` is called before every batch of physics steps (at most the sensors' common period long),
    `measure()` whenever some channel samples; it returns the true present value of every channel, as arrays
    that it does not keep; `watch()` after every step, so it must be cheap. Time is a whole number of steps: it
    does not drift. Channels that `measure` leaves out come after those it gives: `derive(carried)` computes them
    from what the samples of the others carry, noise and failures included (None: nothing, or what was before).
    `failures` names what can fail, and how: sensors by their channel, anything else as the twin has it `broken`.
    """

    def __init__(
        self, model: mujoco.MjModel, sensors: Sequence[Sensor], control: Callable[[float], None],
        measure: Callable[[], Mapping[str, np.ndarray]], watch: Callable[[], None],
        seed: int = 0, realtime: bool = False,
        derive: Callable[[Mapping[str, np.ndarray | None]], Mapping[str, np.ndarray]] = lambda carried: {},
        failures: Mapping[str, Sequence[str]] = {},
    ) -> None:  # fmt: skip
        self.model, self.data = model, mujoco.MjData(model)
        self.dt = float(model.opt.timestep)
        self._control, self._measure, self._watch, self._derive = control, measure, watch, derive
        self._realtime = realtime
        self._rng, self._seed, self._failed = np.random.default_rng(seed), seed, 0
        self._failures = failures
        parts = failures.keys() - {sensor.channel.name for sensor in sensors}
        self._broken: dict[str, list[Failure]] = {part: [] for part in failures if part in parts}
        self._sensors = {s: round(1.0 / s.channel.hz / self.dt) for s in sensors}  # steps between samples
        for sensor, period in self._sensors.items():
            if abs(period * self.dt * sensor.channel.hz - 1.0) > 1e-6:
                raise ValueError(f"{sensor.channel.name}: {sensor.channel.hz} Hz is no whole number of steps")
        self._batch = math.gcd(*self._sensors.values())  # steps
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
        for sensor in self._sensors:
            name = sensor.channel.name
            values[name], stamps[name] = sensor.take(now, self._rng)
        return Reading(values, stamps)

    def fail(self, part: str, kind: str, start: float, lasts: float = math.inf) -> None:
        """Let a part fail from `start` (s) on, for `lasts` seconds. Failures add up. ValueError names what can fail."""
        if kind not in self._failures.get(part, ()):
            raise ValueError(f"{part}:{kind} is none of {self._failures}")
        self._failed += 1  # each with its own generator, so that it draws nothing from the noise of the sensors
        made = Failure(kind, start, lasts, np.random.default_rng([self._seed, self._failed]))
        sensors = {sensor.channel.name: sensor.failures for sensor in self._sensors}
        (self._broken | sensors)[part].append(made)

    def broken(self) -> dict[str, float]:
        """What fails now and is no sensor, and for how many seconds it has."""
        now = self.data.time
        return {part: now - f.start for part, failed in self._broken.items() for f in failed if f.active(now)}

    def settle(self, qpos: np.ndarray) -> None:
        """Put the robot at rest in the state `qpos` (nq,), and fill every sensor with it. Time goes on."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = qpos
        self.data.time = self._steps * self.dt
        self._control(0.0)
        mujoco.mj_forward(self.model, self.data)
        self._sample(self._sensors, Sensor.fill)

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
            due = [sensor for sensor, period in self._sensors.items() if self._steps % period == 0]
            if due:
                self._sample(due, Sensor.put)
        if self.data.warning.number.any():
            kinds = [mujoco.mjtWarning(i).name for i in np.flatnonzero(self.data.warning.number)]
            raise DriverError(f"twin: the physics failed ({', '.join(kinds)}); place the robot again")

    def _sample(self, sensors: Iterable[Sensor], capture: Callable[..., np.ndarray | None]) -> None:
        """Let each of `sensors` capture what is true now."""
        values, carried = self._measure(), dict[str, np.ndarray | None]()
        for sensor in sensors:
            name = sensor.channel.name
            if name not in values:
                values = self._derive(carried)
            carried[name] = capture(sensor, self._steps * self.dt, values[name], self._rng)


class Failure:
    """Something that is broken from `start` for `lasts` seconds of the twin's clock. What a sensor's kinds do:

    - off: no more samples.
    - stuck: the value that was read last, again and again, with fresh stamps.
    - garbage: NaN, infinity and a billion, for a second each, in this order, from a random one on.
    - wrong: plausible and wrong, as the sensor's `wrong` says.
    - slow: one sample in ten.
    - delayed: every sample comes half a second later; at the end those on their way come at once.
    - intermittent: off, on, off ... for 0.1 to 1 s each, at random.
    """

    def __init__(self, kind: str, start: float, lasts: float, rng: np.random.Generator) -> None:
        self.kind, self.start, self._end, self._rng = kind, start, start + lasts, rng
        self._first_garbage = int(rng.integers(len(GARBAGE)))
        self._off, self._turn = False, start  # of intermittent: whether it is off, and until when

    def active(self, now: float) -> bool:
        """Whether it is broken now (to a nanosecond, as times are sums)."""
        return self.start - 1e-9 <= now < self._end - 1e-9

    def loses(self, now: float, number: int) -> bool:
        """Whether sample `number`, which is captured now, never comes."""
        while self.kind == "intermittent" and now >= self._turn - 1e-9:
            self._off, self._turn = not self._off, self._turn + self._rng.uniform(*SPELL_S)
        return self.kind == "off" or self._off or (self.kind == "slow" and number % SLOW > 0)

    def garbage(self, now: float) -> float:
        """What is read instead."""
        return GARBAGE[(self._first_garbage + int(now - self.start + 1e-9)) % len(GARBAGE)]


class Sensor:
    """How a twin imitates one channel: its samples on their way to the reader.

    `noise`: standard deviation in the channel's unit; `combine`: "last", or "mean" / "max" over the samples
    since the last read; `wrong`: (gain, offset) of a sensor that is wrong, a number or one a value. Noise is drawn
    where a value is read, or with `early` where it is captured, so that what is derived from it has it, too.
    """

    def __init__(
        self, channel: Channel, noise: float = 0.0, combine: str = "last", jitter_s: float = JITTER_S,
        wrong: tuple[Sequence[float] | float, Sequence[float] | float] = (-1.0, 0.0), early: bool = False,
    ) -> None:  # fmt: skip
        self.channel = channel
        self.failures: list[Failure] = []
        self._combine, self._jitter, self._wrong = combine, jitter_s, wrong
        self._early_noise, self._noise = (noise, 0.0) if early else (0.0, noise)
        self._most = np.array(channel.most or (np.inf,) * channel.size)
        # (when it is delivered, when it was captured, value; None: as before)
        self._waiting: deque[tuple[float, float, np.ndarray | None]] = deque(maxlen=round(KEEP_S * channel.hz))
        self._value, self._stamp = np.zeros(channel.size, np.float32), 0.0

    def put(self, now: float, value: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        """Capture `value` now; it is delivered a latency later. Returns what the sample carries, None if it is lost
        or repeats the one before."""
        return self._send(now + self.channel.latency_s + self._jitter * rng.random(), now, value, rng)

    def fill(self, now: float, value: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        """As if `value` had been measured for a while: reads deliver it, with its due age, from now on."""
        self._waiting.clear()
        latency, interval = self.channel.latency_s, 1.0 / self.channel.hz
        samples = math.ceil(latency / interval)
        stamps = (now - latency, *(now - i * interval for i in reversed(range(samples))))
        return [self._send(stamp + latency, stamp, value, rng) for stamp in stamps][-1]

    def take(self, now: float, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """A copy of the newest delivered value (or aggregate), and its stamp."""
        waiting, fresh = self._waiting, []
        due = now + 1e-9
        if any(failure.kind == "delayed" and failure.active(now) for failure in self.failures):
            due -= DELAY_S
        while waiting and waiting[0][0] <= due:
            _, self._stamp, value = waiting.popleft()
            if value is not None:
                fresh.append(value)
        if fresh:
            samples = np.array(fresh if self._combine != "last" else fresh[-1:])  # (n, size)
            if self._noise:
                noise = self._noise * rng.standard_normal(samples.shape)
                most = self._most  # at which a sensor saturates, if it is not broken
                samples = np.where(np.abs(samples) <= most, np.clip(samples + noise, -most, most), samples)
            combined = samples.max(axis=0) if self._combine == "max" else samples.mean(axis=0)
            self._value = combined.astype(np.float32)
        return self._value.copy(), self._stamp

    def _send(self, due: float, stamp: float, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        if self._early_noise:
            truth = truth + self._early_noise * rng.standard_normal(self.channel.size)
        value: np.ndarray | None = np.minimum(np.maximum(truth, -self._most), self._most)  # np.clip takes longer
        for failure in self.failures:
            if not failure.active(stamp):
                continue
            if failure.loses(stamp, round(stamp * self.channel.hz)):
                return None
            if failure.kind == "stuck":
                value = None
            elif failure.kind == "garbage":
                value = np.full(self.channel.size, failure.garbage(stamp))
            elif failure.kind == "wrong" and value is not None:
                value = value * self._wrong[0] + self._wrong[1]
        self._waiting.append((due, stamp, value))
        return value
