"""The learner process: records in from the link, updates, weights and permissions out, snapshots to disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..agents.snapshot import SnapshotError
from ..robot_env.fit import translated
from ..robot_env.record import Meta, RecordError, SegmentWriter, read_recording, read_streams
from ..robot_env.task import TaskSpec
from . import catalog, config
from .log import Log
from .trainer import Trainer
from .transport import LearnerLink

POLL_S = 0.05
# Held-out over trained-on loss, for so many logs in a row; RLPD's arm, which learned well, comes to 5 to 19.
OVERFIT, OVERFIT_LOGS = 20.0, 5
TAKEN = 64  # records at once, so that a signal, a snapshot and a new actor need not wait for long
MAX_BEHIND = 1024  # records that wait; the learner makes no updates for those above that, and says so in learn/utd


@dataclass(frozen=True)
class Job:
    """What a learner is asked to do."""

    spec: TaskSpec
    config: config.Config
    folder: Path
    seed: int = 0
    bind: str = "tcp://127.0.0.1:*"
    prior: tuple[str, ...] = ()
    start: str = ""  # a run whose weights to begin with
    resume: bool = False
    tensorboard: bool = False
    devices: int = 1


class Journal:
    """The run's steps/: one folder a stream, written before anything is acknowledged."""

    def __init__(self, folder: Path) -> None:
        self.trouble = ""  # why the last records are not on the disk
        self._folder = folder
        self._writers: dict[str, SegmentWriter] = {}

    def __call__(self, meta: Meta, first_seq: int, payloads: list[bytes]) -> int:
        """Put records of one stream on the disk and return how many: all, or where it is full those that the segments
        before took. In the link's thread."""
        stored = 0
        try:
            if meta.stream not in self._writers:
                self._writers[meta.stream] = SegmentWriter(self._folder / meta.stream, meta)
            writer = self._writers[meta.stream]
            while stored < len(payloads):  # mostly once: the segment may be full
                stored += writer.extend(first_seq + stored, payloads[stored:])
                writer.sync()
            self.trouble = ""
        except RecordError as error:
            self.trouble = str(error)
        return stored

    def close(self) -> None:
        """Let go of the files."""
        for writer in self._writers.values():
            writer.close()


class Learner:
    """One training: a Trainer between a link and a run folder.

    It compiles in a thread of its own while actors start and connect; they wait for the first weights, which
    `ready` gives out.
    """

    def __init__(self, job: Job, log: Log) -> None:
        self.job, self.log = job, log
        steps = [Path(source) / "steps" for source in job.prior]  # of a run; a recording has none
        prior = list(chain.from_iterable(read_streams(s) if s.is_dir() else [read_recording(s.parent)] for s in steps))
        ours = f"{job.spec.robot} at {job.spec.hz:g} Hz"
        if others := {f"{meta.robot} at {meta.hz:g} Hz" for meta, _ in prior} - {ours}:
            raise config.RunError(f"--prior: recorded on {', '.join(others)}; this task's robot is {ours}")
        task, command = catalog.make_task(job.spec), catalog.declaration(job.spec)[1]
        experience = [translated(meta, records, command) for meta, records in prior]
        self.trainer = Trainer(task, job.config, job.seed, experience, job.devices)
        if job.start:  # it acts already: the first batches need not be copies of one step beside prior data
            self.trainer.start_steps = job.config.learner.start_steps
        cursor = self._start()  # first: it may be refused, and who compiles cannot be stopped
        compiles = ThreadPoolExecutor(1)
        self._compiled = compiles.submit(self.trainer.warm_up)
        compiles.submit(self.trainer.warm_up_measure)
        self._first_lap, self._actors, self._version = False, 0, 0
        self._trouble = ""  # as last told
        self._overfit, self._warned = 0, False  # logs in a row
        self._refused: dict[str, str] = {}  # why weights were, by stream, as last told
        self._saved = time.monotonic()
        self._sent = 0, 0  # updates and steps when weights were
        expected = self._replay(cursor)
        self.journal = Journal(job.folder / "steps")
        random_steps = job.config.actor.random_steps  # of which a resumed run has made its share
        welcome = {
            "task": job.spec.text, "name": job.spec.name, "seed": job.seed, "policy": self.trainer.policy_spec(),
            "random_steps": 0 if len(self.trainer.prior) or job.start else max(0, random_steps - self.trainer.steps),
            "random_bound": job.config.actor.random_bound, "auto_reset": job.config.actor.auto_reset,
            "takeover": job.config.actor.takeover, "takeover_quality": job.config.actor.takeover_quality,
        }  # fmt: skip
        log.note("compiling the update")
        self.link = LearnerLink(job.bind, catalog.stream_meta(job.spec), welcome, self.journal, expected)

    def ready(self) -> None:
        """Wait for the compiled update and let the actors have the first weights."""
        self.trainer.policy()  # makes a fresh state beside the compiling
        self._compiled.result()
        self._publish()

    def run(self, stopped: Callable[[], str]) -> dict[str, Any]:
        """Train until the steps are done or `stopped()` says why to end. Returns what a caller reports."""
        try:
            self.ready()
            started, before = time.monotonic(), self.trainer.steps
            while self.trainer.steps < self.job.config.learner.steps and not stopped():
                self._turn()
            self.link.stop(stopped() or "training is done")
            self.link.wait_closed(5.0)
            self.trainer.save(self.job.folder / "snapshots")
            for stream, record in self.link.poll():  # stored already, so it counts; who resumes trains on it
                self.trainer.push(stream, record, train=False)
        finally:
            self.link.close()
            self.journal.close()
        taken = {"new_steps": self.trainer.steps - before, "train_s": round(time.monotonic() - started, 1)}
        return {"steps": self.trainer.steps, **taken}

    def _turn(self) -> None:
        """Take what has come, train on it, let the actors go on."""
        settings = self.job.config.learner
        streams = self.link.status()
        often = max(1, settings.max_lead // 4)  # steps: an actor with most of its lead left need not hear of each
        for stream, record in self.link.poll(POLL_S, TAKEN):
            # those that were allowed to go so far are not behind
            behind = self.link.waiting > MAX_BEHIND + settings.max_lead * len(streams)
            before = self.trainer.updates
            metrics = self.trainer.push(stream, record, self.trainer.steps < settings.steps and not behind)
            steps = self.trainer.stream_steps(stream)
            if self.trainer.updates > before and steps % often == 0:  # which took its time
                self.link.set_run_until({stream: steps + settings.max_lead})
            if metrics:
                self.log.write(self.trainer.steps, metrics)
            if metrics.get("env/lap_clean") and not self._first_lap:
                self._first_lap = True
                self.log.note(f"first clean lap at step {self.trainer.steps:,}: {metrics['env/lap_time_s']:.1f} s")
            if record.action is None:
                continue
            if self.trainer.updates > self._sent[0] and self.trainer.steps >= self._sent[1] + settings.publish_every:
                self._publish()
            if self.trainer.steps % settings.log_every == 0:
                self._measure()
        self.link.set_run_until({name: self.trainer.stream_steps(name) + settings.max_lead for name in streams})
        for stream, actor in streams.items():
            refused = actor.report.get("refused", "")
            if refused not in ("", self._refused.get(stream)):
                self._refused[stream] = refused
                self._warn(f"the actor of stream {stream} keeps its weights and refuses newer ones: {refused!r}")
        actors = sum(actor.connected for actor in streams.values())
        if actors != self._actors:
            self._actors = actors
            self.log.note(f"actors connected: {actors}")
        self.log.show(self.trainer.steps, {"learn/updates": self.trainer.updates})
        if self.journal.trouble != self._trouble:
            self._trouble = self.journal.trouble
            self._warn(f"{self._trouble}, until then nothing is acknowledged" if self._trouble else "stored again")
        if time.monotonic() - self._saved > settings.snapshot_every_s:
            self._saved = time.monotonic()
            try:
                self.trainer.save(self.job.folder / "snapshots")
            except SnapshotError as error:  # a full disk; the records wait, too
                self._warn(str(error))

    def _measure(self) -> None:
        values = self.trainer.metrics()
        self._look_at(values)
        actors = self.link.status().values()
        values["link/steps_received"] = sum(actor.received for actor in actors)
        values["link/weights_version"] = self._version
        newest = min((actor.weights_at for actor in actors if actor.connected), default=math.inf)
        values["link/weights_age_s"] = time.monotonic() - newest
        for actor in actors:
            values |= actor.report["stats"]
        self.log.write(self.trainer.steps, values)

    def _look_at(self, values: dict[str, float]) -> None:
        """Warn once when the critics fit what they have seen much better than what they have not (AVTD)."""
        seen = values.get("learn/seen_loss", 0.0) if "learn/critic_loss" in values else math.inf
        apart = values.get("learn/held_out_loss", 0.0) > OVERFIT * max(seen, 1e-6)
        self._overfit = self._overfit + 1 if apart else 0
        if self._overfit == OVERFIT_LOGS and not self._warned:
            self._warned = True
            self._warn(
                f"the loss on steps that were held out is {OVERFIT:.0f} times that on steps trained on: the critics "
                "learn by heart; fewer updates a step (agent.utd) or dropout (agent.algorithm=droq) help"
            )

    def _publish(self) -> None:
        self._version = max(self._version + 1, self.trainer.steps)
        self._sent = self.trainer.updates, self.trainer.steps
        self.link.publish(self._version, self.trainer.policy())

    def _warn(self, text: str) -> None:
        self.log.note(f"warning: {text}")

    def _start(self) -> dict[str, int]:
        """Take the weights to begin with: a resumed run's snapshot, whose cursor is returned, or another run's."""
        cursor, warning = self.trainer.load(self.job.folder / "snapshots") if self.job.resume else ({}, "")
        if self.job.start and not cursor:
            before, facts = config.read(self.job.start)
            observed = catalog.check_start(self.job.spec, catalog.spec_of(facts["task"], facts["name"]))
            try:
                warning = self.trainer.start_from(Path(self.job.start) / "snapshots", before.algorithm, observed)
            except SnapshotError as error:
                old, new = ({"algorithm": c.algorithm, **c.agent} for c in (before, self.job.config))
                apart = [f"agent.{name}={config.toml(old[name])}" for name in old if old[name] != new.get(name)]
                raise SnapshotError(f"{error}: {', '.join(apart[:4])} (its preset: {before.preset})") from None
            self.log.note(f"starts from {self.job.start}")
        if warning:
            self._warn(warning)
        return cursor

    def _replay(self, cursor: dict[str, int]) -> dict[str, int]:
        """Go through the records of a resumed run again. Returns the next sequence number of every stream."""
        expected = {}
        if self.job.resume:
            self._compiled.result()  # not compiled twice
        for meta, records in read_streams(self.job.folder / "steps") if self.job.resume else ():
            for record in records:
                new = record.seq > cursor.get(meta.stream, 0)
                self.trainer.push(meta.stream, record, new and self.trainer.steps < self.job.config.learner.steps)
            expected[meta.stream] = records[-1].seq + 1 if records else 1
        if self.job.resume or self.job.start:
            self.trainer.policy()  # can be sent, or it ends here
        if self.job.resume:
            self.log.note(f"resumed at step {self.trainer.steps:,}")
        return expected
