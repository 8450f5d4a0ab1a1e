"""Any Gymnasium environment with a Box action space, behind the interface the actor drives a robot by."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from ..drivers.base import Channel, Command, Reading
from .env import GENTLE, RecordingEnv
from .task import Outcome, TaskError, TaskSpec

PREFIX = "gym:"
DEFAULT_HZ = 30.0  # for environments that do not say


def make(name: str) -> gymnasium.Env:
    """The environment of `gym:<id>`. Raises TaskError when it is unknown or its spaces do not fit."""
    try:
        env = gymnasium.make(name.removeprefix(PREFIX))
    except (gymnasium.error.Error, ImportError) as error:
        raise TaskError(f"{name}: {error}") from None
    for space, what in ((env.action_space, "action"), (env.observation_space, "observation")):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise TaskError(f"{name}: its {what} space is {space}; tether trains on one-dimensional Box spaces")
    if not env.action_space.is_bounded():  # type: ignore[attr-defined]
        raise TaskError(f"{name}: its action space is unbounded; wrap it in a bounded one")
    return env


def declare(env: gymnasium.Env, hz: float) -> tuple[tuple[Channel, ...], Command]:
    """The one channel an environment reads and the command it takes."""
    size, box = env.observation_space.shape[0], env.action_space  # type: ignore[index]
    channel = Channel("observation", size, "1", hz, 0.0, (1.0,) * size)
    ends = box.low, box.high, (box.low + box.high) / 2  # type: ignore[attr-defined]
    low, high, rest = (tuple(map(float, end)) for end in ends)
    names, n = tuple(f"action{i}" for i in range(len(low))), len(low)
    return (channel,), Command(names, ("1",) * n, low, high, low, high, (np.inf,) * n, rest)


def spec(name: str) -> TaskSpec:
    """The TaskSpec of `gym:<id>`."""
    env = make(name)
    hz = float(env.metadata.get("render_fps") or DEFAULT_HZ)
    limit = env.spec.max_episode_steps if env.spec else None
    env.close()
    return TaskSpec(name=name, robot=name, kind="gym", hz=hz, episode_s=(limit or 1000) / hz, text=name)


class GymTask:
    """What of a `Task` an environment needs that resets itself; reward and termination come with its records."""

    relabels = False
    _never_asked: Any = None  # it is no course, starts again by itself and tells its rewards
    advance = start = from_rest = walls = recover = spot = in_hindsight = _never_asked

    def __init__(self, task: TaskSpec, channels: tuple[Channel, ...], command: Command) -> None:
        self.spec = task
        self.observation_size = channels[0].size
        self.rest = np.zeros(command.size, np.float32)

    def begin(self, reading: Reading) -> None:
        """Nothing to keep."""

    def observe(self, progress: Any, reading: Reading, action: np.ndarray) -> np.ndarray:
        """The environment's own observation."""
        return reading.values["observation"]


class GymEnv(RecordingEnv):
    """Actions in [-1, 1] onto the environment's box."""

    def __init__(self, task: GymTask, env: gymnasium.Env, command: Command) -> None:
        super().__init__(task, command)
        self.env = env
        self.observation_space = env.observation_space
        self._ticks, self._open = 0, False
        self._reading = self._read(np.zeros(task.observation_size))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Close the segment and start an episode. `seed` as in Gymnasium."""
        self._end_segment()
        obs, info = self.env.reset(seed=seed, options=options)
        self._reading = self._read(obs)
        return self._reading.values["observation"], info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step; `action` in [-1, 1]."""
        self.action = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        native = self.command.to_command(self.action).astype(self.env.action_space.dtype)
        obs, reward, terminated, truncated, info = self.env.step(native)
        before, self._reading = self._reading, self._read(obs)
        self._ticks += 1
        self._open = True
        outcome = Outcome(float(reward), bool(terminated), bool(truncated and not terminated), {})
        self._emit(self._now(), before, self.action, outcome, self.source)
        return self._reading.values["observation"], outcome.reward, outcome.terminated, bool(truncated), info

    def close(self) -> None:
        """End the open segment."""
        self._end_segment()
        self.env.close()

    def _end_segment(self) -> None:
        if self._open:
            self._emit(self._now(), self._reading, None, GENTLE, self.source)
        self._open = False

    def _read(self, obs: np.ndarray) -> Reading:
        return Reading({"observation": np.array(obs, np.float32)}, {"observation": self._now()})

    def _now(self) -> float:
        return self._ticks / self.task.spec.hz
