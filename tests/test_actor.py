"""Weights at the actor: probed before they drive, refused with a reason, kept on its disk."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from tether.drivers.base import DriverError
from tether.launch import kept as keeping
from tether.launch.actor import probed, serve, tell
from tether.launch.kept import Kept
from tether.launch.onboard import Policy
from tether.launch.transport import ActorLink, LearnerLink
from tether.launch.wire import WireError
from tether.robot_env.record import Meta

from tests.chaos import weights as campaign
from tests.chaos.weights import ACT, OBS, Link, messages, pilot, sealed, spec, weights
from tests.conftest import free_address

ORDERS = {"task": "the task", "name": "t", "seed": 3, "policy": spec(), "random_steps": 9, "auto_reset": True}
ZEROS = np.zeros(OBS, np.float32), np.zeros(ACT, np.float32)


def test_no_mutated_payload_drives_and_every_check_refuses_some():
    applied, reasons = campaign.attack(300, seed=1)
    assert applied == 0
    told = " ".join(reasons)
    for check in ("checksum", "layout changed", "not finite or not", "on 16 probes", "malformed", "the layers need"):
        assert check in told


def test_good_weights_drive():
    link = Link()
    actor = pilot(link)
    link.connect()
    assert not actor.refresh()
    link.deliver(messages(campaign.wire.pack_weights(4, weights())))
    assert actor.refresh() and actor._env.version == 4
    np.testing.assert_array_equal(actor._policy.act(*ZEROS), Policy(spec(), weights()).act(*ZEROS))


def test_the_change_of_action_is_the_mean_over_what_was_seen_last():
    rng = np.random.default_rng(0)
    seen = tuple((rng.normal(size=OBS), rng.uniform(-1, 1, ACT)) for _ in range(5))
    old, new = Policy(spec(), weights()), Policy(spec(), weights(seed=1))
    _, change = probed(spec(), weights(seed=1), seen, old)
    expected = np.mean([np.abs(new.act(*pair) - old.act(*pair)) for pair in seen])
    assert change == pytest.approx(expected, rel=1e-6) and change > 0.01
    assert probed(spec(), weights(), seen, old)[1] == 0.0
    assert np.isnan(probed(spec(), weights(), seen, None)[1])


@pytest.mark.parametrize("head", ["mean", "log_std"])
def test_finite_weights_whose_actions_are_not_are_refused_by_the_probe(head):
    finite = weights()
    finite["dense0/bias"][:] = 3e38
    finite["dense1/kernel"][:] = 1.0  # 16 x 3e38 is inf
    finite[f"{head}/kernel"][:] = np.float32([[1.0], [-1.0]] * 8)  # inf - inf, in whatever order a BLAS adds
    with pytest.raises(WireError, match="an action on 1 probes is not finite"):
        probed(spec(), finite, (), None)


def test_a_broken_sensor_is_not_the_weights_fault():
    broken = (np.full(OBS, np.nan, np.float32), np.zeros(ACT, np.float32))
    probed(spec(), weights(), (broken,), None)
    probed(spec(), weights(), (broken, ZEROS), Policy(spec(), weights()))


def test_refused_weights_are_told_to_the_learner_and_the_old_ones_drive_on():
    meta = Meta.of("car", "the task", 10, campaign.CHANNELS, campaign.COMMAND)
    learner = LearnerLink("tcp://127.0.0.1:*", meta, {}, lambda meta, first, new: len(new), {})
    link = ActorLink(learner.address)
    actor, threads = pilot(link), []
    prepare = link.prepare
    link.prepare = lambda *args: (threads.append(threading.current_thread().name), prepare(*args))[1]
    try:
        link.start()
        link.begin(meta)
        learner.publish(1, weights())
        assert link._pump.wait(lambda: link._fresh, 10.0) and actor.refresh()
        learner.publish(2, weights(hidden=17))  # another learner's idea of the policy
        told = lambda: [s.report for s in learner.status().values() if s.report.get("refused")]  # noqa: E731
        assert learner._pump.wait(told, 10.0)
        [report] = told()
        assert report["weights"] == 1 and report["refused"].startswith("weights 2: the layout changed")
        actor.refresh()
        assert actor._env.version == 1
        bad = dict(weights(), **{"mean/bias": np.full(ACT, np.nan, np.float32)})
        learner._weights = sealed(3, campaign.pack(bad))
        learner._pump.wake()
        assert learner._pump.wait(lambda: told()[0]["refused"].startswith("weights 3: a number is not finite"), 10.0)
        learner.publish(4, weights(seed=4))
        assert link._pump.wait(lambda: link._fresh, 10.0) and actor.refresh() and actor._env.version == 4
        assert set(threads) == {"link"}  # the control loop has no part in it
        actor._reported = 0, time.monotonic() - 1.0
        actor._report()
        [stream] = learner.status().values()
        assert learner._pump.wait(lambda: stream.report["stats"].get("link/weights_change", 0.0) > 0.0, 10.0)
    finally:
        link.close(0.1)
        learner.close()


# --- kept on the disk


def test_a_learner_that_falls_silent_is_told_once_and_again_when_it_is_back(monkeypatch):
    link, tells = Link(), []
    monkeypatch.setattr("tether.launch.actor.tell", tells.append)
    actor = pilot(link)
    silences = (4.9, ""), (5.1, "not a word from the learner for 5 s"), (60.0, ""), (0.1, "is back"), (0.1, "")
    for silent, said in silences:
        link.silent_s = silent
        actor._listen()
        told = " ".join(tells)
        tells.clear()
        assert said in told and bool(said) == bool(told)


def test_a_terminal_that_hangs_stops_nobody(monkeypatch):
    goes_on, told = threading.Event(), threading.Event()
    monkeypatch.setattr(os, "write", lambda where, text: goes_on.wait(60) and told.set())
    tell("the learner is back")
    assert not told.is_set()
    goes_on.set()
    assert told.wait(60)


def test_what_cannot_fail_is_said_before_any_learner_is_waited_for():
    with pytest.raises(DriverError, match="no 'nose'"):
        serve(free_address(), "car-loop", fail=["nose:off@5s"])


def test_what_is_kept_comes_back_for_its_task_only(tmp_path):
    store = Kept(tmp_path / "spool", "the task")
    assert store.load() is None
    store.save(ORDERS, 7, weights())
    orders, version, params = Kept(tmp_path / "spool", "the task").load()
    assert (orders, version) == (ORDERS, 7) and params.keys() == weights().keys()
    for name, value in weights().items():
        np.testing.assert_array_equal(params[name], value)
    other = Kept(tmp_path / "spool", "another task")
    assert other.load() is None
    store.path.rename(other.path)
    assert other.load() is None  # whatever the file is called
    assert len(list((tmp_path / "spool").iterdir())) == 1


def test_weights_are_written_now_and_then_only(tmp_path, monkeypatch):
    store = Kept(tmp_path, "the task")
    store.save(ORDERS, 7, weights())
    store.save(ORDERS, 8, weights())
    assert store.load()[1] == 7
    monkeypatch.setattr(keeping, "EVERY_S", 0.0)
    store.save(ORDERS, 9, weights())
    assert store.load()[1] == 9


def test_no_damaged_file_is_used(tmp_path, capsys):
    store, rng = Kept(tmp_path, "the task"), np.random.default_rng(1)
    store.save(ORDERS, 7, weights())
    good = store.path.read_bytes()
    for case in range(200):
        data = bytearray(good)
        at = int(rng.integers(len(data)))
        if case % 2:
            data[at] ^= 1 << int(rng.integers(8))
        else:
            del data[at:]
        store.path.write_bytes(data)
        assert store.load() is None
    assert "is not used: another checksum" in capsys.readouterr().err
    store.path.write_bytes(good)
    assert store.load() is not None


def test_a_disk_that_takes_no_weights_costs_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    Kept(tmp_path / "file" / "spool", "the task").save(ORDERS, 7, weights())
    assert "the weights are not kept: Not a directory" in capsys.readouterr().err
