"""The images of a replay buffer: each stored once, stacks rebuilt by index."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class ReplayError(ValueError):
    """Experience that cannot be stored, or a batch that cannot be made. Says which and why."""


class FrameRing:
    """The images of a ring of steps, each stored once, in the slot of its step; stacks are rebuilt by index."""

    def __init__(self, capacity: int, images: Mapping[str, tuple[int, ...]], stack: int) -> None:
        self.shapes = {name: (stack, *shape) for name, shape in images.items()}  # of a step's stacks
        self._frames = {name: np.zeros((capacity, *shape), np.uint8) for name, shape in images.items()}
        self._before = np.zeros(capacity, np.int32)  # slot of the frame before; its own where a segment begins
        self._stack = stack

    def check(self, images: Mapping[str, np.ndarray] | None) -> None:
        """Raises ReplayError for images this ring does not take."""
        for name, frames in self._frames.items():
            image = (images or {}).get(name)
            found = "no image" if image is None else f"{image.dtype} {image.shape}"
            if found != f"uint8 {frames.shape[1:]}":
                raise ReplayError(f"{name} is {found}, this buffer takes uint8 {frames.shape[1:]}")

    def put(self, slot: int, images: Mapping[str, np.ndarray], before: int) -> None:
        """Store a step's images. `before`: slot of the one before in its segment, or `slot`."""
        self._before[slot] = before
        for name, frames in self._frames.items():
            frames[slot] = images[name]

    def begin(self, slot: int) -> None:
        """What lay before this slot is gone: its segment begins here."""
        self._before[slot] = slot

    def fill(self, out: dict[str, np.ndarray], prefix: str, slots: np.ndarray) -> None:
        """Write the stacks that end in `slots` into the arrays PREFIX + name: (..., stack, height, width, channels).
        The first frame of a segment is repeated."""
        chain = [slots]
        for _ in range(1, self._stack):
            chain.append(self._before[chain[-1]])
        index = np.stack(chain[::-1], axis=-1)
        for name, frames in self._frames.items():
            take(frames, index, out[prefix + name])


def take(values: np.ndarray, slots: np.ndarray, out: np.ndarray) -> None:
    """values[slots] into `out`, three times as fast; `mode` because "raise" would copy once more."""
    if out.flags.c_contiguous:
        values.take(slots, axis=0, out=out, mode="clip")
    else:  # some columns of each mini-batch
        for one, room in zip(slots, out, strict=True):
            values.take(one, axis=0, out=room, mode="clip")
