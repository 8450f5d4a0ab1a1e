"""`tether run`, `learner`, `actor`, `demo`: what each command sets up and in which order."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from . import catalog, config
from .actor import Stop
from .folder import RunError, new_folder, point_latest
from .log import Log

ACTOR_GRACE_S = 10.0


def job_of(options: Any) -> Any:
    """The learner's Job from the command line. Everything that can be wrong is said before anything starts."""
    from .learner import Job

    folder = Path(options.out) if options.out else None
    if options.resume:
        return _resumed(options, folder or Path("runs/latest"))
    spec = catalog.load_spec(options.task)
    settings = config.load(options.preset, spec.kind, options.set)
    if options.steps is not None:
        settings = config.with_steps(settings, options.steps)
    if spec.hindsight and settings.agent.get("n_step", 1) > 1:
        raise config.ConfigError("task.hindsight needs agent.n_step = 1: goals drawn again reward one step")
    folder = folder or new_folder("runs", spec.name.replace(":", "-"))
    if (folder / "config.toml").exists():
        raise RunError(f"{folder} holds a run already; go on with it by --resume, or choose another --out")
    job = Job(
        spec, settings, folder, options.seed, options.bind or "tcp://127.0.0.1:*", tuple(options.prior),
        options.start, tensorboard=options.tensorboard,
    )  # fmt: skip
    save_config(job)
    point_latest(folder)
    return job


def save_config(job: Any) -> None:
    """Write the run's config.toml: everything that was decided."""
    job.folder.mkdir(parents=True, exist_ok=True)
    facts = {"task": job.spec.text or job.spec.name, "name": job.spec.name, "seed": job.seed,
             "prior": list(job.prior), "from": job.start or ""}  # fmt: skip
    (job.folder / "config.toml").write_text(config.dump(job.config, **facts), encoding="utf-8")


def _resumed(options: Any, folder: Path) -> Any:
    from .learner import Job

    settings, facts = config.read(folder.resolve())
    if options.steps is not None:
        settings = config.with_steps(settings, options.steps)
    prior = tuple(facts.get("prior", ()))
    return Job(
        catalog.spec_of(facts["task"], facts["name"]), settings, folder.resolve(), int(facts["seed"]), options.bind or "tcp://127.0.0.1:*", prior,
        resume=True, tensorboard=options.tensorboard,
    )  # fmt: skip


def train(job: Any, actor: list[str] | None, quiet: bool = False) -> dict[str, Any]:
    """Run a learner here and, with `actor` (its arguments), an actor beside it until the steps are done."""
    stop = Stop()
    give_back = stop.install()
    cores = _split_cores() if actor and "--realtime" in actor else None
    child: subprocess.Popen[bytes] | None = None
    with Log(job.folder, job.config.learner.steps, tensorboard=job.tensorboard) as log:
        try:
            learner = _learner(job, log)
            log.note(f"run {job.folder}, learner at {learner.link.address}")
            if actor is not None:
                child = _spawn_actor(learner.link.address, actor)
                if cores is not None:
                    os.sched_setaffinity(child.pid, cores)
                threading.Thread(target=_watch, args=(child, stop), daemon=True).start()
            result = learner.run(stop)
            if child is not None and child.wait(ACTOR_GRACE_S) not in (0, None) and not stop.reason:
                raise RunError(f"the actor ended with status {child.returncode}")
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):
                _write_error(job.folder)
            raise
        finally:
            if child is not None and child.poll() is None:
                child.terminate()
                child.wait()
            give_back()
    if stop.reason.startswith("the actor"):
        raise RunError(f"{stop.reason}; what it had sent is kept in {job.folder}, go on with --resume")
    return result


def _split_cores() -> set[int] | None:
    """Leave the first core to the actor: a loop in real time wakes up late beside a learner."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return None
    os.sched_setaffinity(0, cores[1:])  # before JAX counts them
    return {cores[0]}


def _learner(job: Any, log: Log) -> Any:
    from .learner import Learner

    try:
        return Learner(job, log)
    except BaseException:
        if not job.resume:  # nothing was begun: the folder's name stays free
            (job.folder / "config.toml").unlink(missing_ok=True)
        raise


def _spawn_actor(address: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tether.launch.cli", "actor", "--learner", address]
    command += ["--parent", str(os.getpid()), *arguments]
    return subprocess.Popen(command, start_new_session=True)


def _watch(child: subprocess.Popen[bytes], stop: Stop) -> None:
    status = child.wait()
    if not stop.reason and status != 0:
        stop.reason = f"the actor ended with status {status}"


def _write_error(folder: Path) -> None:
    import traceback

    try:
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        pass  # the error itself is raised on; a full disk must not hide it
