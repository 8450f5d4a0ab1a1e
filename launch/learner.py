"""The learner process: records in from the link, updates, weights and permissions out, snapshots to disk."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..robot_env.record import Meta, Record, SegmentWriter, read_recording, read_streams
from ..robot_env.task import TaskSpec
from . import catalog, config
from .actor import Stop
from .folder import stream_meta
from .log import Log
from .trainer import Trainer
from .transport import LearnerLink

POLL_S = 0.05
FIRST_LAP = "first clean lap at step {step:,}: {time:.1f} s"


@dataclass(frozen=True)
class Job:
    """What a learner is asked to do."""

    spec: TaskSpec
    config: config.Config
    folder: Path
    seed: int = 0
    bind: str = "tcp://127.0.0.1:*"
    prior: tuple[str, ...] = ()
    start: str | None = None  # a run whose weights to begin with
    resume: bool = False
    tensorboard: bool = False


def read_prior(sources: Iterable[str]) -> list[list[Record]]:
    """The streams of recordings and of runs' steps/. Raises RecordError or RunError."""
    streams = []
    for source in sources:
        steps = Path(source) / "steps"
        if steps.is_dir():
            streams += [records for _, records in read_streams(steps)]
        else:
            streams.append(read_recording(source)[1])
    return streams


class Journal:
    """The run's steps/: one folder a stream, written before anything is acknowledged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, SegmentWriter] = {}

    def __call__(self, meta: Meta, first_seq: int, payloads: list[bytes]) -> None:
        """Append records of one stream; runs in the link's thread."""
        if meta.stream not in self._writers:
            self._writers[meta.stream] = SegmentWriter(self._folder / meta.stream, meta)
        for i, payload in enumerate(payloads):
            self._writers[meta.stream].append_payload(first_seq + i, payload)

    def close(self) -> None:
        """Let go of the files."""
        for writer in self._writers.values():
            writer.close()


class Learner:
    """One training: a Trainer between a link and a run folder."""

    def __init__(self, job: Job, log: Log) -> None:
        self.job, self.log = job, log
        task = catalog.make_task(job.spec)
        self.trainer = Trainer(task, job.config, job.seed, read_prior(job.prior))
        self._first_lap = False
        self._saved = time.monotonic()
        self._version = 0
        expected = self._restore() if job.resume else {}
        if job.start:
            self._warn(self.trainer.start_from(Path(job.start) / "snapshots"))
        self.journal = Journal(job.folder / "steps")
        meta = None if job.spec.kind == "gym" else stream_meta(job.spec)
        self.link = LearnerLink(job.bind, meta, self._welcome(), self.journal, expected)
        self.log.note("compiling the update")
        self.trainer.warm_up()  # actors may connect meanwhile; they wait for the first weights
        self._publish()

    def run(self, stop: Stop) -> dict[str, Any]:
        """Train until the steps are done or a stop is asked for. Returns what a caller reports."""
        total = self.job.config.learner.steps
        started = time.monotonic()
        try:
            while self.trainer.steps < total and not stop.reason:
                self._turn(total)
            self.link.stop(stop.reason or "training is done")
            self.link.wait_closed(5.0)
            for stream, record in self.link.poll():  # stored already, so it counts
                self.trainer.push(stream, record, train=False)
            self.trainer.save(self.job.folder / "snapshots")
        finally:
            self.link.close()
            self.journal.close()
        return {"steps": self.trainer.steps, "train_s": round(time.monotonic() - started, 1)}

    def _turn(self, total: int) -> None:
        """Take what has come, train on it, let the actors go on."""
        settings = self.job.config.learner
        for stream, record in self.link.poll(POLL_S):
            if self.trainer.steps >= total and record.action is not None:
                self.trainer.push(stream, record, train=False)
                continue
            metrics = self.trainer.push(stream, record)
            self.link.set_run_until(stream, self.trainer.stream_steps(stream) + settings.max_lead)
            if metrics:
                self._episode(metrics)
            if record.action is None:
                continue
            if self.trainer.steps % settings.publish_every == 0:
                self._publish()
            if self.trainer.steps % settings.log_every == 0:
                self._measure()
        for stream in self.link.status():
            self.link.set_run_until(stream, self.trainer.stream_steps(stream) + settings.max_lead)
        self.log.show(self.trainer.steps, {"learn/updates": self.trainer.updates})
        if time.monotonic() - self._saved > settings.snapshot_every_s:
            self._saved = time.monotonic()
            self.trainer.save(self.job.folder / "snapshots")

    def _episode(self, metrics: Mapping[str, float]) -> None:
        self.log.write(self.trainer.steps, metrics)
        if metrics.get("env/lap_clean") and not self._first_lap:
            self._first_lap = True
            self.log.note(FIRST_LAP.format(step=self.trainer.steps, time=metrics["env/lap_time_s"]))

    def _measure(self) -> None:
        values = self.trainer.metrics()
        actors = self.link.status().values()
        values["link/steps_received"] = sum(actor.received for actor in actors)
        values["link/weights_version"] = self._version
        ages = [time.monotonic() - actor.weights_at for actor in actors if actor.weights_at < math.inf]
        if ages:
            values["link/weights_age_s"] = max(ages)
        for actor in actors:
            values |= actor.report["stats"]
        self.log.write(self.trainer.steps, values)

    def _publish(self) -> None:
        self._version = max(self._version + 1, self.trainer.steps)
        self.link.publish(self._version, self.trainer.policy())

    def _welcome(self) -> dict[str, Any]:
        return {
            "task": self.job.spec.text or self.job.spec.name,
            "name": self.job.spec.name,
            "policy": self.trainer.policy_spec(),
            "random_steps": 0 if len(self.trainer.prior) else self.job.config.actor.random_steps,
            "auto_reset": self.job.config.actor.auto_reset,
            "seed": self.job.seed,
        }

    def _restore(self) -> dict[str, int]:
        """Snapshot and steps/ of an earlier life; returns the next sequence number of every stream."""
        snapshots, steps = self.job.folder / "snapshots", self.job.folder / "steps"
        cursor, warning = self.trainer.load(snapshots)
        self._warn(warning)
        expected = {}
        for meta, records in read_streams(steps) if steps.is_dir() else ():
            for record in records:
                self.trainer.push(meta.stream, record, train=record.seq > cursor.get(meta.stream, 0))
            expected[meta.stream] = records[-1].seq + 1 if records else 1
        self.log.note(f"resumed at step {self.trainer.steps:,}")
        return expected

    def _warn(self, text: str) -> None:
        if text:
            self.log.note(f"warning: {text}")
