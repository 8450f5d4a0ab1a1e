"""Experience as a ring of steps: an observation is stored once, n-step returns and frame stacks are made when
sampling."""

from __future__ import annotations

import math
from array import array
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from .frames import FrameRing, ReplayError, take

Batch = dict[str, np.ndarray]

# What sampling needs before it knows which observations: together, so that it is one cache miss. `next`: slot of the
# successor, -1 while there is none; `mask`: 0 at a true terminal; `train`: to be learned from.
_LINK = np.dtype(
    [("next", np.int32), ("reward", np.float32), ("mask", np.float32), ("train", bool), ("takeover", bool)], align=True
)
_ALIGNMENT = 64  # bytes: what JAX asks for
_TRIES = 32  # at a later step of the same segment; then the next one is taken


class Replay:
    """The newest `capacity` steps of any number of interleaved streams.

    A step's successor is the next one of its own stream, whatever lies between them in the ring. `len` is
    the number of steps that can be drawn: those to be trained on whose successor is known; `takeovers` of
    them were driven by a person. The same calls in the same order give the same buffer, so it is restored
    by adding the records again. With `images` ({name: (height, width, channels)}, uint8) batches have
    stacks of the last `stack` frames. Memory is taken as steps come in.
    """

    def __init__(
        self, capacity: int, obs_size: int, action_size: int, n_step: int = 1, gamma: float = 0.99,
        images: Mapping[str, tuple[int, ...]] | None = None, stack: int = 3,
    ) -> None:  # fmt: skip
        self.capacity, self.n_step, self.gamma = capacity, n_step, np.float32(gamma)
        sizes = {"obs": obs_size, "prev_action": action_size, "action": action_size}
        self._values = {name: _aligned((capacity, size)) for name, size in sizes.items()}
        self._links = np.zeros(capacity, _LINK)
        self._next, self._train, self._takeover = (self._links[name] for name in ("next", "train", "takeover"))
        self._segment = np.zeros(capacity, np.int32)
        self._newest = array("q")  # step of each segment
        self._drawable, self._taken_over = _Pool(capacity), _Pool(capacity)
        self._added = 0  # steps ever added: number i lies in slot i % capacity
        # newest step of each stream; did an episode end there? its discounted return so far
        self._tails: dict[Hashable, tuple[int, bool, float]] = {}
        self.return_max = 0.0  # the largest of these returns, by magnitude
        self._frames = FrameRing(capacity, images, stack) if images else None
        self._no_action = np.zeros(action_size, np.float32)

    def __len__(self) -> int:
        return self._drawable.count

    @property
    def takeovers(self) -> int:
        """Steps that can be drawn and were driven by a person."""
        return self._taken_over.count

    def add(self, stream: Hashable, step: Any) -> None:
        """Append the next step of `stream`: something with obs (o,), prev_action (a,) executed before it, within
        [-1, 1], action (a,) executed (None: the observation that ends a segment), reward, terminated, truncated,
        train, where a person drove takeover, and images ({name: uint8 array}) where this buffer takes some.

        A step becomes drawable when its successor arrives. After one that terminated or was truncated only
        a step without an action counts as its successor: the next episode's first observation is not.
        Raises ReplayError for wrong shapes and numbers that are not finite.
        """
        closes = step.action is None
        values = self._checked(stream, step)
        if self._frames:
            self._frames.check(step.images)
        number, slot = self._added, self._added % self.capacity
        if number >= self.capacity:
            self._forget(slot)
        for rows, value in zip(self._values.values(), values, strict=True):
            rows[slot] = value
        reward, takeover = 0.0 if closes else step.reward, getattr(step, "takeover", False)
        self._links[slot] = -1, reward, not step.terminated, step.train, takeover
        before, ended, total = self._tails.pop(stream, (-self.capacity, False, 0.0))
        # an idle stream may have lost its newest step to the others
        follows = number - before < self.capacity and (closes or not ended)
        if follows:
            self._link(before % self.capacity, slot)
            self._newest[self._segment[slot]] = number
        else:
            self._segment[slot] = len(self._newest)
            self._newest.append(number)
        if self._frames:
            self._frames.put(slot, step.images, before % self.capacity if follows else slot)
        if not closes:
            ends = step.terminated or step.truncated
            total = float(self.gamma) * total + reward if step.train else 0.0  # what is not trained on does not count
            self.return_max = max(self.return_max, abs(total))
            self._tails[stream] = (number, ends, 0.0 if ends else total)
        self._added += 1

    def sample(self, rng: np.random.Generator, n: int) -> Batch:
        """n steps drawn uniformly, with replacement: float32 arrays of n rows.

        obs, action, prev_action; reward: sum of the next n_step discounted rewards, fewer where the
        segment, or what is trained on, ends before; discount: gamma^k, 0 only after a true terminal;
        next_obs and next_prev_action: k steps later, where the value is bootstrapped; return_max: the same
        in all rows. With images obs/NAME and next_obs/NAME: uint8 (n, stack, height, width, channels), the newest
        frame last.
        """
        out = self._empty(n)
        out["return_max"][:] = self.return_max
        self._fill(out, self._drawable.draw(rng, n), rng)
        return out

    def blank(self, n: int) -> Batch:
        """n rows of zeros, as `sample` makes them."""
        return {name: np.zeros_like(values) for name, values in self._empty(n).items()}

    def _empty(self, n: int, future: bool = False) -> Batch:
        """Room for n rows."""
        obs, action = (self._values[name].shape[1] for name in ("obs", "action"))
        widths = {"obs": obs, "action": action, "prev_action": action, "next_obs": obs, "next_prev_action": action}
        out = {name: _aligned((n, width)) for name, width in widths.items()}
        out |= {name: _aligned((n,)) for name in ("reward", "discount", "return_max")}
        if future:
            out["future_obs"] = _aligned((n, obs))
        for name, shape in self._frames.shapes.items() if self._frames else ():
            out |= {f"{key}/{name}": _aligned((n, *shape), np.uint8) for key in ("obs", "next_obs")}
        return out

    def _checked(self, stream: Hashable, step: Any) -> list[np.ndarray]:
        """This step's numbers, in the order of `_values`. Raises ReplayError."""
        found = []
        for name, rows in self._values.items():
            value = getattr(step, name)
            value = self._no_action if value is None and name == "action" else np.asarray(value, np.float32)
            if value.shape != rows.shape[1:]:
                raise ReplayError(f"{name} has shape {value.shape}, this buffer takes {rows.shape[1:]}")
            if not math.isfinite(sum(value.tolist())):  # of float64: none overflows, and a third of the time
                raise ReplayError(f"{name} {value} is not finite")
            found.append(value)
        if not math.isfinite(step.reward):
            raise ReplayError(f"stream {stream}: reward {step.reward} is not finite")
        return found

    def _link(self, before: int, slot: int) -> None:
        """Let `slot` follow `before`, which can be drawn from now on if it is to be trained on."""
        self._next[before], self._segment[slot] = slot, self._segment[before]
        if self._train[before]:
            self._drawable.add(before)
            if self._takeover[before]:
                self._taken_over.add(before)

    def _forget(self, slot: int) -> None:
        """The step in a slot can no longer be drawn, nor be part of a stack."""
        self._drawable.discard(slot)
        self._taken_over.discard(slot)
        if self._frames and self._next[slot] >= 0:
            self._frames.begin(self._next[slot])

    def _fill(self, out: Batch, slots: np.ndarray, rng: np.random.Generator) -> None:
        """Write the steps in `slots` into the arrays of `out`, whose leading shape is that of `slots`."""
        link = self._links.take(slots)
        reward, discount, last = link["reward"], self.gamma * link["mask"], link["next"]  # last: where to bootstrap
        for _ in range(1, self.n_step):
            link = self._links.take(last)
            on = link["train"] & (link["next"] >= 0)
            reward += np.where(on, discount * link["reward"], 0)
            discount *= np.where(on, self.gamma * link["mask"], 1)
            last = np.where(on, link["next"], last)
        out["reward"][...], out["discount"][...] = reward, discount
        for name in ("obs", "prev_action"):  # the successor mostly lies beside its step, and is still in a cache
            take(self._values[name], slots, out[name])
            take(self._values[name], last, out[f"next_{name}"])
        take(self._values["action"], slots, out["action"])
        if self._frames:
            self._frames.fill(out, "obs/", slots)
            self._frames.fill(out, "next_obs/", last)
        if "future_obs" in out:
            future = self._future(slots.ravel(), rng).reshape(slots.shape)
            take(self._values["obs"], future, out["future_obs"])

    def _recent(self, rng: np.random.Generator, among: int, n: int) -> np.ndarray:
        """n slots of the newest `among` steps, of those that can be drawn."""
        slots = (self._added - 1 - np.arange(min(among, self._added, self.capacity))) % self.capacity
        slots = slots[self._drawable.has(slots)]
        return rng.choice(slots, n) if len(slots) else self._drawable.draw(rng, n)

    def _future(self, slots: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The slot of a later step of each one's segment."""
        out, segment = self._next[slots], self._segment[slots]
        number = self._added - 1 - (self._added - 1 - slots) % self.capacity
        newest = np.frombuffer(self._newest, np.int64)[segment]
        left = np.arange(len(slots))
        for _ in range(_TRIES):  # later steps of any stream; the first that is of the same segment counts
            drawn = rng.integers(number[left] + 1, newest[left], endpoint=True) % self.capacity
            same = self._segment[drawn] == segment[left]
            out[left[same]] = drawn[same]
            left = left[~same]
            if not len(left):
                break
        return out


class _Pool:
    """A set of slots, packed in no order, so that drawing one is one index."""

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self._slots = np.zeros(capacity, np.int32)
        self._place = np.zeros(capacity, np.int32)  # in _slots; of a slot that is not in the set it says nothing

    def add(self, slot: int) -> None:
        """Put in a slot that is not in the set."""
        self._slots[self.count], self._place[slot] = slot, self.count
        self.count += 1

    def discard(self, slot: int) -> None:
        """Take a slot out, if it is in; the last one takes its place."""
        if self.has(slot):
            self.count -= 1
            place, moved = self._place[slot], self._slots[self.count]
            self._slots[place], self._place[moved] = moved, place

    def has(self, slots: Any) -> Any:
        """Whether a slot, or each of many, is in the set."""
        place = self._place[slots]
        return (place < self.count) & (self._slots[place] == slots)

    def draw(self, rng: np.random.Generator, shape: int | tuple[int, int]) -> np.ndarray:
        """Slots drawn uniformly, with replacement."""
        if not self.count:
            raise ReplayError("nothing to draw: no step to train on has a successor yet")
        return self._slots[rng.integers(self.count, size=shape)].astype(np.intp)


class Strata:
    """Draws the mini-batches of a learner's step from online and prior steps, into two sets of arrays in turn.

    A batch may be read until the next but one is drawn. The arrays are kept because memory that is new to the
    process costs more than all that is written into it.
    """

    def __init__(
        self, online: Replay, prior: Replay, utd: int, size: int, future: bool = False, newest: int = 0
    ) -> None:
        self._online, self._prior, self._utd, self._size = online, prior, utd, size
        self._newest = newest
        self._rooms = [online._empty(utd * size, future) for _ in range(2)]

    def draw(self, rng: np.random.Generator, share: float) -> Batch:
        """utd mini-batches of `size` rows, one after the other, each with `share` of its rows (rounded) prior;
        with `future` also "future_obs", the observation of a uniformly drawn later step of the segment; with
        `newest` the online rows begin with one of so many newest steps.

        Online takeovers are in both strata (HIL-SERL): the prior one is drawn uniformly from the prior data and
        them. Where there is no prior data, it is there once it has as many steps as a mini-batch takes of it.
        """
        online, prior = self._online, self._prior
        rows = round(share * self._size)
        if not len(prior) and online.takeovers < rows:
            rows = 0
        taken = 0
        if rows and online.takeovers:  # as many in each mini-batch; on average exactly their share of the stratum
            taken = min(int(rows * online.takeovers / (online.takeovers + len(prior)) + rng.random()), rows)
        self._rooms.reverse()
        self._rooms[0]["return_max"][:] = max(online.return_max, prior.return_max)
        batches, at = minibatches(self._rooms[0], self._utd, self._size), 0
        for replay, pool, count in (
            (online, online._drawable, self._size - rows),
            (prior, prior._drawable, rows - taken),
            (online, online._taken_over, taken),
        ):
            if count:
                part = {name: values[:, at : at + count] for name, values in batches.items()}
                slots = pool.draw(rng, (self._utd, count))
                if self._newest and pool is online._drawable:
                    slots[:, 0] = online._recent(rng, self._newest, self._utd)
                replay._fill(part, slots, rng)
                at += count
        return dict(self._rooms[0])


def minibatches(batch: Batch, utd: int, size: int) -> Batch:
    """(utd * size, ...) rows -> (utd, size, ...), in order. Any other number of rows is a ValueError."""
    return {k: v.reshape(utd, size, *v.shape[1:]) for k, v in batch.items()}


def _aligned(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    """An array for anything, at an address from which JAX on a CPU reads it without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    at = -room.ctypes.data % _ALIGNMENT
    return room[at : at + size].view(dtype).reshape(shape)
