"""Takeovers: by hand and by script, on a tool that does what it is told and on the car's twin; what is stored of them,
and what is learned from it."""

from __future__ import annotations

import bisect
import io
import json
import threading
from contextlib import closing, nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tether.agents.replay import Replay, minibatches
from tether.drivers import arm, arm_joints
from tether.drivers.base import DriverError, Sticks
from tether.launch import catalog, cli, config, teach
from tether.launch.actor import Leave, Pilot, serve
from tether.launch.evaluate import Episodes, Tally, practise, pursuit
from tether.launch.log import Log
from tether.robot_env.env import RobotEnv
from tether.robot_env.record import Record, read_recording, read_streams
from tether.robot_env.sample import Fold
from tether.robot_env.takeover import (
    ACROSS_S,
    CLOSER_M,
    KEEPS_S,
    LET_GO_S,
    MIDDLE,
    SCRIPT_MPS,
    STUCK_S,
    ByHand,
    ByScript,
    Takeover,
    by_sticks,
    check,
)  # fmt: skip
from tether.robot_env.task import TaskError, load, parse

from tests.conftest import SETTINGS
from tests.test_manipulate import CUBE_M, make, reading

ORDERS = {"policy": {}, "random_steps": 0}
TICK = 0.1  # s, of all tasks here
JAWS_RADPS = arm.COMMAND.rate[3]


class Person:
    """Somebody with sticks who pushes them now and then, by the robot's clock."""

    def __init__(self, env: RobotEnv, seed: int, count: int) -> None:
        rng = np.random.default_rng(seed)
        self._env, at, self.pushes = env, 0.0, []
        for _ in range(count):  # begin and end lie between two ticks
            at += TICK * (rng.integers(6, 10) + 0.5)
            ends = at + TICK * rng.integers(1, 4)
            way = rng.uniform(-1.0, 1.0, 4) * rng.choice([0.5, 1.0])
            way[rng.integers(4)] = rng.choice([-1.0, 1.0])  # at least one is off its middle
            self.pushes.append((at, ends, Sticks(*way)))
            at = ends + TICK / 2

    def before(self, now: float) -> tuple[float, float, Sticks]:
        """When the newest push began and ended, and what it was."""
        return self.pushes[max(bisect.bisect(self.pushes, (now,)) - 1, 0)]

    def read(self) -> Sticks:
        now = self._env.robot.now()
        begins, ends, sticks = self.before(now)
        return sticks if begins < now < ends else Sticks()


class Still:
    """A policy that stays."""

    def act(self, obs: np.ndarray, prev_action: np.ndarray, rng: Any) -> np.ndarray:
        return prev_action


class Wander:
    """A policy that does anything."""

    def act(self, obs: np.ndarray, prev_action: np.ndarray, rng: Any) -> np.ndarray:
        return rng.uniform(-1.0, 1.0, len(prev_action)).astype(np.float32)


def drive(env: RobotEnv, policy: Any, taker: Takeover, enough: Any, seed: int = 0) -> None:
    """An actor's loop until `enough()`."""
    link = SimpleNamespace(
        prepare=None, full=False, silent_s=0.0, send=lambda seq, payload: None, report=lambda stats: None,
        weights=lambda timeout: None,
    )  # fmt: skip
    pilot = Pilot(env, link, lambda: "enough" if enough() else "", ORDERS, seed, lockstep=False, taker=taker)
    pilot.swap(1, policy)
    with suppress(Leave):
        practise(env, pilot.wish, seed)


def beginnings(records: list[Record]) -> list[tuple[Record, Record]]:
    """The last step before each takeover that began within an episode, and its first one."""
    return [
        (before, first) for before, first in zip(records, records[1:], strict=False)
        if first.action is not None and before.action is not None and (before.source, first.source)
        == ("policy", "takeover")
    ]  # fmt: skip


def written(env: RobotEnv) -> dict[float, np.ndarray]:
    """What the robot is told from now on, by its time."""
    told: dict[float, np.ndarray] = {}
    write = env.robot.write

    def spy(command: np.ndarray) -> None:
        told[env.robot.now()] = np.array(command)
        write(command)

    env.robot.write = spy
    return told


def changes(env: RobotEnv, records: list[Record], source: str = "") -> tuple[np.ndarray, np.ndarray]:
    """(n, c) how the command changed from one step to the next (of that source), and (n, 1) s in between."""
    pairs = [(a, b) for a, b in zip(records, records[1:], strict=False)
             if a.action is not None and b.action is not None and source in ("", b.source)]  # fmt: skip
    actions = np.array([(a.action, b.action) for a, b in pairs]).reshape(-1, 2, env.command.size)
    before, after = (env.command.to_command(actions[:, i]) for i in (0, 1))
    return after - before, np.array([[b.time - a.time] for a, b in pairs])


def assert_executed_is_stored_within_the_gate(env: RobotEnv, records: list[Record], told: dict[float, np.ndarray]):
    """Of every step in the records, resets too: it is what the robot was told, in the limits, and no jump."""
    limits, steps = env.gate.limits, [r for r in records if r.action is not None]
    actions = np.array([step.action for step in steps])
    assert (actions == env.command.to_action(np.array([told[step.time] for step in steps]))).all()
    commands = env.command.to_command(actions)
    assert (commands >= limits.low - 1e-6).all() and (commands <= limits.high + 1e-6).all()
    change, seconds = changes(env, records)
    assert (np.abs(change) <= limits.rate * seconds + 1e-6).all()


def assert_sources(records: list[Record], person: Person) -> None:
    """A step of an episode is the person's from a push until LET_GO_S after it, in that episode."""
    began = 0.0
    for before, record in zip([None, *records], records, strict=False):
        if before is None or before.action is None:
            began = record.time
        if record.action is None or record.source == "reset":
            continue
        now = record.time
        begins, ends, _ = person.before(now)
        hers = begins < now < ends or (ends < now < ends + LET_GO_S and began < ends)
        assert record.source == ("takeover" if hers else "policy"), now


def assert_bootstrap(env: RobotEnv, records: list[Record]) -> None:
    """Only a termination ends what a step is worth."""
    fold, replay = Fold(env.task), Replay(len(records), env.task.observation_size, env.command.size)
    found = [sample for record in records for sample in fold.push(record)]
    for sample in found:
        replay.add("a", sample)
    cut = [s for s in found if s.truncated and s.takeover and s.train]
    assert cut and not any(s.terminated for s in cut) and replay.takeovers > 0
    batch = replay.sample(np.random.default_rng(0), 20_000)
    ended = {s.obs.tobytes() for s in found if s.terminated}
    rows = {row.tobytes() for row in batch["obs"]}
    assert sum(s.obs.tobytes() in rows for s in cut) > 0
    zeroed = {row.tobytes() for row, discount in zip(batch["obs"], batch["discount"], strict=True) if discount == 0}
    assert zeroed <= ended


# --- by hand


def test_a_thousand_takeovers_of_an_arm_by_hand():
    env, records = make(seed=1, **{"episode_s = 10": "episode_s = 20"})  # so that it is not mostly resets
    person, told = Person(env, 1, 1250), written(env)
    taker = ByHand(person, env.command, 10.0, 0.06)
    drive(env, Wander(), taker, lambda: env.robot.now() > person.pushes[-1][1] + 1.0)
    begun = beginnings(records)
    assert len(begun) >= 1000
    assert_executed_is_stored_within_the_gate(env, records, told)
    assert_sources(records, person)
    assert_bootstrap(env, records[:4000])
    change, _ = changes(env, records, "takeover")  # the first step of each too: no faster than a hand
    assert len(change) > 4 * len(begun)
    assert np.linalg.norm(change[:, :3], axis=1).max() <= 0.06 * TICK + 1e-6 < env.gate.limits.rate[0] * TICK / 4
    assert np.abs(change[:, 3]).max() <= JAWS_RADPS * TICK + 1e-6


def test_two_hundred_takeovers_of_the_cars_twin_by_hand():
    pytest.importorskip("mujoco")
    spec = parse(load("car-loop").text.replace("episode_s = 60", "episode_s = 8"), "car-loop")
    env = catalog.make_env(catalog.make_task(spec), seed=2)
    records: list[Record] = []
    env.on_record.append(records.append)
    person, told, follow = Person(env, 2, 240), written(env), pursuit(env, 1.5, 0.8)
    policy = SimpleNamespace(act=lambda obs, prev_action, rng: follow(obs, prev_action))
    taker = ByHand(person, env.command, 10.0, 1.0)
    drive(env, policy, taker, lambda: env.robot.now() > person.pushes[-1][1] + 1.0)
    begun = beginnings(records)
    assert len(begun) >= 200
    assert_executed_is_stored_within_the_gate(env, records, told)
    assert_sources(records, person)
    assert_bootstrap(env, records)
    change, _ = changes(env, records, "takeover")
    box = np.subtract(env.command.action_high, env.command.action_low)
    assert (np.abs(change) <= box * TICK / ACROSS_S + 1e-6).all()
    assert (box / ACROSS_S < env.gate.limits.rate).all()  # no faster than a hand, which the gate would not notice


def test_a_hand_has_the_stick_until_a_while_after_it_let_go():
    device = SimpleNamespace(read=lambda: sticks[0])
    hand, action = ByHand(device, arm.COMMAND, 10.0, 0.06), np.zeros(4, np.float32)
    sticks = [Sticks(ahead=0.9 * MIDDLE, left=-0.9 * MIDDLE)]  # a worn spring
    assert hand.wish(reading(), action) is None
    sticks[0] = Sticks(up=2 * MIDDLE)
    assert hand.wish(reading(), action)[2] > 0.0
    sticks[0] = Sticks()
    for _ in range(round(LET_GO_S / TICK)):
        assert hand.wish(reading(), action) == pytest.approx(action)
    assert hand.wish(reading(), action) is None
    sticks[0] = Sticks(grip=-1)
    assert hand.wish(reading(), action)[3] < 0.0
    hand.begin()  # an episode ended
    sticks[0] = Sticks()
    assert hand.wish(reading(), action) is None


def test_a_tool_that_was_turned_stays_turned_in_a_persons_hand():
    action = arm_joints.COMMAND.to_action(np.array([0.1, -0.3, 0.3, 1.2, 0.5, 0.4]))
    told = arm_joints.COMMAND.to_command(action)
    assert by_sticks(Sticks(), arm_joints.COMMAND, 10.0, 0.06, action) == pytest.approx(action, abs=1e-6)
    wish = by_sticks(Sticks(left=1.0, grip=1.0), arm_joints.COMMAND, 10.0, 0.06, action)
    then = arm_joints.COMMAND.to_command(wish)
    assert then[4] == pytest.approx(told[4], abs=1e-6) and then[5] - told[5] == pytest.approx(0.08, abs=1e-6)
    assert arm.forward(then) - arm.forward(told) == pytest.approx([0.0, 0.006, 0.0], abs=1e-3)


@pytest.mark.parametrize("seen_by", ["wish", "stopped"])
def test_a_person_stops_it_by_a_key_that_is_read_once(seen_by):
    reads = iter([Sticks(), Sticks(stop=True), *[Sticks()] * 9])
    hand = ByHand(SimpleNamespace(read=lambda: next(reads)), arm.COMMAND, 10.0, 0.06)
    assert not hand.stopped()
    if seen_by == "wish":
        assert hand.wish(reading(), np.zeros(4)) is None
    assert hand.stopped() and hand.stopped()


def test_a_device_that_is_gone_stops_the_robot():
    env, _ = make()

    def gone() -> Sticks:
        if env.robot.now() > 5.0:
            raise DriverError("the gamepad is gone")
        return Sticks(ahead=1)

    stopped = env.robot.stopped
    with pytest.raises(DriverError, match="gone"):
        drive(env, Still(), ByHand(SimpleNamespace(read=gone), env.command, 10.0, 0.06), lambda: False)
    assert env.robot.stopped > stopped and env.robot.now() < 5.0 + 2 * TICK


# --- by script


def scripted(policy: Any, count: int, quality: float = 1.0, seed: int = 0, name: str = "arm-pick", **text) -> tuple:
    """Tally and records of so many tries in which the script takes over."""
    env, records = make(name, seed, **text)
    tally, taker = Tally(env), ByScript(env.task, env.command, quality, seed)
    told = written(env)
    drive(env, policy(env) if isinstance(policy, type(lambda: 0)) else policy, taker,
          lambda: len(tally.returns) >= count, seed)  # fmt: skip
    assert_executed_is_stored_within_the_gate(env, records, told)
    change, _ = changes(env, records, "takeover")
    assert (np.linalg.norm(change[:, :3], axis=1) <= SCRIPT_MPS * TICK + 1e-6).all()
    assert (np.abs(change[:, 3]) <= JAWS_RADPS * TICK + 1e-6).all()
    return tally, records


def spans(records: list[Record]) -> list[list[Record]]:
    """The steps of each episode in rows of the same source, in order."""
    rows: list[list[Record]] = []
    for before, record in zip([None, *records], records, strict=False):
        if record.action is None or record.source == "reset":
            continue
        if before is None or before.action is None or before.source != record.source:
            rows.append([])
        rows[-1].append(record)
    return rows


@pytest.mark.parametrize("name, checkpoints", [("arm-pick", 2), ("arm-reach", 1)])
def test_a_policy_that_does_nothing_is_taken_over_for_each_checkpoint(name, checkpoints):
    tally, records = scripted(Still(), 8, name=name)
    assert tally.successes == [1.0] * 8 and tally.episodes.interventions == 0
    rows = spans(records)
    assert [row[0].source for row in rows] == ["policy", "takeover"] * checkpoints * 8
    for idle, taken in zip(rows[::2], rows[1::2], strict=True):
        assert len(idle) * TICK == pytest.approx(STUCK_S, abs=2.1 * TICK)
        assert len(taken) * TICK < KEEPS_S
        stages = [record.events["progress"] for record in taken]
        assert stages[-1] > stages[0] == stages[-2]  # back at once
    shares = [sum(r.source == "takeover" for r in row) for row in rows]
    assert sum(shares) > 0.3 * sum(map(len, rows))


def test_a_script_begins_where_a_tool_was_told_to_be_which_is_not_where_it_is():
    task, told = catalog.make_task(load("arm-pick")), np.array([0.23, 0.02, 0.10, 0.1])
    lags, action = reading(tool=(0.2, 0.0, 0.12)), arm.COMMAND.to_action(told)
    script, wishes = ByScript(task, arm.COMMAND, 1.0, 0), [action]
    while len(wishes) < 11:
        wish = script.wish(lags, wishes[-1])
        wishes += [] if wish is None else [wish]
    steps = np.diff(arm.COMMAND.to_command(np.array(wishes)), axis=0)
    assert np.linalg.norm(steps[:2, :3], axis=1) == pytest.approx(SCRIPT_MPS * TICK)
    assert steps[:9, 3] == pytest.approx([JAWS_RADPS * TICK] * 8 + [0.06])  # they open, and no faster


def until_taken(script: ByScript, tool: tuple[float, ...], thing: tuple[float, ...]) -> np.ndarray:
    """The first wish of a script when a tool stays there."""
    action = arm.COMMAND.to_action(np.array([*tool, 0.6]))
    wishes = (script.wish(reading(tool, thing), action) for _ in range(100))
    return next(wish for wish in wishes if wish is not None)


def test_what_was_reached_in_one_episode_is_not_in_the_next():
    script, action = ByScript(catalog.make_task(load("arm-pick")), arm.COMMAND, 1.0, 0), np.zeros(4, np.float32)
    away, thing = (0.3, 0.1, 0.1), (0.25, 0.0, 0.02)
    assert script.wish(reading(away, thing), action) is script.wish(reading(thing, thing), action) is None
    script.begin()
    until_taken(script, away, thing)
    assert script.wish(reading(thing, thing), action) is None  # the first checkpoint again, and so the stick goes back


def test_a_script_wishes_nothing_that_is_not_learned_from():
    """Above an object that seems to lie in the table."""
    script, thing = ByScript(catalog.make_task(load("arm-pick")), arm.COMMAND, 1.0, 0), (0.25, 0.0, 0.0)
    lowest, wish = 1.0, until_taken(script, (0.25, 0.0, 0.03), thing)
    while wish is not None:
        lowest = min(lowest, wish[2])
        wish = script.wish(reading(arm.COMMAND.to_command(wish)[:3] + (0, 0, 0.02), thing), wish)
    assert lowest == -1.0


# the slower one's tries are so short that it does not come to gripping, which brings nothing nearer for a while
@pytest.mark.parametrize(("speed_mps", "seconds"), [(0.15, 7), (3.0 * CLOSER_M / STUCK_S, 3)])
def test_a_policy_that_makes_progress_is_not_taken_over(speed_mps, seconds):
    def able(env):
        drives = teach.shown(env, speed_mps, 1.0, 0)
        return SimpleNamespace(act=lambda obs, prev_action, rng: drives(obs, prev_action))

    tally, records = scripted(able, 4, **{"episode_s = 10": f"episode_s = {seconds}"})
    assert {r.source for r in records if r.action is not None} == {"policy", "reset"}
    assert tally.successes == [float(speed_mps > 0.1)] * 4


def test_a_script_takes_over_from_whatever_a_policy_does():
    tally, records = scripted(Wander(), 30, 0.5)
    assert len(beginnings(records)) > 40 and len(tally.returns) == 30
    lasted = [len(row) * TICK for row in spans(records) if row[0].source == "takeover"]
    assert max(lasted) == pytest.approx(KEEPS_S)  # it gives up, too


def test_a_script_of_low_quality_misses_and_so_does_it_again_with_the_same_seed():
    successes, actions = {}, []
    for quality in (0.0, 0.0, 0.5):
        tally, records = scripted(Still(), 12, quality, seed=4)
        successes[quality] = np.mean(tally.successes)
        actions.append(np.array([r.action for r in records if r.action is not None]))
    assert successes[0.0] < successes[0.5] < 0.8
    np.testing.assert_array_equal(actions[0], actions[1])
    assert actions[2].shape != actions[1].shape or (actions[2] != actions[1]).any()


@pytest.mark.parametrize("drops", [False, True])
def test_a_script_goes_on_with_what_is_held_and_fetches_what_is_not(drops):
    """The policy picks the object up, and then lets go or only stays."""

    def half(env):
        drives = teach.shown(env, 0.2, 1.0, 0)
        lifted = [False]

        def act(obs, prev_action, rng):
            lifted[0] |= env.robot.object[2] > CUBE_M + 0.02
            let_go = np.array([*prev_action[:3], 1.0], np.float32)
            return drives(obs, prev_action) if not lifted[0] else let_go if drops else prev_action

        return SimpleNamespace(act=act)

    _, records = scripted(half, 1)
    taken = [row for row in spans(records) if row[0].source == "takeover"]
    assert records[-1].events.get("progress", 1.0) == 1.0 and len(taken) == 1 + drops  # to the object, and on with it
    jaws = [arm.COMMAND.to_command(r.action)[3] for row in taken for r in row]
    assert max(jaws) > 0.7 if drops else max(jaws) < 0.1


# --- who may


def test_who_cannot_take_over_is_told_why():
    pick, loop = load("arm-pick"), load("car-loop")
    for who in ("none", "script", "keyboard", "gamepad"):
        check(who, pick, arm.COMMAND)
    car = catalog.declaration(loop)[1]
    check("gamepad", loop, car)
    with pytest.raises(TaskError, match="car-loop: --takeover script is for tasks of kind manipulate, not course"):
        check("script", loop, car)
    with pytest.raises(TaskError, match="'ghost' cannot take over, only none, script, keyboard, gamepad"):
        check("ghost", loop, car)
    for name in ("dog-walk", "gym:Pendulum-v1"):
        spec = catalog.load_spec(name)
        with pytest.raises(TaskError, match=f"{name}: a person takes over cars on a course and tools"):
            check("keyboard", spec, catalog.declaration(spec)[1])


def test_nobody_takes_over_unless_asked():
    env, _ = make()
    with teach.intervener("none", env, 1.0, 0) as taker:
        assert taker is None
    with teach.intervener("script", env, 1.0, 0) as taker:
        assert isinstance(taker, ByScript) and not taker.stopped()


# --- from end to end


@pytest.fixture
def ideal(monkeypatch) -> list[RobotEnv]:
    """Whoever wants the arm gets one that does what it is told."""
    made = []

    def make_env(task, real=False, seed=0, *more) -> RobotEnv:
        env, _ = make(task.spec.name, seed)
        made.append(env)
        return env

    monkeypatch.setattr(catalog, "make_env", make_env)
    return made


def test_a_person_records_a_tool_and_ends_with_stop(ideal, tmp_path, monkeypatch, capsys):
    sticks = iter([Sticks(ahead=1)] * 10 + [Sticks(up=-1, grip=-1)] * 10 + [Sticks(stop=True)])
    monkeypatch.setattr(teach, "opened", lambda who: nullcontext(SimpleNamespace(read=lambda: next(sticks))))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["record", "arm-pick", "--teleop", "gamepad", "--out", "tries", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    _, records = read_recording(tmp_path / "tries")
    driven = [arm.COMMAND.to_command(r.action) for r in records if r.source == "teacher" and r.action is not None]
    assert len(driven) == 20 and (told["laps"], told["tries"]) == (0, 1)
    assert driven[9] - driven[0] == pytest.approx([9 * 0.006, 0, 0, 0], abs=1e-6)
    assert driven[19] - driven[9] == pytest.approx([0, 0, -0.06, -0.6], abs=1e-6)  # the jaws are shut by then


def test_the_share_of_an_episode_that_is_taken_over_is_its_own():
    _, records = scripted(Still(), 3)
    env, more = make(seed=5)
    drive(env, Still(), ByScript(env.task, env.command, 1.0, 0), lambda: env.robot.now() > 6.0)
    found, shares = Episodes(), []
    for number, record in enumerate([*records, *more]):
        left_alone = number >= len(records) and record.source == "takeover"
        metrics = found.push(record._replace(source="policy") if left_alone else record)
        shares += [metrics["env/takeovers"]] if "env/takeovers" in metrics else []
    rows = spans(records)
    assert len(shares) > 3 and set(shares[3:]) == {0.0}
    first = sum(map(len, (rows[1], rows[3]))) / sum(map(len, rows[:4]))
    assert shares[0] == pytest.approx(first) and 0.3 < first < 0.7


def test_takeovers_that_a_learner_orders_are_in_both_of_its_strata(ideal, tmp_path, monkeypatch):
    pytest.importorskip("jax")
    from tether.launch.learner import Job, Learner

    monkeypatch.chdir(tmp_path)
    wanted = ["actor.takeover=script", "actor.takeover_quality=0.5", "actor.random_steps=0", "learner.held_out=0"]
    settings = config.load("cpu", "manipulate", [*SETTINGS, *wanted, "learner.steps=400"])
    (tmp_path / "run").mkdir()
    job = Job(load("arm-pick"), settings, tmp_path / "run")
    with closing(Log(job.folder, stream=io.StringIO())) as log:
        learner = Learner(job, log)
        thread = threading.Thread(target=learner.run, args=(lambda: "",))
        thread.start()
        try:
            said = serve(learner.link.address, spool=str(tmp_path / "spool"))
        finally:
            thread.join()
    trainer = learner.trainer
    assert "the learner said stop: training is done" in said and trainer.updates > 300
    ((_, records),) = read_streams(job.folder / "steps")
    fold = Fold(trainer.task)
    found = [sample for record in records for sample in fold.push(record)]
    taken = {s.obs.tobytes() for s in found if s.takeover and s.train and s.action is not None}
    assert 0 < trainer.replay.takeovers < len(trainer.replay)
    batch = minibatches(trainer._strata.draw(np.random.default_rng(0), 0.5), 1, 32)["obs"][0]
    online, prior = ([row.tobytes() in taken for row in part] for part in (batch[:16], batch[16:]))
    assert all(prior) and not all(online)
    draws = [trainer._strata.draw(np.random.default_rng(i), 0.5)["obs"][:16].copy() for i in range(40)]
    share = np.mean([row.tobytes() in taken for rows in draws for row in rows])
    assert share == pytest.approx(trainer.replay.takeovers / len(trainer.replay), abs=0.1)
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("env/takeovers", 0.0) for row in rows) > 0.2
