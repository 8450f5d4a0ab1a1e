"""The command line: help, JSON, and every bad input as one line on standard error with exit status 2."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tether.launch import actor, cli, evaluate, teach
from tether.robot_env.record import read_recording

from tests.conftest import FAKE, SETTINGS, TETHER, flags, free_address

COMMANDS = (
    "demo",
    "run",
    "learner",
    "actor",
    "record",
    "course",
    "eval",
    "export",
    "drive",
    "report",
    "doctor",
    "list",
)
TINY = flags(*SETTINGS)
HOOK = str(Path(__file__).parents[1] / "robot_env" / "tasks" / "hook.csv")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder with `fake.toml`, and the signals as they were."""
    monkeypatch.chdir(tmp_path)
    Path("fake.toml").write_text(FAKE)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tether(*arguments: object) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)


def refused(capsys, *arguments: object) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    status = tether(*arguments)
    out, err = capsys.readouterr()
    assert status == 2, (status, err)
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert err.startswith("tether") and ": error: " in err
    assert "Traceback" not in err
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small run of the fake robot, made once."""
    pytest.importorskip("jax")
    folder = tmp_path_factory.mktemp("trained")
    (folder / "fake.toml").write_text(FAKE)
    command = [*TETHER, "run", "fake.toml", "--out", "run", "--steps", "60", *TINY]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy one may break."""
    subprocess.run(["cp", "-r", trained, tmp_path / "run"], check=True)
    return Path("run")


# --- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_help(command, capsys):
    assert tether(command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: tether {command}")


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom tether.launch.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'jax', 'mujoco', 'numpy', 'zmq'} & set(sys.modules), sys.modules.keys()\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"\n    {command} " in out for command in COMMANDS)


def test_list_names_robots_tasks_algorithms_and_presets(capsys):
    assert tether("list") == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in ("car", "fake", "car-loop", "hook", "rlpd", "cpu", "full"))


# --- bad input: what a person types

TYPED = {
    "no such command": (["drift"], "invalid choice: 'drift' .*run.*actor"),
    "nothing": ([], "required: COMMAND"),
    "no task": (["run"], "required: task"),
    "a negative seed": (["run", "fake.toml", "--seed", "-1"], "whole number from 0"),
    "no steps": (["run", "fake.toml", "--steps", "0"], "whole number from 1"),
    "no such task": (["run", "nope"], "no task 'nope': .*car-loop"),
    "no such preset": (["run", "fake.toml", "--preset", "gpu"], "no preset 'gpu'; give aprl, cpu, full, rlif"),
    "no such setting": (["run", "fake.toml", "--set", "agent.gama=0.9"], "agent.gama is no setting; .*gamma"),
    "no such section": (["run", "fake.toml", "--set", "actr.x=1"], "actr is no setting; valid are agent"),
    "not a setting": (["run", "fake.toml", "--set", "gamma"], "write section.key=value"),
    "out of range": (["run", "fake.toml", "--set", "agent.gamma=2"], "gamma = 2.0: must lie between 0 and 1"),
    "no such algorithm": (["run", "fake.toml", "--set", "agent.algorithm=ppo"], "unknown algorithm 'ppo'; .*rlpd"),
    "nobody who takes over": (["run", "fake.toml", "--takeover", "ghost"], "'ghost' .*none.*script.*keyboard.*gamepad"),
    "nobody who takes over, set": (
        ["run", "fake.toml", "--set", "actor.takeover=ghost"],
        "takeover = 'ghost': must be one of none, script, keyboard, gamepad",
    ),
    "a script for no tool": (["learner", "fake.toml", "--takeover", "script"], "fake: .*kind manipulate, not course"),
    "a script for no tool, alone": (["actor", "fake.toml", "--takeover", "script"], "fake: .*kind manipulate"),
    "a person in a gym": (["run", "gym:Pendulum-v1", "--takeover", "gamepad"], "a person takes over cars on a course"),
    "rewards for nobody": (["run", "fake.toml", "--preset", "cpu,rlif"], "takeover_reward pays for .*--takeover"),
    "nothing to resume": (["run", "fake.toml", "--resume"], "not a run folder .*runs lie in runs/"),
    "resume nowhere": (["run", "fake.toml", "--resume", "--out", "x"], "x: not a run folder"),
    "no prior": (["run", "fake.toml", "--prior", "lap", *TINY], "lap cannot be read: .*tether record"),
    "from nothing": (["run", "fake.toml", "--from", "old", *TINY], "old: not a run folder"),
    "an address of no use": (["learner", "fake.toml", "--bind", "here", *TINY], "'here'"),
    "an address off this machine": (
        ["learner", "fake.toml", "--bind", "tcp://0.0.0.0:5555", *TINY],
        "needs keys: there is no .*learner.key; `tether keys NAME`",
    ),
    "a learner elsewhere": (["actor", "--learner", "tcp://10.0.0.1:5555"], "10.0.0.1.*there is no .*actor.key"),
    "hardware without a driver": (["record", "car-loop", "--real"], "car has no hardware driver yet; .*--real"),
    "a gym without hardware": (["record", "gym:Pendulum-v1"], "only courses can be recorded"),
    "too fast": (["record", "fake.toml", "--speed", "9"], "--speed 9: between 0 and 4.5"),
    "no quality": (["record", "fake.toml", "--quality", "3"], "--quality lies between 0 and 1"),
    "no laps": (["record", "fake.toml", "--laps", "0"], "from 1"),
    "no CSV": (["course", "none.csv"], "none.csv"),
    "no recording": (["course", "lap"], "lap cannot be read"),
    "no inside": (["course", HOOK, "--width", "1.5", "--length", "3"], "1.5 m wide it has no inside: .*--length"),
    "no task's name": (["course", "fake.csv", "--out", "x"], "ends in .toml"),
    "eval of nothing": (["eval", "x"], "x: neither a run nor a bundle"),
    "export of nothing": (["export", "x"], "x: not a run folder"),
    "drive of nothing": (["drive", "x"], "x"),
    "report of nothing": (["report", "x"], "x"),
    "hardware for a gym": (["eval", "gym:Pendulum-v1", "--policy", "pursuit"], "only courses can be driven by"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, says", TYPED.values(), ids=TYPED)
def test_bad_input_is_one_line(arguments, says, capsys):
    import re

    if {"--prior", "--from", "--bind"} & set(arguments):
        pytest.importorskip("jax")
    assert re.search(says, refused(capsys, *arguments))


def test_a_recording_of_another_robot_is_refused(capsys):
    pytest.importorskip("jax")
    assert tether("record", "fake.toml", "--out", "lap") == 0
    said = refused(capsys, "run", "gym:Pendulum-v1", "--prior", "lap", *TINY)
    assert "--prior: recorded on fake at 10 Hz; this task's robot is gym:Pendulum-v1 at 30 Hz" in said
    Path("fast.toml").write_text(FAKE.replace("hz = 10", "hz = 50"))
    said = refused(capsys, "run", "fast.toml", "--prior", "lap", *TINY)
    assert "--prior: recorded on fake at 10 Hz; this task's robot is fake at 50 Hz" in said


def test_going_on_without_anything_to_go_on_from_is_refused(capsys):
    pytest.importorskip("jax")
    said = refused(capsys, "run", "fake.toml", "--preset", "cpu,sim2real")
    assert "sim2real (prior_anneal) needs --from RUN, --prior RUN and its preset, e.g. cpu,sim2real" in said


def test_a_recording_that_gets_nowhere_is_given_up(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "SLOWEST_MPS", 5.0)
    assert "lap: lap 1 does not end: too narrow" in refused(capsys, "record", "fake.toml", "--out", "lap")


def test_a_task_file_outlives_a_disk_that_is_full(monkeypatch, capsys):
    assert tether("course", HOOK, "--out", "course.toml") == 0
    before = Path("course.toml").read_text()
    write = Path.write_text

    def full(path, text, **options):
        write(path, text[:1000], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left" in refused(capsys, "course", HOOK, "--width", "1.2", "--out", "course.toml")
    assert Path("course.toml").read_text() == before


FILES = {
    "broken": ("[task]", "[task", "not valid TOML"),
    "an unknown key": ("hz = 10", "hz = 10\nspeed = 3", "unknown key task.speed; valid are"),
    "a module path": ('"fake"', '"os:system"', "not a module path"),
    "another robot": ('"fake"', '"boat"', "unknown robot 'boat'; this installation has car, quadruped, arm, arm-"),
    "a checkpoint in the wall": ("at = [4.0, 0.0]", "at = [4.0, 3.0]", "outside the walls"),
    "a wider limit": ("[course]", "[gate]\nmax_speed_mps = 99\n[course]", "only tighten"),
}


@pytest.mark.parametrize("command", ["run", "record", "eval"])
@pytest.mark.parametrize("old, new, says", FILES.values(), ids=FILES)
def test_a_task_file_that_cannot_be_used(command, old, new, says, capsys):
    Path("bad.toml").write_text(FAKE.replace(old, new, 1))
    line = refused(capsys, command, "bad.toml", *(("--policy", "pursuit") if command == "eval" else ()))
    assert says in line and "bad" in line
    assert not Path("runs/bad-1/config.toml").exists() and not Path("recordings").exists()


# --- bad input: what a machine does


def test_an_unreachable_learner(capsys, monkeypatch):
    monkeypatch.setattr(actor, "LEARNER_WAIT_S", 0.3)
    address = free_address()
    assert f"start it with `tether learner TASK --bind {address}`" in refused(capsys, "actor", "--learner", address)


def test_a_busy_port_leaves_the_runs_name_free(capsys):
    pytest.importorskip("jax")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        bind = f"tcp://127.0.0.1:{busy.getsockname()[1]}"
        for _ in range(2):  # the second time, too: nothing was begun
            capsys.readouterr()
            assert tether("learner", "fake.toml", "--bind", bind, "--out", "run", *TINY) == 2
            line = capsys.readouterr().err.splitlines()[-1]
            assert f"cannot listen on {bind}" in line and "--bind" in line
    assert "Traceback" in Path("run/error.txt").read_text()


def test_a_recording_cut_short(capsys):
    assert tether("record", "fake.toml", "--out", "lap", "--speed", "1", "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(told) == {"file", "steps", "laps", "lap_time_s", "contacts"} and told["laps"] == 1
    assert "already there" in refused(capsys, "record", "fake.toml", "--out", "lap")
    whole = read_recording("lap")[1]
    first, *others = sorted(Path("lap").glob("*.seg"))
    for other in others:
        other.unlink()
    data = first.read_bytes()
    first.write_bytes(data[: len(data) // 2])
    assert tether("course", "lap") == 2  # half a lap is no loop
    warning, error = capsys.readouterr().err.splitlines()
    assert "cut at byte" in warning and str(first) in warning and "error: " in error
    assert read_recording("lap", print)[1] != whole
    first.write_bytes(data[:10])
    assert "make one with `tether record`" in refused(capsys, "course", "lap")
    first.unlink()
    assert "make one with `tether record`" in refused(capsys, "course", "lap")


def test_ctrl_c_ends_a_recording_as_a_whole(capsys, monkeypatch):

    scripted = teach.scripted

    def tired(*arguments):
        driver, ticks = scripted(*arguments), iter(range(30))

        def drive(obs, action):
            if next(ticks, None) is None:
                raise KeyboardInterrupt
            return driver(obs, action)

        return drive

    monkeypatch.setattr(teach, "scripted", tired)
    assert tether("record", "fake.toml", "--out", "lap") == 130
    assert "Traceback" not in capsys.readouterr().err
    records = read_recording("lap")[1]
    assert len(records) == 31 and records[-1].action is None and records[-2].action is not None


def test_sigterm_stops_the_robot_and_closes_the_recording():
    command = [*TETHER, "record", "fake.toml", "--out", "lap", "--laps", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "lap 1 of" in process.stderr.readline()
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert read_recording("lap")[1][-1].action is None


# --- bad input: what lies in a run


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "command", [["eval"], ["export"], ["run", "fake.toml", "--resume", "--out"], ["report"]]
)
def test_a_run_of_another_version(run, command, capsys):
    if command == ["report"]:
        pytest.importorskip("tether.launch.report")
    edit(run / "config.toml", "format = 1", "format = 99")
    line = refused(capsys, *command, run)
    assert "this version reads 1" in line and "config.toml" in line


def test_who_takes_over_is_what_a_run_began_with(run, capsys):
    resume = "run", "fake.toml", "--resume", "--out", run, "--steps", 60
    assert "--takeover is not what" in refused(capsys, *resume, "--takeover", "gamepad")
    assert tether(*resume, "--takeover", "none") == 0


def test_what_a_resumed_run_did_is_told_apart_from_what_it_had(run, capsys):
    assert tether("run", "fake.toml", "--resume", "--out", run, "--steps", 60) == 0
    had = int(re.search(r"([\d,]+) steps in all, ", capsys.readouterr().out)[1])
    assert tether("run", "fake.toml", "--resume", "--out", run, "--steps", had + 30) == 0
    total, new = re.search(r"(\d+) steps in all, (\d+) of them in [\d.]+ s", capsys.readouterr().out).groups()
    assert int(total) == had + int(new) and int(new) >= 30


def test_a_report_is_not_written_over_something_else(run, capsys):
    Path("task.toml").write_text("mine")
    assert "a report's name ends in .html" in refused(capsys, "report", run, "--out", "task.toml")
    assert Path("task.toml").read_text() == "mine"


def test_a_keyboard_needs_a_terminal_before_anything_begins(capsys, monkeypatch):
    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        said = refused(capsys, "run", "fake.toml", "--takeover", "keyboard", "--out", "run")
    assert "the keyboard needs a terminal" in said and not Path("run").exists()


def test_a_run_that_is_there_is_not_overwritten(run, capsys):
    assert "--resume" in refused(capsys, "run", "fake.toml", "--out", run)


def test_a_half_written_snapshot_is_passed_over_and_a_damaged_one_gives_way_to_the_one_before(run, capsys):
    snapshots = run / "snapshots"
    (newest,) = [p for p in snapshots.iterdir() if p.name.isdigit()]
    later = snapshots / f"{int(newest.name) + 1:0{len(newest.name)}d}"
    subprocess.run(["cp", "-r", newest, later], check=True)
    (snapshots / "latest").write_text(later.name)
    weights = max(later.iterdir(), key=lambda p: p.stat().st_size)
    os.truncate(weights, weights.stat().st_size // 2)
    assert tether("eval", run, "--steps", 20, "--json") == 0
    out, err = capsys.readouterr()
    assert later.name in err and f"using {newest.name}" in err and err.count("\n") <= 2
    told = json.loads(out.splitlines()[-1])
    assert {"task", "episodes", "steps", "return_mean", "success_rate", "policy_ms", "late", "laps", "clean_laps",
            "contacts", "pose_error_m", "lap_time_s"} <= set(told)  # fmt: skip
    weights = max(newest.iterdir(), key=lambda p: p.stat().st_size)
    os.truncate(weights, 10)
    assert "every snapshot is damaged" in refused(capsys, "eval", run)


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_run_without_a_snapshot_has_no_policy(run, command, capsys):
    subprocess.run(["rm", "-r", run / "snapshots"], check=True)
    assert "no snapshot to take a policy from" in refused(capsys, command, run)


def test_a_bundle_drives_and_is_refused_on_another_robot(run, capsys):
    assert tether("export", run, "--out", "bundle") == 0
    assert tether("drive", "bundle", "--steps", 20, "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["steps"] == 20 and set(told["policy_ms"]) == {"p50", "p99", "max"}
    Path("slow.toml").write_text(FAKE.replace("hz = 10", "hz = 20"))
    line = refused(capsys, "drive", "bundle", "--task", "slow.toml")
    assert "10" in line and "20" in line
    assert "--real" in refused(capsys, "drive", "bundle", "--real")
    assert "observation" in refused(capsys, "drive", "bundle", "--task", "gym:Pendulum-v1")
    weights = Path("bundle/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "bundle" in refused(capsys, "drive", "bundle")
    Path("bundle/policy.json").write_text("{")
    assert "bundle" in refused(capsys, "drive", "bundle")


def test_no_robot_is_named_where_tensorboard_is_missing(capsys):
    if __import__("importlib.util").util.find_spec("tensorboardX"):
        pytest.skip("it is installed")
    assert tether("run", "fake.toml", "--tensorboard", "--out", "run", *TINY) == 2
    assert "tensorboardX" in capsys.readouterr().err
