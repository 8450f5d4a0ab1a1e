"""Who may import whom, and which dependency comes in through which room."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent
ROOMS = ("agents", "robot_env", "drivers", "sim", "launch")
MAY_IMPORT = {
    "drivers": set(),
    "robot_env": {"drivers.base"},
    "sim": {f"drivers.{name}" for name in ("base", "car", "quadruped", "leg_odometry", "arm", "arm_joints")},
    "agents": set(),
    "launch": {"agents", "robot_env", "drivers", "sim"},
}
DOORS = {
    "jax": {"agents", "launch"},
    "flax": {"agents"},
    "optax": {"agents"},
    "safetensors": {"agents", "launch"},
    "zmq": {"launch"},
    "msgpack": {"launch", "robot_env"},
    "mujoco": {"sim"},
    "gymnasium": {"robot_env", "launch"},
    "tensorboardX": {"launch"},
    "tomli": {"robot_env", "launch"},
    "numpy": set(ROOMS),
}
SOURCES = [(room, path) for room in ROOMS for path in sorted((ROOT / room).glob("**/*.py"))]
LIMIT_FILE, LIMIT_FUNCTION, LIMIT_ALL = 450, 60, 10_000
LIMIT_CORE = 4500 + 530  # of the car alone, and where other robots, teachers and takeovers join it
# what carries experience and weights, and keeps them, and what learns: no part of the core
LINK = {"wire.py", "transport.py", "pump.py", "keys.py", "spool.py", "kept.py", "flight.py", "doctor.py"}
# of other robots than the car: it has no camera yet, and its tasks take it as it is
ROBOTS = {"arm.py", "quadruped.py", "leg_odometry.py", "legs.py", "stand_up.py", "walk.py", "fit.py", "frames.py"}
ROBOTS |= {"arm_joints.py", "hand.py", "manipulate.py", "takeover.py"}
ALGORITHMS = {"networks.py", "sac.py", "rlpd.py", "droq.py", "bound.py", "crossq.py", "xqc.py", "bc.py", "native.py"}


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(level, dotted name) of every import in a module."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level and not node.module:  # from . import x; from .. import room
                found += [(node.level, alias.name) for alias in node.names]
            else:
                module = node.module or ""
                found += [(node.level, f"{module}.{a.name}" if "." not in module else module) for a in node.names]
    return found


@pytest.mark.parametrize("room, path", SOURCES, ids=[str(p.relative_to(ROOT)) for _, p in SOURCES])
def test_a_room_imports_only_what_it_may(room: str, path: Path) -> None:
    for level, name in imports(ast.parse(path.read_text())):
        head = name.split(".")[0]
        if level == 2:
            allowed = any(name == a or name.startswith(a + ".") for a in MAY_IMPORT[room])
            assert allowed, f"{path.name}: {room} may not import {name}; it may import {MAY_IMPORT[room]}"
        elif level == 0:
            assert head not in (*ROOMS, "tether"), f"{path.name}: import {name} relatively"
            if head not in sys.stdlib_module_names:
                doors = DOORS.get(head, set())
                assert room in doors, f"{path.name}: {head} comes in through {sorted(doors)} only"


def code_lines(tree: ast.AST, source: str) -> set[int]:
    """Line numbers that are neither blank, comment nor docstring."""
    lines = {i for i, text in enumerate(source.splitlines(), 1) if text.strip() and not text.strip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            doc = node.body[0]
            lines -= set(range(doc.lineno, (doc.end_lineno or doc.lineno) + 1))
    return lines


def measured() -> dict[Path, tuple[set[int], ast.Module]]:
    """The lines that count, and the tree, of every source."""
    found = {}
    for _, path in SOURCES:
        source = path.read_text()
        tree = ast.parse(source)
        found[path] = (code_lines(tree, source), tree)
    return found


def test_files_and_functions_are_small() -> None:
    large = []
    for path, (lines, tree) in measured().items():
        if len(lines) > LIMIT_FILE:
            large.append(f"{path.relative_to(ROOT)}: {len(lines)}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                inside = len([n for n in lines if node.lineno <= n <= (node.end_lineno or 0)])
                if inside > LIMIT_FUNCTION:
                    large.append(f"{path.relative_to(ROOT)}:{node.name}: {inside}")
    assert not large, f"split these: {large}"


def test_the_core_stays_within_its_budget() -> None:
    lines = {path: len(found) for path, (found, _) in measured().items()}
    core = sum(count for path, count in lines.items() if path.name not in LINK | ROBOTS | ALGORITHMS)
    assert core <= LIMIT_CORE, f"core: {core} lines of {LIMIT_CORE}"
    assert sum(lines.values()) <= LIMIT_ALL


def test_every_folder_is_shipped() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent for room in ROOMS for p in (ROOT / room).glob("**/*") if p.is_file()}
    folders = {f for f in folders if "__pycache__" not in f.parts}
    assert {f"tether.{'.'.join(f.relative_to(ROOT).parts)}" for f in folders} == set(listed)


# what runs, or builds, whatever its input says
BUILTINS = {"eval", "exec", "compile", "__import__", "pickle"}
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
CALLS = {"yaml.load", "yaml.full_load", "yaml.unsafe_load", "torch.load", "builtins.eval", "builtins.exec"}
METHODS = {"recv_pyobj", "send_pyobj", "read_pickle"}


def trusting(tree: ast.AST) -> list[str]:
    """What in a module trusts what comes in."""
    found = [name for _, name in imports(tree) if name.split(".")[0] in MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in BUILTINS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and (ast.unparse(node) in CALLS or node.attr in METHODS):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize("room, path", SOURCES, ids=[str(p.relative_to(ROOT)) for _, p in SOURCES])
def test_nothing_that_comes_in_is_run(room: str, path: Path) -> None:
    assert trusting(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("code", [
    "import pickle", "from pickle import loads", "import os, shelve", "def f(): from marshal import load", "eval(x)",
    "map(exec, x)", "compile(x, '', 'exec')", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=flag)",
    "torch.load(f)", "yaml.load(f)", "socket.recv_pyobj()", "from torch import load; torch.load(x)",
])  # fmt: skip
def test_what_would_run_it_is_found(code: str) -> None:
    assert trusting(ast.parse(code))
    assert not trusting(ast.parse("re.compile(x); spec.compile(); self.eval(); np.load(f, allow_pickle=False)"))
