"""Honest curves: tether through its real command line, or a peer, on the same environment; one JSON a seed.

    make curves ENV=Hopper-v5 ALGO=rlpd SEEDS="0 1 2" STEPS=100000 [PRESET=cpu] [SET="agent.utd=2 agent.tau=0.01"]
    make curves ENV=Hopper-v5 ALGO="crossq sbx:crossq" SEEDS="0 1"         several, seed by seed in turn
    make curves ENV=car-loop ALGO="rlpd sbx:droq sbx:crossq" [PRIOR=no]    minutes and steps to clean laps

ALGO is a row of tether's catalog: `tether run` with learner and actor processes, link and records. Or sbx:crossq,
sbx:droq, sbx:sac: Stable-Baselines3's JAX package with its own defaults (peer.py); PRESET, SET, PRIOR are not for it.
On a course of tether's, tether begins with one slow lap of `tether record --speed 1.0 --laps 1` as prior data, as
`tether demo` does. sbx gets no prior: it has no such feature. With PRIOR=no tether has none either.

Resumable: a seed whose JSON is there is not run again; a killed run of tether goes on with `--resume`, one of sbx
begins again. One run at a time, every one on the same CORES (2) with one BLAS thread. Everything lands in curves/ENV;
table and SVG are of all the JSONs there. The last line is the path of the JSON summary. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tether.launch import catalog, config
from tether.launch.log import read_metrics
from tether.robot_env.task import shipped

from tests.bench import drawing
from tests.bench.peer import PEERS

ROOT = Path(__file__).parents[2]
TETHER = [sys.executable, "-m", "tether.launch.cli"]
PEER = [sys.executable, "-m", "tests.bench.peer"]
EPISODES = 10
EVAL_SEED = 1000  # added to a seed for its evaluation
POLL_S = 1.0
FAST = 0.6  # of the demonstration's lap
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "gymnasium", "mujoco", "sbx-rl", "stable-baselines3")
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Wanted:
    """One curve of one seed."""

    env: str
    algo: str
    seed: int
    steps: int
    preset: str = "cpu"
    settings: tuple[str, ...] = ()
    prior: bool = True

    @property
    def peer(self) -> str:
        """The peer's algorithm; "" for one of tether's."""
        return self.algo.removeprefix("sbx:") if self.algo.startswith("sbx:") else ""

    @property
    def ours(self) -> bool:
        """Whether it is a task of tether's."""
        return self.env in shipped()

    @property
    def course(self) -> bool:
        """Whether it is a car's course, where laps count and there is a demonstration."""
        return self.ours and catalog.family(catalog.load_spec(self.env)) == "course"

    @property
    def label(self) -> str:
        """What differs from the algorithm as it comes, for people."""
        if self.peer:
            return self.algo
        preset = [] if self.preset == "cpu" else [f"preset {Path(self.preset).stem}"]
        prior = ["no prior"] if self.course and not self.prior else []
        return ", ".join([self.algo, *preset, *self.settings, *prior])

    @property
    def stem(self) -> str:
        """Of its files; other settings have other files."""
        text = re.sub(r"[^\w.=+-]+", "_", f"{self.label}-{self.steps}")
        if len(text) > 120:
            text = f"{text[:110]}~{hashlib.sha256(self.label.encode()).hexdigest()[:8]}"
        return f"{text}-seed{self.seed}"


def stage(file: Path, folder: Path) -> str:
    """What is left to do for a seed: "done", "eval" (it is trained), "resume" or "train"."""
    if file.exists():
        return "done"
    if usage(folder).get("trained"):
        return "eval"
    return "resume" if (folder / "run" / "config.toml").exists() else "train"


def usage(folder: Path) -> dict[str, Any]:
    """What a seed's training has cost so far."""
    file = folder / "usage.json"
    return json.loads(file.read_text()) if file.exists() else {}


def write(file: Path, data: Any) -> None:
    """All of it, or what was there before."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(json.dumps(data, indent=1))
    fresh.replace(file)


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU time of a process, and of it with all below it; ends included, as long as nobody has waited for it."""
    table: dict[int, tuple[int, list[float]]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()  # from the state on
            table[int(file.parent.name)] = int(fields[1]), [float(x) for x in fields[11:15]]  # parent; own, waited for

    def tree(one: int) -> float:
        return sum(table[one][1]) + sum(tree(child) for child, (parent, _) in table.items() if parent == one)

    hz = os.sysconf("SC_CLK_TCK")
    return (sum(table[pid][1][:2]) / hz, tree(pid) / hz) if pid in table else (0.0, 0.0)


def measured(command: list[str], folder: Path) -> str:
    """Run a training and add what it costs to the folder's usage.json. Returns what it said."""
    nothing = {"attempts": 0, "wall_s": 0.0, "cpu_s": 0.0, "learner_cpu_s": 0.0, "load_at_start": [], "git": []}
    before = nothing | usage(folder)
    before["load_at_start"].append(round(os.getloadavg()[0], 2))
    before["git"].append(revision())
    before["attempts"] += 1
    start, output = time.monotonic(), folder / "output.txt"
    with open(output, "w") as file:  # a session of its own: Ctrl-C reaches it through us, once
        environment = os.environ | ONE_THREAD
        process = subprocess.Popen(command, stdout=file, env=environment, start_new_session=True, close_fds=False)

    def note() -> None:
        own, all_below = cpu_seconds(process.pid)
        spent = {"learner_cpu_s": own, "cpu_s": all_below, "wall_s": time.monotonic() - start}
        write(folder / "usage.json", before | {key: round(before[key] + value, 2) for key, value in spent.items()})

    try:
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            note()
            time.sleep(POLL_S)
    except BaseException:
        process.terminate()  # it stops cleanly, with a snapshot
        raise
    finally:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        note()  # it has ended, and its figures are still there
        process.wait()
    if process.returncode:
        raise SystemExit(f"failed ({process.returncode}): {shlex.join(command)}")
    return output.read_text()


def asked(command: list[str]) -> dict[str, Any]:
    """The JSON object that a command ends with."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD)
    if done.returncode:
        raise SystemExit(f"failed ({done.returncode}): {shlex.join(command)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def demonstration(wanted: Wanted, parent: Path) -> tuple[Path, float]:
    """The slow lap of this seed, driven once for all algorithms: where it is, and how long it took."""
    lap, said = parent / f"demo-seed{wanted.seed}", parent / f"demo-seed{wanted.seed}.json"
    if not said.exists():
        shutil.rmtree(lap, ignore_errors=True)
        drive = ["record", wanted.env, "--speed", "1.0", "--laps", "1", "--seed", str(wanted.seed)]
        write(said, asked([*TETHER, *drive, "--out", str(lap), "--json"]))
    return lap, float(json.loads(said.read_text())["lap_time_s"])


def training(wanted: Wanted, run: Path, lap: Path | None, resume: bool) -> list[str]:
    """The command that trains."""
    counts = ["--seed", str(wanted.seed), "--steps", str(wanted.steps)]
    if wanted.peer:
        return [*PEER, "train", wanted.env, wanted.peer, str(run), *counts]
    task = wanted.env if wanted.ours else f"gym:{wanted.env}"
    if resume:
        return [*TETHER, "run", task, "--resume", "--out", str(run), "--steps", str(wanted.steps)]
    sets = [x for setting in (f"agent.algorithm={wanted.algo}", *wanted.settings) for x in ("--set", setting)]
    prior = ["--prior", str(lap)] if lap and wanted.prior else []
    return [*TETHER, "run", task, "--preset", wanted.preset, *sets, *prior, *counts, "--out", str(run)]


def evaluation(wanted: Wanted, run: Path) -> list[str]:
    """The command that drives the trained policy."""
    counts = ["--episodes", str(EPISODES), "--seed", str(EVAL_SEED + wanted.seed)]
    if wanted.peer:
        return [*PEER, "eval", wanted.env, wanted.peer, str(run), *counts]
    return [*TETHER, "eval", str(run), *counts, "--json"]


def one(wanted: Wanted, parent: Path) -> None:
    """Train and evaluate one seed, as far as that is not done, and write its JSON."""
    file, folder = parent / f"{wanted.stem}.json", parent / wanted.stem
    left, run = stage(file, folder), folder / "run"
    if left == "done":
        return
    print(f"{wanted.env}, {wanted.label}, seed {wanted.seed}: {left}", file=sys.stderr, flush=True)
    lap, demo_s = demonstration(wanted, parent) if wanted.course else (None, None)
    command = training(wanted, run, lap, False)
    if left == "train":
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if left != "eval":
        said = measured(training(wanted, run, lap, left == "resume"), folder)
        reached = re.search(r"^([\d,]+) steps in", said, re.MULTILINE)
        if reached is None or int(reached[1].replace(",", "")) < wanted.steps:
            raise SystemExit(f"{run} ended before its {wanted.steps:,} steps; the same command goes on with it")
        write(folder / "usage.json", usage(folder) | {"trained": True})
    final = asked(evaluation(wanted, run))
    found = result(wanted, read_metrics(run), usage(folder), final, demo_s)
    write(file, found | {"settings": decided(wanted, run), "command": shown(command)} | machine())


def result(
    wanted: Wanted, rows: list[dict[str, Any]], cost: dict[str, Any], final: dict[str, Any], demo_s: float | None
) -> dict[str, Any]:
    """A seed's JSON from its metrics, its cost and its evaluation."""
    episodes = [[r["step"], r["time_s"], r["env/episode_return"]] for r in rows if "env/episode_return" in r]
    out = {
        "env": wanted.env, "algo": wanted.algo, "label": wanted.label, "seed": wanted.seed, "steps": wanted.steps,
        "preset": None if wanted.peer else wanted.preset, "set": [] if wanted.peer else list(wanted.settings),
        "prior": wanted.course and wanted.prior and not wanted.peer,
        "final_return": final["return_mean"], "final_returns": final["returns"],
        "last_tenth_return": drawing.last_tenth(episodes, wanted.steps),
        "train_s": max((r["time_s"] for r in rows), default=0.0),
    }  # fmt: skip
    if wanted.course and demo_s is not None:
        keys = ("step", "time_s", "env/lap_time_s", "env/lap_clean")
        laps = [[row[key] for key in keys] for row in rows if "env/lap_time_s" in row]
        clean = [lap for lap in laps if lap[3]]
        fast = [lap for lap in clean if lap[2] <= FAST * demo_s]
        first, quick = ({"step": x[0][0], "minutes": x[0][1] / 60} if x else None for x in (clean, fast))
        out |= {"demo_lap_s": demo_s, "first_clean_lap": first, "first_fast_lap": quick, "laps": laps}
    return out | cost | {"episodes": episodes, "eval": final}


def decided(wanted: Wanted, run: Path) -> dict[str, Any]:
    """The settings of a training: of tether all of them, of the peer what is not its default."""
    if wanted.peer:
        return PEERS[wanted.peer][1]
    settings, _ = config.read(run)
    return {"agent": dict(settings.agent), "learner": vars(settings.learner), "actor": vars(settings.actor)}


def shown(command: list[str]) -> str:
    """A command as one would type it."""
    return shlex.join(["python" if part == sys.executable else part for part in command])


def revision() -> str:
    """Of this checkout, "-dirty" when changed."""
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(ask, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """What a figure is worth nothing without."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores = {"cores": len(os.sched_getaffinity(0)), "of": os.cpu_count()}
    return {"machine": cores | {"machine": platform.machine(), "cpu": found[1] if found else ""}, "versions": versions}


def grouped(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results of several seeds by what was run; steps are named where they differ."""
    lengths = {r["steps"] for r in results}
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in sorted(results, key=lambda r: (r["algo"].startswith("sbx:"), r["label"], r["steps"], r["seed"])):
        name = r["label"] if len(lengths) == 1 else f"{r['label']}, {r['steps']:,} steps"
        groups.setdefault(name, []).append(r)
    return groups


def summary(groups: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each group mean and standard error over its seeds, and what cannot be compared."""
    out = {}
    for name, results in groups.items():
        row: dict[str, Any] = {"seeds": [r["seed"] for r in results], "steps": results[0]["steps"]}
        for key in ("final_return", "last_tenth_return", "wall_s", "cpu_s", "learner_cpu_s"):
            mean, error = drawing.mean_se([r[key] for r in results])
            row[key] = {"mean": mean, "se": error}
        for key in ("first_clean_lap", "first_fast_lap"):
            if key in results[0]:
                reached = [r[key] for r in results if r[key]]
                row[key] = {"reached": len(reached)}
                for what in ("step", "minutes"):
                    mean, error = drawing.mean_se([r[what] for r in reached])
                    row[key][what] = {"mean": mean, "se": error}
        row["git"] = sorted({git for r in results for git in r["git"]})
        row["resumed"] = [r["seed"] for r in results if r["attempts"] > 1]
        row["load_at_start"] = max(load for r in results for load in r["load_at_start"])
        out[name] = row
    return out


def table(rows: dict[str, dict[str, Any]]) -> str:
    """What people read."""

    def figure(value: dict[str, Any], form: str, scale: float = 1.0) -> str:
        if value["mean"] is None:
            return "-"
        error = "" if value["se"] is None else f" ± {value['se'] * scale:{form}}"
        return f"{value['mean'] * scale:{form}}{error}"

    def lap(row: dict[str, Any], key: str) -> str:
        found, seeds = row[key], len(row["seeds"])
        if not found["reached"]:
            return f"none of {seeds}"
        some = "" if found["reached"] == seeds else f" ({found['reached']} of {seeds})"
        return f"{figure(found['minutes'], '.1f')} min, step {figure(found['step'], ',.0f')}{some}"

    course = any("first_clean_lap" in row for row in rows.values())
    head = ["", "seeds", "steps", "final return", "last 10 %", "wall min", "CPU min", "learner"]
    lines = [head + (["first clean lap", f"first at {FAST} x demo"] if course else [])]
    for name, row in rows.items():
        line = [name, str(len(row["seeds"])), f"{row['steps']:,}"]
        line += [figure(row[key], ",.1f") for key in ("final_return", "last_tenth_return")]
        line += [figure(row[key], ".1f", 1 / 60) for key in ("wall_s", "cpu_s", "learner_cpu_s")]
        lines.append(line + ([lap(row, "first_clean_lap"), lap(row, "first_fast_lap")] if course else []))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.append("mean ± standard error over seeds; learner: CPU minutes of the learner's process (sbx has only one)")
    if course:
        text.append("sbx has no prior data: it has no such feature; tether has one slow lap unless it says `no prior`")
    for name, row in rows.items():
        notes = [f"resumed: seeds {', '.join(map(str, row['resumed']))}"] if row["resumed"] else []
        notes += [f"git {', '.join(row['git'])}"] if len(row["git"]) > 1 else []
        notes += [f"not alone on the machine, load at start {row['load_at_start']}"] if row["load_at_start"] > 1 else []
        if notes:
            text.append(f"{name}: {'; '.join(notes)}")
    return "\n".join(text)


def report(parent: Path, env: str) -> Path:
    """Table, SVG and summary of everything there is of an environment. Returns the summary's path."""
    files = sorted(parent.glob("*-seed*.json"))
    groups = grouped([r for r in (json.loads(f.read_text()) for f in files) if "final_return" in r])
    rows = summary(groups)
    print(table(rows))
    picture = parent / "curves.svg"
    picture.write_text(drawing.svg(f"{env}: return of the training episodes", groups), encoding="utf-8")
    write(parent / "summary.json", {"env": env, "svg": str(picture), "groups": rows})
    print(picture)
    return parent / "summary.json"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse to measure beside another `make curves`, or beside a training that a killed one left behind."""
    with open(folder / ".lock", "w") as file:
        os.set_inheritable(file.fileno(), True)  # so that a training holds it, too
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{folder}: a training runs here already; two would slow each other: stop it") from None
        yield


def ended(number: int, frame: Any) -> None:
    """Leave through the `finally`s."""
    raise SystemExit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5", help="a Gymnasium id, or a course of tether's")
    algorithms = [*catalog.algorithms(), *(f"sbx:{name}" for name in PEERS)]
    parser.add_argument("--algo", nargs="+", choices=algorithms, default=["rlpd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: 100,000; on a course 12,000, 20 minutes of driving")
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--prior", choices=["yes", "no"], default="yes")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("curves"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, ended)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    parent = options.out / options.env
    parent.mkdir(parents=True, exist_ok=True)
    steps = options.steps or (12_000 if options.env in shipped() else 100_000)
    with alone(options.out):
        for seed in options.seeds:
            for algo in options.algo:
                chosen = options.env, algo, seed, steps, options.preset, tuple(options.set), options.prior == "yes"
                one(Wanted(*chosen), parent)
        print(report(parent, options.env))


if __name__ == "__main__":
    main()
