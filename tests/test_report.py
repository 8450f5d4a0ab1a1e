"""The report: what it says of a run, from files alone, and that it survives any state a run can be in."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tether.drivers.base import Reading
from tether.launch import cli, config, report
from tether.launch.config import RunError
from tether.robot_env.record import Meta, Record, SegmentWriter, encode
from tether.robot_env.task import load

HZ = 10.0
LAP = 80  # frames of one round
TASK = """
[task]
robot = "car"
kind = "course"
hz = 10
episode_s = 60

[course]
width_m = 1.5
centerline = [[6, 0], [4.24, 4.24], [0, 6], [-4.24, 4.24], [-6, 0], [-4.24, -4.24], [0, -6], [4.24, -4.24]]

[[checkpoint]]
at = [6, 0]

[[checkpoint]]
at = [-6, 0]
radius_m = 0.7
"""


def make_run(folder: Path, task: str = TASK, name: str = "ring", steps: int = 400, **facts: Any) -> Path:
    """A run folder without anything driven yet."""
    folder.mkdir(parents=True)
    kind = "gym" if task.startswith("gym:") else "course"
    settings = config.load("cpu", kind, [f"learner.steps={steps}"])
    known = {"task": task, "name": name, "seed": 3, "prior": [], "from": ""} | facts
    (folder / "config.toml").write_text(config.dump(settings, **known))
    return folder


def record(seq: int, act: bool = True, events: dict[str, float] | None = None, **changes: Any) -> Record:
    """A car that goes round a circle of 6 m, LAP frames a round."""
    angle = math.tau * (seq - 1) / LAP
    pose = [6 * math.cos(angle), 6 * math.sin(angle), -math.sin(angle), math.cos(angle)]
    values = {"pose": np.array(pose, np.float32), "velocity": np.array([3.0, 4.0], np.float32)}
    fields: dict[str, Any] = {
        "seq": seq, "time": seq / HZ, "reading": Reading(values, dict.fromkeys(values, seq / HZ)),
        "action": np.zeros(2, np.float32) if act else None, "reward": 1.0, "terminated": False,
        "truncated": False, "source": "policy", "version": seq, "events": events or {},
    }  # fmt: skip
    return Record(**(fields | changes))


def write_stream(
    folder: Path, records: list[Record], stream: str = "0123456789abcdef", created: str = "1"
) -> None:
    channels = (("pose", 4, "m", 50.0), ("velocity", 2, "m/s", 50.0))
    meta = Meta(stream, "car", TASK, HZ, channels, (("speed", 0.5, 4.5), ("steering", -0.4, 0.4)), created)
    writer = SegmentWriter(folder, meta)
    for one in records:
        writer.append(one.seq, encode(one))
    writer.close()


def driven(laps: int = 3) -> list[Record]:
    """`laps` rounds: the first with a collision and a reset in it, the others clean; lap k takes 8 - k s."""
    out = [record(i) for i in range(1, laps * LAP + 10)]
    for k in range(laps + 1):
        events = {"lap_started": 1.0}
        if k:
            events |= {"lap_time_s": 8.0 - k, "lap_clean": float(k > 1)}
        out[k * LAP] = record(k * LAP + 1, events=events)
    out[39] = record(40, events={"collision": 1.0}, terminated=True)
    out[40] = record(41, act=False)
    for i in range(41, 50):
        out[i] = record(i + 1, source="reset", reward=-100.0)
    out[50] = record(51, act=False, events={"reset": 1.0, "intervention": 1.0})
    return out


def write_metrics(run: Path, rows: list[dict[str, Any]], tail: str = "") -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def page_data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found
    return json.loads(found[1])


def frames(data: dict[str, Any]) -> np.ndarray:
    """(6, n) x, y, heading, speed, source, step."""
    return np.frombuffer(base64.b64decode(data["frames"]), "<f4").reshape(6, -1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "runs" / "a")
    write_stream(folder / "steps" / "0123456789abcdef", driven())
    rows = [{"step": 100 * i, "time_s": 10.0 * i, "learn/updates": 400 * i, "learn/critic_loss": 1 / i,
             "link/weights_version": 100 * i} for i in range(1, 4)]  # fmt: skip
    rows.append({"step": 78, "time_s": 8.0, "env/episode_return": 40.0, "env/lap_time_s": 7.0})
    write_metrics(folder, rows)
    return folder


def test_the_page_holds_what_was_driven(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    lines = report.write_report(run, out)
    data = page_data(out)
    x, y, heading, speed, source, step = frames(data)
    assert np.hypot(x, y) == pytest.approx(6.0, abs=1e-5) and speed == pytest.approx(5.0)
    assert heading[0] == pytest.approx(math.pi / 2)
    assert (source == 1).sum() == 9, "nine steps of reset"
    laps = [(step[end - 1], seconds, clean) for _, end, seconds, clean in data["laps"]]
    assert laps == [(79, 7.0, False), (159, 6.0, True), (239, 5.0, True)]
    for begin, end, *_ in data["laps"]:  # a lap begins and ends at the same place, a round apart
        assert (x[begin], y[begin]) == pytest.approx((x[end], y[end]), abs=1e-5) and end - begin == LAP
    assert data["marks"] == [[39, "collision", True]] and step[39] == 40
    assert data["begins"] == [0] and data["hz"] == HZ
    assert data["metrics"]["env/episode_return"] == [[78, 40.0]]
    assert data["map"]["checkpoints"][1] == [-6, 0, 0.7] and len(data["map"]["walls"]) == 2
    assert data["steps"] == 300 and data["total"] == 400 and data["error"] == ""
    assert data["facts"]["seed"] == 3 and data["facts"]["name"] == "ring" and data["algorithm"] == "rlpd"
    assert data["metrics"]["learn/updates"][-1] == [300, 1200] and data["metrics"]["time_s"][-1] == [300, 30]
    assert lines[0].startswith("disk: ") and lines[1].endswith("  a")


def test_the_page_needs_nothing_else(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    report.write_report(run, out)
    text = out.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//cdn|\bsrc=|@import|url\(|<link|fetch\(", text)
    assert "{{" not in text


def test_no_learning_and_no_physics_are_imported() -> None:
    code = "import sys, tether.launch.report; print([m for m in ('jax', 'mujoco') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    report.write_report(run, tmp_path / "page.html")
    data = page_data(tmp_path / "page.html")
    assert data["frames"] is None and data["laps"] == [] and data["map"]["walls"] and data["steps"] == 0


def test_a_torn_run_says_so_and_shows_the_rest(run: Path, tmp_path: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 990, "env/epis')
    segment = next((run / "steps").rglob("*.seg"))
    segment.write_bytes(segment.read_bytes()[:-5])
    lines = report.write_report(run, tmp_path / "page.html")
    data = page_data(tmp_path / "page.html")
    assert len(data["laps"]) == 3 and data["steps"] == 300
    assert len([line for line in lines if line.startswith("warning: 1 damaged")]) == 1


def test_metrics_that_are_not_numbers_are_left_out(run: Path, tmp_path: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 310, "learn/critic_loss": null, "learn/utd": NaN, "learn/entropy": "x"}\n')
    report.write_report(run, tmp_path / "page.html")
    metrics = page_data(tmp_path / "page.html")["metrics"]
    assert len(metrics["learn/critic_loss"]) == 3 and metrics["learn/utd"] == metrics["learn/entropy"] == []


def test_gymnasium_runs_have_curves_but_no_map(tmp_path: Path) -> None:
    run = make_run(tmp_path / "g", "gym:Pendulum-v1", "gym:Pendulum-v1")
    write_metrics(run, [{"step": 200 * i, "env/episode_return": -1000.0 / i} for i in range(1, 6)])
    report.write_report(run, tmp_path / "page.html")
    data = page_data(tmp_path / "page.html")
    assert data["map"]["walls"] == [] and data["frames"] is None and data["notes"] == []
    assert data["metrics"]["env/episode_return"][-1] == [1000, -200] and data["steps"] >= data["total"]


def test_a_walk_has_its_driven_line_and_its_falls_on_open_ground(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "w", load("dog-walk").text, "dog-walk")
    records = driven()
    records[39] = record(40, events={"fall": 1.0}, terminated=True)
    write_stream(run / "steps" / "0123456789abcdef", records)
    out = tmp_path / "page.html"
    assert not [line for line in report.write_report(run, out) if "warning" in line]
    data = page_data(out)
    assert data["map"] == {"walls": [], "checkpoints": []} and data["marks"] == [[39, "fall", True]]
    assert frames(data).shape[1] == len(records)


def test_two_actors_side_by_side_share_the_axis_of_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    for k, stream in enumerate(("aa" * 8, "bb" * 8)):
        records = [record(i, version=2 * i + k) for i in range(1, 101)]
        records[49] = record(50, version=100 + k, events={"lap_time_s": 5.0 + k})
        write_stream(run / "steps" / stream, records, stream, created=str(k))
    data = report.describe(run)
    step = frames(data)[5]
    assert [step[end - 1] for _, end, *_ in data["laps"]] == [99, 100]
    assert data["begins"] == [0, 100] and sorted(step) == list(range(1, 201))


def test_one_lost_stream_does_not_hide_the_others(run: Path) -> None:
    other = run / "steps" / ("ff" * 8)
    other.mkdir()
    (other / "00000001.seg").write_bytes(b"not a recording")
    data = report.describe(run)
    assert len(data["laps"]) == 3 and "1 damaged place(s)" in data["notes"][0]


def test_a_name_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", name="</script><b>", **{"from": "</script><script>alert(1)"})
    report.write_report(run, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "</script><b>" not in text and "<script>alert" not in text
    assert page_data(tmp_path / "page.html")["facts"]["name"] == "</script><b>"


def test_a_task_this_installation_does_not_know_costs_only_the_map(run: Path, tmp_path: Path) -> None:
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace('robot = "car"', 'robot = "submarine"'))
    data = report.describe(run)
    assert data["map"]["walls"] == [] and "submarine" in data["notes"][0] and len(data["laps"]) == 3


def test_a_failed_run_says_why(run: Path) -> None:
    (run / "error.txt").write_text("Traceback\n  somewhere\nOSError: disk full\n")
    assert report.describe(run)["error"].endswith("OSError: disk full\n")


def test_disk_is_told_largest_first(tmp_path: Path) -> None:
    for i in range(25):
        run = make_run(tmp_path / f"r{i:02d}")
        (run / "snapshots").mkdir()
        (run / "snapshots" / "blob").write_bytes(bytes(10_000 * (i + 1)))
    (tmp_path / "latest").symlink_to(tmp_path / "r24")
    (tmp_path / "no-run").mkdir()
    lines = report.disk_lines(tmp_path)
    assert "25 run(s)" in lines[0] and lines[1].endswith("r24") and len(lines) == 26
    assert "0.3 MB  (steps 0.0, snapshots 0.2)" in lines[1] and lines[-1].endswith("r00")


def test_what_cannot_be_read_or_written_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    taken = tmp_path / "taken"
    taken.mkdir()
    for out in (taken, tmp_path / "missing" / "page.html"):
        with pytest.raises(RunError, match="cannot be written: .*; choose another place with --out"):
            report.write_report(run, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "taken"], "nothing is left lying about"


def test_the_command_prints_where_the_page_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "report.html")
    assert (run / "report.html").is_file()
