"""From a person's (or the script's) slow lap to a recording, and from a recording or a CSV to a course."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..drivers.base import DriverError, Twin
from ..drivers.gamepad import Gamepad
from ..drivers.keyboard import Keyboard
from ..robot_env import record, task, track
from ..robot_env.course import Course
from ..robot_env.env import RobotEnv
from . import catalog
from .evaluate import PursuitDriver
from .folder import stream_meta

LOOKAHEAD_M = 0.8  # of the scripted driver
WANDER_RAD = 0.15  # steering noise of a script of quality 0
WANDER_S = 0.5  # its correlation time
LINE_STEP_M = 0.25  # of a centre line that is written: half the tightest bend a car can take
OVERLAP_M = 1.0  # driven beyond the last lap, so that the loop closes


class Teacher(Protocol):
    """Who drives a recording: called once a tick."""

    def __call__(self, obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray | None:
        """(a,) wish in action units, or None to stop."""
        ...


def scripted(env: RobotEnv, speed_mps: float, quality: float, seed: int) -> Teacher:
    """Pure pursuit at a commanded speed; below quality 1 its steering wanders."""
    low, high = env.robot.command.low[0], env.gate.limits.high[0]
    if not 0 < speed_mps <= high:
        raise DriverError(f"--speed {speed_mps:g}: between 0 and {high:g} m/s (the robot's and the task's limit)")
    assert low < high
    pursuit = PursuitDriver(env, speed_mps, LOOKAHEAD_M)
    rng = np.random.default_rng(seed)
    keep = np.exp(-1.0 / (env.task.spec.hz * WANDER_S))
    sigma = WANDER_RAD * (1.0 - quality) / env.robot.command.action_high[1] * np.sqrt(1 - keep**2)
    wander = 0.0

    def drive(obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray:
        nonlocal wander
        wish = pursuit(obs, prev_action)
        wander = keep * wander + sigma * rng.standard_normal()
        return wish + np.array([0.0, wander], np.float32)

    return drive


def by_hand(device: Keyboard | Gamepad, env: RobotEnv, speed_mps: float) -> Teacher:
    """Full deflection means `speed_mps` and full lock."""
    command = env.robot.command

    def drive(obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray | None:
        steer, speed, stop = device.read()
        return None if stop else command.to_action(np.array([speed * speed_mps, steer * command.high[1]]))

    return drive


def record_laps(
    env: RobotEnv, teacher: Teacher, laps: int, out: Path, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Drive and write every record as it happens. Returns DESIGN's keys of `record`."""
    if out.exists():
        raise record.RecordError(f"{out} is already there; choose another --out")
    assert isinstance(env.task, Course)
    meta = stream_meta(env.task.spec)
    times: list[float] = []
    steps = 0
    travelled, overlap = 0.0, 0.0
    with closing(record.SegmentWriter(out, meta)) as writer:

        def keep(made: record.Record) -> None:
            nonlocal steps, travelled
            writer.append(made)
            steps += made.action is not None
            travelled += abs(float(made.reading.values["velocity"][0])) / env.task.spec.hz
            if "lap_time_s" in made.events:
                times.append(made.events["lap_time_s"])
                say(f"lap {len(times)} of {laps}: {times[-1]:.1f} s")

        env.on_record.append(keep)
        env.source = "teacher"
        try:
            obs, _ = env.reset(seed=seed)
            while True:
                if len(times) >= laps:
                    overlap = overlap or travelled + OVERLAP_M
                    if travelled >= overlap:
                        break
                wish = teacher(obs, env.action)
                if wish is None:
                    break
                obs, _, terminated, truncated, _ = env.step(wish)
                if terminated or truncated:
                    obs, _ = env.reset()
            contacts = int(env.robot.truth()["contacts"]) if isinstance(env.robot, Twin) else None
        finally:
            env.close()  # while the writer takes the last reading
    return {
        "file": str(out), "steps": steps, "laps": len(times), "contacts": contacts,
        "lap_time_s": round(float(np.median(times)), 3) if times else None,
    }  # fmt: skip


def course_from_csv(
    file: Path, out: Path, length: float | None, width: float | None, checkpoints: int | None
) -> dict[str, Any]:
    """A task file from a centre-line CSV."""
    centerline, width_m = track.read_csv(file, length, width)
    centerline = track.resample(centerline, LINE_STEP_M, True)
    track.walls(centerline, width_m)  # refuses a corridor that joins two stretches
    places, radius = track.place_checkpoints(centerline, checkpoints, True, centerline, width_m)
    return _write(out, track.task_toml(centerline, width_m, places, radius), len(places), centerline, width_m)


def course_from_recording(
    file: Path, out: Path, width: float | None, checkpoints: int | None
) -> dict[str, Any]:
    """A task file from one lap of a recording; walls and rates are those of the task it was driven on."""
    meta, records = record.read_recording(file)
    if meta.task:
        spec = task.parse(meta.task, file.name, f"{file} (its task)")
    else:
        raise track.TrackError(f"{file}: the recording does not say which task it was driven on")
    positions = np.array([r.reading.values["pose"][:2] for r in records if r.source != "reset"], np.float64)
    first, last = track.find_loop(positions, meta.hz)
    line = track.lap_line(positions[first:last])
    centerline = np.asarray(spec.course.centerline)
    width_m = width or spec.course.width_m
    known = centerline if len(centerline) else None
    places, radius = track.place_checkpoints(line, checkpoints, True, known, width_m or None)
    text = track.task_toml(centerline, width_m, places, radius, hz=meta.hz, episode_s=spec.episode_s)
    return _write(out, text, len(places), line, width_m)


def _write(out: Path, text: str, checkpoints: int, line: np.ndarray, width_m: float) -> dict[str, Any]:
    catalog.make_task(task.parse(text, out.stem, str(out)))  # what we write, we can read
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    length = track.Line.from_points(line, True).length
    return {"file": str(out), "checkpoints": checkpoints, "length_m": round(length, 2), "width_m": round(width_m, 3)}
