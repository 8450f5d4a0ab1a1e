"""Who drives instead of a policy, from a person's (or the script's) slow lap, or tries, to a recording, and from a
recording or a CSV to a course."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..drivers.base import DriverError
from ..drivers.gamepad import Gamepad
from ..drivers.keyboard import Keyboard
from ..robot_env import record, takeover, task, track
from ..robot_env.course import Course
from ..robot_env.env import RobotEnv
from ..robot_env.gym_env import GymEnv
from ..robot_env.hand import Scripted, miss, show
from ..robot_env.manipulate import Manipulate, shown_task
from ..robot_env.record import Record
from . import catalog
from .evaluate import Tally, patience, practise, pursuit

LOOKAHEAD_M = 0.8  # of the scripted driver
WANDER_RAD = 0.15  # steering noise of a script of quality 0
WANDER_S = 0.5  # its correlation time
SPEED_MPS = {"course": 1.0, "manipulate": takeover.SCRIPT_MPS}  # of a script, unless told otherwise
OVERLAP_M = 1.0  # driven beyond the last lap, so that the loop closes
TAUGHT = {"arm-pick": 0.62, "arm-insert": 0.94}  # quality of the scripts to learn from: 8 of 10 of their tries succeed
PATIENCE = 10  # tries to one that succeeds, after which a recording is given up

# (observation, previous action) -> (a,) wish in action units, or None to stop
Teacher = Callable[[np.ndarray, np.ndarray], np.ndarray | None]


@contextmanager
def teacher(teleop: str, env: RobotEnv, speed_mps: float | None, quality: float, seed: int) -> Iterator[Teacher]:
    """Who drives a recording: `script`, `keyboard` or `gamepad`, which is let go of in the end."""
    usual_mps = (SPEED_MPS if teleop == "script" else takeover.HAND_MPS)[env.task.spec.kind]
    speed_mps = usual_mps if speed_mps is None else speed_mps
    if teleop == "script":
        yield (scripted if isinstance(env.task, Course) else shown)(env, speed_mps, quality, seed)
        return
    with opened(teleop) as device:
        yield by_hand(device, env, speed_mps)


@contextmanager
def intervener(
    who: str, env: RobotEnv | GymEnv, quality: float, seed: int
) -> Iterator[takeover.Takeover | None]:
    """Who takes over from the policy, one of takeover.WHO; a device is let go of in the end. Raises TaskError, or
    DriverError where the device is not there."""
    spec, command = env.task.spec, env.command
    takeover.check(who, spec, command)
    if who in takeover.BY_HAND:
        with opened(who) as device:
            yield takeover.ByHand(device, command, spec.hz, takeover.HAND_MPS[spec.kind])
    elif who == "script":
        assert isinstance(env.task, Manipulate)
        yield takeover.ByScript(env.task, command, quality, seed)
    else:
        yield None


@contextmanager
def opened(who: str) -> Iterator[takeover.Device]:
    """A `device`, of which is said how it is used; it is let go of in the end."""
    with closing(device(who)) as sticks:
        print(f"{who}: {sticks.HOW}", file=sys.stderr)
        yield sticks


def device(who: str) -> Keyboard | Gamepad:
    """The `keyboard` or the `gamepad`, open. Raises DriverError."""
    sticks = Keyboard() if who == "keyboard" else Gamepad()
    sticks.open()
    return sticks


def scripted(env: RobotEnv, speed_mps: float, quality: float, seed: int) -> Teacher:
    """Pure pursuit at a commanded speed; below quality 1 its steering wanders."""
    _check_script(speed_mps, env.gate.limits.high[0], quality)
    follow = pursuit(env, speed_mps, LOOKAHEAD_M)
    rng = np.random.default_rng(seed)
    keep = np.exp(-1.0 / (env.task.spec.hz * WANDER_S))
    sigma = WANDER_RAD * (1.0 - quality) / env.command.action_high[1] * np.sqrt(1 - keep**2)
    wander = 0.0

    def drive(obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray:
        nonlocal wander
        wander = keep * wander + sigma * rng.standard_normal()
        return follow(obs, prev_action) + np.array([0.0, wander], np.float32)

    return drive


def _check_script(speed_mps: float, high: float, quality: float) -> None:
    if not 0 < speed_mps <= high:
        raise DriverError(f"--speed {speed_mps:g}: between 0 and {high:g} m/s (the robot's and the task's limit)")
    if not 0 <= quality <= 1:
        raise DriverError("--quality lies between 0 and 1")


def shown(env: RobotEnv, speed_mps: float, quality: float, seed: int) -> Teacher:
    """A task's checkpoints one after the other, by script; below quality 1 it misses what it grips, in each try by
    another distance."""
    _check_script(speed_mps, float(env.gate.limits.rate[0]), quality)
    rng, spec = np.random.default_rng(seed), env.task.spec
    script: Scripted | None = None

    def ended(record: Record) -> None:
        nonlocal script
        script = None if record.action is None else script

    def drive(obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray | None:
        nonlocal script
        if script is None:
            script = show(env.command, spec.hz, spec.checkpoints, speed_mps, miss(quality, rng))
        return script.wish(env.reading)

    env.on_record.append(ended)
    return drive


def by_hand(device: takeover.Device, env: RobotEnv, speed_mps: float) -> Teacher:
    """Full deflection means `speed_mps` and full lock."""
    command, hz = env.command, env.task.spec.hz

    def drive(obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray | None:
        sticks = device.read()
        return None if sticks.stop else takeover.by_sticks(sticks, command, hz, speed_mps, prev_action)

    return drive


def record_laps(
    env: RobotEnv, driver: Teacher, laps: int, out: Path, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Drive, write every record as it happens, and close the environment. Returns DESIGN's keys of `record`."""
    assert isinstance(env.task, Course)
    tally, overlap = Tally(env), 0.0
    limit = patience(env.task, laps)

    def see(made: Record) -> None:
        nonlocal overlap
        if len(tally.laps) >= laps:
            overlap += abs(float(made.reading.values["velocity"][0])) / env.task.spec.hz
        if made.seq > limit:
            raise record.RecordError(f"{out}: lap {len(tally.laps) + 1} does not end: too narrow, tight or slow?")
        if "lap_time_s" in made.events:
            say(f"lap {len(tally.laps)} of {laps}: {tally.laps[-1]:.1f} s")

    _record(env, lambda obs, before: driver(obs, before) if overlap < OVERLAP_M else None, out, seed, say, see)
    return {
        "file": str(out), "steps": tally.episodes.steps, "laps": len(tally.laps), "lap_time_s": tally.median_s,
        "contacts": tally.contacts,
    }  # fmt: skip


def record_tries(
    env: RobotEnv, driver: Teacher, wanted: int, out: Path, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """`record_laps` for tries of a task that ends: until so many have succeeded. Those that failed are kept, too."""
    tally = Tally(env)

    def see(made: Record) -> None:
        done = int(sum(tally.successes))
        if made.action is None and tally.returns and done < wanted and len(tally.returns) >= PATIENCE * wanted:
            raise record.RecordError(f"{out}: {done} of {len(tally.returns)} tries succeeded: too fast, or too bad?")
        if made.action is None and "reset" not in made.events:
            say(f"{done} of {wanted} done, in {len(tally.returns)} tries")

    def on(obs: np.ndarray, before: np.ndarray) -> np.ndarray | None:
        return driver(obs, before) if sum(tally.successes) < wanted else None

    _record(env, on, out, seed, say, see)
    return {
        "file": str(out), "steps": tally.episodes.steps, "laps": int(sum(tally.successes)), "tries": len(tally.returns),
        "lap_time_s": tally.cycle_s, "contacts": tally.contacts,
    }  # fmt: skip


def _record(
    env: RobotEnv, driver: Teacher, out: Path, seed: int, say: Callable[[str], None], see: Callable[[Record], None]
) -> None:
    """Let somebody drive until they stop; every record is on the disk before `see` sees it."""
    if out.exists():
        raise record.RecordError(f"{out} is already there; choose another --out")
    with closing(record.SegmentWriter(out, catalog.stream_meta(env.task.spec))) as writer:

        def keep(made: Record) -> None:
            writer.append(made.seq, record.encode(made))
            see(made)

        env.on_record.append(keep)
        env.source = "teacher"
        try:
            practise(env, driver, seed)
        except (KeyboardInterrupt, SystemExit):
            say(f"stopped; what was driven is kept in {out}")
            raise


def make_course(
    file: Path, out: Path, length: float | None, width: float | None, checkpoints: int | None
) -> dict[str, Any]:
    """A task file from a centre-line CSV, or from one lap of a recording, with the walls and the rates of the
    task that was driven. Returns DESIGN's keys of `course`.
    """
    rates = {}
    if file.suffix == ".csv":
        centerline, width_m = track.read_csv(file, length, width)
        line = centerline = track.resample(centerline, track.STEP_M, True)
        if len(track.walls(centerline, width_m)) < 2:  # it refuses a corridor that joins two stretches itself
            raise track.TrackError(f"{file}: {width_m:g} m wide it has no inside: less --width, or more --length")
    elif length:
        raise track.TrackError("--length scales a CSV; a recording has its own length")
    else:
        meta, records = record.read_recording(file)
        driven = task.parse(meta.task, file.name, f"{file} (its task)")
        if driven.kind == "manipulate":
            return _make_manipulation(driven, records, out, checkpoints, width)
        places = np.array([r.reading.values["pose"][:2] for r in records if r.source != "reset"], np.float64)
        first, last = track.find_loop(places, meta.hz)
        line = track.lap_line(places[first:last])
        centerline, width_m = np.asarray(driven.course.centerline), width or driven.course.width_m
        rates = {"hz": meta.hz, "episode_s": driven.episode_s}
    known = centerline if len(centerline) else None
    chosen, radius = track.place_checkpoints(line, checkpoints, known, width_m or None)
    text = track.task_toml(centerline, width_m, chosen, radius, **rates)
    _write(text, out)
    return {
        "file": str(out), "checkpoints": len(chosen), "width_m": round(width_m, 3),
        "length_m": round(track.Line(line, True).length, 2),
    }  # fmt: skip


def _make_manipulation(
    driven: task.TaskSpec, records: list[Record], out: Path, checkpoints: int | None, width: float | None
) -> dict[str, Any]:
    """The same task with checkpoints from recorded tries."""
    if width or checkpoints == 1:
        raise task.TaskError("no --width for an arm, and at least 2 --checkpoints: the object gripped, and its end")
    text = shown_task(driven, records, checkpoints or 2)
    _write(text, out)
    return {"file": str(out), "checkpoints": text.count("[[checkpoint]]"), "width_m": 0.0, "length_m": 0.0}


def _write(text: str, out: Path) -> None:
    catalog.make_task(task.parse(text, out.stem, str(out)))  # what we write, we can read
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".new").write_text(text, encoding="utf-8")  # on a full disk an older file stays whole
    out.with_suffix(".new").replace(out)
