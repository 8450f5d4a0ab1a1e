"""What each sub-command does with its options: a text to print, and the object that `--json` prints after it."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..robot_env.course import Course
from ..robot_env.env import RobotEnv
from ..robot_env.gym_env import GymEnv
from ..robot_env.takeover import BY_HAND, STEERED
from ..robot_env.task import Task, TaskError, shipped
from . import catalog, config, onboard
from . import evaluate as evaluation
from .config import RunError, new_folder
from .signals import uninterrupted

Said = tuple[str, dict[str, Any]]
LAPS = 5  # driven by eval and drive unless told otherwise
EPISODES = 10


def run(options: Namespace) -> Said:
    """Learner here, and unless it is `tether learner` an actor beside it."""
    with uninterrupted():
        from .run import job_of, train
        from .teach import device

    job = job_of(options)
    actor = None
    if options.bind is None:
        catalog.failures(job.spec, options.fail)  # the actor would refuse them when the run has begun
        who = job.config.actor.takeover
        if who in BY_HAND:
            device(who).close()  # the actor would miss it when the run has begun
        if who == "none" and job.config.learner.takeover_reward is not None:
            raise RunError("learner.takeover_reward pays for takeovers only: say by --takeover who takes over")
        options.realtime |= who in BY_HAND
        actor = [flag for flag in ("--realtime", "--view") if getattr(options, flag[2:])]
        actor += [part for failure in options.fail for part in ("--fail", failure)]
    result = train(job, actor)
    new = f" in all, {result['new_steps']:,} of them" if job.resume else ""
    text = f"{result['steps']:,} steps{new} in {result['train_s']} s; the run is in {job.folder}\nnext: "
    if result["steps"] < job.config.learner.steps:
        text += f"the same with --resume --out {job.folder}   "
    return text + f"tether eval {job.folder}   tether report {job.folder}   tether export {job.folder}", result


def actor(options: Namespace) -> Said:
    """An actor that drives until its learner says stop."""
    with uninterrupted():
        from .actor import serve

    chosen = options.learner, options.task, options.real, options.seed, options.realtime, options.view
    more = {"parent": options.parent, "spool": options.spool, "fail": options.fail, "takeover": options.takeover}
    return serve(*chosen, **more), {}


def record(options: Namespace) -> Said:
    """Drive and keep what was driven."""
    from . import teach

    task = catalog.make_task(catalog.load_spec(options.task))
    tries = task.spec.kind == "manipulate"
    if not tries:
        _steered(task, "be recorded")
    out = Path(options.out) if options.out else new_folder("recordings", task.spec.name)
    options.realtime |= options.teleop != "script"
    env = _env(options, task)
    with teach.teacher(options.teleop, env, options.speed, options.quality, options.seed) as driver:
        keep = teach.record_tries if tries else teach.record_laps
        result = keep(env, driver, options.laps, out, options.seed, _progress)
    if tries:
        text = "{tries} tries, {laps} succeeded, {steps} steps in {file}\nnext: tether run {task} --prior {file}"
    else:
        text = "{laps} laps, {steps} steps in {file}\nnext: tether course {file}"
    return text.format(task=options.task, **result), result


def course(options: Namespace) -> Said:
    """A task file from a CSV or a recording."""
    from . import teach

    file = Path(options.file)
    out = Path(options.out) if options.out else Path(f"{file.stem}.toml")
    if out.suffix != ".toml":
        raise TaskError(f"--out {out}: a task file's name ends in .toml")
    result = teach.make_course(file, out, options.length, options.width, options.checkpoints)
    text = "{file}: {checkpoints} checkpoints on {length_m} m, {width_m} m wide\nnext: tether record {file}"
    if not result["length_m"]:  # no way along the floor
        text = "{file}: {checkpoints} checkpoints\nnext: tether run {file} --prior " + str(file)
    return text.format(**result), result


def evaluate(options: Namespace) -> Said:
    """Drive a run's or a bundle's policy, or a scripted one, without exploration."""
    source = Path(options.source)
    if options.policy:
        return _pursue(options)
    if (source / "policy.json").is_file():
        return drive(options)
    if not (source / "config.toml").is_file():
        raise RunError(f"{source}: neither a run nor a bundle; for a task give --policy pursuit")
    with uninterrupted():
        from .freeze import trained

    trainer = trained(source)
    task = catalog.make_task(catalog.load_spec(options.task)) if options.task else trainer.task
    catalog.check_actions(task.spec, trainer.task.spec)
    policy = onboard.Policy(trainer.policy_spec(), trainer.policy())
    return _drive(options, _env(options, task), policy.act)


def drive(options: Namespace) -> Said:
    """The frozen policy of a bundle."""
    from .bundle import check_robot

    bundle = onboard.load_bundle(options.source)
    name = str(bundle.spec["from"].get("task", "bundle"))
    spec = catalog.load_spec(options.task) if options.task else catalog.spec_of(bundle.spec["task"], name)
    check_robot(bundle, spec)
    env = _env(options, catalog.make_task(spec))
    return _drive(options, env, bundle.policies["task"].act)


def export(options: Namespace) -> Said:
    """Freeze a run's policy."""
    with uninterrupted():
        from .freeze import freeze

    run_folder = Path(options.run)
    out = Path(options.out) if options.out else run_folder / "bundle"
    checked = freeze(run_folder, out)
    error, p99 = checked["task"]["max_error"], checked["task"]["latency_ms"]["p99"]
    text = f"{out}: equal to {error:.1e}, p99 {p99:.3f} ms a tick\nnext: tether drive {out}"
    return text, {"bundle": str(out), "checked": checked}


def report(options: Namespace) -> Said:
    """One HTML file about a run."""
    from .report import write_report

    out = Path(options.out) if options.out else Path(options.run) / "report.html"
    if out.suffix != ".html":
        raise RunError(f"--out {out}: a report's name ends in .html")
    return "\n".join([*write_report(Path(options.run), out), str(out)]), {}


def demo(options: Namespace) -> Said:
    """Everything, without hardware and without arguments."""
    with uninterrupted():
        from . import demo as chain

    out = Path(options.out) if options.out else new_folder("runs", f"demo-{options.robot}")
    if options.robot == "quadruped":
        result = chain.quadruped(out, options.seed, _progress)
        text = "{speed_mps:.2f} m/s, {falls} falls in {episodes} episodes"
    elif options.robot == "arm":
        result = chain.arm(out, options.seed, _progress)
        text = "{success_rate:.0%} of {episodes} tries" + _each(result) + " (shown in {shown_s} s)"
    else:
        result = chain.car(out, options.seed, _progress)
        text = "lap {lap_time_s} s (demonstration {demo_lap_s} s), {clean_laps} clean laps in a row"
    return ("trained in {train_s:.0f} s; " + text + "; bundle {bundle}").format(**result), result


def doctor(options: Namespace) -> Said:
    """Whether the rig is ready."""
    from .doctor import examine, report

    spec = catalog.load_spec(options.task)
    return report(spec, examine(spec, options.learner, options.real))


def keys(options: Namespace) -> Said:
    """The learner's keys and those of its actors."""
    from .keys import make

    return "\n".join(make(options.names)), {}


def catalog_list(options: Namespace) -> Said:
    """What there is to choose from."""
    robots = [f"{name:12} {row.about}{'' if row.driver else ' (twin only)'}" for name, row in catalog.robots().items()]
    tables = {"robots": robots, "tasks": [*shipped(), "gym:<id>"], "algorithms": catalog.algorithms(),
              "presets": config.presets()}  # fmt: skip
    return "\n".join("\n  ".join([title, *names]) for title, names in tables.items()), {}


def _env(options: Namespace, task: Task) -> Any:
    return catalog.make_env(task, options.real, options.seed, options.realtime, options.view)


def _steered(task: Task, what: str) -> None:
    """Raise TaskError for what neither a script nor a person can drive."""
    if not isinstance(task, Course):
        raise TaskError(f"{task.spec.name}: only courses can {what}")
    if catalog.declaration(task.spec)[1].names != STEERED:
        raise TaskError(f"{task.spec.name}: only robots that take {' and '.join(STEERED)} can {what}")


def _pursue(options: Namespace) -> Said:
    task = catalog.make_task(catalog.load_spec(options.task or options.source))
    _steered(task, "be driven by pure pursuit")
    found: dict[str, Any] = {}
    policy = {"speed_mps": 1.0, "lookahead_m": 0.8}
    if options.tune:
        found = evaluation.tune(lambda: _env(options, task), _progress)
        policy = {key: found["best"][key] for key in policy}
    env = _env(options, task)
    return _drive(options, env, evaluation.pursuit(env, **policy), {"policy": policy, **found})


def _drive(
    options: Namespace, env: RobotEnv | GymEnv, act: evaluation.Driver, more: dict[str, Any] | None = None
) -> Said:
    laps, episodes, course = options.laps, options.episodes, isinstance(env.task, Course)
    if laps is not None and not course:
        raise TaskError(f"--laps: {env.task.spec.name} is not a course; give --episodes")
    if laps is None and episodes is None and options.steps is None:
        laps, episodes = (LAPS, None) if course else (None, EPISODES)
    result = evaluation.drive(env, act, laps, episodes, options.steps, options.seed)
    text = "{episodes} episodes, mean return {return_mean:.1f}"
    if course:
        text = "{laps} laps, {clean_laps} clean in a row, {contacts} contacts"
        text += ", median {lap_time_s[median]} s" if result["laps"] else ""
    elif env.task.spec.kind == "walk":
        text = "{episodes} episodes, {speed_mps:.2f} m/s, {falls} falls"
    elif env.task.spec.kind == "manipulate":
        text = "{success_rate:.0%} of {episodes} tries" + _each(result) + ", {interventions} interventions"
    text += "; policy p99 {policy_ms[p99]:.3f} ms"
    return text.format(**result), result | (more or {})


def _each(result: dict[str, Any]) -> str:
    """How long the tries took that succeeded, if any did."""
    return "" if result["cycle_s"] is None else f" in {result['cycle_s']} s each"


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
