"""Breaks the link between real processes on a seeded schedule, and checks what became of every record."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tether.robot_env import record

from tests.chaos import ends
from tests.chaos.proxy import Proxy
from tests.conftest import free_address

ACTORS = 2
BOTH = 0.2  # share of the faults that come two at a time
LONG = 0.04  # share of stops and stalls that outlast the actor's patience (transport.SILENT_S)
PATIENCE = 40.0  # s, until records come again

PROCESSES = multiprocessing.get_context("forkserver")  # imports once: a restart takes milliseconds
PROCESSES.set_forkserver_preload(["tests.chaos.ends"])


class Nemesis:
    """A learner and actors in `folder`, a proxy between them, and faults. Use as a context; `fault()` as often as
    one likes; `finish()` brings everything home and returns the totals."""

    def __init__(self, folder: Path, seed: int, hz: float = 300.0, actors: int = ACTORS) -> None:
        self.folder, self.hz = folder, hz
        self.counts: Counter[str] = Counter()
        self.waits: dict[str, list[float]] = {}  # s from the end of a fault to the first record, by kind
        self._rng = random.Random(seed)
        self._address = free_address()
        self._proxy = Proxy(self._address, seed)
        self._streams = [""] * actors
        self._killed: set[str] = set()
        self._actors: list[Any] = [None] * actors
        self._processes = {
            "learner killed": self._learner_killed, "actor killed": self._actor_killed,
            "all killed": self._all_killed, "learner stopped": self._learner_stopped,
            "actor stopped": self._actor_stopped, "all stopped": self._all_stopped,
            "learner's disk full": self._learner_full, "actor's disk full": self._actor_full,
        }  # fmt: skip
        self._network = {
            "stall": self._stall, "cut": self._cut, "reset": self._reset, "truncate": self._truncate,
            "throttle": self._throttle, "delay": self._delay,
        }  # fmt: skip

    def __enter__(self) -> Nemesis:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._start_learner()
        for slot in range(len(self._actors)):
            self._start_actor(slot)
        self._await_records(time.monotonic())
        return self

    def __exit__(self, *error: object) -> None:
        for process in (self._learner, *self._actors):
            if process.is_alive():
                process.kill()
            process.join()
        self._proxy.close()

    def fault(self, kind: str | None = None) -> str:
        """One fault (or one of the processes and one of the network), its end, and the wait for the next records."""
        every = self._processes | self._network
        kinds = [kind or self._rng.choice(list(every))]
        if kind is None and self._rng.random() < BOTH:
            kinds = [self._rng.choice(list(self._processes)), self._rng.choice(list(self._network))]
        with ExitStack() as stack:
            for each in kinds:
                self.counts[each] += 1
                stack.enter_context(every[each]())
            time.sleep(self._rng.uniform(0.05, 0.5))
        name = " + ".join(kinds)
        self.waits.setdefault(name, []).append(self._await_records(time.monotonic(), "actor's disk full" in kinds))
        return name

    def stall_for(self, seconds: float) -> float:
        """A stall of the network; seconds from its end to the next record of every actor."""
        with self._proxied(stalled=True):
            self.counts["stall"] += 1
            time.sleep(seconds)
        self.waits.setdefault("stall", []).append(self._await_records(time.monotonic()))
        return self.waits["stall"][-1]

    def finish(self) -> dict[str, Any]:
        """Let everything be delivered, end it, and say what became of the records."""
        for process in self._actors:
            os.kill(process.pid, signal.SIGTERM)
        for process in self._actors:
            self._join(process)
        last = self._spawn(ends.actor, self._proxy.address, self.folder, "", 0.0)  # delivers what is left
        self._join(last)
        os.kill(self._learner.pid, signal.SIGTERM)
        self._join(self._learner)
        waits = [wait for rows in self.waits.values() for wait in rows]
        return {
            "faults": sum(self.counts.values()), "by_kind": dict(sorted(self.counts.items())),
            **check(self.folder, self._killed),
            "spools_left": sum(1 for _ in (self.folder / "spool").iterdir()),
            "first_s": {"p50": round(statistics.median(waits), 3), "max": round(max(waits), 3),
                        "max_by_kind": {kind: round(max(rows), 3) for kind, rows in sorted(self.waits.items())}},
        }  # fmt: skip

    # --- processes

    def _spawn(self, target: Any, *arguments: Any) -> Any:
        process = PROCESSES.Process(target=target, args=arguments, daemon=True)
        process.start()
        return process

    def _join(self, process: Any) -> None:
        process.join(PATIENCE + ends.PATIENCE)
        assert process.exitcode == 0, f"ended with {process.exitcode}: {self.folder / 'log.txt'}"

    def _start_learner(self) -> None:
        self._learner = self._spawn(ends.learner, self._address, self.folder)

    def _start_actor(self, slot: int) -> None:
        self._streams[slot] = f"{self._rng.getrandbits(64):016x}"
        ends.new_history(self.folder, self._streams[slot])
        self._actors[slot] = self._spawn(
            ends.actor, self._proxy.address, self.folder, self._streams[slot], self.hz
        )

    def _await_records(self, since: float, all_of_them: bool = False) -> float:
        """Seconds until a record of each actor was stored after `since`; or until all made by now were, which a kill
        would take where they are in memory alone."""
        wanted = {}
        for stream in self._streams:
            due = np.count_nonzero(ends.made(self.folder, stream)) if all_of_them else 0
            wanted[stream] = ends.seen(self.folder, stream), due
        while wanted:
            for process in (self._learner, *self._actors):
                assert process.is_alive(), f"ended with {process.exitcode}: {self.folder / 'log.txt'}"
            assert time.monotonic() - since < PATIENCE, f"no records of {list(wanted)} after {PATIENCE} s"
            time.sleep(0.005)
            wanted = {s: (mark, due) for s, (mark, due) in wanted.items() if mark[1] <= since or mark[0] < due}
        return time.monotonic() - since

    # --- faults: each a context, in which it lasts

    def _some(self) -> int:
        return self._rng.randrange(len(self._actors))

    def _last(self) -> None:
        if self._rng.random() < LONG:
            time.sleep(self._rng.uniform(2.0, 3.0))

    @contextmanager
    def _dead(self, learner: bool, slots: list[int]) -> Iterator[None]:
        for process in [self._learner] * learner + [self._actors[slot] for slot in slots]:
            process.kill()
            process.join()
        self._killed |= {self._streams[slot] for slot in slots}
        yield
        if learner:
            self._start_learner()
        for slot in slots:
            self._start_actor(slot)

    @contextmanager
    def _stopped(self, processes: list[Any]) -> Iterator[None]:
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        self._last()
        yield
        for process in processes:
            if process.is_alive():  # else it was killed meanwhile
                os.kill(process.pid, signal.SIGCONT)

    @contextmanager
    def _full(self, process: Any) -> Iterator[None]:
        """No file of the process grows, as on a full disk."""
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        yield
        if process.is_alive():
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    @contextmanager
    def _proxied(self, **values: Any) -> Iterator[None]:
        before = {name: getattr(self._proxy, name) for name in values}
        for name, value in values.items():
            setattr(self._proxy, name, value)
        yield
        for name, value in before.items():
            setattr(self._proxy, name, value)

    def _learner_killed(self) -> Any:
        return self._dead(True, [])

    def _actor_killed(self) -> Any:
        return self._dead(False, [self._some()])

    def _all_killed(self) -> Any:
        return self._dead(True, list(range(len(self._actors))))

    def _learner_stopped(self) -> Any:
        return self._stopped([self._learner])

    def _actor_stopped(self) -> Any:
        return self._stopped([self._actors[self._some()]])

    def _all_stopped(self) -> Any:
        return self._stopped([self._learner, *self._actors])

    def _learner_full(self) -> Any:
        return self._full(self._learner)

    def _actor_full(self) -> Any:
        return self._full(self._actors[self._some()])

    @contextmanager
    def _stall(self) -> Iterator[None]:
        with self._proxied(stalled=True):
            self._last()
            yield

    @contextmanager
    def _cut(self, reset: bool = False) -> Iterator[None]:
        self._proxy.cut(reset)
        yield

    def _reset(self) -> Any:
        return self._cut(reset=True)

    def _truncate(self) -> Any:
        return self._proxied(truncate=True)

    def _throttle(self) -> Any:
        return self._proxied(bytes_per_s=self._rng.uniform(2e4, 3e5))

    def _delay(self) -> Any:
        return self._proxied(delay_s=self._rng.uniform(0.02, 0.3), jitter_s=self._rng.uniform(0.0, 0.2))


def check(folder: Path, killed: set[str]) -> dict[str, Any]:
    """What became of the records that actors made: ids made = ids stored, each once, in order, unchanged.

    Of an actor that was killed the record it was writing may be missing; those are counted apart.
    """
    found: Counter[str] = Counter()
    worst: list[str] = []
    for path in sorted((folder / "made").iterdir()):
        sums = ends.made(folder, path.name, "r")
        number = int(np.count_nonzero(sums))
        stored = stored_in(folder / "steps" / path.name)
        once = dict(reversed(stored))  # the first of each number
        lost = [seq for seq in range(1, number + 1) if seq not in once]
        if path.name in killed and lost and lost[-1] == number:
            found["cut_by_kill"] += 1
            lost.pop()
        row = {
            "lost": len(lost), "doubled": len(stored) - len(once),
            "disordered": sum(b[0] < a[0] for a, b in zip(stored, stored[1:], strict=False)),
            "altered": sum(not 1 <= seq <= number or int(sums[seq - 1]) != what for seq, what in once.items()),
        }  # fmt: skip
        found.update(row, records=number, streams=1)
        if any(row.values()):
            worst.append(f"{path.name}: {row}, lost {lost[:5]}")
    keys = ("records", "streams", "lost", "doubled", "disordered", "altered", "cut_by_kill")
    return {key: found[key] for key in keys} | {"worst": worst[:10]}


def stored_in(folder: Path) -> list[tuple[int, int]]:
    """(number, checksum) of every record as it lies in a stream's files, told by nothing but their bytes."""
    rows = []
    for file in sorted(folder.glob(f"*{record.SUFFIX}")):
        for kind, stream, seq, payload in record._frames(file.read_bytes(), str(file), []):
            if kind == record._RECORD:
                assert stream == folder.name
                rows.append((seq, ends.checksum(payload)))
    return rows
