"""`tether run` and `tether learner`: what is set up, in which order, and how it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..robot_env.record import SUFFIX
from ..robot_env.takeover import check
from . import catalog, config
from .actor import noise_seed
from .config import RunError
from .learner import Job, Learner
from .log import Log
from .pump import keys_for
from .signals import stoppable

ACTOR_GRACE_S = 10.0
ACTOR_ENDED = "the actor ended"


def job_of(options: Any) -> Job:
    """The learner's job from the command line. Everything that can be wrong is said before anything starts."""
    steps = [] if options.steps is None else [f"learner.steps={options.steps}"]
    if options.resume:
        folder = Path(options.out or "runs/latest").resolve()
        settings, facts = config.read(folder, steps)
        spec, seed = catalog.spec_of(facts["task"], facts["name"]), facts["seed"]
        prior, start = facts["prior"], facts["from"]
        asked: dict[str, tuple[Any, Any, Any]] = {  # now, where nothing is asked for, when the run began
            "TASK": (catalog.load_spec(options.task).text, None, spec.text),
            "--seed": (options.seed, 0, seed),
            "--preset": (options.preset, "cpu", settings.preset),
            "--set": (config.read(folder, [*options.set, *steps])[0], None, settings),
            "--takeover": (options.takeover, None, settings.actor.takeover),
            "--prior": (options.prior, [], prior),
            "--from": (options.start, "", start),
        }
        for name, (now, default, before) in asked.items():
            if now not in (default, before):
                how = f"{name} is not what {folder} began with, which its config.toml says"
                raise RunError(f"{how}: leave out {name} or give the same, or leave out --resume")
    else:
        spec, seed, prior, start = catalog.load_spec(options.task), options.seed, options.prior, options.start
        whom = [] if options.takeover is None else [f"actor.takeover={options.takeover}"]
        settings = config.load(options.preset, catalog.family(spec), [*options.set, *whom, *steps])
        folder = Path(options.out) if options.out else config.new_folder("runs", spec.name.replace(":", "-"))
        if (folder / "config.toml").exists():
            raise RunError(f"{folder} holds a run already; go on with it by --resume, or choose another --out")
        if any(folder.glob(f"*{SUFFIX}")):  # its steps would be taken for the recording's
            raise RunError(f"{folder} holds a recording; choose another --out")
    if settings.learner.prior_anneal and not prior and settings.actor.takeover == "none":  # preset sim2real
        raise RunError("sim2real (prior_anneal) needs --from RUN, --prior RUN and its preset, e.g. cpu,sim2real")
    if spec.hindsight and settings.agent.get("n_step", 1) > 1:
        raise config.ConfigError("task.hindsight needs agent.n_step = 1: goals drawn again reward one step")
    if settings.actor.takeover != "none":
        check(settings.actor.takeover, spec, catalog.declaration(spec)[1])
    bind = options.bind or "tcp://127.0.0.1:*"
    keys_for(bind, "learner.key")
    return Job(spec, settings, folder, seed, bind, tuple(prior), start, options.resume,
               options.tensorboard, options.devices)  # fmt: skip


def train(job: Job, actor: list[str] | None) -> dict[str, Any]:
    """Run a learner here and, with `actor` (its arguments), an actor beside it until the steps are done."""
    cores = _split_cores() if actor and "--realtime" in actor else None
    child: subprocess.Popen[bytes] | None = None
    failure = job.folder / "error.txt"
    job.folder.mkdir(parents=True, exist_ok=True)
    failure.unlink(missing_ok=True)
    with (
        _owned(job.folder),
        stoppable(lambda: ACTOR_ENDED if child and child.poll() is not None else "") as stopped,
        contextlib.closing(Log(job.folder, job.config.learner.steps, tensorboard=job.tensorboard)) as log,
    ):
        try:
            learner = Learner(job, log)
            if not job.resume:  # only now is the folder's name taken
                facts = {"task": job.spec.text, "name": job.spec.name, "seed": job.seed}
                text = config.dump(job.config, **facts, prior=list(job.prior), **{"from": job.start})
                (job.folder / "config.toml").write_text(text, encoding="utf-8")
                config.point_latest(job.folder)
            log.note(f"run {job.folder}, learner at {learner.link.address}")
            if learner.trainer.steps >= job.config.learner.steps:
                log.note(f"it has its {learner.trainer.steps:,} steps already; for more give --steps")
            elif actor is not None:
                seed = noise_seed(job.seed, len(learner.trainer.cursor))
                actor = [*actor, "--seed", str(seed), "--spool", str(job.folder / "spool")]
                child = _spawn_actor(learner.link.address, actor, cores)
            result = learner.run(stopped)
            if child and not learner.link.greeted:
                child.terminate()  # it was still starting, and could not be told
            if child and _wait(child) and stopped() == ACTOR_ENDED:
                kept = f"what it had sent is kept in {job.folder}, go on with --resume"
                raise RunError(f"{ACTOR_ENDED} with status {child.returncode}; {kept}")
            return result
        except Exception:
            with contextlib.suppress(OSError):  # a full disk must not hide the error itself
                failure.write_text(traceback.format_exc(), encoding="utf-8")
            raise
        finally:
            if child and child.poll() is None:
                child.terminate()
                _wait(child)


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Keep other learners out of a run's folder."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunError(f"{folder} belongs to a learner that runs; stop it, or choose another --out") from None
    finally:
        os.close(held)


def _split_cores() -> set[int] | None:
    """Leave the first core to the actor: a loop in real time wakes up late beside a learner."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return None
    os.sched_setaffinity(0, cores[1:])  # before JAX counts them
    return {cores[0]}


def _spawn_actor(address: str, arguments: list[str], cores: set[int] | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tether.launch.cli", "actor", "--learner", address]
    child = subprocess.Popen([*command, "--parent", str(os.getpid()), *arguments], start_new_session=True)
    if cores is not None:
        os.sched_setaffinity(child.pid, cores)
    return child


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Its exit status. After a while it is told to end, then killed: what it held is in its spool."""
    for end in (child.terminate, child.kill):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(ACTOR_GRACE_S)
        end()
    return child.wait()
