"""The ring of steps against a naive list of episodes, whatever the streams, flags and capacity; strata and frames."""

import tracemalloc
from dataclasses import dataclass
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tether.agents.replay import Replay, ReplayError, Strata, minibatches
from tether.launch import catalog, config

from tests.conftest import FAKE, SETTINGS

GAMMA = 0.9
STACK = 3
IMAGES = {"camera": (2, 3, 2)}


def future_of(replay, n, seed=0):
    """n rows with an observation of a later step each."""
    return Strata(replay, Replay(1, 3, 2), 1, n, future=True).draw(np.random.default_rng(seed), 0.0)


@dataclass
class Step:
    obs: np.ndarray
    prev_action: np.ndarray
    action: np.ndarray | None
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    train: bool = True
    takeover: bool = False
    images: dict | None = None


def step(number, kind="go", train=True, takeover=False):
    """A step whose numbers all tell which one it is. kind: go, terminated, truncated or close."""
    action = None if kind == "close" else np.float32([number / 2000, -number / 2000])
    return Step(
        np.float32([number, -number, 1]), np.float32([number / 1000, -number / 1000]), action, number + 0.5,
        kind == "terminated", kind == "truncated", train, takeover, {"camera": frame(number)},
    )  # fmt: skip


def frame(number):
    """An image that tells which step it is of."""
    return np.full((2, 3, 2), divmod(number, 256), np.uint8)


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
            "obs": first.obs, "action": first.action, "prev_action": first.prev_action,
            "reward": reward, "discount": discount, "next_obs": last.obs,
            "next_prev_action": last.prev_action,
            "obs/camera": self.stack(i), "next_obs/camera": self.stack(at),
        }  # fmt: skip

    def stack(self, i):
        chain = [i] * STACK
        for k in range(STACK - 2, -1, -1):
            alive = range(max(0, len(self.all) - self.capacity), chain[k + 1])
            chain[k] = next((j for j in alive if self.successor(j) == chain[k + 1]), chain[k + 1])
        return [frame(int(self.all[j][1].obs[0])) for j in chain]

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
    replay, naive = Replay(capacity, 3, 2, n_step, GAMMA, IMAGES, STACK), Naive(capacity, n_step)
    for number, (stream, kind, train) in enumerate(events):
        for buffer in (replay, naive):
            buffer.add(stream, step(number, kind, train))
    drawable = naive.drawable()
    assert len(replay) == len(drawable)
    if not drawable:
        with pytest.raises(ReplayError, match="nothing to draw"):
            replay.sample(np.random.default_rng(0), 1)
        return
    batch = future_of(replay, 40 * len(drawable))
    seen = batch["obs"][:, 0].astype(int)
    assert set(seen) == set(drawable)
    rows = {i: naive.row(i) for i in drawable}
    for row in range(0, len(seen), 7):
        for key, value in rows[seen[row]].items():
            np.testing.assert_allclose(batch[key][row], value, rtol=1e-5, err_msg=key)
        assert batch["future_obs"][row, 0] in naive.future(seen[row])
    del batch["future_obs"]
    blank = replay.blank(len(seen))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in blank.items()}


def test_a_long_segment_among_others_is_walked_exactly_and_uniformly():
    replay = Replay(1000, 3, 2)
    numbers = {"a": [], "b": []}
    for number in range(1300):  # the ring is full and begins in the middle of both
        stream = "a" if number % 3 else "b"
        numbers[stream].append(number)
        replay.add(stream, step(number))
    batch = future_of(replay, 40_000)
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
            batch = future_of(replay, 100, number)
            now, future = batch["obs"][:, 0].astype(int), batch["future_obs"][:, 0].astype(int)
            assert (future > now).all() and (np.isin(now, fast) == np.isin(future, fast)).all()


def test_a_stream_that_paused_for_long_still_finds_its_own_next_step():
    replay = Replay(3000, 3, 2)
    for number in range(2002):
        replay.add("b", step(number)) if 0 < number < 2001 else replay.add("a", step(number))
    batch = future_of(replay, 20_000)
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
    batches = minibatches(Strata(*replays.values(), utd, 2 * half).draw(rng, 0.5), utd, 2 * half)
    assert batches["obs"].shape == (utd, 2 * half, 3) and batches["reward"].shape == (utd, 2 * half)
    is_online = batches["obs"][..., 0] > 0
    assert (is_online.sum(1) == half).all()
    np.testing.assert_array_equal(batches["reward"] - 0.5, batches["obs"][..., 0])


PRIOR = 1000  # numbers of prior steps begin here


def buffers(events, prior_steps, capacity=60, n_step=1):
    """Online and prior buffers, and naive ones that were given the same."""
    online, prior = ((Replay(capacity, 3, 2, n_step, GAMMA), Naive(capacity, n_step)) for _ in range(2))
    for number, (stream, kind, train, takeover) in enumerate(events):
        for buffer in online:
            buffer.add(stream, step(number, kind, train, takeover))
    for number in range(prior_steps):
        for buffer in prior:
            buffer.add("p", step(PRIOR + number))
    return *online, *prior


def numbers(batch, utd, size):
    """Which step each row of each mini-batch is."""
    return minibatches(batch, utd, size)["obs"][..., 0].astype(int)


DRIVEN = st.tuples(st.sampled_from("aab"), KINDS, st.booleans(), st.booleans())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(DRIVEN, min_size=5, max_size=80), st.integers(0, 30), st.floats(0, 1), st.integers(1, 5),
    st.integers(1, 12), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_every_mini_batch_has_its_share_of_each_stratum(events, prior_steps, share, utd, size, n_step, seed):
    online, naive, prior, naive_prior = buffers(events, prior_steps, n_step=n_step)
    driven = {i for i in naive.drawable() if naive.all[i][1].takeover}
    assert online.takeovers == len(driven)
    data = {PRIOR + i for i in naive_prior.drawable()}
    rows = round(share * size) if data or len(driven) >= round(share * size) else 0
    if rows < size and not len(online):
        with pytest.raises(ReplayError, match="nothing to draw"):
            Strata(online, prior, utd, size).draw(np.random.default_rng(seed), share)
        return
    batch = Strata(online, prior, utd, size, future=True).draw(np.random.default_rng(seed), share)
    found = numbers(batch, utd, size)
    assert set(found[:, : size - rows].ravel()) <= set(naive.drawable())
    second = found[:, size - rows :]
    assert set(second.ravel()) <= data | driven
    taken = (second < PRIOR).sum(1)
    expected = rows * len(driven) / max(len(driven) + len(data), 1)
    assert (taken == taken[0]).all() and abs(taken[0] - expected) < 1
    for row in range(0, utd * size, 3):
        number = found.ravel()[row]
        source, at = (naive_prior, number - PRIOR) if number >= PRIOR else (naive, number)
        for key, value in source.row(at).items():
            if key in batch:
                np.testing.assert_allclose(batch[key][row], value, rtol=1e-5, err_msg=key)
        later = [i + (number >= PRIOR) * PRIOR for i in source.future(at)]
        assert batch["future_obs"][row, 0] in later
    again = Strata(online, prior, utd, size, future=True).draw(np.random.default_rng(seed), share)
    assert batch.keys() == again.keys() and all((batch[k] == again[k]).all() for k in batch)


def test_a_takeover_is_drawn_online_and_prior_as_often_as_any_other_there():
    events = [("a", "go", True, number % 10 == 0) for number in range(101)]
    online, _, prior, _ = buffers(events, 31, capacity=200)
    assert (len(online), online.takeovers, len(prior)) == (100, 10, 30)
    rng, strata, seen = np.random.default_rng(0), Strata(online, prior, 3, 100), {"online": [], "prior": []}
    for _ in range(400):  # the number of takeovers is drawn once for all the mini-batches of a call
        found = numbers(strata.draw(rng, 0.4), 3, 100)
        seen["online"].append(found[:, :60].ravel())
        seen["prior"].append(found[:, 60:].ravel())
    for stratum, steps in (("online", [*range(100)]), ("prior", [*range(0, 100, 10), *range(PRIOR, PRIOR + 30)])):
        drawn, counts = np.unique(np.concatenate(seen[stratum]), return_counts=True)
        assert drawn.tolist() == steps
        expected = counts.sum() / len(steps)
        assert (abs(counts - expected) < 5 * expected**0.5).all()


def test_a_few_takeovers_are_drawn_on_average_exactly_in_proportion():
    """Less than one row of a mini-batch: rounding would never, or always, draw them."""
    online, _, prior, _ = buffers([("a", "go", True, number == 0) for number in range(10)], 41, capacity=200)
    rng, strata = np.random.default_rng(0), Strata(online, prior, 1, 10)
    counts = [(numbers(strata.draw(rng, 1.0), 1, 10) < PRIOR).sum() for _ in range(4000)]
    assert set(counts) == {0, 1} and abs(np.mean(counts) - 10 / 41) < 5 * (0.25 / 4000) ** 0.5


def test_without_prior_data_takeovers_are_a_stratum_once_they_fill_their_rows():
    for driven, rows in ((7, 0), (8, 8)):
        events = [("a", "go", True, number < driven) for number in range(1001)]
        online, _, prior, _ = buffers(events, 0, capacity=2000)
        found = numbers(Strata(online, prior, 4, 16).draw(np.random.default_rng(0), 0.5), 4, 16)
        assert ((found[:, 8:] < driven).all(1) == (rows == 8)).all()
        assert (found[:, :8] >= driven).any()


def test_a_batch_stays_until_the_next_but_one_and_is_where_jax_need_not_copy_it():
    online, _, prior, _ = buffers([("a", "go", True, False)] * 50, 50)
    rng, strata = np.random.default_rng(0), Strata(online, prior, 4, 16)
    batches = [strata.draw(rng, 0.5)]
    for _ in range(3):
        kept = {name: values.copy() for name, values in batches[-1].items()}
        batches.append(strata.draw(rng, 0.5))
        assert all((batches[-2][name] == kept[name]).all() for name in kept)
        assert (batches[-1]["obs"] != kept["obs"]).any()
    for first, third in zip(batches, batches[2:], strict=False):
        assert all(first[name] is third[name] for name in first)  # memory is not taken again and again
    assert all(values.ctypes.data % 64 == 0 for batch in batches for values in batch.values())


def test_a_takeover_that_is_overwritten_is_forgotten():
    replay = Replay(20, 3, 2)
    for number in range(100):
        replay.add("a", step(number, takeover=number < 30))
        alive = range(max(0, number - 19), number)
        assert replay.takeovers == sum(i < 30 for i in alive)


class Sums:
    """An algorithm whose state is a check sum of all the batches it was given."""

    @staticmethod
    def init(agent, key, obs_size, action_size):
        return {"sum": np.uint32(0)}

    @staticmethod
    def update(agent, state, batches):
        sum = int(state["sum"])
        for name in sorted(batches):
            sum = crc32(batches[name].tobytes(), sum)
        return {"sum": np.uint32(sum)}, {}


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Makes trainers of the fake robot that learn nothing: `update` is called with the batches of each step."""
    pytest.importorskip("jax")
    from tether.launch.trainer import Trainer

    rlpd = catalog.algorithm("rlpd")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.toml").write_text(FAKE)

    def make(*more, update=Sums.update, prior=()):
        stub = SimpleNamespace(Config=rlpd.Config, init=Sums.init, update=update)
        monkeypatch.setattr(catalog, "algorithm", lambda name: stub)
        task = catalog.make_task(catalog.load_spec("fake.toml"))
        return Trainer(task, config.load("cpu", "course", [*SETTINGS, "learner.start_steps=1", *more]), 0, prior)

    return make


@pytest.fixture
def records(trainer):
    """60 records of the fake robot, every third of them driven by a person."""
    env, found = catalog.make_env(catalog.make_task(catalog.load_spec("fake.toml")), seed=1), []
    env.on_record.append(found.append)
    rng = np.random.default_rng(1)
    env.reset()
    while len(found) < 60:
        env.source = "policy" if len(found) % 3 else "takeover"
        _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 2))
        if terminated or truncated:
            env.reset()
    env.close()
    return found


def test_the_share_of_prior_data_follows_its_schedule(trainer, records):
    def shares(*more):
        """Prior rows of each mini-batch of each update."""
        counts = []

        def update(agent, state, batches):
            counts.append((batches["reward"] == 777).sum(-1).tolist())
            return state, {}

        made = trainer("agent.utd=5", *more, update=update)
        for _ in range(50):
            made.prior.add("p", Step(np.zeros(made.task.observation_size), np.zeros(2), np.zeros(2), 777.0))
        for record in records:
            if record.source != "takeover":
                made.push("a", record)
        return counts

    assert all(counts == [16] * 5 for counts in shares())
    assert all(counts == [8] * 5 for counts in shares("learner.prior_share=0.25", "learner.prior_share_end=0.9"))
    found = shares("learner.prior_share=0.75", "learner.prior_share_end=0.25", "learner.prior_anneal=40")
    assert len(found) > 12
    for i, counts in enumerate(found):
        assert counts == [round(32 * (0.75 - 0.5 * min(5 * i / 40, 1)))] * 5
    assert shares("learner.prior_anneal=10")[2:] == [[0] * 5] * (len(found) - 2)


def test_an_update_has_its_batch_to_itself_while_the_next_one_is_drawn(trainer, records):
    calls = []

    def update(agent, state, batches):
        if calls:
            before, copied = calls[-1]
            assert all((before[name] == copied[name]).all() for name in copied)
        calls.append((batches, {name: values.copy() for name, values in batches.items()}))
        return state, {}

    made = trainer(update=update, prior=[records])
    for record in records:
        made.push("a", record)
    assert len(calls) > 30


@pytest.mark.parametrize("more", [(), ("learner.takeover_reward=-1",)])
def test_a_resumed_training_draws_what_an_uninterrupted_one_draws(trainer, records, tmp_path, more):
    settings = ("agent.utd=2", "agent.batch=16", "agent.n_step=3", "learner.prior_anneal=60", *more)
    whole = trainer(*settings, prior=[records])
    for i, record in enumerate(records):
        whole.push("a", record)
        if i == 20:
            whole.save(tmp_path / "snapshots")
            saved = whole.state["sum"]
    assert 0 < whole.replay.takeovers < len(whole.replay) and whole.updates > 60
    resumed = trainer(*settings, prior=[records])
    cursor, _ = resumed.load(tmp_path / "snapshots")
    assert resumed.state["sum"] == saved
    for record in records:
        resumed.push("a", record, train=record.seq > cursor["a"])
    assert resumed.updates == whole.updates and resumed.state["sum"] == whole.state["sum"] != saved


def test_where_takeovers_are_the_reward_neither_run_nor_prior_data_have_another(trainer, records):
    shown = [record._replace(source="teacher") for record in records]
    made, plain = (trainer(*more, prior=[shown]) for more in (["learner.takeover_reward=-1"], []))
    rewards = []
    for training in (made, plain):
        for record in records:
            training.push("a", record, train=False)
        rewards += [set(replay.sample(np.random.default_rng(0), 2000)["reward"]) for replay in
                    (training.replay, training.prior)]  # fmt: skip
    assert rewards[:2] == [{0.0, -1.0}, {0.0}] and min(map(len, rewards[2:])) > 20
    assert len(made.replay) == len(plain.replay) and made.replay.takeovers == plain.replay.takeovers
    begun = sum(b.source == "takeover" != a.source for a, b in zip(records, records[1:], strict=False)
                if a.action is not None and b.action is not None)  # fmt: skip
    assert begun > 5 and sum(made.replay._links["reward"]) == -begun


def test_takeovers_are_known_by_the_source_of_their_record(trainer, records):
    made = trainer()
    for record in records:
        made.push("a", record, train=False)
    open_steps = [r for r, after in zip(records, records[1:], strict=False) if r.action is not None]
    driven = sum(r.source == "takeover" and bool((abs(r.action) <= 1).all()) for r in open_steps)
    assert driven > 5 and made.replay.takeovers == driven


@pytest.mark.parametrize(
    "image, found",
    [
        (np.zeros((2, 3, 1), np.uint8), r"uint8 \(2, 3, 1\)"),
        (np.zeros((2, 3, 2), np.float32), r"float32 \(2, 3, 2\)"),
        (None, "no image"),
    ],
)
def test_an_image_that_does_not_fit_is_refused_and_changes_nothing(image, found):
    replay = Replay(3, 3, 2, images=IMAGES)
    for number in range(3):
        replay.add("a", step(number))
    wrong = step(3)
    wrong.images = image if image is None else {"camera": image}
    before = replay.sample(np.random.default_rng(0), 50)
    with pytest.raises(ReplayError, match=rf"camera is {found}, this buffer takes uint8 \(2, 3, 2\)"):
        replay.add("a", wrong)
    after = replay.sample(np.random.default_rng(0), 50)
    assert set(after["obs"][:, 0]) == {0, 1}
    assert all((before[key] == after[key]).all() for key in before)


@pytest.mark.parametrize("side", [64, 128])
def test_images_are_stored_once(side):
    steps, bytes_taken = 500, []
    for images in (None, {"camera": (side, side, 3)}):
        tracemalloc.start()
        replay = Replay(steps, 48, 12, images=images)
        bytes_taken.append(tracemalloc.get_traced_memory()[0])
        for number in range(2 * steps):
            picture = {"camera": np.full((side, side, 3), number % 251, np.uint8)}
            replay.add("a", Step(np.zeros(48), np.zeros(12), np.zeros(12), images=picture))
        assert tracemalloc.get_traced_memory()[0] < bytes_taken[-1] + 50_000 + side**2 * 3 * 2
        tracemalloc.stop()
    state, all_of_it = bytes_taken
    raw = steps * side * side * 3
    assert raw < all_of_it - state < 1.01 * raw and all_of_it < 1.05 * raw
    assert state < steps * (4 * (48 + 2 * 12) + 50)


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


def test_large_numbers_are_finite_too():
    replay = Replay(3, 3, 2)
    large = step(0)
    large.obs = np.float32([1e30, -1e30, 0])  # their squares are not
    replay.add("a", large)
    replay.add("a", step(1))
    np.testing.assert_array_equal(replay.sample(np.random.default_rng(0), 1)["obs"], [large.obs])


def test_batches_that_cannot_be_cut_are_refused():
    a = {"obs": np.zeros((4, 3)), "reward": np.zeros(4)}
    with pytest.raises(ValueError):
        minibatches(a, 2, 3)
