"""Task files: what is wrong with one is said with file, key and remedy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tether.launch import catalog
from tether.robot_env.task import TaskError, load, parse, shipped

GOOD = """
[task]
robot = "car"
kind = "course"
hz = 10
episode_s = 60
hindsight = 0.5

[course]
loop = true
width_m = 2.0
centerline = [[0.0, 0.0], [10.0, 0.0], [10.0, 10.0], [0.0, 10.0]]

[[checkpoint]]
at = [5.0, 0.0]
radius_m = 0.8

[[checkpoint]]
at = [10.0, 5.0]

[gate]
max_speed_mps = 3.0
"""


def test_a_good_file_is_what_it_says():
    spec = parse(GOOD, "square")
    assert (spec.name, spec.robot, spec.kind, spec.hz, spec.episode_s, spec.hindsight) == (
        "square", "car", "course", 10.0, 60.0, 0.5,
    )  # fmt: skip
    assert spec.course.loop and spec.course.width_m == 2.0 and len(spec.course.centerline) == 4
    assert [(c.at, c.radius_m) for c in spec.checkpoints] == [((5.0, 0.0), 0.8), ((10.0, 5.0), 1.0)]
    assert spec.gate == {"max_speed_mps": 3.0} and spec.text == GOOD
    assert catalog.limits(spec).high[0] == 3.0


WRONG = {  # what is replaced, with what, and what the error names
    "not TOML": ('robot = "car"', "robot = car", "not valid TOML"),
    "an unknown table": ("[gate]", "[gates]", "unknown key gates; valid are task, course, checkpoint, gate"),
    "an unknown key": ("hz = 10", "hz = 10\nspeed = 3", "unknown key task.speed; valid are robot, kind, hz"),
    "a key of the course": ("loop = true", "lop = true", "unknown key course.lop"),
    "a key of a checkpoint": ("radius_m = 0.8", "r = 0.8", r"unknown key checkpoint\[0\].r"),
    "no rate": ("hz = 10\n", "", "task.hz is missing; it must be a number"),
    "text for a number": ("hz = 10", 'hz = "10"', "task.hz must be a number from 0.1 to 1000, not '10'"),
    "a truth for a number": ("hz = 10", "hz = true", "task.hz must be a number"),
    "infinity": ("episode_s = 60", "episode_s = inf", "task.episode_s must be a number"),
    "too fast": ("hz = 10", "hz = 1e9", "task.hz must be a number from 0.1 to 1000, not 1000000000.0"),
    "a share over one": ("hindsight = 0.5", "hindsight = 2", "task.hindsight must be a number from 0 to 1, not 2"),
    "a number for a truth": ("loop = true", "loop = 1", "course.loop must be true or false"),
    "an unknown kind": ('kind = "course"', 'kind = "fly"', "task.kind must be one of course, walk, manipulate"),
    "a list for a kind": ('kind = "course"', 'kind = ["course"]', "task.kind must be one of course, walk, manipulate"),
    "a module path": ('robot = "car"', 'robot = "os:system"', "in the catalog, not a module path"),
    "a dotted path": ('robot = "car"', 'robot = "my.robot"', "in the catalog, not a module path"),
    "a number for a name": ('robot = "car"', "robot = 3", "task.robot must be the name of a robot .* not 3"),
    "few points": (", [10.0, 10.0], [0.0, 10.0]]", "]", "course.centerline must be 4 or more points"),
    "a point in 3D": ("[10.0, 10.0]", "[10.0, 10.0, 1.0]", r"course.centerline must be 4 or more points \[x, y\] in m"),
    "no width": ("width_m = 2.0\n", "", "course.width_m is missing"),
    "a checkpoint in the wall": ("at = [5.0, 0.0]", "at = [5.0, 1.2]", r"checkpoint\[0\].at .* outside"),
    "a checkpoint nowhere": ("at = [5.0, 0.0]\n", "", r"checkpoint\[0\].at is missing"),
    "a flat checkpoint": ("at = [5.0, 0.0]", "at = 5.0", r"checkpoint\[0\].at must be a point"),
    "a radius of nothing": ("radius_m = 0.8", "radius_m = 0", r"checkpoint\[0\].radius_m must be a number from"),
    "one checkpoint": ("[[checkpoint]]\nat = [10.0, 5.0]\n", "", "at least 2"),
    "a checkpoint table": ("[[checkpoint]]\nat = [10.0, 5.0]", "", "at least 2"),
    "a wide limit": ("max_speed_mps = 3.0", 'max_speed_mps = "3"', "gate.max_speed_mps must be a number"),
}  # fmt: skip


@pytest.mark.parametrize("old, new, says", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(old, new, says, tmp_path):
    assert GOOD.count(old) >= 1
    file = tmp_path / "track.toml"
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(TaskError, match=says) as error:
        load(str(file))
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


@pytest.mark.parametrize("old, new, says", [
    ("max_speed_mps = 3.0", "max_speed_mps = 9.0", r"\[gate\] max_speed_mps = 9.0: .*own 4.5"),
    ("max_speed_mps = 3.0", "max_force_n = 9.0", r"\[gate\] max_force_n: unknown limit; .*max_speed_mps"),
])  # fmt: skip
def test_a_gate_may_only_tighten(old, new, says):
    with pytest.raises(TaskError, match=says):
        catalog.make_task(parse(GOOD.replace(old, new), "square"))


def test_an_unknown_robot_names_those_there_are():
    with pytest.raises(TaskError, match="square: unknown robot 'cra'; this installation has car, quadruped, arm"):
        catalog.make_task(parse(GOOD.replace('"car"', '"cra"'), "square"))


def test_a_table_where_a_list_belongs():
    with pytest.raises(TaskError, match=r"\[\[checkpoint\]\] tables"):
        parse("[checkpoint]\nat = 1\n" + GOOD.split("[[checkpoint]]")[0], "square")


@pytest.mark.parametrize("name", ["nope", "nope.toml", "/etc/passwd", ".."])
def test_a_task_that_is_not_there_names_the_choices(name):
    with pytest.raises(TaskError, match="car-loop.*path of a .toml file, or gym:<id>"):
        load(name)


def test_a_binary_file_is_refused(tmp_path):
    file = tmp_path / "x.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="cannot be read"):
        load(str(file))


@given(st.text(max_size=200))
def test_any_text_is_a_task_or_a_task_error(text):
    for whole in (text, GOOD + text, text + GOOD):
        try:
            parse(whole, "any")
        except TaskError:
            pass


@pytest.mark.parametrize("name", shipped())
def test_shipped_tasks_can_be_made(name):
    made = catalog.make_task(load(name))
    assert bool(made.walls()) == bool(made.spec.course.centerline) and made.observation_size > 0
