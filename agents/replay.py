"""Experience as a ring of steps: an observation is stored once, n-step returns are made when sampling."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]

_TRIES = 32  # at a later step of the same segment; then the next one is taken


class ReplayError(ValueError):
    """Experience that cannot be stored, or a batch that cannot be made. Says which and why."""


class Replay:
    """The newest `capacity` steps of any number of interleaved streams.

    A step's successor is the next one of its own stream, whatever lies between them in the ring. `len` is
    the number of steps that can be drawn: those to be trained on whose successor is known. The same calls
    in the same order give the same buffer, so it is restored by adding the records again.
    """

    def __init__(self, capacity: int, obs_size: int, action_size: int, n_step: int = 1, gamma: float = 0.99) -> None:
        self.capacity, self.n_step, self.gamma = capacity, n_step, np.float32(gamma)
        self._obs = np.zeros((capacity, obs_size), np.float32)
        self._prev = np.zeros((capacity, action_size), np.float32)
        self._action = np.zeros((capacity, action_size), np.float32)
        self._reward = np.zeros(capacity, np.float32)
        self._mask = np.zeros(capacity, np.float32)  # 0 at a true terminal
        self._train = np.zeros(capacity, bool)  # to be learned from
        self._next = np.full(capacity, -1, np.int64)  # slot of the successor; -1 while there is none
        self._segment = np.zeros(capacity, np.int64)
        self._newest: list[int] = []  # step of each segment
        self._drawable = np.zeros(capacity, np.int64)  # slots that can be drawn, packed, in no order
        self._place = np.full(capacity, -1, np.int64)  # of each slot in _drawable
        self._count = 0
        self._added = 0  # steps ever added: number i lies in slot i % capacity
        self._tails: dict[Hashable, tuple[int, bool]] = {}  # newest step of each stream; did it end there?

    def __len__(self) -> int:
        return self._count

    def add(self, stream: Hashable, step: Any) -> None:
        """Append the next step of `stream`: something with obs (o,), prev_action (a,) executed before it,
        action (a,) executed (None: the observation that ends a segment), reward, terminated, truncated, train.

        A step becomes drawable when its successor arrives. After one that terminated or was truncated only
        a step without an action counts as its successor: the next episode's first observation is not.
        Raises ReplayError for wrong shapes and numbers that are not finite.
        """
        obs, previous = self._checked("obs", step.obs), self._checked("prev_action", step.prev_action)
        closes = step.action is None
        action = 0.0 if step.action is None else self._checked("action", step.action)
        if not np.isfinite(step.reward):
            raise ReplayError(f"stream {stream}: reward {step.reward} is not finite")
        number, slot = self._added, self._added % self.capacity
        self._undraw(slot)
        self._obs[slot], self._prev[slot] = obs, np.clip(previous, -1.0, 1.0)
        self._action[slot] = action
        self._reward[slot] = 0.0 if closes else step.reward
        self._mask[slot] = not step.terminated
        self._train[slot] = step.train
        self._next[slot] = -1
        before, ended = self._tails.pop(stream, (-self.capacity, False))
        # an idle stream may have lost its newest step to the others
        if number - before >= self.capacity or (ended and not closes):
            self._segment[slot] = len(self._newest)
            self._newest.append(number)
        else:
            self._link(before % self.capacity, slot)
            self._newest[self._segment[slot]] = number
        if not closes:
            self._tails[stream] = (number, step.terminated or step.truncated)
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
        segment = self._segment[slots]
        number = self._added - 1 - (self._added - 1 - slots) % self.capacity
        newest = [self._newest[i] for i in segment]
        # later steps of any stream; the first that is of the same segment counts
        drawn = rng.integers(number + 1, newest, (_TRIES, n), endpoint=True) % self.capacity
        same = self._segment[drawn] == segment
        future = np.where(same.any(0), drawn[same.argmax(0), np.arange(n)], self._next[slots])
        return self._batch(slots) | {"future_obs": self._obs[future]}

    def _checked(self, name: str, value: np.ndarray) -> np.ndarray:
        value, size = np.asarray(value, np.float32), (self._obs if name == "obs" else self._action).shape[1]
        if value.shape != (size,):
            raise ReplayError(f"{name} has shape {value.shape}, this buffer takes ({size},)")
        if not np.isfinite(value).all():
            raise ReplayError(f"{name} {value} is not finite")
        return value

    def _link(self, before: int, slot: int) -> None:
        """Let `slot` follow `before`, which can be drawn from now on if it is to be trained on."""
        self._next[before], self._segment[slot] = slot, self._segment[before]
        if self._train[before]:
            self._place[before], self._drawable[self._count] = self._count, before
            self._count += 1

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


def symmetric(online: Batch, prior: Batch) -> Batch:
    """Half and half: row 0 online, row 1 prior, and so on, so every even-sized run of rows is half prior."""
    pairs = {k: np.stack([v, prior[k]], axis=1) for k, v in online.items()}
    return {k: v.reshape(-1, *v.shape[2:]) for k, v in pairs.items()}


def minibatches(batch: Batch, utd: int, size: int) -> Batch:
    """(utd * size, ...) rows -> (utd, size, ...), in order. Any other number of rows is a ValueError."""
    return {k: v.reshape(utd, size, *v.shape[1:]) for k, v in batch.items()}
