"""README's commands: every one is understood, and those of the chain run, in order, from a track to a frozen policy."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tether.launch import cli

from tests.conftest import TETHER, flags

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
README = (ROOT / "README.md").read_text()
LINES = [line for block in FENCED.findall(README) for line in block.splitlines()]
SPANS = re.findall(r"`([^`\n]+)`", FENCED.sub("", README))
BLOCKS = [shlex.split(line, comments=True) for line in LINES]
INLINE = [span.split() for span in SPANS if re.match(r"(\S*/)?tether ", span)]

# Options that make the chain short; the commands are README's.
TINY = ["agent.hidden=[16]", "agent.utd=1", "agent.batch=32", "learner.start_steps=10", "actor.random_steps=10"]
SHORTER = {
    "record": ["--speed", "3"],
    "run": ["--steps", "40", *flags(*TINY)],
    "eval": ["--steps", "40"],
    "drive": ["--steps", "40"],
}
DRIVEN = {"task", "episodes", "steps", "return_mean", "success_rate", "policy_ms", "late", "laps", "clean_laps",
          "contacts", "lap_time_s"}  # fmt: skip
KEYS = {  # always in what --json prints
    "course": {"file", "checkpoints", "length_m", "width_m"},
    "record": {"file", "steps", "laps", "lap_time_s", "contacts"},
    "eval": DRIVEN,
    "drive": DRIVEN,
}
ELSEWHERE = {"learner", "actor", "keys"}  # two machines; tests/test_processes.py, tests/test_keys.py


@pytest.mark.parametrize("words", [w for w in BLOCKS + INLINE if w and Path(w[0]).name == "tether"], ids=" ".join)
def test_every_command_is_understood(words, capsys):
    alone = words in INLINE and len(words) == 2  # only named, as in "`tether course` writes them"
    try:
        cli.build().parse_args([*words[1:], "--help"] if alone else words[1:])
    except SystemExit as ended:
        assert ended.code == 0, capsys.readouterr().err


def test_every_target_of_make_is_there():
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = [words[1] for words in BLOCKS + [span.split() for span in SPANS] if words[:1] == ["make"]]
    assert named and set(named) <= set(known)


def commands() -> list[list[str]]:
    """The chain of the fenced blocks, then what stands in the text about any Gymnasium environment."""
    chain = [w for w in BLOCKS if w and (w[0] == "python" or (w[0] == "tether" and w[1] not in ELSEWHERE))]
    return chain + [w for w in INLINE if " ".join(w[1:]).startswith("run gym:")]


def test_the_chain_runs_from_a_track_to_a_frozen_policy(tmp_path):
    pytest.importorskip("jax")
    pytest.importorskip("mujoco")
    shutil.copy(ROOT / "robot_env" / "tasks" / "hook.csv", tmp_path / "track.csv")
    ran = []
    for program, *arguments in commands():
        name = "python" if program == "python" else arguments[0]
        command = [sys.executable, *arguments] if name == "python" else [*TETHER, *arguments]
        command += [*SHORTER.get(name, []), *(["--json"] if name in KEYS else [])]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        if name in KEYS:
            told = json.loads(done.stdout.splitlines()[-1])
            assert KEYS[name] <= set(told), name
            if KEYS[name] is DRIVEN:
                assert set(told["policy_ms"]) == {"p50", "p99", "max"}
                assert set(told["lap_time_s"]) == {"median", "best", "all"}
        ran.append(name)
    assert ran == ["course", "record", "course", "run", "eval", "report", "export", "drive", "python", "run"]
    assert (tmp_path / "runs" / "first" / "report.html").is_file() and (tmp_path / "bundle" / "policy.json").is_file()
