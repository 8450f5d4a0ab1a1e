"""SAFETY.md's tables: each failure of the car's twin is seen as it says and in time, or bounded by the limits."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tether.drivers.car import COMMAND
from tether.launch import catalog
from tether.robot_env.env import RobotEnv
from tether.robot_env.safety import CLAMPS, SafetyError
from tether.robot_env.task import parse

from tests.conftest import square

pytest.importorskip("mujoco")

from tether.sim.car import CarTwin

TEXT = (Path(__file__).parents[1] / "SAFETY.md").read_text()
ROWS = re.findall(r"^\| ([a-z_ ]+) \| (\w+)[^|]*\| `(\w+)`[^|]*\| ([\d.]+) s \|$", TEXT, re.M)
SEEN = [(part, kind, name, float(s)) for parts, kind, name, s in ROWS for part in parts.split()]
UNSEEN = re.findall(r"^\| ([a-z_]+) \| (wrong) \| ([^|]*) \|$", TEXT, re.M)
OPEN_FLOOR = re.sub(r"\[course\].*?(?=\[\[checkpoint)", "", square("car", side_m=40.0, episode_s=600.0), flags=re.S)
STARTS = (3.0, 3.03, 3.07)  # s; the phase between failure and tick


def weave(t: float) -> np.ndarray:
    """1.2 and 3.2 m/s, 2 s each; the wheels 0.3 rad left and right, 1 s each."""
    return COMMAND.to_action(np.array([3.2 if t % 4 < 2 else 1.2, 0.3 if t % 2 < 1 else -0.3]))


def faults(fail: list[str], seconds: float, seed: int) -> tuple[list[tuple[float, str]], float]:
    """(time, fault) of every tick that had one, and the largest speed."""
    env = catalog.make_env(catalog.make_task(parse(OPEN_FLOOR, "floor")), seed=seed, fail=fail)
    assert isinstance(env, RobotEnv)
    found, fastest = [], 0.0
    try:
        env.reset()
        while (now := env.robot.now()) < seconds:
            *_, truncated, info = env.step(weave(now))
            found += [(now, fault) for fault in info["faults"] if fault not in CLAMPS]
            fastest = max(fastest, abs(env.robot.truth()["speed"]))
            if truncated:
                env.reset()
    except SafetyError:
        pass
    finally:
        env.close()
    return found, fastest


def test_every_failure_of_the_twin_is_in_the_tables():
    listed = [(part, kind) for part, kind, *_ in SEEN] + [(part, kind) for part, kind, _ in UNSEEN]
    assert sorted(listed) == sorted((part, kind) for part, kinds in CarTwin.failures.items() for kind in kinds)


@pytest.mark.parametrize("part, kind, name, within", SEEN, ids=lambda v: str(v))
def test_it_is_seen_in_time(part, kind, name, within):
    for seed, start in enumerate(STARTS):
        found, _ = faults([f"{part}:{kind}@{start}s"], start + within + 0.2, seed)
        assert found, "not seen"
        when, fault = found[0]
        assert fault == (name if "_" in name else f"{name}_{part}") and 0.0 <= when - start <= within, found[0]


@pytest.mark.parametrize("part, kind, bound", UNSEEN, ids=lambda v: str(v)[:20])
def test_what_cannot_be_seen_stays_within_the_limits(part, kind, bound):
    found, fastest = faults([f"{part}:{kind}@3s"], 15.0, 0)
    assert not found and fastest < COMMAND.high[0] + 0.3


def test_without_a_failure_nothing_is_seen():
    assert faults([], 60.0, 0)[0] == []
