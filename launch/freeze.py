"""From a run to a frozen policy: its newest snapshot, its own records to check it on, a bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..robot_env.record import read_streams
from ..robot_env.sample import samples
from . import bundle, catalog, config
from .config import RunError
from .trainer import Trainer


def trained(run: Path) -> Trainer:
    """The trainer of the newest snapshot, with the policy to be deployed. Raises RunError for a run without one."""
    settings, facts = config.read(run.resolve())
    task = catalog.make_task(catalog.spec_of(facts["task"], facts["name"]))
    trainer = Trainer(task, settings, int(facts["seed"]))
    cursor, warning = trainer.load(run / "snapshots")
    if not cursor:
        raise RunError(f"{run}: no snapshot to take a policy from; train first, or go on with --resume")
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    trainer.freeze()
    return trainer


def freeze(run: Path, out: Path) -> dict[str, Any]:
    """Write the bundle; returns what was checked. Raises BundleError with the figures, or RunError."""
    trainer = trained(run)
    task, spec = trainer.task, trainer.task.spec
    kept = [s for _, records in read_streams(run / "steps") for s in samples(task, records) if s.action is not None]
    if not kept:
        raise RunError(f"{run}: no steps to check the policy on; train first")
    kept = kept[:: max(1, len(kept) // bundle.MAX_CHECKED)]
    observations, previous = np.stack([s.obs for s in kept]), np.stack([s.prev_action for s in kept])
    expected = trainer.expected(observations, previous)
    policy = bundle.Trained(trainer.policy_spec(), trainer.policy(), observations, previous, expected)
    settings, facts = config.read(run.resolve())
    origin = {"run": run.resolve().name, "task": spec.name, "git": str(facts["git"]), "preset": settings.preset}
    return bundle.export(out, {"task": policy}, spec, origin)
