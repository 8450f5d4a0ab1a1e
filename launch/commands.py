"""What each sub-command does, from its options. `cli.py` parses them."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..robot_env.course import Course
from ..robot_env.env import RobotEnv
from ..robot_env.gym_env import GymEnv
from ..robot_env.task import Task, TaskError
from . import catalog, config, evaluate as evaluation, onboard
from .folder import RunError, new_folder

LAPS = 5  # driven by eval and drive unless told otherwise
EPISODES = 10
DEMO_STEPS = 6000
DEMO_CHECKPOINTS = 6


def run(options: Namespace) -> int:
    """Learner here, and unless it is `tether learner` an actor beside it."""
    from .run import job_of, train

    job = job_of(options)
    actor = None
    if options.bind is None:
        actor = [flag for flag in ("--realtime", "--view") if getattr(options, flag[2:])]
    result = train(job, actor)
    print(f"{result['steps']:,} steps in {result['train_s']} s; the run is in {job.folder}")
    print(f"next: tether eval {job.folder}   tether report {job.folder}   tether export {job.folder}")
    return 0


def actor(options: Namespace) -> int:
    """An actor that drives until its learner says stop."""
    from .actor import serve

    serve(
        options.learner, options.task, options.real, options.seed, options.realtime, options.view,
        parent=options.parent,
    )  # fmt: skip
    return 0


def record(options: Namespace) -> int:
    """Drive and keep what was driven."""
    from ..drivers.gamepad import Gamepad
    from ..drivers.keyboard import Keyboard
    from . import teach
    from .actor import start_view

    task = catalog.make_task(catalog.load_spec(options.task))
    if not isinstance(task, Course):
        raise TaskError(f"{options.task}: only courses can be recorded")
    if not 0 <= options.quality <= 1 or options.laps < 1:
        raise TaskError("--quality lies between 0 and 1, --laps is at least 1")
    out = Path(options.out) if options.out else new_folder("recordings", task.spec.name)
    by_hand = options.teleop != "script"
    env = catalog.make_env(task, options.real, options.seed, options.realtime or by_hand)
    assert isinstance(env, RobotEnv)
    if options.view:
        start_view(env)
    device = {"keyboard": Keyboard, "gamepad": Gamepad}[options.teleop]() if by_hand else None
    try:
        if device is None:
            teacher = teach.scripted(env, options.speed, options.quality, options.seed)
        else:
            device.open()
            teacher = teach.by_hand(device, env, options.speed)
        result = teach.record_laps(env, teacher, options.laps, out, options.seed, _progress)
    finally:
        env.close()
        if device is not None:
            device.close()
    return _say(options, result, f"{result['laps']} laps, {result['steps']} steps in {result['file']}")


def course(options: Namespace) -> int:
    """A task file from a CSV or a recording."""
    from . import teach

    file = Path(options.file)
    out = Path(options.out) if options.out else Path(f"{file.stem}.toml")
    if out.suffix != ".toml":
        raise TaskError(f"--out {out}: a task file's name ends in .toml")
    if file.suffix == ".csv":
        result = teach.course_from_csv(file, out, options.length, options.width, options.checkpoints)
    else:
        if options.length:
            raise TaskError("--length scales a CSV; a recording has its own length")
        result = teach.course_from_recording(file, out, options.width, options.checkpoints)
    text = "{file}: {checkpoints} checkpoints on {length_m} m, {width_m} m wide".format(**result)
    return _say(options, result, text)


def evaluate(options: Namespace) -> int:
    """Drive a run's or a bundle's policy, or a scripted one, without exploration."""
    source = Path(options.source)
    if options.policy:
        return _pursue(options)
    if (source / "policy.json").is_file():
        return drive(Namespace(**vars(options) | {"bundle": options.source, "real": False}))
    if not (source / "config.toml").is_file():
        raise RunError(f"{source}: neither a run nor a bundle; for a task give --policy pursuit")
    from .freeze import load_policy

    settings, facts = config.read(source.resolve())
    task = _task(options.task, str(facts["task"]), str(facts["name"]))
    trained = load_policy(source)
    policy = onboard.Policy(trained.spec, trained.weights)
    return _drive(options, task, policy.act)


def drive(options: Namespace) -> int:
    """The frozen policy of a bundle."""
    from .bundle import check_robot

    bundle = onboard.load_bundle(options.bundle)
    origin = bundle.spec["from"]
    task = _task(options.task, bundle.spec["task"], str(origin.get("task", "bundle")))
    channels, command = catalog.declaration(task.spec)
    check_robot(bundle, channels, command, task.spec.hz)
    return _drive(options, task, bundle.policies["task"].act, options.real)


def export(options: Namespace) -> int:
    """Freeze a run's policy."""
    from .freeze import freeze

    run_folder = Path(options.run)
    out = Path(options.out) if options.out else run_folder / "bundle"
    checked = freeze(run_folder, out)
    error, p99 = checked["task"]["relative_error"], checked["task"]["latency_ms"]["p99"]
    return _say(options, {"bundle": str(out), "checked": checked},
                f"{out}: equal to {error:.1e}, p99 {p99:.3f} ms a tick")  # fmt: skip


def report(options: Namespace) -> int:
    """One HTML file about a run."""
    from .report import write_report

    out = Path(options.out) if options.out else Path(options.run) / "report.html"
    for line in write_report(Path(options.run), out):
        print(line)
    print(out)
    return 0


def demo(options: Namespace) -> int:
    """Everything, without hardware and without arguments."""
    from . import demo as chain

    out = Path(options.out) if options.out else new_folder("runs", f"demo-{options.robot}")
    result = chain.car(out, options.seed, _progress)
    text = (
        f"trained in {result['train_s']:.0f} s; lap {result['lap_time_s']} s (demonstration "
        f"{result['demo_lap_s']} s), {result['clean_laps']} clean laps in a row; bundle {result['bundle']}"
    )
    return _say(options, result, text)


def catalog_list(options: Namespace) -> int:
    """What there is to choose from."""
    from ..robot_env.task import shipped

    rows = catalog.robots()
    print("robots")
    for name, entry in rows.items():
        print(f"  {name:12} {entry.about}{'' if entry.driver else ' (twin only)'}")
    for title, names in (
        ("tasks", [*shipped(), "gym:<id>"]), ("algorithms", list(catalog.ALGORITHMS)),
        ("presets", config.presets()),
    ):  # fmt: skip
        print(title)
        for name in names:
            print(f"  {name}")
    return 0


def _task(wanted: str | None, text: str, name: str) -> Task:
    if wanted:
        return catalog.make_task(catalog.load_spec(wanted))
    return catalog.make_task(catalog.spec_of(text, name))


def _drive(options: Namespace, task: Task, act: evaluation.Driver, real: bool = False) -> int:
    env = catalog.make_env(task, real, options.seed, options.realtime)
    laps, episodes = options.laps, options.episodes
    if laps is None and episodes is None and options.steps is None:
        laps, episodes = (LAPS, None) if isinstance(task, Course) else (None, EPISODES)
    if laps is not None and not isinstance(task, Course):
        raise TaskError(f"--laps: {task.spec.name} is not a course; give --episodes")
    if options.view:
        from .actor import start_view

        start_view(env)
    try:
        tally = evaluation.drive(env, act, laps, episodes, options.steps, options.seed)
        late = env.rate.late if isinstance(env, RobotEnv) else 0
    finally:
        env.close()
    return _told(options, tally.report(task.spec.name, late, isinstance(task, Course)))


def _pursue(options: Namespace) -> int:
    task = catalog.make_task(catalog.load_spec(options.task or options.source))
    if not isinstance(task, Course):
        raise TaskError(f"{task.spec.name}: pure pursuit drives courses only")

    def make() -> RobotEnv:
        env = catalog.make_env(task, False, options.seed, options.realtime)
        assert isinstance(env, RobotEnv)
        return env

    found: dict[str, Any] = {}
    speed, lookahead = 1.0, 0.8
    if options.tune:
        found = evaluation.tune(make, progress=_progress)
        if found["best"]["lap_time_s"] is None:
            raise TaskError(f"{task.spec.name}: no pure pursuit on the grid drives 3 clean laps")
        speed, lookahead = found["best"]["speed_mps"], found["best"]["lookahead_m"]
    env = make()
    try:
        driver = evaluation.PursuitDriver(env, speed, lookahead)
        tally = evaluation.drive(env, driver, options.laps or LAPS, options.episodes, options.steps, options.seed)
    finally:
        env.close()
    result = tally.report(task.spec.name, env.rate.late, True)
    return _told(options, result | {"policy": {"speed_mps": speed, "lookahead_m": lookahead}, **found})


def _told(options: Namespace, result: dict[str, Any]) -> int:
    if "laps" in result:
        laps = result["lap_time_s"]
        text = (
            f"{result['laps']} laps, {result['clean_laps']} clean in a row, {result['contacts']} contacts, "
            f"median {laps['median']} s, best {laps['best']} s; policy p99 {result['policy_ms']['p99']:.3f} ms"
        )
    else:
        text = (
            f"{result['episodes']} episodes, mean return {result['return_mean']:.1f}; "
            f"policy p99 {result['policy_ms']['p99']:.3f} ms"
        )
    return _say(options, result, text)


def _say(options: Namespace, result: dict[str, Any], text: str) -> int:
    print(text)
    if options.json:
        print(json.dumps(result), flush=True)
    return 0


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
