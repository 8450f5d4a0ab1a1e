"""Does a snapshot survive? Kills at every point of a save, kills at random, and damaged files.

    python -m tests.chaos.snapshots --kills 200 --mutations 1000 --seed 0        (or: make snapshots)

ends in one line: how many kills left no usable snapshot, and how many damaged ones were taken for good.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tether.agents import snapshot

from tests.chaos.crashfs import FATES, Crash, CrashFS

LEFT = ".writing-000099"  # what an earlier crash left


def state(i: int, floats: int = 16) -> dict[str, Any]:
    """A training state of which every number says that it is the i-th."""
    return {"actor": np.full(floats, i, np.float32), "optimiser": {"mu": np.full(floats, -i, np.float32)}}


def save(folder: Path, i: int, keep: int = 3, floats: int = 16) -> None:
    """Save the i-th state."""
    snapshot.save(folder, {"task": state(i, floats)}, {"steps": i}, keep)


def newest(folder: Path, floats: int = 16) -> int:
    """Which state comes back, whole, or 0 where there is none. Raises SnapshotError or AssertionError."""
    found = snapshot.load(folder, {"task": state(0, floats)})
    if found is None:
        return 0
    i = found.counters["steps"]
    for got, due in ((found.states["task"]["actor"], i), (found.states["task"]["optimiser"]["mu"], -i)):
        assert np.array_equal(got, np.full(floats, due, np.float32)), f"{found.path}: a mixture"
    return int(i)


def prepared(folder: Path, before: int) -> Path:
    """A folder with `before` snapshots and what a crash left."""
    with CrashFS(folder):  # which spares the disk
        for i in range(1, before + 1):
            save(folder, i)
    (folder / LEFT).mkdir(parents=True)
    (folder / LEFT / "task.safetensors").write_bytes(b"half")
    return folder


def crashed(folder: Path, at: int, fate: str, before: int, keep: int, process: bool = False) -> tuple[bool, str]:
    """Save one more than `before` on a file system that ends at change number `at`.

    Whether it came to its end, and what is wrong afterwards ("" for nothing).
    """
    prepared(folder, before)
    if process:
        child = _processes().Process(target=_save_and_exit, args=(folder, at, fate, before + 1, keep))
        child.start()
        child.join()
        finished = child.exitcode == 0
    else:
        try:
            with CrashFS(folder, at, fate):
                save(folder, before + 1, keep)
            finished = True
        except Crash:
            finished = False
    where = f"{fate} at change {at}, {before} before, keeping {keep}"
    try:
        found = newest(folder)
        if found not in ([before + 1] if finished else [before, before + 1]):
            return finished, f"{where}: snapshot {found} came back"
        with CrashFS(folder):
            save(folder, before + 2, keep)  # and it goes on
        if newest(folder) != before + 2 or list(folder.glob(".*")):
            return finished, f"{where}: the next save did not make up for it"
    except (snapshot.SnapshotError, AssertionError) as error:
        return finished, f"{where}: {error}"
    return finished, ""


def crash_points(folder: Path, fates: Sequence[str] = FATES, process: bool = False) -> tuple[int, list[str]]:
    """Every point of a save, the first one and later ones. How many ends, and what went wrong, a line each."""
    wrong, ends = [], 0
    for fate in fates:
        for before, keep in ((0, 3), (2, 1), (3, 3)):
            for at in count(1):
                finished, problem = crashed(folder / f"{fate}-{before}-{at}", at, fate, before, keep, process)
                wrong += [problem] if problem else []
                if finished:
                    break
                ends += 1
    return ends, wrong


def kills(folder: Path, number: int, seed: int, floats: int = 1 << 18) -> list[str]:
    """SIGKILL a process that saves without pause, at random times. What went wrong, a line each."""
    rng, wrong, last = random.Random(seed), [], 0
    for n in range(number):
        ours, theirs = _processes().Pipe(duplex=False)
        child = _processes().Process(target=_save_for_ever, args=(folder, last + 1, floats, theirs))
        child.start()
        theirs.close()
        try:
            last = ours.recv()  # it is under way
            time.sleep(rng.uniform(0.0, 0.1))
            child.kill()
            while True:
                last = ours.recv()
        except EOFError:
            child.join()
        try:
            found = newest(folder, floats)
            if found not in (last, last + 1):
                wrong.append(f"kill {n}: {last} was saved, {found} came back")
            last = max(last, found)
        except (snapshot.SnapshotError, AssertionError) as error:
            wrong.append(f"kill {n}: {error}")
    return wrong


def mutations(folder: Path, number: int, seed: int) -> list[str]:
    """Damage the newest snapshot in every way; it must be refused, named, and the one before used."""
    rng, wrong = random.Random(seed), []
    for i in (1, 2, 3):
        save(folder, i)
    original = folder.with_name(f"{folder.name}-original")
    shutil.copytree(folder, original)
    before, path = folder / "000002", folder / "000003"
    for n in range(number):
        what = _mutate(rng, path, before)
        try:
            found = snapshot.load(folder, {"task": state(0)})
            assert found is not None
            if found.path != before or path.name not in found.warning or newest(folder) != 2:
                wrong.append(f"mutation {n} ({what}): {found.path.name} was taken, {found.warning!r} said")
        except snapshot.SnapshotError as error:
            wrong.append(f"mutation {n} ({what}): not the one before, but: {error}")
        shutil.rmtree(path)
        shutil.copytree(original / path.name, path)
    return wrong


def _mutate(rng: random.Random, path: Path, before: Path) -> str:
    """Damage one snapshot; what was done."""
    names = sorted(file.name for file in path.iterdir())
    file = path / rng.choice(names)
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    what = rng.choice(["flip", "byte", "cut", "zeros", "more", "doubled", "gone", "swapped", "older"])
    if what == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif what == "byte":
        data[at] = rng.choice([b for b in range(256) if b != data[at]])
    elif what == "cut":
        del data[at:]
    elif what == "zeros":  # a sector that was never written
        data[at : at + 512] = bytes(len(data[at : at + 512]))
        data[at] = 0 if file.read_bytes()[at] else 1
    elif what == "more":
        data += rng.choice([b"\n", b" ", b"\0", rng.randbytes(8)])
    elif what == "doubled":
        data[at:at] = data[at : at + rng.randint(1, 64)]
    elif what == "gone":
        file.unlink()
        return f"{file.name} gone"
    elif what == "swapped":
        other = path / rng.choice([name for name in names if name != file.name])
        data[:], theirs = other.read_bytes(), bytes(data)
        other.write_bytes(theirs)
    else:
        data[:] = (before / file.name).read_bytes()
    file.write_bytes(data)
    return f"{file.name} {what}"


def _processes() -> Any:
    """Processes that begin with JAX loaded, and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tether.agents.snapshot"])
    return context


def _save_and_exit(folder: Path, at: int, fate: str, i: int, keep: int) -> None:
    with CrashFS(folder, at, fate, end=partial(os._exit, 9)):
        save(folder, i, keep)


def _save_for_ever(folder: Path, first: int, floats: int, pipe: Any) -> None:
    for i in count(first):
        save(folder, i, floats=floats)
        pipe.send(i)


def main() -> int:
    """The campaign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        points, unusable = 0, []
        for process in (False, True):
            ends, wrong = crash_points(folder / f"points-{process}", process=process)
            points, unusable = points + ends, unusable + wrong
        unusable += kills(folder / "kills", options.kills, options.seed)
        accepted = mutations(folder / "mutations", options.mutations, options.seed)
    for line in unusable + accepted:
        print(line, file=sys.stderr)
    print(
        f"snapshots: {options.kills} kills at random and {points} crash points: {len(unusable)} unusable; "
        f"{options.mutations} mutated: {len(accepted)} accepted"
    )
    return 1 if unusable or accepted else 0


if __name__ == "__main__":
    sys.exit(main())
