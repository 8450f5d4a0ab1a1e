"""Learner and actors as real processes that are killed, restarted and stopped; and the same weights twice."""

from __future__ import annotations

import os
import pty
import re
import resource
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zmq
from tether.launch import catalog, cli, config
from tether.launch.config import RunError
from tether.robot_env.record import Record, read_streams

from tests.conftest import FAKE, SETTINGS, TETHER, flags, free_address

jax = pytest.importorskip("jax")

from tether.launch import run as launch_run  # noqa: E402
from tether.launch.learner import Job  # noqa: E402
from tether.launch.run import job_of  # noqa: E402
from tether.launch.trainer import Trainer  # noqa: E402

PATIENCE = 120.0  # s, for what is awaited; never for what is asserted
SETTINGS = [*SETTINGS, "learner.snapshot_every_s=1.0"]
TINY = flags(*SETTINGS)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where actors keep what they could not deliver
    Path("fake.toml").write_text(FAKE)


@contextmanager
def tether(*arguments: object, stdin: int | None = None):
    """A process of ours, its output in a file; killed at the end if it has not ended."""
    log = open(f"{arguments[0]}-{time.monotonic_ns()}.log", "w+")
    command = [*TETHER, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=stdin, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        log.seek(0)
        print(f"--- {' '.join(command[len(TETHER) :])}\n{log.read()}")
        log.close()


def await_(ready: Callable[[], object], *processes: subprocess.Popen) -> None:
    """Until `ready`, while all the processes live."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        for process in processes:
            assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline
        try:
            processes[0].wait(0.05)
        except subprocess.TimeoutExpired:
            pass


def stored() -> dict[str, list[Record]]:
    """What a learner has written so far; also while it writes."""
    if not Path("run/steps").is_dir():
        return {}
    return {m.stream: records for m, records in read_streams("run/steps", on_damage=lambda line: None)}


def count() -> int:
    return sum(map(len, stored().values()))


def each_once_and_in_order() -> dict[str, list[Record]]:
    """No record lost, none doubled."""
    streams = {meta.stream: records for meta, records in read_streams("run/steps", on_damage=pytest.fail)}
    for records in streams.values():
        assert [r.seq for r in records] == list(range(1, len(records) + 1))
        times = [r.time for r in records]
        assert times == sorted(times)
    return streams


def steps_of(streams: dict[str, list[Record]]) -> int:
    return sum(r.action is not None for records in streams.values() for r in records)


def restored() -> Trainer:
    settings, facts = config.read(Path("run").resolve())
    trainer = Trainer(make_task(), settings, int(facts["seed"]))
    cursor, warning = trainer.load(Path("run/snapshots"))
    assert not warning
    streams = each_once_and_in_order()
    # what came after the stop is trained on by whoever resumes
    left = [len(records) - cursor.get(stream, 0) for stream, records in streams.items()]
    assert all(0 <= n <= 2 * settings.learner.max_lead for n in left), left
    return trainer


# --- processes


def test_a_killed_learner_and_a_killed_actor_lose_and_double_nothing():
    address = free_address()
    learner = ("learner", "fake.toml", "--out", "run", "--bind", address, "--steps", 1_000_000, *TINY)
    with tether("actor", "--learner", address) as actor:  # waits for its learner
        with tether(*learner) as first:
            await_(lambda: count() > 60, first, actor)
            first.kill()
            first.wait()
        before = count()
        with tether(*learner, "--resume") as second:
            await_(lambda: count() > before + 60, second, actor)  # the same actor goes on
            assert len(stored()) == 1
            actor.kill()
            actor.wait()
            before = count()
            with tether("actor", "--learner", address) as other:
                await_(lambda: count() > before + 60, second, other)
                second.send_signal(signal.SIGINT)
                assert other.wait(PATIENCE) == 0  # told to stop
                assert second.wait(PATIENCE) == 0
    streams = each_once_and_in_order()
    assert len(streams) == 2 and min(map(len, streams.values())) > 60
    assert sorted(records[-1].action is None for records in streams.values()) == [False, True]  # one was killed
    trainer = restored()
    # every step made its update, before the restart and after, but for what came after the stop
    late = steps_of(streams) - trainer.start_steps + 1 - trainer.updates
    assert 0 <= late <= trainer.config.learner.max_lead + 1
    # and the weights are those of a training that nothing interrupted
    whole = Trainer(make_task(), trainer.config, 0)
    for stream, records in each_once_and_in_order().items():
        for record in records:
            whole.push(stream, record, train=whole.updates < trainer.updates)
    for x, y in zip(leaves(whole), leaves(trainer), strict=True):
        assert x.tobytes() == y.tobytes()


def test_an_actor_drives_without_a_learner_and_delivers_when_one_comes_back():
    address = free_address()
    learner = ("learner", "fake.toml", "--out", "run", "--bind", address, "--steps", 1_000_000, *TINY)
    alone = ("actor", "fake.toml", "--learner", address, "--spool", "spool")
    with tether(*learner) as first, tether("actor", "--learner", address, "--spool", "spool") as actor:
        await_(lambda: count() > 60 and list(Path("spool").glob("*.weights")), first, actor)
        actor.terminate()
        assert actor.wait(PATIENCE) == 0
        await_(lambda: not list(Path("spool").glob("*/*.seg")), first)
        first.kill()
        first.wait()
    before = stored()
    with tether(*alone) as actor:
        await_(lambda: waiting() > 30, actor)
        with tether(*learner, "--resume") as second:
            await_(lambda: len(stored()) == 2 and count() > sum(map(len, before.values())) + 60, second, actor)
            second.send_signal(signal.SIGINT)
            assert actor.wait(PATIENCE) == 0 and second.wait(PATIENCE) == 0
    (log,) = (path for path in Path().glob("actor-*.log") if "no learner at" in path.read_text())
    told = rf"no learner at {address} after 10 s: .*; until then the actor drives with weights (\d+), its last here, "
    version = int(re.search(told + "and records wait in spool", log.read_text())[1])
    streams = each_once_and_in_order()
    ((name, records),) = ((name, records) for name, records in streams.items() if name not in before)
    assert version > 0 and records[0].version == version  # no random steps, no fresh policy
    assert records[-1].version > max(r.version for rs in before.values() for r in rs)  # and newer ones in the end
    assert not list(Path("spool").glob("*/*.seg"))


def waiting() -> int:
    """Records in the spool."""
    return sum(len(records) for _, records in read_streams("spool", on_damage=lambda line: None))


def test_two_actors_feed_one_learner():
    address = free_address()
    learner = ("learner", "fake.toml", "--out", "run", "--bind", address, "--steps", 400, *TINY)
    with tether(*learner) as one, tether("actor", "--learner", address) as a:
        with tether("actor", "--learner", address, "--seed", 1) as b:
            await_(lambda: one.poll() is not None or len(stored()) == 2, a)
            assert one.wait(PATIENCE) == 0 and a.wait(PATIENCE) == 0 and b.wait(PATIENCE) == 0
    streams = each_once_and_in_order()
    assert len(streams) == 2 and all(records[-1].action is None for records in streams.values())
    assert steps_of(streams) >= 400
    assert {r.version > 0 for records in streams.values() for r in records} == {True}
    poses = [np.array([r.reading.values["pose"][:2] for r in records[:40]]) for records in streams.values()]
    n = min(map(len, poses))
    assert not np.array_equal(poses[0][:n], poses[1][:n])  # each explores by itself
    restored()


@contextmanager
def talking(*arguments: object):
    """A process of ours and the lines it says, which need no disk."""
    command = [*TETHER, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: [lines.append(line) for line in process.stdout])
    reader.start()
    try:
        yield process, lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        print("".join(lines))


def fill_disk(process: subprocess.Popen, full: bool = True) -> None:
    """From now on no file of the process grows, or all may again."""
    soft = 0 if full else resource.RLIM_INFINITY
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))


def test_full_disks_are_said_and_lose_nothing():
    address, rare = free_address(), flags("learner.snapshot_every_s=1000.0")
    arguments = ("learner", "fake.toml", "--out", "run", "--bind", address, "--steps", 1_000_000, *TINY, *rare)
    with talking(*arguments) as (learner, said), talking("actor", "--learner", address, "--spool", "spool") as (
        actor, told,
    ):  # fmt: skip
        await_(lambda: count() > 40, learner, actor)
        fill_disk(learner)
        await_(lambda: any("nothing is acknowledged" in line for line in said), learner, actor)
        full = count()
        fill_disk(learner, False)
        await_(lambda: count() > full + 40 and any("stored again" in line for line in said), learner, actor)
        fill_disk(actor)
        await_(lambda: any("actor: paused" in line for line in told), learner, actor)
        paused = count()
        await_(lambda: count() > paused + 100, learner, actor)  # it goes on when the learner has what waited
        fill_disk(actor, False)
        learner.send_signal(signal.SIGINT)
        assert learner.wait(PATIENCE) == actor.wait(PATIENCE) == 0
    (records,) = each_once_and_in_order().values()
    assert records[-1].action is None and not [path for path in Path("spool").iterdir() if path.is_dir()]


def test_a_run_is_ended_while_its_actor_starts():
    with tether("run", "fake.toml", "--out", "run", "--steps", 1_000_000, *TINY) as run:
        await_(lambda: children(run.pid), run)
        run.send_signal(signal.SIGINT)
        assert run.wait(PATIENCE) == 0
    assert not Path("run/error.txt").exists()


@pytest.mark.parametrize(("way", "status"), [("DFL", -signal.SIGTERM), ("IGN", -signal.SIGKILL)])
def test_an_actor_that_does_not_end_is_told_and_then_killed(way, status, monkeypatch):
    monkeypatch.setattr(launch_run, "ACTOR_GRACE_S", 0.2)
    code = f"import signal as s; s.signal(s.SIGTERM, s.SIG_{way}); print(flush=True); s.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline()  # it hears from now on
        assert launch_run._wait(child) == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_snapshot_and_it_can_go_on(number):
    with tether("run", "fake.toml", "--out", "run", "--steps", 1_000_000, *TINY) as run:
        await_(lambda: count() > 40, run)
        (child,) = children(run.pid)
        run.send_signal(number)
        assert run.wait(PATIENCE) == 0
        assert not Path(f"/proc/{child}").exists()
    streams = each_once_and_in_order()
    (records,) = streams.values()
    assert records[-1].action is None  # the robot was stopped and let go of
    restored()
    assert not Path("run/error.txt").exists()
    if number == signal.SIGINT:
        total = steps_of(streams) + 30
        with tether("run", "fake.toml", "--resume", "--out", "run", "--steps", total) as again:
            assert again.wait(PATIENCE) == 0
        streams = each_once_and_in_order()
        assert len(streams) == 2 and steps_of(streams) >= total
        restored()


def test_an_actor_that_waits_for_a_learner_ends_at_a_signal():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as nobody:
        port = nobody.bind_to_random_port("tcp://127.0.0.1")
        with tether("actor", "--learner", f"tcp://127.0.0.1:{port}") as actor:
            assert nobody.poll(1000 * PATIENCE)  # it asks what there is to do, and nobody answers
            actor.send_signal(signal.SIGINT)
            assert actor.wait(PATIENCE) == 130


def begun(**changes) -> None:
    """A folder of a run that was begun, before its first step."""
    Path("run").mkdir()
    facts = {"task": FAKE, "name": "fake", "seed": 3, "prior": ["lap"], "from": "older"} | changes
    settings = config.load("full", "course", ["agent.gamma=0.9"])
    Path("run/config.toml").write_text(config.dump(settings, **facts))


def resumed(*arguments: str) -> Job:
    return job_of(cli.build().parse_args(["run", *arguments, "--resume", "--out", "run"]))


def test_a_run_is_not_made_where_a_recording_is():
    Path("lap").mkdir()
    Path("lap/000001.seg").touch()
    with pytest.raises(RunError, match="lap holds a recording; choose another --out"):
        job_of(cli.build().parse_args(["run", "fake.toml", "--out", "lap"]))


@pytest.mark.parametrize("name, arguments", [
    ("--seed", ["fake.toml", "--seed", "4"]), ("--preset", ["fake.toml", "--preset", "cpu,full"]),
    ("--set", ["fake.toml", "--set", "agent.gamma=0.8"]), ("--prior", ["fake.toml", "--prior", "lap", "more"]),
    ("--from", ["fake.toml", "--from", "another"]), ("TASK", ["car-loop"]),
    ("--takeover", ["fake.toml", "--takeover", "gamepad"]),
])  # fmt: skip
def test_a_resumed_run_refuses_what_it_did_not_begin_with(name, arguments):
    begun()
    with pytest.raises(RunError, match=f"{name} is not what .*/run began with.*: leave out {name} or give the same"):
        resumed(*arguments)


def test_a_resumed_run_takes_what_it_began_with_and_other_steps():
    begun()
    Path("copy.toml").write_text(FAKE)
    plain = resumed("fake.toml")
    assert (plain.seed, plain.prior, plain.start, plain.spec.name) == (3, ("lap",), "older", "fake")
    same = ["--seed", "3", "--preset", "full", "--set", "agent.gamma=0.9", "--prior", "lap", "--from", "older"]
    assert resumed("copy.toml", *same) == plain
    assert resumed("fake.toml", "--steps", "7").config.learner.steps == 7


def test_an_actor_does_not_outlive_the_run_it_belongs_to():
    with tether("run", "fake.toml", "--out", "run", "--steps", 1_000_000, *TINY) as run:
        await_(lambda: count() > 20, run)
        (child,) = children(run.pid)
        run.kill()
        run.wait()
        orphan = os.pidfd_open(child)
        try:
            assert select_readable(orphan)
        finally:
            os.close(orphan)
    with tether("run", "fake.toml", "--resume", "--out", "run", "--steps", count() + 20) as again:
        assert again.wait(PATIENCE) == 0
    each_once_and_in_order()


def test_a_run_belongs_to_one_learner():
    with tether("run", "fake.toml", "--out", "run", "--steps", 1_000_000, *TINY) as run:
        await_(lambda: count() > 20, run)
        with tether("learner", "fake.toml", "--out", "run", "--resume", "--bind", free_address()) as other:
            assert other.wait(PATIENCE) == 2
        run.send_signal(signal.SIGINT)
        assert run.wait(PATIENCE) == 0
    (log,) = Path().glob("learner-*.log")
    assert "belongs to a learner that runs" in log.read_text()
    each_once_and_in_order()


def test_an_actor_that_fails_ends_the_run_with_its_reason(monkeypatch):
    with tether("run", "fake.toml", "--out", "run", "--steps", 1_000_000, *TINY) as run:
        await_(lambda: count() > 20, run)
        (child,) = children(run.pid)
        os.kill(child, signal.SIGKILL)
        assert run.wait(PATIENCE) == 2
    (log,) = Path().glob("run-*.log")
    assert re.search(r"tether: error: the actor ended with status -9; .*--resume", log.read_text())
    each_once_and_in_order()
    restored()


def test_a_person_at_the_terminal_of_a_run_takes_over_and_ends_it():
    keys, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    arguments = "run", "fake.toml", "--out", "run", "--steps", 1_000_000, "--takeover", "keyboard", *TINY
    try:
        with tether(*arguments, stdin=terminal) as run:
            await_(lambda: count() > 5, run)
            os.write(keys, b"w")
            await_(lambda: any(r.source == "takeover" for rows in stored().values() for r in rows), run)
            driven = count()
            await_(lambda: count() > driven + 20, run)
            os.write(keys, b"q")
            assert run.wait(PATIENCE) == 0
        assert termios.tcgetattr(terminal) == before
    finally:
        os.close(keys)
        os.close(terminal)
    (records,) = each_once_and_in_order().values()
    taken = [r.seq for r in records if r.source == "takeover" and r.action is not None]
    speeds = [r.reading.values["velocity"][0] for r in records if r.seq in taken]
    assert 0 < len(taken) < 20 and taken[-1] - taken[0] == len(taken) - 1  # one key, and then the policy's again
    assert max(np.diff([r.time for r in records if r.action is not None])) < 0.11 and min(speeds) < 1.2
    assert [r.source for r in records if r.action is not None][-1] == "policy"
    restored()


def children(pid: int) -> list[int]:
    """Its children that are actors; threads and processes may end while they are looked at."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    actors = []
    for child in found:
        with suppress(OSError):
            actors += [child] if b"actor" in Path(f"/proc/{child}/cmdline").read_bytes() else []
    return actors


def select_readable(fd: int) -> bool:
    import select

    return bool(select.select([fd], [], [], PATIENCE)[0])


# --- the same weights


def make_task():
    return catalog.make_task(catalog.load_spec("fake.toml"))


def drive(steps: int, seed: int) -> list[Record]:
    env = catalog.make_env(make_task(), seed=seed)
    records: list[Record] = []
    env.on_record.append(records.append)
    rng = np.random.default_rng(seed)
    env.reset()
    while len(records) < steps:
        _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 2))
        if terminated or truncated:
            env.reset()
    env.close()
    return records


def trainer(prior=(), seed: int = 0, *settings: str) -> Trainer:
    return Trainer(make_task(), config.load("cpu", "course", [*SETTINGS, "agent.utd=2", *settings]), seed, prior)


def leaves(one: Trainer) -> list[np.ndarray]:
    found = []
    for leaf in jax.tree.leaves(one.state):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found.append(np.asarray(jax.random.key_data(leaf) if is_key else leaf))
    return found


def assert_equal(a: Trainer, b: Trainer) -> None:
    assert (a.steps, a.updates, a.cursor) == (b.steps, b.updates, b.cursor) and a.updates > 50
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.tobytes() == y.tobytes()
    assert a._rng.bit_generator.state == b._rng.bit_generator.state
    for name, value in a.policy().items():
        assert value.tobytes() == b.policy()[name].tobytes()


def test_the_same_seed_and_records_give_the_same_weights_and_another_seed_others():
    records, prior = drive(60, 1), [drive(60, 2)]
    one, two, other = trainer(prior), trainer(prior), trainer(prior, 1)
    for each in (one, two, other):
        for record in records:
            each.push("a", record)
    assert_equal(one, two)
    assert any(x.tobytes() != y.tobytes() for x, y in zip(leaves(one), leaves(other), strict=True))


def test_warming_up_changes_nothing():
    records = drive(50, 1)
    one, two = trainer(), trainer()
    two.warm_up()
    for record in records:
        one.push("a", record)
        two.push("a", record)
    assert_equal(one, two)


@pytest.mark.parametrize("with_prior", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, with_prior):
    records = drive(90, 1)
    prior = [drive(60, 2)] if with_prior else []
    whole, first, second = trainer(prior), trainer(prior), trainer(prior)
    for record in records:
        whole.push("a", record)
    for record in records[:40]:
        first.push("a", record)
    first.save(tmp_path / "snapshots")
    cursor, warning = second.load(tmp_path / "snapshots")
    assert not warning and cursor == {"a": 40}
    for record in records:
        second.push("a", record, train=record.seq > cursor["a"])
    assert_equal(whole, second)


def test_half_of_every_minibatch_is_prior_data():
    mark = 77.0

    def marked(record: Record) -> Record:
        reading = record.reading
        values = reading.values | {"accel": np.array([mark, 0.0, 9.81], np.float32)}
        return record._replace(reading=replace(reading, values=values))

    one = trainer([[marked(r) for r in drive(60, 2)]])
    algorithm, shares = one._algorithm, []

    def update(agent, state, batches):
        shares.extend((np.asarray(batches["obs"])[..., 0] == np.float32(mark) * np.float32(0.1)).mean(-1))
        return algorithm.update(agent, state, batches)

    one._algorithm = SimpleNamespace(**vars(algorithm) | {"update": update})
    records = drive(40, 1)
    for record in records:
        one.push("a", record)
    steps = sum(r.action is not None for r in records)
    assert len(shares) == one.updates and one.updates >= 2 * (steps - 2)  # with prior data from the start
    assert set(shares) == {0.5}


def test_updates_of_a_step_sample_the_records_up_to_it():
    one = trainer([], 0, "learner.start_steps=5")
    seen, algorithm = [], one._algorithm

    def update(agent, state, batches):
        seen.append(one.steps)
        return algorithm.update(agent, state, batches)

    one._algorithm = SimpleNamespace(**vars(algorithm) | {"update": update})
    for record in drive(30, 1):
        one.push("a", record)
    assert seen == list(range(5, one.steps + 1))
