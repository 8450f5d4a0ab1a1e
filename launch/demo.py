"""`tether demo`: the whole chain on one machine, from nothing to a frozen policy that drives, walks or picks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..robot_env.env import RobotEnv
from ..robot_env.task import TaskSpec
from . import catalog, config, evaluate, onboard, teach
from .config import RunError
from .freeze import freeze
from .learner import Job
from .run import train

Say = Callable[[str], None]
TASK, SPEED_MPS, CHECKPOINTS, STEPS, LAPS = "car-loop", 1.0, 8, 6000, 6
WALK, WALK_STEPS, WALKS = "dog-walk", 10_000, 3
PICK, PICK_STEPS, SHOWN, PICKS = "arm-pick", 5_000, 20, 20


def car(out: Path, seed: int, say: Say) -> dict[str, Any]:
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
    trained = _trained(spec, str(course), run, seed, STEPS, (str(lap),))

    say("4/5 freezing the policy")
    freeze(run, frozen)

    say("5/5 driving the frozen policy")
    result = _driven(spec, frozen, seed, laps=LAPS)
    return trained | {
        "bundle": str(frozen), "demo_lap_s": driven["lap_time_s"], "lap_time_s": result["lap_time_s"]["median"],
        "clean_laps": result["clean_laps"], "laps": result["laps"], "contacts": result["contacts"],
        "lap_times_s": result["lap_time_s"]["all"],
    }  # fmt: skip


def quadruped(out: Path, seed: int, say: Say) -> dict[str, Any]:
    """Learn to walk from nothing, freeze, walk. Returns DESIGN's keys of `demo`."""
    out.mkdir(parents=True, exist_ok=False)
    run, frozen, spec = out / "run", out / "bundle", catalog.load_spec(WALK)

    minutes = WALK_STEPS / spec.hz / 60
    say(f"1/3 learning to walk from nothing: {minutes:.0f} minutes of the twin's time; when it falls it gets up")
    trained = _trained(spec, WALK, run, seed, WALK_STEPS)

    say("2/3 freezing the policy")
    freeze(run, frozen)

    say("3/3 walking with the frozen policy")
    result = _driven(spec, frozen, seed, episodes=WALKS)
    say(f"    this is half a training: `tether run {WALK} --resume --out {run} --steps 24000` goes on to its end")
    return trained | {"bundle": str(frozen)} | {key: result[key] for key in ("episodes", "speed_mps", "falls")}


def arm(out: Path, seed: int, say: Say) -> dict[str, Any]:
    """Show how to pick up a cube, learn it, freeze, pick. Returns DESIGN's keys of `demo`."""
    out.mkdir(parents=True, exist_ok=False)
    shown, run, frozen, spec = out / "shown", out / "run", out / "bundle", catalog.load_spec(PICK)

    say(f"1/4 {SHOWN} demonstrations by a script that often misses")
    env = catalog.make_env(catalog.make_task(spec), seed=seed)
    assert isinstance(env, RobotEnv)
    teacher = teach.shown(env, teach.SPEED_MPS[spec.kind], teach.TAUGHT[PICK], seed)
    demonstrated = teach.record_tries(env, teacher, SHOWN, shown, seed, lambda line: None)
    say(f"    {SHOWN} of {demonstrated['tries']} tries succeeded, in {demonstrated['lap_time_s']} s each")

    say("2/4 learning from them and from practice: a reward of 1 for the cube held up, else none")
    trained = _trained(spec, PICK, run, seed, PICK_STEPS, (str(shown),))

    say("3/4 freezing the policy")
    freeze(run, frozen)

    say("4/4 picking with the frozen policy")
    result = _driven(spec, frozen, seed, episodes=PICKS)
    say(f"    this is a third of a training: `tether run {PICK} --resume --out {run} --steps 15000` goes on to its end")
    return trained | {
        "bundle": str(frozen), "shown_s": demonstrated["lap_time_s"],
        "episodes": result["episodes"], "success_rate": result["success_rate"], "cycle_s": result["cycle_s"],
    }  # fmt: skip


def _trained(
    spec: TaskSpec, source: str, run: Path, seed: int, steps: int, prior: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Train in the twin with the preset `cpu`; DESIGN's keys of that. Raises RunError where it is stopped."""
    settings = config.load("cpu", catalog.family(spec), [f"learner.steps={steps}"])
    trained = train(Job(spec, settings, run, seed, prior=prior), [])
    if trained["steps"] < steps:
        raise RunError(f"stopped at step {trained['steps']}; go on with `tether run {source} --resume --out {run}`")
    return {"train_s": trained["train_s"], "steps": trained["steps"], "run": str(run)}


def _driven(spec: TaskSpec, frozen: Path, seed: int, **until: int) -> dict[str, Any]:
    """What the frozen policy does under noise that it has not met."""
    env = catalog.make_env(catalog.make_task(spec), seed=seed + 1000)
    return evaluate.drive(env, onboard.load_bundle(frozen).policies["task"].act, **until)
