"""From a person's (or the script's) slow lap to a recording, and from a recording or a CSV to a course."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..drivers.base import DriverError
from ..drivers.gamepad import Gamepad
from ..drivers.keyboard import Keyboard
from ..robot_env import record, task, track
from ..robot_env.course import Course
from ..robot_env.env import RobotEnv
from . import catalog
from .evaluate import Tally, practise, pursuit

LOOKAHEAD_M = 0.8  # of the scripted driver
WANDER_RAD = 0.15  # steering noise of a script of quality 0
WANDER_S = 0.5  # its correlation time
SLOWEST_MPS = 0.2  # a recording that takes longer than at this speed is given up
OVERLAP_M = 1.0  # driven beyond the last lap, so that the loop closes

# (observation, previous action) -> (a,) wish in action units, or None to stop
Teacher = Callable[[np.ndarray, np.ndarray], np.ndarray | None]


@contextmanager
def teacher(teleop: str, env: RobotEnv, speed_mps: float, quality: float, seed: int) -> Iterator[Teacher]:
    """Who drives a recording: `script`, `keyboard` or `gamepad`, which is let go of in the end."""
    if teleop == "script":
        yield scripted(env, speed_mps, quality, seed)
        return
    device = Keyboard() if teleop == "keyboard" else Gamepad()
    device.open()
    with closing(device):
        yield by_hand(device, env, speed_mps)


def scripted(env: RobotEnv, speed_mps: float, quality: float, seed: int) -> Teacher:
    """Pure pursuit at a commanded speed; below quality 1 its steering wanders."""
    high = env.gate.limits.high[0]
    if not 0 < speed_mps <= high:
        raise DriverError(f"--speed {speed_mps:g}: between 0 and {high:g} m/s (the robot's and the task's limit)")
    if not 0 <= quality <= 1:
        raise DriverError("--quality lies between 0 and 1")
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


def by_hand(device: Keyboard | Gamepad, env: RobotEnv, speed_mps: float) -> Teacher:
    """Full deflection means `speed_mps` and full lock."""
    command = env.command

    def drive(obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray | None:
        steer, speed, stop = device.read()
        return None if stop else command.to_action(np.array([speed * speed_mps, steer * command.high[1]]))

    return drive


def record_laps(
    env: RobotEnv, driver: Teacher, laps: int, out: Path, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Drive, write every record as it happens, and close the environment. Returns DESIGN's keys of `record`."""
    if out.exists():
        raise record.RecordError(f"{out} is already there; choose another --out")
    assert isinstance(env.task, Course)
    tally, overlap = Tally(env), 0.0
    patience = (laps + 1) * env.task.line.length / SLOWEST_MPS * env.task.spec.hz
    with closing(record.SegmentWriter(out, catalog.stream_meta(env.task.spec))) as writer:

        def keep(made: record.Record) -> None:
            nonlocal overlap
            writer.append(made.seq, record.encode(made))
            if len(tally.laps) >= laps:
                overlap += abs(float(made.reading.values["velocity"][0])) / env.task.spec.hz
            if made.seq > patience:
                raise record.RecordError(f"{out}: lap {len(tally.laps) + 1} does not end: too narrow, tight or slow?")
            if "lap_time_s" in made.events:
                say(f"lap {len(tally.laps)} of {laps}: {tally.laps[-1]:.1f} s")

        env.on_record.append(keep)
        env.source = "teacher"
        try:
            practise(env, lambda obs, before: driver(obs, before) if overlap < OVERLAP_M else None, seed)
        except (KeyboardInterrupt, SystemExit):
            say(f"stopped; what was driven is kept in {out}")
            raise
    return {
        "file": str(out), "steps": tally.episodes.steps, "laps": len(tally.laps), "lap_time_s": tally.median_s,
        "contacts": tally.contacts,
    }  # fmt: skip


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
        places = np.array([r.reading.values["pose"][:2] for r in records if r.source != "reset"], np.float64)
        first, last = track.find_loop(places, meta.hz)
        line = track.lap_line(places[first:last])
        centerline, width_m = np.asarray(driven.course.centerline), width or driven.course.width_m
        rates = {"hz": meta.hz, "episode_s": driven.episode_s}
    known = centerline if len(centerline) else None
    chosen, radius = track.place_checkpoints(line, checkpoints, known, width_m or None)
    text = track.task_toml(centerline, width_m, chosen, radius, **rates)
    catalog.make_task(task.parse(text, out.stem, str(out)))  # what we write, we can read
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".new").write_text(text, encoding="utf-8")  # on a full disk an older file stays whole
    out.with_suffix(".new").replace(out)
    return {
        "file": str(out), "checkpoints": len(chosen), "width_m": round(width_m, 3),
        "length_m": round(track.Line(line, True).length, 2),
    }  # fmt: skip
