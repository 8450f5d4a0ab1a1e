"""From a reading to the vector a policy sees."""

from __future__ import annotations

import numpy as np

from ..drivers.base import Channel, Reading


class Observer:
    """The observed channels in declared order, each divided by its declared scale: (size,) float32."""

    def __init__(self, channels: tuple[Channel, ...]) -> None:
        self._names = [c.name for c in channels if c.observed]
        scales = [s for c in channels if c.observed for s in c.scale]
        ends = np.cumsum([c.size for c in channels if c.observed])
        self.slices = {c: slice(int(e) - n, int(e)) for c, n, e in zip(
            self._names, [c.size for c in channels if c.observed], ends, strict=True)}  # fmt: skip
        self.scale = np.asarray(scales, np.float32)
        self._factor = 1.0 / self.scale
        self.size = len(scales)

    def __call__(self, reading: Reading) -> np.ndarray:
        return np.concatenate([reading.values[n] for n in self._names]).astype(np.float32) * self._factor
