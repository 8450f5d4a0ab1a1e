"""Snapshots survive crashes and damage, and what comes back is what was saved, to the bit."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from tether.agents import rlpd, snapshot, xqc  # noqa: E402
from tether.agents.snapshot import SnapshotError  # noqa: E402

from tests.chaos import snapshots  # noqa: E402
from tests.chaos.crashfs import FATES, CrashFS  # noqa: E402

CFG = rlpd.Config(ensemble=3, hidden=(8, 8), batch=4, utd=2)
OBS, ACT = 3, 2


def fresh(cfg=CFG, seed=0):
    return rlpd.init(cfg, jax.random.key(seed), OBS, ACT)


def numbers(state):
    plain = state._replace(key=jax.random.key_data(state.key))
    return [np.array(leaf) for leaf in jax.tree.leaves(plain)]


def fill(folder, n):
    """n snapshots whose counter says which they are."""
    state = fresh()
    return [snapshot.save(folder, {"task": state}, {"steps": i}) for i in range(1, n + 1)]


def flip(path: Path, at: int = -1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def loaded(folder):
    found = snapshot.load(folder, {"task": fresh()})
    assert found is not None
    return found


def test_what_was_saved_comes_back_to_the_bit_and_draws_the_same(tmp_path):
    rng, state = np.random.default_rng(7), fresh()
    rng.random(3)
    counters = {"steps": 30, "cursor": {"ab": 12}, "rng": rng.bit_generator.state}
    snapshot.save(tmp_path, {"task": state}, counters)
    found = snapshot.load(tmp_path, {"task": fresh(seed=99)})
    assert found.counters == counters and found.warning == ""
    restored = found.states["task"]
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(numbers(state), numbers(restored), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)
    again = np.random.default_rng()
    again.bit_generator.state = found.counters["rng"]
    np.testing.assert_array_equal(again.random(5), rng.random(5))


def test_several_policies_are_kept_by_name(tmp_path):
    task, reset = fresh(seed=1), fresh(seed=2)
    snapshot.save(tmp_path, {"task": task, "reset": reset}, {})
    found = snapshot.load(tmp_path, {"reset": fresh(), "task": fresh()})
    for name, want in {"task": task, "reset": reset}.items():
        for a, b in zip(numbers(found.states[name]), numbers(want), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(SnapshotError, match=r"holds \['reset.s.*, this run needs \['task.safetensors'\]"):
        snapshot.load(tmp_path, {"task": fresh()})


def test_the_newest_three_stay_and_latest_names_the_newest(tmp_path):
    fill(tmp_path, 5)
    assert sorted(os.listdir(tmp_path)) == ["000003", "000004", "000005", "latest"]
    assert (tmp_path / "latest").read_text() == "000005"
    assert loaded(tmp_path).counters == {"steps": 5}


def test_nothing_written_yet_is_no_error(tmp_path):
    assert snapshot.load(tmp_path / "absent", {"task": fresh()}) is None
    (tmp_path / ".writing-000001").mkdir()
    assert snapshot.load(tmp_path, {"task": fresh()}) is None


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda p: flip(p / "task.safetensors"), "task.safetensors has another checksum"),
        (lambda p: (p / "task.safetensors").write_bytes(b""), "task.safetensors has another checksum"),
        (lambda p: (p / "task.safetensors").unlink(), "No such file or directory: .*task.safetensors.*"),
        (lambda p: (p / "sha256.json").unlink(), "No such file or directory: .*sha256.json.*"),
        (lambda p: (p / "sha256.json").write_text("[]"), "'counters.json'"),
        (lambda p: (p / "sha256.json").write_text("3"), "'int' object .*"),
        (lambda p: os.truncate(p / "sha256.json", 100), "Unterminated string.*|Expecting .*"),
        (lambda p: (p / "counters.json").write_text('{"steps": 9}'), "counters.json has another checksum"),
    ],
)
def test_a_damaged_snapshot_gives_way_to_the_one_before_and_says_so(tmp_path, damage, why):
    *_, before, newest = fill(tmp_path, 3)
    damage(newest)
    found = loaded(tmp_path)
    assert found.path == before and found.counters == {"steps": 2}
    assert re.fullmatch(rf"damaged snapshots: 000003 \((.* )?({why})\); using 000002", found.warning)
    snapshot.save(tmp_path, {"task": fresh()}, {"steps": 4})
    assert loaded(tmp_path).counters == {"steps": 4}


def test_every_single_bit_of_the_weights_counts(tmp_path):
    (path,) = fill(tmp_path, 1)
    size = (path / "task.safetensors").stat().st_size
    for at in np.random.default_rng(0).integers(0, size, 20):
        flip(path / "task.safetensors", at)
        with pytest.raises(SnapshotError, match="every snapshot is damaged: 000001"):
            loaded(tmp_path)
        flip(path / "task.safetensors", at)
    assert loaded(tmp_path).warning == ""


@pytest.mark.parametrize("pointer", [None, b"", b"000009", b"\xff\xfe"])
def test_a_lost_pointer_costs_nothing(tmp_path, pointer):
    fill(tmp_path, 2)
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_bytes(pointer)
    assert loaded(tmp_path).counters == {"steps": 2}


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "rmtree"])
def test_a_crash_while_saving_leaves_what_was_there(tmp_path, monkeypatch, call):
    fill(tmp_path, 3)
    with monkeypatch.context() as patch:

        def crash(*_args, **_kwargs):
            raise OSError(28, "No space left on device")

        owner = {"fsync": os, "replace": os, "rename": Path, "rmtree": snapshot.shutil}[call]
        patch.setattr(owner, call, crash)
        with pytest.raises(SnapshotError, match="snapshot not written: .*No space left.* intact"):
            snapshot.save(tmp_path, {"task": fresh()}, {"steps": 4})
    assert not list(tmp_path.glob(".writing*")) or call == "rmtree"  # the records need the room
    assert loaded(tmp_path).counters["steps"] in (3, 4)
    assert loaded(tmp_path).warning == ""
    snapshot.save(tmp_path, {"task": fresh()}, {"steps": 5})
    assert loaded(tmp_path).counters == {"steps": 5}
    assert not list(tmp_path.glob(".writing*"))


def test_what_the_disk_holds_is_verified_before_it_counts(tmp_path, monkeypatch):
    fill(tmp_path, 1)
    honest = snapshot._write
    lossy = lambda path, payload: honest(path, payload[:-1] if path.suffix == ".safetensors" else payload)  # noqa: E731
    monkeypatch.setattr(snapshot, "_write", lossy)
    with pytest.raises(SnapshotError, match="task.safetensors has another checksum"):
        snapshot.save(tmp_path, {"task": fresh()}, {"steps": 2})
    assert loaded(tmp_path).counters == {"steps": 1}


def test_an_agent_of_other_settings_is_never_restored_in_part(tmp_path):
    fill(tmp_path, 2)
    state = fresh()
    wider = state._replace(critic={"params": state.critic["params"] | {"value_bias": jax.numpy.zeros((4, 1))}})
    with pytest.raises(SnapshotError, match=r"task/critic/params/value_bias is float32\[3, 1\], .* float32\[4, 1\]"):
        snapshot.load(tmp_path, {"task": wider})
    whole = state._replace(log_temperature=jax.numpy.zeros((), int))
    with pytest.raises(SnapshotError, match="is float32.*needs int32.*give the settings"):
        snapshot.load(tmp_path, {"task": whole})
    fewer = state._replace(actor={"params": {k: v for k, v in state.actor["params"].items() if k != "log_std"}})
    with pytest.raises(
        SnapshotError, match=r"actor/params/log_std/bias is float32\[2\], this run needs absent"
    ):
        snapshot.load(tmp_path, {"task": fewer})


def test_what_json_cannot_hold_is_refused_before_anything_changes(tmp_path):
    fill(tmp_path, 1)
    with pytest.raises(SnapshotError, match="not JSON serializable"):
        snapshot.save(tmp_path, {"task": fresh()}, {"steps": np.zeros(2)})
    assert loaded(tmp_path).counters == {"steps": 1}


# --- power and processes that end, files that change: seconds' worth of `make snapshots`


@pytest.mark.parametrize("fate", FATES)
def test_a_save_cut_short_at_any_point_leaves_the_one_before_or_the_new_one(tmp_path, fate):
    ends, wrong = snapshots.crash_points(tmp_path, [fate])
    assert wrong == [] and ends > 50


def test_a_process_that_ends_at_any_point_leaves_the_one_before_or_the_new_one(tmp_path):
    ends, wrong = snapshots.crash_points(tmp_path, ["killed"], process=True)
    assert wrong == [] and ends > 50


def test_kills_at_random_leave_what_was_saved_last(tmp_path):
    assert snapshots.kills(tmp_path, 5, seed=1) == []


def test_no_damaged_snapshot_is_taken_for_good(tmp_path):
    assert snapshots.mutations(tmp_path / "run", 150, seed=1) == []


def test_the_crash_points_find_a_save_that_forgets_to_sync(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "_sync", lambda folder: None)
    assert snapshots.crash_points(tmp_path / "names", ["lost"])[1]
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_write", Path.write_bytes)
        assert snapshots.crash_points(tmp_path / "contents", ["torn"])[1]


def test_every_change_of_a_save_has_its_number(tmp_path):
    snapshots.prepared(tmp_path, 1)
    with CrashFS(tmp_path) as fs:
        snapshots.save(tmp_path, 2, keep=1)
    assert {line.split()[0] for line in fs.done} == {"unlink", "rmdir", "mkdir", "open", "write", "fsync", "rename"}
    for file in ("task.safetensors", "counters.json", "sha256.json"):
        assert [f"{call} .writing-000002/{file}" in fs.done for call in ("open", "write", "fsync")] == [True] * 3


@pytest.mark.parametrize("sums", ["[" * 100_000, '{"../000001/task.safetensors": ""}', '{"counters.json": ""}\n'])
def test_a_manifest_that_save_does_not_write_is_damage(tmp_path, sums):
    before, newest = fill(tmp_path, 2)
    (newest / "sha256.json").write_text(sums)
    assert loaded(tmp_path).path == before


@pytest.mark.parametrize("kind, settings", [(xqc, {}), (rlpd, {"bound_start": 0.5})])
def test_an_agent_that_observes_more_begins_with_all_that_one_learned_that_observed_less(kind, settings):
    cfg = kind.Config(hidden=(8, 8), batch=4, utd=2, **settings)
    rng = np.random.default_rng(0)
    shapes = {"obs": (OBS,), "action": (ACT,), "prev_action": (ACT,), "next_obs": (OBS,), "next_prev_action": (ACT,)}
    shapes |= {"reward": (), "discount": (), "return_max": ()}
    batch = {name: rng.uniform(0.1, 0.9, (4, *shape)).astype(np.float32) for name, shape in shapes.items()}
    more = {n: np.insert(v, [1, 1], rng.normal(size=(4, 2)), -1) if "obs" in n else v for n, v in batch.items()}
    state, fresh = (kind.init(cfg, jax.random.key(seed), OBS + 2 * seed, ACT) for seed in (0, 1))
    wide = snapshot.widened(state, fresh, 1)
    for leaf, like in zip(jax.tree.leaves(wide), jax.tree.leaves(fresh), strict=True):
        assert leaf.shape == like.shape and leaf.dtype == like.dtype
    rows = (state, batch), (wide, more)
    acts = [kind.act(cfg, s.actor, b["obs"], b["prev_action"]) for s, b in rows]
    np.testing.assert_allclose(*acts, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(*(kind.held_out(cfg, s, b) for s, b in rows), rtol=1e-5)
    moments = jax.tree.map(lambda x: x + 1.0, (state.actor_opt[0].mu, fresh.actor_opt[0].mu))
    kernel = np.asarray(snapshot.widened(*moments, 1)["dense0"]["kernel"])
    assert (kernel[1:3] == 0).all() and (kernel[[0, 3, 4]] == 1).all()
