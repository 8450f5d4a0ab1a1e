"""Behaviour cloning: the actor alone, towards the actions in the batches.

    L = mean over batch and actions of (mean action - action)^2
    the log standard deviation is fitted to what is left, before the tanh, by likelihood

`gamma` and `n_step` shape batches that nothing else here looks at.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from . import sac
from .networks import Actor, window
from .sac import AVERAGED, Batch, Variables, frozen, policy_params, policy_spec

__all__ = ["Config", "State", "act", "frozen", "held_out", "init", "policy_params", "policy_spec", "update"]

EDGE = 0.999  # of the squashed action, so that its inverse stays finite
STD_MIN = -5.0  # log; a teacher without noise would drive it to minus infinity


@dataclass(frozen=True)
class Config:
    """What does not change during training."""

    hidden: tuple[int, ...] = (256, 256)
    actor_lr: float = 3e-4
    gamma: float = 0.99
    n_step: int = 1
    batch: int = 256  # of each update
    utd: int = 1  # updates per step
    max_delta: float | None = None  # largest change of an action per step

    actor_hidden = None

    def __post_init__(self) -> None:
        sac.check(self, {})


class State(NamedTuple):
    """All that changes; `update` consumes it (its buffers are donated)."""

    actor: Variables
    average: Variables  # of past actors
    actor_opt: optax.OptState


@partial(jax.jit, static_argnames=("cfg", "obs_size", "action_size"))
def init(cfg: Config, key: jax.Array, obs_size: int, action_size: int) -> State:
    """A fresh actor for (obs_size,) observations and (action_size,) actions."""
    actor = _module(cfg, action_size).init(key, jnp.zeros((1, obs_size)))
    return State(actor, jax.tree.map(jnp.copy, actor), optax.adam(cfg.actor_lr).init(actor["params"]))


@partial(jax.jit, static_argnames="cfg")
def act(
    cfg: Config, actor: Variables, obs: jax.Array, prev_action: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Action in [-1, 1] for (..., obs) and the executed previous action: the mean, or a sample with a key."""
    mean, log_std = _module(cfg, prev_action.shape[-1]).apply(actor, obs)
    return sac.squashed(cfg, mean, log_std, prev_action, key)[0]


@partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def update(cfg: Config, state: State, batches: Batch) -> tuple[State, dict[str, jax.Array]]:
    """One update per mini-batch; leaves (utd, batch, ...) float32: obs, prev_action, action (executed)."""

    def step(carry: Any, batch: Batch) -> Any:
        params, average, opt = carry
        (_, error), grads = jax.value_and_grad(partial(_loss, cfg), has_aux=True)(params, batch)
        updates, opt = optax.adam(cfg.actor_lr).update(grads, opt)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, jnp.maximum(1.0 / AVERAGED, 1.0 / opt[0].count))
        return (params, average, opt), error

    carry = (state.actor["params"], state.average["params"], state.actor_opt)
    (params, average, opt), errors = lax.scan(step, carry, batches)
    return State({"params": params}, {"params": average}, opt), {"actor_loss": errors.mean()}


@partial(jax.jit, static_argnames="cfg")
def held_out(cfg: Config, state: State, batch: Batch) -> jax.Array:
    """The squared error on one mini-batch that was not trained on; leaves (batch, ...)."""
    return _loss(cfg, state.actor["params"], batch)[1]


def _module(cfg: Config, action_size: int) -> Any:
    return Actor(cfg.hidden, action_size)


def _loss(cfg: Config, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    previous, action = batch["prev_action"], batch["action"]
    mean, log_std = _module(cfg, action.shape[-1]).apply({"params": params}, batch["obs"])
    error = jnp.square(sac.squashed(cfg, mean, log_std, previous, None)[0] - action).mean()
    low, high = (-1.0, 1.0) if cfg.max_delta is None else window(previous, cfg.max_delta)
    inner = jnp.clip(2.0 * (action - low) / (high - low) - 1.0, -EDGE, EDGE)
    log_std = jnp.maximum(log_std, STD_MIN)
    off = (jnp.arctanh(inner) - lax.stop_gradient(mean)) / jnp.exp(log_std)
    return error + (0.5 * jnp.square(off) + log_std).mean(), error
