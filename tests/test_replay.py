"""The ring of steps against a naive list of episodes, whatever the streams, flags and capacity."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tether.agents.replay import Replay, ReplayError, minibatches, symmetric

GAMMA = 0.9


@dataclass
class Step:
    obs: np.ndarray
    prev_action: np.ndarray
    action: np.ndarray | None
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    train: bool = True


def step(number, kind="go", train=True):
    """A step whose numbers all tell which one it is. kind: go, terminated, truncated or close."""
    action = None if kind == "close" else np.float32([number / 2000, -number / 2000])
    return Step(
        np.float32([number, -number, 1]), np.float32([number / 10, -number / 10]), action, number + 0.5,
        kind == "terminated", kind == "truncated", train,
    )  # fmt: skip


class Naive:
    """Everything ever added, in lists, with the newest `capacity` entries alive."""

    def __init__(self, capacity, n_step):
        self.capacity, self.n_step, self.all, self.streams = capacity, n_step, [], {}

    def add(self, stream, entry):
        self.streams.setdefault(stream, []).append(len(self.all))
        self.all.append((stream, entry))

    def successor(self, i):
        stream, entry = self.all[i]
        later = [j for j in self.streams[stream] if j > i]
        if entry.action is None or not later:
            return None
        ended = entry.terminated or entry.truncated
        return None if ended and self.all[later[0]][1].action is not None else later[0]

    def drawable(self):
        alive = range(max(0, len(self.all) - self.capacity), len(self.all))
        return [i for i in alive if self._trains(i)]

    def _trains(self, i):
        entry = self.all[i][1]
        return entry.action is not None and entry.train and self.successor(i) is not None

    def row(self, i):
        reward, discount, at = 0.0, 1.0, i
        for k in range(self.n_step):
            if k and not self._trains(at):
                break
            entry = self.all[at][1]
            reward += discount * entry.reward
            discount *= 0.0 if entry.terminated else GAMMA
            at = self.successor(at)
        first, last = self.all[i][1], self.all[at][1]
        return {
            "obs": first.obs, "action": first.action, "prev_action": first.prev_action.clip(-1, 1),
            "reward": reward, "discount": discount, "next_obs": last.obs,
            "next_prev_action": last.prev_action.clip(-1, 1),
        }  # fmt: skip

    def future(self, i):
        out = []
        while (i := self.successor(i)) is not None:
            out.append(i)
        return out


KINDS = st.sampled_from(["go"] * 6 + ["terminated", "truncated", "close"])
EVENTS = st.lists(
    st.tuples(st.sampled_from("aaab"), KINDS, st.sampled_from([True, True, True, False])), max_size=120
)


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.integers(1, 60), st.integers(1, 5))
def test_every_batch_is_what_a_naive_buffer_would_give(events, capacity, n_step):
    replay, naive = Replay(capacity, 3, 2, n_step, GAMMA), Naive(capacity, n_step)
    for number, (stream, kind, train) in enumerate(events):
        for buffer in (replay, naive):
            buffer.add(stream, step(number, kind, train))
    drawable = naive.drawable()
    assert len(replay) == len(drawable)
    if not drawable:
        with pytest.raises(ReplayError, match="nothing to draw"):
            replay.sample(np.random.default_rng(0), 1)
        return
    batch = replay.sample_future(np.random.default_rng(0), 40 * len(drawable))
    seen = batch["obs"][:, 0].astype(int)
    assert set(seen) == set(drawable)
    for row in range(0, len(seen), 7):
        for key, value in naive.row(seen[row]).items():
            np.testing.assert_allclose(batch[key][row], value, rtol=1e-5, err_msg=key)
        assert batch["future_obs"][row, 0] in naive.future(seen[row])


def test_a_long_segment_among_others_is_walked_exactly_and_uniformly():
    replay = Replay(1000, 3, 2)
    numbers = {"a": [], "b": []}
    for number in range(1300):  # the ring is full and begins in the middle of both
        stream = "a" if number % 3 else "b"
        numbers[stream].append(number)
        replay.add(stream, step(number))
    batch = replay.sample_future(np.random.default_rng(0), 40_000)
    now, future = batch["obs"][:, 0].astype(int), batch["future_obs"][:, 0].astype(int)
    for stream, mine in numbers.items():
        of = np.isin(now, mine)
        assert np.isin(future[of], mine).all(), stream
        distance = np.searchsorted(mine, future[of]) - np.searchsorted(mine, now[of])
        left = len(mine) - 1 - np.searchsorted(mine, now[of])
        assert (distance >= 1).all() and (distance <= left).all() and distance.max() > 300
        far = left > 20
        assert abs((distance[far] / left[far]).mean() - 0.5) < 0.02


def test_a_slow_stream_leaves_the_links_of_the_others_alone():
    replay, fast = Replay(62, 3, 2), []
    for number in range(700):
        stream = "slow" if number % 9 == 0 else "fast"
        fast += [number] * (stream == "fast")
        replay.add(stream, step(number))
        if number > 64:
            batch = replay.sample_future(np.random.default_rng(number), 100)
            now, future = batch["obs"][:, 0].astype(int), batch["future_obs"][:, 0].astype(int)
            assert (future > now).all() and (np.isin(now, fast) == np.isin(future, fast)).all()


def test_a_stream_that_paused_for_long_still_finds_its_own_next_step():
    replay = Replay(3000, 3, 2)
    for number in range(2002):
        replay.add("b", step(number)) if 0 < number < 2001 else replay.add("a", step(number))
    batch = replay.sample_future(np.random.default_rng(0), 20_000)
    paused = batch["obs"][:, 0] == 0
    assert paused.any() and (batch["future_obs"][paused, 0] == 2001).all()


def test_every_step_is_drawn_as_often_as_any_other():
    replay = Replay(50, 3, 2)
    for number in range(120):
        replay.add("a", step(number, train=number % 5 > 0))
    seen = replay.sample(np.random.default_rng(0), 78_000)["obs"][:, 0].astype(int)
    counts = np.bincount(seen)[70:]
    assert (counts[np.arange(70, 119) % 5 == 0] == 0).all()
    assert len(replay) == 39 and (abs(counts[counts > 0] - 2000) < 5 * 2000**0.5).all()


def test_a_truncated_step_bootstraps_from_its_own_last_observation():
    replay = Replay(10, 3, 2)
    for number, kind in enumerate(["go", "truncated", "close", "go"]):
        replay.add("a", step(number, kind))
    batch = replay.sample(np.random.default_rng(0), 50)
    ends = batch["obs"][:, 0] == 1
    assert ends.any() and (batch["next_obs"][ends, 0] == 2).all()
    assert (batch["discount"] == np.float32(0.99)).all()


def test_the_next_episode_never_stands_in_for_a_lost_last_observation():
    replay = Replay(10, 3, 2)
    for number, kind in enumerate(["truncated", "go", "go"]):
        replay.add("a", step(number, kind))
    assert set(replay.sample(np.random.default_rng(0), 50)["obs"][:, 0]) == {1}


def test_the_same_records_give_the_same_samples_and_rows_are_copies():
    def filled():
        replay = Replay(40, 3, 2, 3, GAMMA)
        for number in range(95):
            replay.add(number % 2, step(number, "close" if number % 17 == 0 else "go"))
        return replay

    replay = filled()
    first = replay.sample(np.random.default_rng(5), 64)
    for value in first.values():
        assert value.dtype == np.float32 and len(value) == 64
        kept = value.copy()
        value += 1
        np.copyto(value, kept)
    for key, value in filled().sample(np.random.default_rng(5), 64).items():
        np.testing.assert_array_equal(value, first[key])
    first["obs"][:] = -7
    assert (replay.sample(np.random.default_rng(5), 64)["obs"] != -7).any()


@given(st.integers(1, 8), st.integers(1, 16), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_every_mini_batch_is_exactly_half_online_and_half_prior(utd, half, seed):
    rng = np.random.default_rng(seed)
    replays = {"online": Replay(200, 3, 2), "prior": Replay(200, 3, 2)}
    for number in range(200):
        replays["online"].add("a", step(number + 1))
        replays["prior"].add("a", step(-number - 1))
    online, prior = (r.sample(rng, utd * half) for r in replays.values())
    batches = minibatches(symmetric(online, prior), utd, 2 * half)
    assert batches["obs"].shape == (utd, 2 * half, 3) and batches["reward"].shape == (utd, 2 * half)
    is_online = batches["obs"][..., 0] > 0
    assert (is_online.sum(1) == half).all()
    # nothing is lost, doubled or paired with another row
    np.testing.assert_array_equal(batches["obs"][..., 0][is_online], online["obs"][:, 0])
    np.testing.assert_array_equal(batches["obs"][..., 0][~is_online], prior["obs"][:, 0])
    np.testing.assert_array_equal(batches["reward"] - 0.5, batches["obs"][..., 0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"obs": np.zeros(4)}, r"obs has shape \(4,\), this buffer takes \(3,\)"),
        ({"obs": np.zeros((1, 3))}, r"obs has shape \(1, 3\)"),
        ({"action": np.zeros(1)}, r"action has shape \(1,\), this buffer takes \(2,\)"),
        ({"prev_action": np.zeros(3)}, r"prev_action has shape \(3,\)"),
        ({"obs": np.float32([0, np.nan, 0])}, "obs .*nan.* is not finite"),
        ({"action": np.float32([np.inf, 0])}, "action .*inf.* is not finite"),
        ({"reward": float("nan")}, "stream a: reward nan is not finite"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    replay = Replay(3, 3, 2)
    for number in range(3):
        replay.add("a", step(number))
    wrong = step(3)
    for name, value in change.items():
        setattr(wrong, name, value)
    with pytest.raises(ReplayError, match=message):
        replay.add("a", wrong)
    assert set(replay.sample(np.random.default_rng(0), 50)["obs"][:, 0]) == {0, 1}


def test_batches_that_cannot_be_mixed_or_cut_are_refused():
    a = {"obs": np.zeros((4, 3)), "reward": np.zeros(4)}
    with pytest.raises(ValueError):
        symmetric(a, a | {"reward": np.zeros(3)})
    with pytest.raises(ValueError):
        minibatches(a, 2, 3)
