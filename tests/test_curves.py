"""The pure parts of `make curves`: figures over seeds, curves, the SVG, and what is left to do for a seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bench import curves, drawing
from tests.bench.curves import Wanted

HOPPER = Wanted("Hopper-v5", "rlpd", 0, 1000)
CAR = Wanted("car-loop", "rlpd", 0, 1000)
PEER = Wanted("car-loop", "sbx:droq", 0, 1000)
COST = {"attempts": 1, "wall_s": 60.0, "cpu_s": 90.0, "learner_cpu_s": 70.0, "load_at_start": [0.1], "git": ["abc"]}
ROWS = [
    {"step": 50, "time_s": 5.0, "env/episode_return": 1.0},
    {"step": 400, "time_s": 30.0, "env/lap_time_s": 29.0, "env/lap_clean": 0.0},
    {"step": 600, "time_s": 60.0, "env/lap_time_s": 40.0, "env/lap_clean": 1.0},
    {"step": 900, "time_s": 90.0, "env/lap_time_s": 30.0, "env/lap_clean": 1.0, "env/episode_return": 3.0},
    {"step": 950, "time_s": 95.0, "env/episode_return": 5.0},
    {"step": 1000, "time_s": 100.0, "learn/updates": 7.0},
]
FINAL = {"return_mean": 4.0, "returns": [3.0, 5.0]}


def made(wanted: Wanted, seed: int = 0, shift: float = 0.0) -> dict[str, Any]:
    """A seed's JSON."""
    final = {"return_mean": 4.0 + shift, "returns": [4.0 + shift]}
    result = curves.result(replace(wanted, seed=seed), ROWS, COST, final, 50.0 if wanted.course else None)
    result["episodes"] = [[s, t, r + shift] for s, t, r in result["episodes"]]
    return result


def test_mean_and_standard_error() -> None:
    assert drawing.mean_se([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1.0 / np.sqrt(3)))
    assert drawing.mean_se([2.0, None]) == (2.0, None)
    assert drawing.mean_se([None]) == (None, None)


def test_the_last_tenth_is_of_steps_not_of_episodes() -> None:
    episodes = [[10, 1.0, 1.0], [900, 2.0, 100.0], [901, 3.0, 4.0], [1000, 4.0, 8.0]]
    assert drawing.last_tenth(episodes, 1000) == 6.0
    assert drawing.last_tenth(episodes[:2], 1000) is None


def test_a_curve_on_a_grid_is_the_mean_of_the_window_before() -> None:
    x, y, grid = [1.0, 2.0, 3.0, 9.0], [10.0, 20.0, 60.0, 1.0], np.array([0.5, 1.0, 3.0, 4.0, 8.0, 9.0])
    # (1, 3] holds 20 and 60; (2, 4] holds 60; (6, 8] is empty: the last before it
    assert drawing.on_grid(x, y, grid, 2.0)[1:].tolist() == [10.0, 40.0, 60.0, 60.0, 1.0]
    assert np.isnan(drawing.on_grid(x, y, grid, 2.0)[0])
    assert np.isnan(drawing.on_grid([], [], grid, 2.0)).all()


def test_a_band_is_only_where_all_seeds_have_a_value() -> None:
    mean, low, high = drawing.band([np.array([np.nan, 1.0, 3.0]), np.array([0.0, 3.0, 4.0])])
    assert np.isnan([mean[0], low[0], high[0]]).all()
    assert (mean[1:].tolist(), low[1:].tolist(), high[1:].tolist()) == ([2.0, 3.5], [1.0, 3.0], [3.0, 4.0])


def test_curves_end_where_their_first_seed_ends() -> None:
    short = made(HOPPER, 1) | {"episodes": [[200, 600.0, 1.0]]}
    both = {"a": [made(HOPPER), short], "b": [made(HOPPER)], "empty": [made(HOPPER) | {"episodes": []}]}
    steps, minutes = drawing.curves(both, 0, 1.0), drawing.curves(both, 1, 1 / 60)
    assert [(c["name"], c["x"][-1]) for c in steps] == [("a", 200.0), ("b", 950.0)]
    assert [c["x"][-1] for c in minutes] == pytest.approx([95 / 60, 95 / 60])


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-3.0, 8500.0), (0.0, 100_000.0), (4.0, 4.002)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    marks = drawing.ticks(low, high)
    assert 3 <= len(marks) <= 7 and all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)
    assert {f"{mark:.3g}" for mark in np.diff(marks)} & {f"{m * 10.0**e:.3g}" for m in (1, 2, 5) for e in range(-5, 6)}


def test_the_svg_is_xml_with_two_panels_and_a_legend() -> None:
    name = 'rlpd, agent.hidden=[2,2] & "<x>"'
    text = drawing.svg("Hopper", {name: [made(HOPPER), made(HOPPER, 1, 2.0)], "sbx:crossq": [made(HOPPER)]})
    root, space = ElementTree.fromstring(text), "{http://www.w3.org/2000/svg}"
    width, height = (float(root.get(key, "")) for key in ("width", "height"))
    lines = root.findall(f"{space}polyline")
    assert len(lines) == 4 and len({line.get("stroke") for line in lines}) == 2
    assert len(root.findall(f"{space}polygon")) == 2  # of the group with two seeds, a panel each
    for shape in [*lines, *root.findall(f"{space}polygon")]:
        points = np.array([pair.split(",") for pair in shape.get("points", "").split()], float)
        assert len(points) > 50 and (points >= 0).all() and (points <= [width, height]).all()
    said = [element.text for element in root.iter(f"{space}text")]
    assert {"steps", "wall-clock, minutes", f"{name} (2 seeds)", "sbx:crossq (1 seed)"} <= set(said)


def test_the_svg_of_nothing_and_of_a_constant_is_xml() -> None:
    flat = made(HOPPER) | {"episodes": [[10, 1.0, 5.0], [20, 2.0, 5.0]]}
    for groups in ({}, {"a": [made(HOPPER) | {"episodes": []}]}, {"a": [flat]}):
        assert "nan" not in drawing.svg("x", groups)
        ElementTree.fromstring(drawing.svg("x", groups))


def test_what_is_left_to_do_for_a_seed(tmp_path: Path) -> None:
    file, folder = tmp_path / "x.json", tmp_path / "x"
    assert curves.stage(file, folder) == "train"
    (folder / "run").mkdir(parents=True)
    curves.write(folder / "usage.json", {"attempts": 1})
    assert curves.stage(file, folder) == "train"  # killed before there was a run
    (folder / "run" / "config.toml").touch()
    assert curves.stage(file, folder) == "resume"
    curves.write(folder / "usage.json", {"attempts": 1, "trained": True})
    assert curves.stage(file, folder) == "eval"
    curves.write(file, {})
    assert curves.stage(file, folder) == "done"


def test_whatever_differs_has_files_of_its_own() -> None:
    many = tuple(f"agent.some_long_name_{i}=0.0001" for i in range(20))
    wanted = [HOPPER, CAR, PEER, replace(HOPPER, seed=1), replace(HOPPER, steps=2000), replace(HOPPER, preset="full"),
              replace(HOPPER, settings=("agent.utd=2",)), replace(HOPPER, settings=many), replace(CAR, prior=False),
              replace(HOPPER, settings=(*many, "agent.utd=2"))]  # fmt: skip
    paths = {f"{w.env}/{w.stem}" for w in wanted}
    assert len(paths) == len(wanted) and all(len(w.stem) < 200 and "/" not in w.stem for w in wanted)
    assert replace(PEER, preset="full", prior=False).stem == PEER.stem  # not for sbx
    assert replace(HOPPER, prior=False).stem == HOPPER.stem  # there is none


def test_the_commands(tmp_path: Path) -> None:
    tuned = replace(CAR, settings=("agent.utd=2",), seed=3)
    fresh = curves.training(tuned, tmp_path / "run", tmp_path / "lap", False)
    assert fresh[3:8] == ["run", "car-loop", "--preset", "cpu", "--set"]
    assert {"agent.algorithm=rlpd", "agent.utd=2", "--prior", str(tmp_path / "lap")} <= set(fresh)
    assert "--prior" not in curves.training(replace(tuned, prior=False), tmp_path / "run", tmp_path / "lap", False)
    again = curves.training(tuned, tmp_path / "run", tmp_path / "lap", True)
    assert "--resume" in again and "--set" not in again
    assert "gym:Hopper-v5" in curves.training(HOPPER, tmp_path, None, False)
    assert curves.training(PEER, tmp_path, tmp_path / "lap", False)[2:6] == [
        "tests.bench.peer", "train", "car-loop", "droq",
    ]  # fmt: skip


def test_laps_of_a_seed() -> None:
    found = curves.result(CAR, ROWS, COST, FINAL, 50.0)
    assert found["first_clean_lap"] == {"step": 600, "minutes": 1.0}  # the lap before was not clean
    assert found["first_fast_lap"] == {"step": 900, "minutes": 1.5}  # 30 s are 0.6 x 50 s
    assert found["last_tenth_return"] == 5.0 and found["prior"] and not made(PEER)["prior"]
    assert curves.result(CAR, ROWS, COST, FINAL, 49.0)["first_fast_lap"] is None
    assert "first_clean_lap" not in curves.result(HOPPER, ROWS, COST, FINAL, None)


def test_the_table_says_who_never_got_there() -> None:
    never = made(CAR, 1, 2.0) | {"first_fast_lap": None}
    groups = curves.grouped([made(PEER), never, made(CAR), made(replace(CAR, steps=2000)) | {"attempts": 2}])
    assert list(groups) == ["rlpd, 1,000 steps", "rlpd, 2,000 steps", "sbx:droq, 1,000 steps"]
    rows = curves.summary(groups)
    assert rows["rlpd, 1,000 steps"]["final_return"] == {"mean": 5.0, "se": 1.0}
    assert rows["rlpd, 1,000 steps"]["first_clean_lap"]["step"] == {"mean": 600.0, "se": 0.0}
    text = curves.table(rows)
    assert "5.0 ± 1.0" in text and "1.5 min, step 900 (1 of 2)" in text
    assert "2,000 steps: resumed: seeds 0" in text and "sbx:droq, 1,000 steps: " not in text
    json.dumps(rows)


def test_a_seed_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def measured(command: list[str], folder: Path) -> str:
        ran.append(command)
        (folder / "run").mkdir(exist_ok=True)
        (folder / "run" / "config.toml").touch()
        (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        curves.write(folder / "usage.json", COST)
        return f"actor: 9 steps\n{'1,000' if len(ran) > 1 else '400'} steps in 3 s\n"

    monkeypatch.setattr(curves, "measured", measured)
    monkeypatch.setattr(curves, "asked", lambda command: FINAL)
    monkeypatch.setattr(curves, "decided", lambda wanted, run: {})
    with pytest.raises(SystemExit, match="ended before its 1,000 steps"):
        curves.one(HOPPER, tmp_path)
    for _ in range(2):
        curves.one(HOPPER, tmp_path)
    assert ["--resume" in command for command in ran] == [False, True]
    assert curves.report(tmp_path, "Hopper-v5") == tmp_path / "summary.json"
    assert json.loads((tmp_path / "summary.json").read_text())["groups"]["rlpd"]["final_return"]["mean"] == 4.0
    ElementTree.parse(tmp_path / "curves.svg")


def test_what_a_training_costs_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a child of its own, and when it is started again."""
    monkeypatch.setattr(curves, "POLL_S", 0.1)
    burn = "import time\nwhile time.process_time() < 0.08: pass\n"
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', {burn!r}])\n"
    code = f"{child}{burn}print('5 steps in 1 s')"
    for attempt in (1, 2):
        assert curves.measured([sys.executable, "-S", "-c", code], tmp_path) == "5 steps in 1 s\n"
        found = curves.usage(tmp_path)
        assert found["attempts"] == attempt == len(found["load_at_start"]) == len(found["git"])
        assert 0.06 * attempt <= found["learner_cpu_s"] <= found["cpu_s"] - 0.06 * attempt
    with pytest.raises(SystemExit, match="failed"):
        curves.measured([sys.executable, "-S", "-c", "raise SystemExit(3)"], tmp_path)
    assert curves.usage(tmp_path)["attempts"] == 3


def test_an_end_from_outside_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def end(pid: int) -> tuple[float, float]:
        started.append(pid)
        if len(started) == 1:
            raise KeyboardInterrupt
        return 3.0, 4.0

    monkeypatch.setattr(curves, "cpu_seconds", end)
    with pytest.raises(KeyboardInterrupt):
        curves.measured([sys.executable, "-S", "-c", "import time; time.sleep(60)"], tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)
    assert curves.usage(tmp_path)["cpu_s"] == 4.0  # what it has cost is kept


def test_two_do_not_measure_at_once(tmp_path: Path) -> None:
    """Nor one beside a training whose `make curves` was killed."""
    refused = pytest.raises(SystemExit, match="runs here already")
    with curves.alone(tmp_path), refused, curves.alone(tmp_path):
        pass
    with curves.alone(tmp_path):
        command = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
        left = subprocess.Popen(command, stdin=subprocess.PIPE, close_fds=False)
    with left, refused, curves.alone(tmp_path):
        pass
    with curves.alone(tmp_path):
        pass
