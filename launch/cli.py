"""The command line: `tether <command>`. Commands import what they need when they run."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

EXTRAS = {"jax": "learner", "flax": "learner", "optax": "learner", "mujoco": "sim", "tensorboardX": "tensorboard"}
TASK_HELP = "a shipped task (see `tether list`), the path of a .toml file, or gym:<id>"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Expected errors print one line and give 2."""
    # a second BLAS thread would wake on another process's core for every action; before numpy is imported
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    options = build().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        from .signals import uninterrupted

        with uninterrupted():
            from . import commands
        text, result = getattr(commands, options.command)(options)
        print(text)
        if getattr(options, "json", False):
            print(json.dumps(result))
        sys.stdout.flush()  # here, where a reader that went away is no error
        return 0 if result.get("ready", True) else 1  # what `tether doctor` found
    except KeyboardInterrupt:
        print("tether: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"tether: error: this needs {error.name}: pip install 'tether[{EXTRAS[error.name]}]'", file=sys.stderr)
        return 2
    except Exception as error:
        # Of our own errors the message is all a person needs; anything else is a defect and keeps its traceback.
        ours = any(base.__module__.startswith("tether.") for base in type(error).__mro__)
        if not ours and not isinstance(error, OSError):
            raise
        print(f"tether: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _terminated(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # so that robots are stopped and files closed on the way out


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other error; `--help` has the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def build() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="tether", description="Train a robot on a tether to a workstation; cut it, and it runs on its own."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: str, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        sub.set_defaults(command=function)
        return sub

    demo = command("demo", "demo", "no hardware, no arguments: train in the twin for some minutes, freeze, show it")
    demo.add_argument("robot", nargs="?", default="car", choices=["car", "quadruped", "arm"], help="(default: car)")
    demo.add_argument("--out", help="folder for the run and the bundle (default: runs/demo-ROBOT-N)")
    _seeded(demo, "of everything")
    _json(demo)

    run = command("run", "run", "learner and actor on this machine, two processes")
    _training(run)
    _driving(run)
    _failing(run)
    run.set_defaults(bind=None)

    learner = command("learner", "run", "the learner alone; actors connect to it")
    _training(learner)
    learner.add_argument("--bind", default="tcp://127.0.0.1:5555", help="address to listen on (default: %(default)s)")

    _acting(command("actor", "actor", "the actor alone: the twin, or with --real the hardware"))

    _recording(command("record", "record", "drive a course or show an arm's task, and keep what was done"))

    course = command("course", "course", "a task file from a centre-line CSV or from a recording")
    course.add_argument("file", help="a .csv (x_m, y_m, w_tr_right_m, w_tr_left_m) or a recording")
    course.add_argument("--length", type=float, help="scale the closed line to this length, m (CSV)")
    course.add_argument("--width", type=float, help="free width, m (default: the CSV's, or the recording's task)")
    course.add_argument("--checkpoints", type=_from(1), help="how many (default: as many of 4 to 8 as say something)")
    course.add_argument("--out", help="the task file (default: FILE's name with .toml)")
    _json(course)

    evaluate = command("eval", "evaluate", "drive without exploration and count")
    evaluate.add_argument("source", metavar="RUN|BUNDLE|TASK", help="a run folder, a bundle, or with --policy a task")
    evaluate.set_defaults(real=False)
    evaluate.add_argument("--policy", choices=["pursuit"], help="a scripted policy instead of a learned one")
    evaluate.add_argument("--tune", action="store_true", help="search the scripted policy's grid for its best lap")
    _counting(evaluate)

    export = command("export", "export", "freeze a run's policy into a bundle, checked for equality and latency")
    export.add_argument("run", help="a run folder")
    export.add_argument("--out", help="the bundle's folder (default: RUN/bundle)")
    _json(export)

    drive = command("drive", "drive", "the frozen policy, on NumPy alone")
    drive.add_argument("source", metavar="BUNDLE", help="a bundle's folder")
    _real(drive)
    _counting(drive)

    report = command("report", "report", "curves, laps, the map and a replay in one HTML file")
    report.add_argument("run", help="a run folder")
    report.add_argument("--out", help="the HTML file (default: RUN/report.html)")

    doctor = command("doctor", "doctor", "measure the rig, read-only: exit status 0 when it is ready, 1 when not")
    doctor.add_argument("task", nargs="?", default="car-loop", help=f"{TASK_HELP} (default: car-loop)")
    doctor.add_argument("--learner", help="address of the learner (default: the link to one that is started here)")
    _real(doctor, "read the hardware; without it, the twin")
    _json(doctor)

    keys = command("keys", "keys", "make and show the keys of the link, which it needs beyond this machine")
    keys.add_argument("names", nargs="*", metavar="NAME", help="make the keys of an actor of this name")

    command("list", "catalog_list", "robots, tasks, algorithms, presets")
    return parser


def _training(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("task", help=TASK_HELP)
    sub.add_argument("--steps", type=_from(1), help="stop after this many (default: the preset's)")
    sub.add_argument("--out", help="the run folder (default: runs/TASK-N)")
    sub.add_argument("--preset", default="cpu", help="name or .toml path, several with commas (default: cpu)")
    sub.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting")
    sub.add_argument("--from", dest="start", default="", metavar="RUN", help="start from this run's weights")
    sub.add_argument("--prior", nargs="+", action="extend", default=[], metavar="FILE|RUN", help="prior data")
    sub.add_argument("--resume", action="store_true", help="go on with TASK's run in --out (default: runs/latest)")
    devices = "learn on this many of this machine's devices, each on its share of every batch (default: 1)"
    sub.add_argument("--devices", type=_from(1), default=1, help=devices)
    sub.add_argument("--tensorboard", action="store_true", help="write TensorBoard files too")
    _taking_over(sub, "none")
    _seeded(sub, "of everything")


def _acting(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("task", nargs="?", help="refuse a learner of another task (default: the learner says)")
    sub.add_argument("--learner", default="tcp://127.0.0.1:5555", help="the learner's address (default: %(default)s)")
    sub.add_argument("--spool", help="where records wait for the learner (default: ~/.local/state/tether/spool)")
    sub.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # end with this process
    sub.add_argument("--seed", type=_from(0), help="of exploration and the twin (default: the learner's)")
    hardware_or_failures = sub.add_mutually_exclusive_group()  # hardware fails without being asked
    _real(hardware_or_failures)
    _failing(hardware_or_failures)
    _taking_over(sub, "the learner says")
    _driving(sub)


def _recording(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("task", help=TASK_HELP)
    sub.add_argument("--teleop", default="script", choices=["script", "keyboard", "gamepad"], help="who drives")
    about = "m/s, of the script or at full deflection (default: 1.0; an arm's tool: 0.15, by hand 0.06)"
    sub.add_argument("--speed", type=float, help=about)
    sub.add_argument("--laps", type=_from(1), default=1, help="stop after so many, or successful tries (default: 1)")
    sub.add_argument("--quality", type=float, default=1.0, help="0 (wandering, missing) to 1 (clean) of the script")
    sub.add_argument("--out", help="the recording's folder (default: recordings/TASK-N)")
    _seeded(sub, "of the twin's noise")
    _real(sub)
    _driving(sub)
    _json(sub)


def _counting(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--task", help="drive this task instead of the one it was trained on")
    sub.add_argument("--episodes", type=_from(1), help="stop after this many")
    sub.add_argument("--laps", type=_from(1), help="stop after this many (default on a course: 5)")
    sub.add_argument("--steps", type=_from(1), help="stop after this many")
    _seeded(sub, "of the twin's noise")
    _driving(sub)
    _json(sub)


def _driving(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--realtime", action="store_true", help="the twin keeps real time (always where a person drives)")
    sub.add_argument("--view", action="store_true", help="open MuJoCo's viewer (needs a display)")


def _taking_over(sub: argparse.ArgumentParser, default: str) -> None:
    about = f"who takes the stick in the middle of an episode: none, script, keyboard, gamepad (default: {default})"
    sub.add_argument("--takeover", choices=["none", "script", "keyboard", "gamepad"], metavar="WHO", help=about)


def _failing(sub: argparse._ActionsContainer) -> None:
    about = "break this in the twin at that time of its clock, e.g. pose:stuck@12s or motor:off@5s+2s; more than once"
    sub.add_argument("--fail", action="append", default=[], metavar="PART:KIND@TIME[+FOR]", help=about)


def _real(sub: argparse._ActionsContainer, about: str = "drive the hardware; without it, the twin") -> None:
    sub.add_argument("--real", action="store_true", help=about)


def _seeded(sub: argparse.ArgumentParser, what: str) -> None:
    sub.add_argument("--seed", type=_from(0), default=0, help=f"{what} (default: 0)")


def _json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="the last line of output is one JSON object")


def _from(lowest: int) -> Callable[[str], int]:
    """A whole number of at least this, as argparse's `type`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text) < 1 << 31:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number from {lowest} to {(1 << 31) - 1}")
        return int(text)

    return parse


if __name__ == "__main__":
    sys.exit(main())
