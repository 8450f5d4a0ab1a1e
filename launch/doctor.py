"""`tether doctor`: measures the rig and says whether it is ready. It opens and reads; it never writes to a robot,
begins no stream at a learner and makes no file."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from ..drivers.base import Channel, DriverError, Robot
from ..robot_env.env import RobotEnv
from ..robot_env.rate import Rate
from ..robot_env.record import Meta
from ..robot_env.task import TaskSpec
from . import catalog, keys, spool, wire
from .actor import SPOOL
from .keys import KeysError
from .pump import Pump
from .transport import NOBODY, LearnerLink
from .wire import WireError

WATCH_S = 2.0  # how long channels, and then the loop, are watched
RATE_SHARE = 0.8  # of its declared rate a channel must reach
AGE_PERIODS = 3.0  # a reading may be this much older than its declared latency
LATE_SHARE = 0.25  # of a control period may 99 % of the ticks begin late
ANSWER_S = 5.0  # a learner answers within
ROUND_TRIPS, BURST = 50, 200  # HELLOs one by one, and one after the other
IN_FLIGHT = 32  # fewer than the learner's queue holds: what does not fit it is not answered
ROUND_TRIP_MS = 300.0  # the link is tested with a latency of 200 ms and 100 ms of jitter
CATCH_UP = 5.0  # times its rate: how fast what waits in a spool should be brought
SPOOL_HOURS, FREE_SHARE, MEMORY_SHARE = 1.0, 0.07, 0.1
TICK_NS = 1e6
RELEASED = datetime(2025, 1, 1, tzinfo=timezone.utc)  # a clock that says less was never set
PARTS = ("tether", "numpy", "pyzmq", "msgpack", "safetensors", "gymnasium", "jax", "mujoco")


@dataclass(frozen=True)
class Check:
    """One thing that was measured, against what it should be."""

    name: str
    value: float | str
    limit: str
    ok: bool


def examine(spec: TaskSpec, learner: str | None = None, real: bool = False) -> list[Check]:
    """Everything that can be measured without moving anything, for the rig that does this task."""
    meta = catalog.stream_meta(spec)
    return [*rig(spec, real), *link(learner, meta), *host(meta), *secrets(keys.folder()), versions()]


def report(spec: TaskSpec, checks: Sequence[Check]) -> tuple[str, dict[str, Any]]:
    """What to print, one line a check, and the object that `--json` prints."""
    ready = all(check.ok for check in checks)
    lines = [f"{'ok' if c.ok else 'NOT':4}{c.name:30}{c.value!s:32} {c.limit}" for c in checks]
    verdict = "ready" if ready else f"not ready: {', '.join(c.name for c in checks if not c.ok)}"
    text = "\n".join([f"{spec.name} ({spec.robot}, {spec.hz:g} Hz)", *lines, verdict])
    return text, {"ready": ready, "checks": [asdict(check) for check in checks]}


def rig(spec: TaskSpec, real: bool) -> list[Check]:
    """The robot: its channels, and how late a loop that reads it begins its ticks."""
    try:
        env = catalog.make_env(catalog.make_task(spec), real, realtime=True)
        if not isinstance(env, RobotEnv):
            env.close()
            return []
        try:
            env.robot.open()
            return [*channels(env.robot, WATCH_S), *lateness(env.robot, spec.hz, WATCH_S)]
        finally:
            env.robot.close()
    except (DriverError, ModuleNotFoundError) as error:  # of which a twin without mujoco is the likely one
        return [Check("robot", " ".join(str(error).split()), "opens and can be read", False)]


def channels(robot: Robot, seconds: float) -> list[Check]:
    """Rate and age of every channel, on the robot's clock, and whether its values are numbers."""
    seen: dict[str, set[float]] = {c.name: set() for c in robot.channels}
    ages: dict[str, list[float]] = {c.name: [] for c in robot.channels}
    broken = set()
    poll_s = 0.5 / max(c.hz for c in robot.channels)  # no sample may come and go between two looks
    start = now = robot.now()
    while now - start < seconds:
        reading, now = robot.read(), robot.now()
        for name, stamp in reading.stamps.items():
            seen[name].add(stamp)
            ages[name].append(now - stamp)
            if not np.isfinite(reading.values[name]).all():
                broken.add(name)
        robot.sleep(poll_s)
    found = [_channel(c, (len(seen[c.name]) - 1) / (now - start), ages[c.name]) for c in robot.channels]
    values = Check("values", f"not finite: {', '.join(sorted(broken))}" if broken else "finite", "finite", not broken)
    return [check for pair in found for check in pair] + [values]


def _channel(channel: Channel, hz: float, ages: list[float]) -> tuple[Check, Check]:
    lowest, oldest = RATE_SHARE * channel.hz, 1e3 * (channel.latency_s + AGE_PERIODS / channel.hz)
    age = 1e3 * float(np.percentile(ages, 95))  # the odd sample may be late
    return (
        Check(f"{channel.name} rate, Hz", round(hz, 1), f"at least {lowest:g}, declared {channel.hz:g}", hz >= lowest),
        Check(f"{channel.name} age, ms", round(age, 1), f"at most {oldest:g}", 0.0 <= age <= oldest),
    )


def lateness(robot: Robot, hz: float, seconds: float) -> list[Check]:
    """How late the ticks of a loop begin that reads the robot, as an actor's does. Always in real time."""
    rate = Rate(hz, time.monotonic, time.sleep)
    for _ in range(max(2, round(seconds * hz))):
        robot.read()
        rate.wait()
    late, longest = rate.lateness_ms(), LATE_SHARE * 1e3 / hz
    return [
        Check("loop late p50, ms", round(late["p50"], 2), f"at most {longest:g}", late["p50"] <= longest),
        Check("loop late p99, ms", round(late["p99"], 2), f"at most {longest:g}", late["p99"] <= longest),
    ]


def link(address: str | None, meta: Meta) -> list[Check]:
    """Round trip to the learner at `address`, or to one that is started here, and what it can send.

    It asks what there is to do, again and again, and begins nothing.
    """
    where = address or "one started here"
    here: LearnerLink | None = None
    try:
        if address is None:
            orders = {"task": meta.task, "name": "doctor"}
            here = LearnerLink("tcp://127.0.0.1:*", meta, orders, lambda meta, first, payloads: 0, {})
            address = here.address
        trips_ms, rate = _ask(address)
    except (WireError, KeysError) as error:
        return [Check("link", str(error), "answers", False)]
    finally:
        if here is not None:
            here.close()
    due = (1.0 + CATCH_UP) * meta.hz * spool.record_bytes(meta) / 1e3
    p50 = float(np.percentile(trips_ms, 50))
    return [
        Check("link", where, "answers", True),
        Check("link round trip p50, ms", round(p50, 2), f"at most {ROUND_TRIP_MS:g}", p50 <= ROUND_TRIP_MS),
        Check("link throughput, kB/s", round(rate / 1e3), f"at least {due:.0f} to catch up", rate / 1e3 >= due),
    ]


def _ask(address: str) -> tuple[list[float], float]:
    """Round trips in ms, and bytes/s of answers, many on their way at once. Raises WireError."""
    hello = wire.encode("HELLO", stream=NOBODY, first=1, next=1)
    answers: list[int] = []  # their bytes
    refusals: list[str] = []
    wanted = asked = 0

    def take(frames: list[bytes]) -> None:
        message = wire.decode(frames, "learner")
        if message.kind == "REFUSE":
            refusals.append(message.body.decode(errors="replace"))
        answers.append(sum(map(len, frames)))

    def turn() -> bool | None:
        nonlocal asked
        while asked < min(wanted, len(answers) + IN_FLIGHT) and pump.send(hello):
            asked += 1
        return None if time.monotonic() >= pump.end_by else False

    def ask(count: int) -> float:
        nonlocal wanted
        start, wanted = time.perf_counter(), wanted + count
        pump.wake()
        if not pump.wait(lambda: len(answers) >= wanted, ANSWER_S):
            raise WireError(f"no learner at {address} after {ANSWER_S:g} s")
        if refusals:
            raise WireError(f"the learner at {address} refuses: {refusals[0]}")
        return time.perf_counter() - start

    pump = Pump(zmq.DEALER, address)
    pump.start(take, turn)
    try:
        ask(1)  # the first waits for the connection
        trips = [1e3 * ask(1) for _ in range(ROUND_TRIPS)]
        return trips, BURST / ask(BURST) * answers[-1]
    finally:
        pump.close()


def host(meta: Meta) -> list[Check]:
    """Room for runs and for the spool, memory, and clocks."""
    checks = []
    for name, wanted in (("run folder", Path("runs")), ("spool", Path(SPOOL).expanduser())):
        disk = shutil.disk_usage(spool.existing(wanted))
        free = disk.free / disk.total
        value = f"{100 * free:.0f} % of {disk.total / 1e9:.0f} GB"
        checks.append(Check(f"disk free, {name}", value, f"at least {100 * FREE_SHARE:g} %", free >= FREE_SHARE))
    hours = spool.hours(meta, Path(SPOOL).expanduser())
    checks.append(Check("spool, hours of records", round(hours, 1), f"at least {SPOOL_HOURS:g}", hours >= SPOOL_HOURS))
    if Path("/proc/meminfo").exists():
        rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        sizes = {row[0]: float(row[1]) for row in rows}
        free = sizes["MemAvailable:"] / sizes["MemTotal:"]
        value = f"{100 * free:.0f} % of {sizes['MemTotal:'] / 1e6:.1f} GB"
        checks.append(Check("memory free", value, f"at least {100 * MEMORY_SHARE:g} %", free >= MEMORY_SHARE))
    tick, now = round(1e9 * time.get_clock_info("monotonic").resolution), datetime.now(timezone.utc)
    checks.append(Check("clock resolution, ns", tick, f"at most {TICK_NS:g}", tick <= TICK_NS))
    checks.append(Check("clock", now.isoformat(timespec="seconds"), f"after {RELEASED:%Y-%m-%d}", now > RELEASED))
    return checks


def secrets(folder: Path) -> list[Check]:
    """Whether nobody else can read the keys of the link."""
    files = [*folder.glob("*.key"), *folder.glob("actors/*.key")]
    loose = [str(file.relative_to(folder)) for file in files if file.stat().st_mode & 0o077]
    value = f"readable by others: {', '.join(loose)}" if loose else f"{len(files)} in {folder}"
    return [Check("key files", value, "mode 0600", not loose)]


def versions() -> Check:
    """What is installed; nothing of it is imported."""
    found = [f"python {platform.python_version()}", f"libzmq {zmq.zmq_version()}"]
    for part in PARTS:
        try:
            found.append(f"{part} {metadata.version(part)}")
        except metadata.PackageNotFoundError:
            continue  # an extra that this machine does without
    return Check("versions", ", ".join(found), "", True)
