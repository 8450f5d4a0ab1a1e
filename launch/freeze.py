"""From a run to a frozen policy: its newest snapshot, its own records to check it on, a bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..robot_env.record import read_streams
from ..robot_env.sample import Fold
from . import bundle, catalog, config
from .folder import RunError
from .trainer import Trainer


def load_policy(run: Path) -> bundle.Trained:
    """The newest snapshot's policy and what it is checked on. Raises RunError for a run without one."""
    settings, facts = config.read(run.resolve())
    task = catalog.make_task(catalog.spec_of(facts["task"], facts["name"]))
    trainer = Trainer(task, settings, int(facts["seed"]))
    cursor, warning = trainer.load(run / "snapshots")
    if not cursor:
        raise RunError(f"{run}: no snapshot to take a policy from; train first, or go on with --resume")
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    samples = []
    for _, records in read_streams(run / "steps"):
        fold = Fold(task)
        samples += [s for r in records for s in fold.push(r) if s.action is not None]
    if not samples:
        raise RunError(f"{run}: no steps to check the policy on; train first")
    observations = np.stack([s.obs for s in samples])
    previous = np.stack([s.prev_action for s in samples])
    keep = np.linspace(0, len(samples) - 1, min(len(samples), bundle.MAX_CHECKED)).astype(int)
    observations, previous = observations[keep], previous[keep]
    expected = trainer.expected(observations, previous)
    return bundle.Trained(trainer.policy_spec(), trainer.policy(), observations, previous, expected)


def freeze(run: Path, out: Path) -> dict[str, Any]:
    """Write the bundle; returns what was checked. Raises BundleError with the figures, or RunError."""
    settings, facts = config.read(run.resolve())
    spec = catalog.spec_of(facts["task"], facts["name"])
    channels, command = catalog.declaration(spec)
    origin = {"run": run.resolve().name, "task": spec.name, "git": str(facts["git"]), "preset": settings.preset}
    return bundle.export(
        out, {"task": load_policy(run)}, channels, command, spec.hz, catalog.limits(spec),
        spec.text or spec.name, origin,
    )  # fmt: skip
