"""Metrics that survive crashes and full disks, progress to read, and nothing that stops training."""

from __future__ import annotations

import io
import json
import sys
import types
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tether.launch.log import Log, read_metrics


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn(stream):
    """What a terminal shows after these characters."""
    lines, row = [""], 0
    text = stream.getvalue()
    while text:
        if text.startswith("\x1b[J"):
            lines[row], text = "", text[3:]
            del lines[row + 1 :]
        elif text.startswith("\x1b["):
            digits, text = text[2:].split("F", 1)
            row -= int(digits)
        elif text[0] == "\n":
            row, text = row + 1, text[1:]
            if row == len(lines):
                lines.append("")
        elif text[0] == "\r":
            text = text[1:]
        else:
            lines[row], text = lines[row] + text[0], text[1:]
    return lines


def test_metrics_are_one_object_a_line_and_not_finite_is_null(tmp_path):
    clock = Clock()
    with closing(Log(tmp_path, stream=io.StringIO(), clock=clock)) as out:
        out.write(1, {"learn/critic_loss": np.float32(0.5), "gate/clamped": 3})
        clock.now += 2.5
        out.write(np.int64(2), {"learn/critic_loss": float("nan"), "learn/actor_loss": np.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 1, "time_s": 0.0, "learn/critic_loss": 0.5, "gate/clamped": 3.0},
        {"step": 2, "time_s": 2.5, "learn/critic_loss": None, "learn/actor_loss": None},
    ]
    assert read_metrics(tmp_path) == [json.loads(line) for line in lines]


def test_a_resumed_run_goes_on_after_damaged_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 5, "time_s": 60.0}\n\xff\n[]\n{"step": "x"}\n{"step": 6, "time_s": 61\n')
    assert read_metrics(tmp_path) == [{"step": 5, "time_s": 60.0}]
    clock = Clock()
    with closing(Log(tmp_path, stream=io.StringIO(), clock=clock)) as out:
        clock.now += 1
        out.write(6, {})
    assert read_metrics(tmp_path) == [{"step": 5, "time_s": 60.0}, {"step": 6, "time_s": 61.0}]
    assert read_metrics(tmp_path / "absent") == []


def test_lines_are_out_before_the_run_ends(tmp_path):
    with closing(Log(tmp_path, stream=io.StringIO())) as out:
        out.write(1, {"env/resets": 1})
        assert len(read_metrics(tmp_path)) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path):
    stream = io.StringIO()
    out = Log(tmp_path, stream=stream)
    out.write(1, {})
    full = open("/dev/full", "a", buffering=1)
    working, out._file = out._file, full
    for step in range(2, 5):
        out.write(step, {})
    out._file = working
    out.write(9, {})
    out.close()
    with pytest.raises(OSError):
        full.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 9]
    said = stream.getvalue()
    assert said.count("warning: metrics.jsonl cannot be written") == 1 and "No space left" in said


def test_a_closed_terminal_is_no_error(tmp_path):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    with closing(Log(tmp_path, stream=Gone())) as out:
        out.note("hello")
        out.write(1, {})
    out.close()
    assert len(read_metrics(tmp_path)) == 1


def test_progress_says_what_a_person_wants_to_know(tmp_path):
    clock, stream = Clock(), io.StringIO()
    out = Log(tmp_path, total=12_000, stream=stream, clock=clock)
    out.show(0)
    clock.now += 20
    for lap in (31.2, 22.04):
        out.write(1, {"env/lap_time_s": lap})
    out.write(1000, {"learn/updates": 4000, "learn/utd": 4.0, "env/episode_return": 61.25, "env/resets": 7})
    out.show(1000, {"link/weights_age_s": 0.21})
    clock.now += 1
    out.show(1050)  # too early
    clock.now += 400
    out.show(1100)
    out.close()
    first, second, third = stream.getvalue().splitlines()
    assert first == "0:00:00 | step 0/12,000"
    assert second == (
        "0:00:20 | step 1,000/12,000 | 50 steps/s | 200 updates/s | UTD 4 | return 61.2 | resets 7 | "
        "weights 0.21 s old | lap 22.0 s (best 22.0, 2 laps) | ETA 0:03:40"
    )
    assert third.startswith("0:07:01 | step 1,100/12,000 | 2.61 steps/s") and third.endswith("ETA 1:09:31")


def test_progress_says_how_much_is_taken_over_once_there_is_any(tmp_path):
    clock, stream = Clock(), io.StringIO()
    with closing(Log(tmp_path, stream=stream, clock=clock)) as out:
        for shares in ([0.0] * 30, [0.5, 0.0], [0.0] * 20):
            for share in shares:
                out.write(1, {"env/takeovers": share})
            out.show(1)
            clock.now += 20
    first, second, third = stream.getvalue().splitlines()
    assert "taken over" not in first and "| taken over 25%" in second and "| taken over 0%" in third


def test_progress_is_drawn_over_on_a_terminal_and_notes_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    clock, stream = Clock(), Terminal()
    out = Log(tmp_path, total=100, stream=stream, clock=clock)
    for step in range(1, 4):
        out.show(step, {"learn/utd": 1, "env/resets": step, "env/interventions": 0})
        if step == 2:
            out.note("first lap: 31.2 s")
        clock.now += 1
    out.close()
    lines = drawn(stream)
    assert lines[0] == "first lap: 31.2 s"
    assert lines[1].startswith("0:00:02 | step 3/100")
    assert sum("step" in line for line in lines) == 1 and "resets 3" in " ".join(lines)
    assert all(len(line) < 40 for line in lines) and lines[-1] == ""


def test_tensorboard_gets_the_same_numbers_or_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match="tensorboardX"):
        Log(tmp_path, stream=io.StringIO(), tensorboard=True)
    seen = []
    writer = types.SimpleNamespace(add_scalar=lambda *a: seen.append(a), close=lambda: seen.append("closed"))
    fake = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    with closing(Log(tmp_path, stream=io.StringIO(), tensorboard=True)) as out:
        out.write(3, {"learn/utd": 2.0, "learn/critic_loss": float("nan")})
    assert seen == [("learn/utd", 2.0, 3), "closed"]
