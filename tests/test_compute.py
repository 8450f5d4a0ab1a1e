"""The cache of what was compiled, and several devices that learn as one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.conftest import FAKE, SETTINGS, flags

jax = pytest.importorskip("jax")

from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from tether.launch import compute, config  # noqa: E402
from tether.launch.cli import main  # noqa: E402

KEPT = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
KEPT += ("jax_persistent_cache_min_entry_size_bytes",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where things are kept, in a process that has compiled nothing yet and was told no folder."""
    before = {name: getattr(jax.config, name) for name in KEPT}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update(KEPT[0], None)
    compilation_cache.reset_cache()
    yield tmp_path / "cache" / "tether" / "jax"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def found(what: list[str] = []) -> int:  # noqa: B006 - one listener for the whole process: JAX takes none back
    """How often something compiled was found in the cache, so far."""
    if not what:
        what.append("listening")
        jax.monitoring.register_event_listener(lambda event, **_: what.append(event))
    return what.count("/jax/compilation_cache/cache_hits")


def compiled() -> None:
    """Compile something, as a new process would, and check that it is right."""
    assert jax.jit(lambda x: x * 3.0 + 1.0)(np.float32(2.0)) == 7.0


def test_what_was_compiled_is_found_again(folder):
    compute.keep_compiled()
    before = found()
    compiled()
    assert list(folder.glob("*-cache")) and found() == before
    compiled()
    assert found() == before + 1


@pytest.mark.parametrize("damage", [
    lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes(len(b)), lambda b: b[:-40] + bytes(40),
    lambda b: b"\xff" + b[1:],
])  # fmt: skip
def test_a_damaged_cache_costs_a_compilation(folder, damage):
    compute.keep_compiled()
    compiled()
    for path in folder.glob("*-cache"):
        path.write_bytes(damage(path.read_bytes()))
    before = found()
    compiled()
    assert found() == before


def test_a_cache_that_cannot_be_made_or_written_is_done_without(folder):
    folder.parent.parent.write_text("in the way")
    compute.keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
    compiled()
    folder.parent.parent.unlink()
    compute.keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    compilation_cache.reset_cache()
    compiled()
    shutil.rmtree(folder)  # now nothing can be written into it
    assert jax.jit(lambda x: x * 5.0)(np.float32(2.0)) == 10.0
    assert not folder.exists()


def test_a_folder_that_somebody_chose_is_left_alone(folder, tmp_path):
    jax.config.update(KEPT[0], str(tmp_path / "mine"))
    compute.keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine") and not folder.exists()


def test_the_cache_is_bounded_and_what_was_used_last_stays(folder, monkeypatch):
    monkeypatch.setattr(compute, "CACHE_BYTES", 250)
    (folder / "deeper").mkdir(parents=True)
    for i, name in enumerate(("old", "deeper/older", "new", "newest")):
        (folder / name).write_bytes(bytes(100))
        os.utime(folder / name, (1_000.0 + i * (-1 if i == 1 else 1), 0.0))
    compute.keep_compiled()
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["new", "newest"]


DEVICES = """
    import sys
    import jax
    import numpy as np
    from tether.launch import catalog, config, trainer as module
    from tether.launch.trainer import Trainer

    module.BLOCK = 1  # few steps are held out here
    task, records = catalog.make_task(catalog.load_spec("fake.toml")), []
    env = catalog.make_env(task, seed=1)
    env.on_record.append(records.append)
    env.reset()
    for _ in range(20):
        env.step(np.ones(2))
    settings = config.load("cpu", "course", sys.argv[1:])
    trainers = [Trainer(task, settings, 7, devices=devices) for devices in (1, 4)]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None)
    for trainer in trainers:
        trainer.warm_up()
        trainer.warm_up_measure()
        assert trainer.state
        before = len(compiled)
        assert before
        for record in records:
            trainer.push("a", record)
        trainer.metrics()
        assert trainer.metrics()["learn/held_out_loss"] > 0
        assert len(compiled) == before  # warming up was all there was to do
        trainer.save(f"snapshots{len(trainer.state.log_temperature.devices())}")
    one, four = (jax.tree_util.tree_leaves_with_path(trainer.state) for trainer in trainers)
    assert trainers[1].updates > 20 and all(len(leaf.devices()) == 4 for _, leaf in four)
    worst = 0.0
    for (path, a), (_, b) in zip(one, four, strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert np.array_equal(jax.random.key_data(a), jax.random.key_data(b))
        else:
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            worst = max(worst, np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-30))
    print("worst", worst)
    assert worst <= 1e-5
    trainers[0].load("snapshots4")
    trainers[1].load("snapshots1")
    trainers[1].push("b", records[0])
    assert all(len(leaf.devices()) == 4 for leaf in jax.tree.leaves(trainers[1].state))
"""


def test_four_devices_learn_what_one_learns(tmp_path, monkeypatch):
    """Through the trainer, on four virtual devices; and a snapshot of either goes on as the other."""
    monkeypatch.chdir(tmp_path)
    Path("fake.toml").write_text(FAKE)
    flags = f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}"
    command = [sys.executable, "-c", textwrap.dedent(DEVICES), *SETTINGS, "agent.utd=3", "learner.held_out=2"]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


EACH = """
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from tether.agents import bc, crossq, droq, xqc
    from tether.launch import compute
    from tests.reference import ACT, OBS, batches_of

    for algorithm in (bc, crossq, droq, xqc):
        few = {} if algorithm is bc else {"ensemble": 2, "actor_every": None}
        cfg, ends = algorithm.Config(hidden=(16, 12), batch=8, utd=1, **few), []
        for devices in (1, 4):
            mesh = compute.mesh(devices, cfg)
            whole = NamedSharding(mesh, PartitionSpec())
            state = jax.device_put(algorithm.init(cfg, jax.random.key(0), OBS, ACT), whole)
            batches = jax.device_put(batches_of(cfg, 1), NamedSharding(mesh, PartitionSpec(None, "batch")))
            state, metrics = algorithm.update(cfg, state, batches)
            gradients = [opt[0].mu for name, opt in state._asdict().items() if name.endswith("_opt")]
            ends.append(jax.tree_util.tree_leaves_with_path((metrics, gradients)))
        for (path, a), (_, b) in zip(*ends, strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            where = algorithm.__name__, jax.tree_util.keystr(path), np.linalg.norm(a - b), np.linalg.norm(a)
            assert 0 < np.linalg.norm(a) and np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a), where
"""


@pytest.mark.slow
def test_losses_and_gradients_of_every_algorithm_are_those_of_one_device():
    flags = f"--xla_force_host_platform_device_count=4 {os.environ['XLA_FLAGS']}"
    command, root = [sys.executable, "-c", textwrap.dedent(EACH)], Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_devices_that_are_not_there_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("fake.toml").write_text(FAKE)
    assert main(["learner", "fake.toml", "--devices", "3", "--bind", "tcp://127.0.0.1:*", *flags(*SETTINGS)]) == 2
    assert "error: --devices 3: this machine has 1 (cpu)\n" in capsys.readouterr().err


def test_a_batch_that_cannot_be_split_evenly_says_so(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: list("abc"))
    with pytest.raises(config.RunError, match="agent.batch = 32 .* use a multiple"):
        compute.mesh(3, SimpleNamespace(batch=32))


def test_native_updates_are_for_one_processor():
    with pytest.raises(config.RunError, match="agent.native computes on one CPU"):
        compute.mesh(2, SimpleNamespace(batch=32, native=True))
