"""The learner between its link and its folder: what it gives an actor after a restart, and how it fails."""

from __future__ import annotations

import io
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tether.launch import catalog, config
from tether.launch.transport import ActorLink
from tether.robot_env.record import Record, encode, read_streams

from tests.conftest import FAKE, SETTINGS

jax = pytest.importorskip("jax")

from tether.agents.snapshot import SnapshotError  # noqa: E402
from tether.launch import trainer as trainer_module  # noqa: E402
from tether.launch.learner import OVERFIT, Job, Learner  # noqa: E402
from tether.launch.log import Log  # noqa: E402
from tether.launch.trainer import Diverged, Trainer  # noqa: E402

WAIT_S = 60.0
STEPS = 40  # after which a learner is done


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fake.toml").write_text(FAKE)
    Path("run").mkdir()


def settings(*more: str) -> config.Config:
    small = [text for text in SETTINGS if "agent.algorithm=bc" not in more or "ensemble" not in text]  # bc has none
    return config.load("cpu", "course", [*small, f"learner.steps={STEPS}", *more])


@contextmanager
def learner(*more: str, resume: bool = False, folder: str = "run", start: str = "", prior: tuple[str, ...] = ()):
    """A learner in this process, and what it said."""
    said = io.StringIO()
    spec, to = catalog.load_spec("fake.toml"), Path(folder).resolve()
    job = Job(spec, settings(*more), to, prior=prior, resume=resume, start=start)
    with closing(Log(Path(folder), STEPS, stream=said)) as log:
        made = Learner(job, log)
        made.link.wait_closed = lambda timeout: True  # the actors here never leave
        try:
            made.ready()
            yield made, said
        finally:
            made.link.close()
            made.journal.close()


@contextmanager
def actor(address: str, records: list[Record] = ()):
    """The link of an actor that has made these records; with what it was told to do."""
    link = ActorLink(address)
    try:
        orders = link.start(WAIT_S)
        link.begin(catalog.stream_meta(catalog.load_spec("fake.toml")))
        for record in records:
            link.send(record.seq, encode(record))
        yield link, orders
    finally:
        link.close(0.1)


def drive(steps: int, seed: int = 1) -> list[Record]:
    env = catalog.make_env(catalog.make_task(catalog.load_spec("fake.toml")), seed=seed)
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


def trained(records: list[Record], *more: str) -> Trainer:
    """A training of these records that nothing interrupted."""
    trainer = Trainer(catalog.make_task(catalog.load_spec("fake.toml")), settings(*more), 0)
    for record in records:
        trainer.push("a", record, train=trainer.steps < STEPS)
    return trainer


def assert_same(params: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> None:
    assert params.keys() == others.keys()
    for name, value in params.items():
        assert value.tobytes() == others[name].tobytes()


def stored() -> list[Record]:
    """What is in steps/, in order."""
    return [record for _, records in read_streams("run/steps", on_damage=pytest.fail) for record in records]


def poison(trainer: Trainer, at: int) -> None:
    """From the update of step `at` on, one number of the state is NaN."""
    algorithm = trainer._algorithm

    def update(agent, state, batches):
        state, metrics = algorithm.update(agent, state, batches)
        if trainer.steps >= at:
            first, *rest = jax.tree.leaves(state.actor)
            state = state._replace(actor=jax.tree.unflatten(jax.tree.structure(state.actor), [first * np.nan, *rest]))
        return state, metrics

    update.lower = algorithm.update.lower  # it is compiled before
    trainer._algorithm = SimpleNamespace(**vars(algorithm) | {"update": update})


def first_run() -> None:
    with learner() as (one, _), actor(one.link.address, drive(60)):
        one.run(lambda: "")


def test_the_first_weights_after_a_resume_are_the_snapshots():
    first_run()
    saved, fresh = trained([]), trained([])
    saved.load(Path("run/snapshots"))
    with learner(resume=True) as (one, _), actor(one.link.address) as (link, orders):
        version, params = link.weights(WAIT_S)
    assert_same(params, saved.policy())
    assert version >= STEPS  # as a version of the same run, newer than before
    assert any(params[name].tobytes() != value.tobytes() for name, value in fresh.policy().items())


def test_a_resumed_run_goes_on_with_what_is_left_of_the_random_steps():
    with learner("actor.random_steps=50") as (one, _), actor(one.link.address, drive(60)) as (_, orders):
        assert orders["random_steps"] == 50
        one.run(lambda: "")
        steps = one.trainer.steps
    with learner("actor.random_steps=50", resume=True) as (one, _), actor(one.link.address) as (_, orders):
        assert orders["random_steps"] == max(0, 50 - steps) < 50


def test_who_starts_from_a_run_makes_no_random_steps():
    first_run()
    run_facts = config.dump(settings(), task=FAKE, name="fake", seed=0)
    Path("run/config.toml").write_text(run_facts, encoding="utf-8")
    Path("second").mkdir()
    more = "actor.random_steps=50"
    with learner(more, folder="second", start="run") as (one, _), actor(one.link.address) as (_, orders):
        assert orders["random_steps"] == 0


def test_who_starts_from_a_run_takes_all_that_it_learned_and_waits_for_experience_of_its_own():
    first_run()
    Path("run/config.toml").write_text(config.dump(settings(), task=FAKE, name="fake", seed=0), encoding="utf-8")
    Path("second").mkdir()
    old = trained([])
    old.load(Path("run/snapshots"))
    with learner(folder="second", start="run", prior=("run",)) as (one, _):
        assert len(one.trainer.prior) and one.trainer.start_steps == 10  # with prior data alone it is 1
        assert one.trainer.updates == one.trainer.steps == 0
        for name in old.state._fields:
            of = [jax.tree.leaves(getattr(trainer.state, name)) for trainer in (one.trainer, old)]
            for mine, theirs in zip(*of, strict=True):
                assert jax.numpy.array_equal(mine, theirs), name
    assert int(old.state.updates) > 20 and old.state.critic_opt[0].count > 20


def cloned_run() -> Trainer:
    cloned = trained(drive(60), "agent.algorithm=bc")
    cloned.save(Path("run/snapshots"))
    facts = config.dump(settings("agent.algorithm=bc"), task=FAKE, name="fake", seed=0)
    Path("run/config.toml").write_text(facts, encoding="utf-8")
    Path("second").mkdir()
    return cloned


def test_an_actor_with_batch_norm_cannot_start_from_cloning(monkeypatch):
    cloned_run()
    monkeypatch.setattr(Trainer, "warm_up", lambda self: pytest.fail("compiles what is not going to run"))
    with pytest.raises(SnapshotError, match='actor/.*this run needs.*: agent.algorithm="bc", .*its preset: cpu'):
        with learner("agent.algorithm=crossq", folder="second", start="run"):
            pass


def test_who_starts_from_cloning_takes_its_actor_alone():
    cloned, fresh = cloned_run(), trained([])
    with learner(folder="second", start="run") as (one, _), actor(one.link.address) as (link, _):
        _, params = link.weights(WAIT_S)
        assert_same(params, cloned.policy())
        critics = jax.tree.map(np.asarray, (one.trainer.state.critic, fresh.state.critic))
        jax.tree.map(np.testing.assert_array_equal, *critics)


def test_a_course_begins_with_what_walking_taught():
    specs = {name: catalog.load_spec(name) for name in ("dog-walk", "dog-course")}
    walk, course = (Trainer(catalog.make_task(spec), settings(), seed) for seed, spec in enumerate(specs.values()))
    walk.replay.return_max = 333.0
    walk.save(Path("run/snapshots"))
    observed = catalog.check_start(specs["dog-course"], specs["dog-walk"])
    assert course.start_from(Path("run/snapshots"), "rlpd", observed) == ""
    assert course.replay.return_max == 333.0  # in which some critics count
    rng, before = np.random.default_rng(0), np.zeros((5, 12), np.float32)
    seen = rng.normal(size=(5, walk.task.observation_size)).astype(np.float32)
    channels, action = np.split(seen, [-12], 1)
    way = rng.normal(size=(5, course.task.observation_size - walk.task.observation_size)).astype(np.float32)
    wide = np.concatenate([channels, way, action], 1)
    np.testing.assert_allclose(course.expected(wide, before), walk.expected(seen, before), atol=1e-5)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_resumed_learner_has_the_weights_of_one_that_was_never_interrupted(damaged):
    """It trains again on what came after the snapshot it found, be it the newest or an older one."""
    records = drive(60)
    with learner() as (one, _), actor(one.link.address, records):
        while one.trainer.steps < 30:
            one._turn()
            if one.trainer.steps >= 15 and not list(Path("run/snapshots").glob("0*")):
                one.trainer.save(Path("run/snapshots"))
        one.trainer.save(Path("run/snapshots"))
        one._turn()  # and here it is killed
    if damaged:
        file = Path("run/snapshots/000002/task.safetensors")
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    kept = stored()
    with learner(resume=True) as (two, said), actor(two.link.address) as (link, _):
        _, params = link.weights(WAIT_S)
        assert damaged == ("damaged snapshots: 000002" in said.getvalue())
    whole = trained(kept)
    assert (two.trainer.steps, two.trainer.updates) == (whole.steps, whole.updates)
    assert two.trainer.replay.return_max == whole.replay.return_max > 0.0
    assert_same(params, whole.policy())


def test_a_resumed_learner_trains_on_no_more_steps_than_it_was_told_to():
    """Records that came after the last step it trains on lie in steps/, too."""
    records = drive(STEPS + 20)
    with learner() as (one, _), actor(one.link.address, records[:20]) as (link, _):
        while one.trainer.steps < 15:
            one._turn()
        one.trainer.save(Path("run/snapshots"))
        for record in records[20:]:
            link.send(record.seq, encode(record))
        while max(one.trainer.cursor.values()) < records[-1].seq:
            one._turn()
    with learner(resume=True) as (two, _):
        whole = trained(stored())
        assert whole.steps > STEPS
        assert (two.trainer.steps, two.trainer.updates) == (whole.steps, whole.updates)


def test_who_resumes_trains_on_what_came_while_the_run_was_stopped():
    records = drive(STEPS - 1)
    with learner() as (one, _), actor(one.link.address, records):
        assert one.link._pump.wait(lambda: one.link.waiting == len(records), WAIT_S)
        done = one.run(lambda: "Ctrl-C")
        assert (done["steps"], one.trainer.updates) == (STEPS - 1, 0)
    with learner(resume=True) as (two, _), actor(two.link.address) as (link, _):
        _, params = link.weights(WAIT_S)
    whole = trained(records)
    assert two.trainer.updates == whole.updates > 20
    assert_same(params, whole.policy())


@pytest.mark.parametrize("publish_every", [1, 1000])
def test_a_training_that_diverges_ends_in_one_line_and_nothing_of_it_is_sent_or_saved(publish_every):
    first_run()
    more = [f"learner.publish_every={publish_every}", "learner.steps=80"]
    with learner(*more, resume=True) as (one, _), actor(one.link.address, drive(60, seed=2)) as (link, _):
        before = one.trainer.steps
        poison(one.trainer, at=before + 10)
        with pytest.raises(Diverged, match=r"step (\d+): the training diverged, .* is not finite.*--resume") as failure:
            one.run(lambda: "")
        step = int(failure.value.args[0].split()[1].rstrip(":"))
        assert step == before + 10 if publish_every == 1 else step >= before + 10
        received = [link.weights()]
    assert all(np.isfinite(value).all() for got in received if got for value in got[1].values())
    assert sorted(path.name for path in Path("run/snapshots").glob("0*")) == ["000001"]
    assert len(stored()) > 60
    with learner(*more, resume=True) as (two, _):  # what went wrong here does not come again
        assert two.trainer.steps >= step
        two.trainer.policy()


def test_a_training_that_diverges_on_the_way_back_ends_as_well(monkeypatch):
    first_run()
    records = drive(60, seed=2)
    with learner("learner.steps=80", resume=True) as (one, _), actor(one.link.address, records):
        while one.trainer.steps < 70:
            one._turn()
    load = Trainer.load

    def poisoned(self, folder):
        poison(self, at=60)
        return load(self, folder)

    monkeypatch.setattr(Trainer, "load", poisoned)
    with pytest.raises(Diverged, match="the training diverged"):
        with learner("learner.steps=80", resume=True):
            pass


def test_a_snapshot_that_the_disk_does_not_take_is_tried_again():
    with learner() as (one, said):
        save, tries = one.trainer.save, []

        def full(folder):
            tries.append(folder)
            if len(tries) < 3:
                raise SnapshotError("run/snapshots: snapshot not written: No space left on device")
            return save(folder)

        one.trainer.save = full
        for _ in range(4):
            one._saved = -np.inf
            one._turn()
    assert len(tries) == 4
    assert said.getvalue().count("No space left on device") == 2
    assert list(Path("run/snapshots").glob("0*"))


def test_weights_that_an_actor_refuses_are_told_once():
    with learner() as (one, said), actor(one.link.address) as (link, _):
        assert link.weights(WAIT_S)
        stream = next(iter(one.link.status().values()))
        link._inbox.refused = "weights 9: \x1b[2Jnot finite"
        assert one.link._pump.wait(lambda: stream.report.get("refused"), WAIT_S)
        for _ in range(3):
            one._turn()
    assert said.getvalue().count("refuses newer ones: 'weights 9: \\x1b[2Jnot finite'") == 1


def drawable(replay) -> set[bytes]:
    """The observations that can be drawn."""
    rows = replay.sample(np.random.default_rng(0), 4000)["obs"]
    return {row.tobytes() for row in rows}


def test_blocks_of_steps_are_held_out_and_measured_on(monkeypatch):
    monkeypatch.setattr(trainer_module, "BLOCK", 5)
    records = drive(300)
    every, none = trained(records, "learner.held_out=4"), trained(records, "learner.held_out=0")
    apart, rest, whole = drawable(every._aside), drawable(every.replay), drawable(none.replay)
    assert not apart & rest and apart | rest == whole
    assert len(apart) == pytest.approx(len(whole) / 4, rel=0.2)
    paid = trained(records, "learner.held_out=4", "learner.takeover_reward=-1")  # its samples are complete a step later
    assert (drawable(paid._aside), drawable(paid.replay)) == (apart, rest)
    every.metrics()
    found = every.metrics()  # told the next time, so that nothing waits
    assert found["learn/held_out_loss"] > 0 and "learn/held_out_loss" not in none.metrics() | none.metrics()


def test_what_was_held_out_is_measured_as_what_was_trained_on_is(monkeypatch):
    """XQC counts in units of the largest return of all data, of which a block has less."""
    monkeypatch.setattr(trainer_module, "BLOCK", 5)
    one, measured = trained(drive(60), "agent.algorithm=xqc", "learner.held_out=4"), []
    real = one._algorithm

    def measure(agent, state, batch):
        measured.append(batch)
        return real.held_out(agent, state, batch)

    monkeypatch.setattr(one, "_algorithm", SimpleNamespace(held_out=measure))
    one.metrics()
    found = one.metrics()
    assert one._aside.return_max < one.replay.return_max
    assert {float(x) for batch in measured for x in batch["return_max"]} == {np.float32(one.replay.return_max)}
    assert 0 < found["learn/seen_loss"] and 0 < found["learn/held_out_loss"]


def test_where_all_that_was_trained_on_was_a_reset_nothing_is_compared(monkeypatch):
    monkeypatch.setattr(trainer_module, "BLOCK", 5)
    block = range(6, 11)  # the one that is held out
    records = [r if r.seq in block else r._replace(source="reset") for r in drive(11)]
    one = trained(records, "learner.held_out=2")
    assert len(one._aside) >= 5 and not len(one.replay)
    assert one.metrics()["learn/updates"] == 0


def test_critics_that_learn_by_heart_are_told_of_once():
    with learner() as (one, said):
        for _ in range(9):  # cloning has no critics
            one._look_at({"learn/actor_loss": 1.0, "learn/seen_loss": 1.0, "learn/held_out_loss": 99.0})
        assert "learn by heart" not in said.getvalue()
        for apart, times in ((1.1, 4), (0.9, 1), (1.1, 5), (2.0, 9)):
            for _ in range(times):
                one._look_at({"learn/critic_loss": 9.0, "learn/seen_loss": 1.0, "learn/held_out_loss": OVERFIT * apart})
    assert said.getvalue().count("learn by heart") == 1


def test_a_learner_that_cannot_keep_up_makes_fewer_updates_and_loses_no_record(monkeypatch):
    monkeypatch.setattr("tether.launch.learner.MAX_BEHIND", 10)
    monkeypatch.setattr("tether.launch.learner.TAKEN", 8)
    records = drive(150)
    steps = sum(record.action is not None for record in records)
    with learner("learner.steps=1000", "learner.max_lead=1") as (one, _), actor(one.link.address, records):
        assert one.link._pump.wait(lambda: one.link.waiting == len(records), WAIT_S)
        one._turn()
        assert one.trainer.steps == 8 and one.link.waiting == len(records) - 8
        while one.trainer.steps < steps:
            one._turn()
        measured = one.trainer.metrics()
    assert [record.seq for record in stored()] == [record.seq for record in records]
    assert one.trainer.replay._added == len(records)
    # none before what waits is no more than the bound and the step that was allowed; then one a step
    assert 0 < one.trainer.updates <= 10 + 1 + 8
    assert measured["learn/utd"] == one.trainer.updates / (steps - 10 + 1) < 1.0


def test_weights_are_sent_when_there_was_an_update_and_not_more_often_than_asked():
    with learner("learner.steps=1000", "learner.publish_every=7") as (one, _), actor(one.link.address, drive(60)):
        sent = []
        publish = one.link.publish
        one.link.publish = lambda version, params: sent.append(one.trainer.steps) or publish(version, params)
        while one.trainer.steps < 50:
            one._turn()
    assert sent[0] == 10 and set(np.diff(sent)) == {7}  # from the first update on


def test_metrics_are_those_of_an_update_that_has_ended():
    one = trained(drive(30))

    class Unfinished:
        def __float__(self):
            raise AssertionError("waited for")

    ended = one._metrics
    one._ended, one._metrics = ended, {name: Unfinished() for name in ended}
    assert one.metrics()["learn/critic_loss"] == float(ended["critic_loss"])


def test_the_actors_metrics_are_there_whenever_they_are_asked_for():
    """Its updates come once in so many steps; those between have none."""
    records, found = drive(40), []
    one = trained(records[:12], "agent.utd=2", "agent.actor_every=10")
    for record in records[12:]:
        one.push("a", record)
        found.append(one.metrics())
    assert all(np.isfinite([row["learn/actor_loss"], row["learn/entropy"]]).all() for row in found[5:])
    assert len({row["learn/actor_loss"] for row in found[5:]}) > 3


def test_the_time_of_an_update_is_that_of_this_process():
    first_run()
    one = trained([])
    one.load(Path("run/snapshots"))
    assert one.updates > 20
    one.updates, one.update_s = one.updates + 5, 1.0
    assert one.metrics()["learn/update_ms"] == 200.0
