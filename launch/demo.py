"""`tether demo`: the whole chain on one machine, from a slow lap to a frozen policy that drives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..robot_env.env import RobotEnv
from . import catalog, config, evaluate, onboard, teach
from .config import RunError
from .freeze import freeze
from .learner import Job
from .run import train

TASK, SPEED_MPS, CHECKPOINTS, STEPS, LAPS = "car-loop", 1.0, 8, 6000, 6


def car(out: Path, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Record a lap, make the course, train, freeze, drive. Returns DESIGN's keys of `demo`."""
    out.mkdir(parents=True, exist_ok=False)
    lap, course, run, frozen = out / "lap", out / "course.toml", out / "run", out / "bundle"

    say(f"1/5 one slow lap of {TASK} at {SPEED_MPS} m/s")
    env = catalog.make_env(catalog.make_task(catalog.load_spec(TASK)), seed=seed)
    assert isinstance(env, RobotEnv)
    teacher = teach.scripted(env, SPEED_MPS, 1.0, seed)
    driven = teach.record_laps(env, teacher, 1, lap, seed, say)

    say("2/5 the course from that lap")
    made = teach.make_course(lap, course, None, None, CHECKPOINTS)
    say(f"    {made['checkpoints']} checkpoints on {made['length_m']} m")

    say("3/5 training in the twin")
    spec = catalog.load_spec(str(course))
    settings = config.load("cpu", spec.kind, [f"learner.steps={STEPS}"])
    trained = train(Job(spec, settings, run, seed, prior=(str(lap),)), [])
    if trained["steps"] < STEPS:
        raise RunError(f"stopped at step {trained['steps']}; go on with `tether run {course} --resume --out {run}`")

    say("4/5 freezing the policy")
    freeze(run, frozen)

    say("5/5 driving the frozen policy")
    env = catalog.make_env(catalog.make_task(spec), seed=seed + 1000)
    result = evaluate.drive(env, onboard.load_bundle(frozen).policies["task"].act, laps=LAPS)
    return {
        "train_s": trained["train_s"], "steps": trained["steps"], "run": str(run), "bundle": str(frozen),
        "demo_lap_s": driven["lap_time_s"], "lap_time_s": result["lap_time_s"]["median"],
        "clean_laps": result["clean_laps"], "laps": result["laps"], "contacts": result["contacts"],
        "lap_times_s": result["lap_time_s"]["all"],
    }  # fmt: skip
