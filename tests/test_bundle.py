"""Export refuses what is unequal, too slow or would overwrite; a bundle for another robot is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from tether.drivers import arm, arm_joints
from tether.drivers.car import CHANNELS, COMMAND
from tether.launch import bundle, catalog, onboard
from tether.launch.onboard import BundleError, Policy, load_bundle
from tether.robot_env.safety import Limits

SPEC = {"observation_size": 18, "action_size": 2, "hidden": [32, 32], "max_delta": 0.2}
TASK = catalog.load_spec("car-loop")
ORIGIN = {"run": "first", "steps": 1200, "git": "abc"}


@pytest.fixture
def trained():
    rng = np.random.default_rng(0)
    weights = {n: (rng.standard_normal(s) * 0.3).astype(np.float32) for n, s in onboard._shapes(SPEC).items()}
    observations = rng.standard_normal((60, 18)).astype(np.float32)
    previous = rng.uniform(-1, 1, (60, 2)).astype(np.float32)
    policy = Policy(SPEC, weights)
    expected = np.stack([policy.act(o, p) for o, p in zip(observations, previous, strict=True)])
    return bundle.Trained(SPEC, weights, observations, previous, expected)


def export(out, trained, hz=10.0):
    return bundle.export(out, {"task": trained}, at(hz), ORIGIN)


def at(hz):
    return dataclasses.replace(TASK, hz=hz)


def test_a_bundle_acts_as_what_was_frozen(tmp_path, trained):
    checked = export(tmp_path / "b", trained)
    assert checked["task"]["observations"] == 60 and checked["task"]["max_error"] == 0
    assert 0 < checked["task"]["latency_ms"]["p50"] <= checked["task"]["latency_ms"]["p99"]
    found = load_bundle(tmp_path / "b")
    pairs = zip(trained.observations, trained.prev_actions, strict=True)
    actions = [found.policies["task"].act(o, p) for o, p in pairs]
    np.testing.assert_array_equal(actions, trained.expected)
    assert found.spec["hz"] == 10 and found.spec["task"] == TASK.text
    assert found.spec["from"] == ORIGIN
    assert {c["name"]: c["size"] for c in found.spec["observation"]}["pose"] == 4
    assert found.spec["action"]["names"] == ["speed", "steering"]
    assert found.spec["gate"]["high"] == [4.5, 0.38]
    assert found.spec["gate"]["max_age_s"]["pose"] == pytest.approx(0.15)
    assert set(load_file(tmp_path / "b" / "weights.safetensors")) == {f"task/{n}" for n in trained.weights}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]  # nothing left beside it


def test_unequal_is_refused_with_the_figure(tmp_path, trained):
    top = np.abs(trained.expected).max()
    fine = trained.expected + np.float32(0.5e-5 * top)
    checked = export(tmp_path / "fine", dataclasses.replace(trained, expected=fine))
    assert checked["task"]["max_error"] > 1e-6
    for off in (2e-5 * top, np.nan):
        wrong = trained.expected.copy()
        wrong[59, 1] += off
        with pytest.raises(BundleError, match=r"policy task: .* differ by (2\.\de-05|nan) .* 60 .*1e-05"):
            export(tmp_path / "b", dataclasses.replace(trained, expected=wrong))
    assert not (tmp_path / "b").exists()


def test_too_slow_is_refused_with_the_figures(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(onboard, "latency_ms", lambda *_: {"p50": 1.0, "p99": 5.0, "max": 9.0})
    with pytest.raises(BundleError, match=r"p99 latency 5 ms, at 100 Hz it must stay below 5 ms"):
        export(tmp_path / "b", trained, hz=100)
    assert not (tmp_path / "b").exists()
    export(tmp_path / "b", trained, hz=99)


def test_only_a_bundle_is_overwritten(tmp_path, trained):
    out = tmp_path / "b"
    export(out, trained)
    before = (out / "policy.json").read_bytes()
    export(out, trained, hz=20)
    assert load_bundle(out).spec["hz"] == 20 and (out / "policy.json").read_bytes() != before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"is there and not \(only\) a bundle; give another --out"):
        export(out, trained)
    assert (out / "notes.txt").read_text() == "mine" and load_bundle(out).spec["hz"] == 20
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "policy.json").write_text('{"name": "not ours"}')
    (tmp_path / "file").write_text("x")
    for path in (theirs, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BundleError):
            export(path, trained)
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", trained)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "empty", "file", "theirs"]


def test_a_damaged_bundle_is_refused_in_one_line(tmp_path, trained):
    out = tmp_path / "b"
    export(out, trained)
    good = {name: (out / name).read_bytes() for name in ("policy.json", "weights.safetensors")}
    spec = json.loads(good["policy.json"])

    def broken(says, **files):
        for name, payload in good.items():
            (out / name).write_bytes(files.get(name.split(".")[0], payload))
        with pytest.raises(BundleError, match=says) as caught:
            load_bundle(out)
        assert "\n" not in str(caught.value) and str(out) in str(caught.value)

    flipped = bytearray(good["weights.safetensors"])
    flipped[-1] ^= 1
    broken("weights.safetensors has another checksum", weights=bytes(flipped))
    broken("weights.safetensors has another checksum", weights=good["weights.safetensors"][:-4])
    broken("policy.json has another checksum: damaged or edited", policy=good["policy.json"].replace(b"0.38", b"0.48"))
    broken("policy.json is damaged", policy=good["policy.json"][:-10])
    broken("policy.json is damaged", policy=b"[" * 100_000)
    broken("is 'tether-bundle' 2; this reads 'tether-bundle' 1", policy=json.dumps(spec | {"version": 2}).encode())
    broken("policy.json is damaged", policy=b"[]")

    def signed(change):
        changed = spec | change
        changed["checksums"] = spec["checksums"] | {"policy.json": onboard.digest(changed)}
        return json.dumps(changed).encode()

    broken("no control rate", policy=signed({"hz": 0}))
    broken("policy.json is damaged", policy=signed({"hz": "10"}))
    broken("belong to no policy", policy=signed({"policies": {}}))
    broken("policy.json is damaged", policy=signed({"policies": {"task": 3}}))
    narrow = SPEC | {"hidden": [32, 16]}
    broken("weights dense1/kernel .* the layers need", policy=signed({"policies": {"task": narrow}}))
    (out / "weights.safetensors").unlink()
    with pytest.raises(BundleError, match=r"No such file .*weights\.safetensors.*export it again"):
        load_bundle(out)


def test_a_bundle_for_another_robot_is_refused_with_the_difference(tmp_path, trained, monkeypatch):
    export(tmp_path / "b", trained)
    found = load_bundle(tmp_path / "b")
    bundle.check_robot(found, at(10))
    gyro = dataclasses.replace(CHANNELS[1], scale=(3.0, 3.0, 4.0))
    other = dataclasses.replace(COMMAND, names=("speed", "yaw"))
    for says, channels, command, hz in (
        (r"observation.1.scale.2 is 3.0 in the bundle, 4.0 on the robot",
         (CHANNELS[0], gyro, *CHANNELS[2:]), COMMAND, 10),
        (r'observation.0.name is "accel" in the bundle, "gyro" on', CHANNELS[1::-1] + CHANNELS[2:], COMMAND, 10),
        (r'observation.1.name is "gyro" in the bundle, null on .* more', CHANNELS[:1], COMMAND, 10),
        (r'action.names.1 is "steering" in the bundle, "yaw" on the robot', CHANNELS, other, 10),
        (r"hz is 10.0 in the bundle, 50.0 on the robot", CHANNELS, COMMAND, 50),
    ):  # fmt: skip
        monkeypatch.setattr(catalog, "declaration", lambda task, here=(channels, command): here)
        with pytest.raises(BundleError, match=says) as caught:
            bundle.check_robot(found, at(hz))
        assert "\n" not in str(caught.value)
    found.spec["observation"] = {"channels": "nonsense"}
    with pytest.raises(BundleError, match="made for another robot"):
        bundle.check_robot(found, at(10))


def test_a_robot_that_is_led_by_its_tool_is_declared_in_json(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(catalog, "declaration", lambda task: (arm.CHANNELS, arm_joints.COMMAND))
    monkeypatch.setattr(catalog, "limits", lambda task: Limits.of(arm.CHANNELS, arm_joints.COMMAND, {}))
    export(tmp_path / "b", trained)
    bundle.check_robot(load_bundle(tmp_path / "b"), at(10))
    monkeypatch.setattr(catalog, "declaration", lambda task: (arm.CHANNELS, arm.COMMAND))
    with pytest.raises(BundleError, match='action.names.0 is "shoulder_pan" in the bundle, "x" on the robot'):
        bundle.check_robot(load_bundle(tmp_path / "b"), at(10))


def test_limits_without_bound_survive_json(tmp_path, trained, monkeypatch):
    free = dataclasses.replace(COMMAND, rate=(np.inf, 4.0))
    monkeypatch.setattr(catalog, "declaration", lambda task: (CHANNELS, free))
    export(tmp_path / "b", trained)
    found = load_bundle(tmp_path / "b")
    assert found.spec["action"]["rate"] == [None, 4.0] and found.spec["gate"]["rate"] == [None, 4.0]
    bundle.check_robot(found, at(10))


def test_the_copy_in_the_bundle_runs_alone(tmp_path, trained):
    export(tmp_path / "b", trained)
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
         "sys.argv = ['run.py']; runpy.run_path('run.py', run_name='__main__')",
         next(p for p in sys.path if p.endswith("site-packages"))],
        cwd=tmp_path / "b", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "10 Hz" in done.stdout and "policy task: 18 -> 2" in done.stdout


def test_bundle_needs_no_jax():
    code = "import sys; sys.modules['jax'] = None; from tether.launch import bundle"
    subprocess.run([sys.executable, "-c", code], check=True)
