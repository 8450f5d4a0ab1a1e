"""Learning without a network: records go in, in order; updates, metrics and snapshots come out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..agents import bc, bound, snapshot
from ..agents.replay import Batch, Replay, Strata, minibatches
from ..robot_env.record import Record
from ..robot_env.sample import Fold, Sample, samples
from ..robot_env.task import Task
from . import catalog, compute
from .config import Config
from .evaluate import Episodes

# for what runs only once
ONCE: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BLOCK = 50  # steps that are held out together: neighbours tell too much of each other
ASIDE = 20_000  # steps kept of them


class Diverged(RuntimeError):
    """The training made a number that is not finite: which one, and what to do."""


class Trainer:
    """The learner's state and what moves it.

    `push` inserts one record and makes the updates of that step, on exactly the records so far: the same
    seed and records give the same weights. On several `devices` each of them takes its share of every batch.
    """

    def __init__(
        self, task: Task, config: Config, seed: int, prior: Iterable[Iterable[Record]] = (), devices: int = 1
    ) -> None:
        self.task, self.config = task, config
        self._algorithm = catalog.algorithm(config.algorithm)
        self.agent = self._algorithm.Config(**config.agent)
        sizes = (task.observation_size, len(task.rest))
        shape = (config.learner.replay_capacity, *sizes, self.agent.n_step, self.agent.gamma)
        self.replay, self.prior = Replay(*shape), Replay(*shape)
        for i, records in enumerate(prior):
            for sample in samples(task, records, config.learner.takeover_reward):
                self.prior.add((i, sample.part), sample)
        mini_batches = self.agent.utd, self.agent.batch
        newest = bound.WINDOW if getattr(self.agent, "bound_start", None) else 0  # on which its model is measured
        self._strata = Strata(self.replay, self.prior, *mini_batches, task.spec.hindsight > 0.0, newest)
        # steps before the first update; with prior data updates begin at once
        self.start_steps = 1 if len(self.prior) else config.learner.start_steps
        compute.full_precision()
        compute.keep_compiled()
        mesh = compute.mesh(devices, self.agent)
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        # of batches (utd, batch, ...); one device takes them as they are
        self._split = NamedSharding(mesh, PartitionSpec(None, "batch")) if devices > 1 else None
        self._key = jax.random.key(seed)
        self._init = jax.jit(self._algorithm.init, static_argnums=(0, 2, 3)).lower(self.agent, self._key, *sizes)
        self._rng = np.random.default_rng(seed)
        self._streams: dict[str, tuple[Fold, Episodes]] = {}
        self.steps = 0
        self.updates = 0
        self.update_s = 0.0  # spent in updates, sampling included
        self._metrics: dict[str, Any] = {}  # of the newest update, which may go on
        self._ended: dict[str, Any] = {}  # of the newest that has ended and had a part for the actor
        self._aside = Replay(min(ASIDE, shape[0]), *shape[1:])  # held out
        self._measured: dict[str, jax.Array] = {}  # losses at the last `metrics`: on it, and on what was trained on
        self._restored = 0  # updates that another process made

    @cached_property
    def state(self) -> Any:
        """All that is learned. The first to ask makes a fresh one."""
        return self._placed(self._init.compile(ONCE)(self._key))

    @property
    def cursor(self) -> dict[str, int]:
        """The newest record of every stream."""
        return {name: episodes.seq for name, (_, episodes) in self._streams.items()}

    def stream_steps(self, stream: str) -> int:
        """Steps of one stream."""
        return self._streams[stream][1].steps if stream in self._streams else 0

    def push(self, stream: str, record: Record, train: bool = True) -> dict[str, float]:
        """Insert a record and make its step's updates. Returns the `env/...` metrics it completes."""
        if stream not in self._streams:
            fold = Fold(self.task, takeover_reward=self.config.learner.takeover_reward)
            self._streams[stream] = fold, Episodes()
        fold, episodes = self._streams[stream]
        for sample in fold.push(record):
            late = fold.waits and sample.action is not None  # it is the step before
            self._insert((stream, sample.part), sample, episodes.steps - late)
        metrics = episodes.push(record)
        if record.action is not None:
            self.steps += 1
            if train and self.steps >= self.start_steps and len(self.replay):
                self._update()
        return metrics

    def _insert(self, stream: tuple[str, int], sample: Sample, step: int) -> None:
        """Put a stream's sample where it belongs: some blocks of steps are held out from training."""
        every, block = self.config.learner.held_out, step // BLOCK
        held = every > 0 and block % every == every - 1
        self.replay.add(stream, sample._replace(train=False) if held else sample)
        if held:
            self._aside.add((*stream, block), sample)
        elif every and block and block % every == 0 and step % BLOCK == 0:  # successor of the last one held
            self._aside.add((*stream, block - 1), sample)

    def warm_up(self) -> None:
        """Compile the update before anything moves. From shapes, so that the state can be made meanwhile."""
        blank = minibatches(self.replay.blank(self.agent.utd * self.agent.batch), self.agent.utd, self.agent.batch)
        batches = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=self._split) for k, v in blank.items()}
        if lower := getattr(self._algorithm.update, "lower", None):  # else it is compiled at its first call
            lower(self.agent, self._shapes(), batches).compile()

    def warm_up_measure(self) -> None:
        """Compile what `metrics` measures with, too; nothing waits for it at the start."""
        lower = getattr(getattr(self._algorithm, "held_out", None), "lower", None)
        if lower and self.config.learner.held_out:
            lower(self.agent, self._shapes(), self.replay.blank(self.agent.batch)).compile()

    def _shapes(self) -> Any:
        """Those of the state."""
        made, on = self._init.out_info, self._everywhere
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), made)

    def metrics(self) -> dict[str, float]:
        """`learn/...` values of the newest update that has ended: nothing waits for them."""
        out = {f"learn/{k}": float(v) for k, v in ((self._ended or self._metrics) | self._measured).items()}
        measure = getattr(self._algorithm, "held_out", None)  # those that plug in need not
        if measure and len(self._aside) >= BLOCK and len(self.replay):  # told next time: nothing waits for it
            for name, replay in (("held_out_loss", self._aside), ("seen_loss", self.replay)):
                batch = replay.sample(np.random.default_rng(self.steps), self.agent.batch)
                batch["return_max"][:] = self._return_max  # as in training
                self._measured[name] = measure(self.agent, self.state, batch)
        return out | {
            "learn/updates": self.updates,
            "learn/utd": self.updates / max(self.steps - self.start_steps + 1, 1),
            "learn/update_ms": 1e3 * self.update_s / max(self.updates - self._restored, 1),
        }

    def policy(self) -> dict[str, np.ndarray]:
        """The actor's weights, by name. Raises Diverged."""
        return self._finite(self._algorithm.policy_params(self.agent, self.state))

    def policy_spec(self) -> dict[str, Any]:
        """The actor's layers, as the NumPy runtime takes them."""
        return self._algorithm.policy_spec(self.agent, self._shapes())  # an actor may start before there is a state

    def expected(self, observations: np.ndarray, prev_actions: np.ndarray) -> np.ndarray:
        """(n, a) mean actions of the training runtime, to hold the frozen policy against."""
        return np.asarray(self._algorithm.act(self.agent, self.state.actor, observations, prev_actions))

    def save(self, folder: Path) -> Path:
        """Write a snapshot into a run's snapshots/. Raises SnapshotError, or Diverged."""
        self._finite(self.state)
        counters = {"steps": self.steps, "updates": self.updates, "cursor": self.cursor, "return_max": self._return_max}
        return snapshot.save(folder, {"task": self.state}, counters | {"replay_rng": self._rng.bit_generator.state})

    def load(self, folder: Path) -> tuple[dict[str, int], str]:
        """Go back to the newest intact snapshot: its cursor, and a warning when it was not the newest.

        Records up to the cursor must then be pushed with `train=False`, those after it as they come. Where
        there is no snapshot nothing changes and the cursor is empty. Raises SnapshotError.
        """
        found = snapshot.load(folder, {"task": self.state})
        if found is None:
            return {}, ""
        self.state = self._placed(found.states["task"])
        self.updates = self._restored = found.counters["updates"]
        self._rng.bit_generator.state = found.counters["replay_rng"]
        self.replay.return_max = found.counters.get("return_max", 0.0)
        return found.counters["cursor"], found.warning

    @property
    def _return_max(self) -> float:
        """The largest return so far, which critics may count in."""
        return max(self.replay.return_max, self.prior.return_max)

    def freeze(self) -> None:
        """Take the policy that is to be evaluated and deployed; there is no training after this."""
        self.state = self._algorithm.frozen(self.state)

    def start_from(self, folder: Path, algorithm: str, observed: int) -> str:
        """Take the weights and the optimiser of another run's newest snapshot, of cloning the actor alone; returns a
        warning or "". Raises SnapshotError.

        Of the `observed` numbers that it saw the last are the previous action, as here; what this task sees besides
        comes before them (`snapshot.widened`).
        """
        actions, template = len(self.task.rest), self.state
        if observed < self.task.observation_size:
            template = self._algorithm.init(self.agent, self._key, observed, actions)
        if cloned := algorithm == "bc" != self.config.algorithm:
            template = bc.State(*(getattr(template, name) for name in bc.State._fields))
        found = snapshot.load(folder, {"task": template})
        if found is None:
            raise snapshot.SnapshotError(f"{folder}: no snapshot to start from")
        taken = ("actor", "average") if cloned else self.state._fields
        old, fresh = ({name: getattr(state, name) for name in taken} for state in (found.states["task"], self.state))
        self.state = self._placed(self.state._replace(**snapshot.widened(old, fresh, observed - actions)))
        self.replay.return_max = found.counters.get("return_max", 0.0)  # critics may count in it
        return found.warning

    def _placed(self, state: Any) -> Any:
        """The same, whole on every device."""
        return jax.device_put(state, self._everywhere)

    def _finite(self, tree: Any) -> Any:
        """The same, where all its numbers are finite."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if jax.dtypes.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf).all():
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise Diverged(
                    f"step {self.steps:,}: the training diverged, {name} is not finite. No such weights were sent or "
                    "saved, and all records are kept: go on with --resume; if that ends here again, begin another "
                    "run with --from and --prior this one, and a smaller agent.critic_lr"
                )
        return tree

    def _update(self) -> None:
        start = time.perf_counter()
        batches = minibatches(self._sample(), self.agent.utd, self.agent.batch)
        # one update in flight, while the next batch is drawn; the one after that takes its batch's place
        ended, _ = jax.block_until_ready((self._metrics, self.state))
        if not np.isnan(ended.get("actor_loss", 0.0)):
            self._ended = ended
        batches = jax.device_put(batches, self._split) if self._split else batches
        self.state, self._metrics = self._algorithm.update(self.agent, self.state, batches)
        self.updates += self.agent.utd
        self.update_s += time.perf_counter() - start

    def _sample(self) -> Batch:
        """The rows of one step's updates, mini-batch after mini-batch."""
        learner = self.config.learner
        share = learner.prior_share
        if learner.prior_anneal:
            share += min(self.updates / learner.prior_anneal, 1.0) * (learner.prior_share_end - share)
        batch = self._strata.draw(self._rng, share)
        if self.task.spec.hindsight > 0.0:
            future = batch.pop("future_obs")
            batch = self.task.in_hindsight(batch, future, self._rng)
        return batch
