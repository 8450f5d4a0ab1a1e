"""Experience as a ring of steps: an observation is stored once, n-step returns are made when sampling."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Batch = dict[str, np.ndarray]

_STRIDE = 32  # steps a skip link spans: a walk of k steps is k // 32 + k % 32 look-ups


class ReplayError(ValueError):
    """Experience that cannot be stored, or a batch that cannot be made. Says which and why."""


class Step(Protocol):
    """What `Replay.add` reads of a step of a stream."""

    @property
    def obs(self) -> np.ndarray: ...  # (o,)
    @property
    def prev_action(self) -> np.ndarray: ...  # (a,) executed the step before
    @property
    def action(self) -> np.ndarray | None: ...  # (a,) executed; None: the observation that ends a segment
    @property
    def reward(self) -> float: ...
    @property
    def terminated(self) -> bool: ...
    @property
    def truncated(self) -> bool: ...
    @property
    def train(self) -> bool: ...


@dataclass
class _Tail:
    """The newest steps of a segment that is still growing."""

    segment: int
    steps: deque[int] = field(default_factory=lambda: deque(maxlen=_STRIDE))
    ended: bool = False  # terminated or truncated: only the final observation may follow


class Replay:
    """The newest `capacity` steps of any number of interleaved streams.

    A step's successor is the next one of its own stream, whatever lies between them in the ring. `len` is
    the number of steps that can be drawn: those to be trained on whose successor is known. The same calls
    in the same order give the same buffer, so it is restored by adding the records again.
    """

    def __init__(
        self, capacity: int, obs_size: int, action_size: int, n_step: int = 1, gamma: float = 0.99
    ) -> None:
        if min(capacity, obs_size, action_size, n_step) < 1 or not 0 <= gamma <= 1:
            raise ReplayError(
                f"capacity {capacity}, sizes {obs_size} and {action_size}, n_step {n_step}: at least 1 each; "
                f"gamma {gamma}: between 0 and 1"
            )
        self.capacity, self.n_step, self.gamma = capacity, n_step, np.float32(gamma)
        self._obs = np.zeros((capacity, obs_size), np.float32)
        self._prev = np.zeros((capacity, action_size), np.float32)
        self._action = np.zeros((capacity, action_size), np.float32)
        self._reward = np.zeros(capacity, np.float32)
        self._mask = np.zeros(capacity, np.float32)  # 0 at a true terminal
        self._train = np.zeros(capacity, bool)  # to be learned from
        self._next = np.full(capacity, -1, np.int64)  # slot of the successor; -1 while there is none
        self._skip = np.zeros(capacity, np.int64)  # slot _STRIDE steps later, once the segment is that long
        self._position = np.zeros(capacity, np.int64)  # in its segment
        self._segment = np.zeros(capacity, np.int64)
        self._length = np.zeros(64, np.int64)  # steps of each segment; the only array that grows
        self._segments = 0
        self._drawable = np.zeros(capacity, np.int64)  # slots that can be drawn, packed, in no order
        self._place = np.full(capacity, -1, np.int64)  # of each slot in _drawable
        self._count = 0
        self._added = 0  # steps ever added: number i lies in slot i % capacity
        self._tails: dict[Hashable, _Tail] = {}

    def __len__(self) -> int:
        return self._count

    def add(self, stream: Hashable, step: Step) -> None:
        """Append the next step of `stream`.

        A step becomes drawable when its successor arrives. After one that terminated or was truncated only
        a step without an action counts as its successor: the next episode's first observation is not.
        Raises ReplayError for wrong shapes and numbers that are not finite.
        """
        obs, previous = self._checked("obs", step.obs), self._checked("prev_action", step.prev_action)
        action = None if step.action is None else self._checked("action", step.action)
        if not np.isfinite(step.reward):
            raise ReplayError(f"stream {stream}: reward {step.reward} is not finite")
        slot = self._added % self.capacity
        self._undraw(slot)
        self._obs[slot], self._prev[slot] = obs, np.clip(previous, -1.0, 1.0)
        self._action[slot] = 0.0 if action is None else action
        self._reward[slot] = 0.0 if action is None else step.reward
        self._mask[slot] = not step.terminated
        self._train[slot] = step.train
        self._next[slot] = -1
        tail = self._append(stream, slot, closes=action is None)
        tail.ended = step.terminated or step.truncated
        if action is None:
            del self._tails[stream]
        self._added += 1

    def sample(self, rng: np.random.Generator, n: int) -> Batch:
        """n steps drawn uniformly, with replacement: float32 arrays of n rows.

        obs, action, prev_action; reward: sum of the next n_step discounted rewards, fewer where the
        segment, or what is trained on, ends before; discount: gamma^k, 0 only after a true terminal;
        next_obs and next_prev_action: k steps later, where the value is bootstrapped.
        """
        return self._batch(self._draw(rng, n))

    def sample_future(self, rng: np.random.Generator, n: int) -> Batch:
        """As `sample`, and "future_obs": the observation of a uniformly drawn later step of the segment."""
        slots = self._draw(rng, n)
        left = self._length[self._segment[slots]] - 1 - self._position[slots]
        future = self._walk(slots, rng.integers(1, left, endpoint=True))
        return self._batch(slots) | {"future_obs": self._obs[future]}

    def _checked(self, name: str, value: np.ndarray) -> np.ndarray:
        value, size = np.asarray(value, np.float32), (self._obs if name == "obs" else self._action).shape[1]
        if value.shape != (size,):
            raise ReplayError(f"{name} has shape {value.shape}, this buffer takes ({size},)")
        if not np.isfinite(value).all():
            raise ReplayError(f"{name} {value} is not finite")
        return value

    def _append(self, stream: Hashable, slot: int, closes: bool) -> _Tail:
        """Link a slot to what came before it in its stream, or begin a segment with it."""
        tail = self._tails.get(stream)
        # an idle stream may have lost its last step to the others
        if tail is None or self._added - tail.steps[-1] >= self.capacity or (tail.ended and not closes):
            tail = self._tails[stream] = _Tail(self._segments)
            if self._segments == len(self._length):
                self._length = np.concatenate([self._length, np.zeros_like(self._length)])
            self._segments += 1
        else:
            before = tail.steps[-1] % self.capacity
            self._next[before] = slot
            if self._train[before]:
                self._place[before], self._drawable[self._count] = self._count, before
                self._count += 1
            if len(tail.steps) == _STRIDE and self._added - tail.steps[0] < self.capacity:
                self._skip[tail.steps[0] % self.capacity] = slot
        self._segment[slot], self._position[slot] = tail.segment, self._length[tail.segment]
        self._length[tail.segment] += 1
        tail.steps.append(self._added)
        return tail

    def _undraw(self, slot: int) -> None:
        """Take a slot out of the drawable ones; the last of them takes its place."""
        place = self._place[slot]
        if place >= 0:
            self._count -= 1
            moved = self._drawable[self._count]
            self._drawable[place], self._place[moved] = moved, place
            self._place[slot] = -1

    def _draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        if not self._count:
            raise ReplayError("nothing to draw: no step to train on has a successor yet")
        return self._drawable[rng.integers(self._count, size=n)]

    def _batch(self, slots: np.ndarray) -> Batch:
        reward, discount = self._reward[slots], self.gamma * self._mask[slots]
        last = self._next[slots]  # where to bootstrap
        for _ in range(1, self.n_step):
            on = self._train[last] & (self._next[last] >= 0)
            reward += np.where(on, discount * self._reward[last], 0)
            discount *= np.where(on, self.gamma * self._mask[last], 1)
            last = np.where(on, self._next[last], last)
        return {
            "obs": self._obs.take(slots, axis=0),  # three times as fast as an index
            "action": self._action.take(slots, axis=0),
            "prev_action": self._prev.take(slots, axis=0),
            "reward": reward,
            "discount": discount,
            "next_obs": self._obs.take(last, axis=0),
            "next_prev_action": self._prev.take(last, axis=0),
        }

    def _walk(self, slots: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """The slots `distance` steps later in their segments, which must reach that far."""
        slots = slots.copy()
        for links, count in zip((self._skip, self._next), np.divmod(distance, _STRIDE), strict=True):
            for i in range(count.max(initial=0)):
                on = count > i
                slots[on] = links[slots[on]]
        return slots


def symmetric(online: Batch, prior: Batch) -> Batch:
    """Half and half: row 0 online, row 1 prior, and so on, so every even-sized run of rows is half prior.

    Both need the same keys and number of rows (ReplayError).
    """
    if online.keys() != prior.keys():
        raise ReplayError(f"online batch has {sorted(online)}, prior batch has {sorted(prior)}")
    for key in online:
        if online[key].shape != prior[key].shape:
            raise ReplayError(f"{key}: online {online[key].shape}, prior {prior[key].shape}; must be equal")
    mixed = {k: np.empty((2 * len(v), *v.shape[1:]), v.dtype) for k, v in online.items()}
    for key, value in mixed.items():
        value[0::2], value[1::2] = online[key], prior[key]
    return mixed


def minibatches(batch: Batch, utd: int, size: int) -> Batch:
    """(utd * size, ...) rows -> (utd, size, ...), in order. Any other number of rows is a ReplayError."""
    for key, value in batch.items():
        if len(value) != utd * size:
            raise ReplayError(f"{key} has {len(value)} rows; {utd} mini-batches of {size} need {utd * size}")
    return {k: v.reshape(utd, size, *v.shape[1:]) for k, v in batch.items()}
