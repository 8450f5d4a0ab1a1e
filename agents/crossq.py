"""CrossQ (Bhatt et al. 2024): batch norm in critics and actor, no target network, one update per step.

    one pass through the critics for (s, a) and (s', a') together, normalised by the statistics of both
    y   = r + discount * (min_i Q_i(s', a') - temperature * log pi(a'|s')),  no gradient
    L_Q = mean over critics and batch of (Q_i(s, a) - y)^2
    the actor climbs the minimum of the critics, normalised by running statistics

Batch norm stands before the ReLU. What is common to the soft actor-critics is in `sac`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import sac
from .networks import Critics
from .sac import Batch, State, Variables

__all__ = ["Config", "State", "act", "frozen", "held_out", "init", "policy_params", "policy_spec", "update"]


@dataclass(frozen=True)
class Config(sac.Config):
    """As published, but for the width of the critics: 1024 as in sbx, not 2048. Batch norm is plain, as in the paper;
    sbx's, as the released code's, is renormalised."""

    ensemble: int = 2
    hidden: tuple[int, ...] = (1024, 1024)
    actor_hidden: tuple[int, ...] | None = (256, 256)
    critic_lr: float = 1e-3
    actor_lr: float = 1e-3
    temp_lr: float = 1e-3
    adam_b1: float = 0.5
    utd: int = 1
    actor_every: int | None = 3


def _module(cfg: Config) -> Any:
    return Critics(cfg.ensemble, cfg.hidden, "batch")


def _make(cfg: Config, key: jax.Array, obs_size: int, action_size: int) -> Variables:
    return _module(cfg).init(key, jnp.zeros((1, obs_size)), jnp.zeros((1, action_size)))


def _fit(
    cfg: Config, critic: Variables, target: Variables, batch: Batch, next_action: jax.Array, bonus: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, Any, Any]:  # fmt: skip
    rows = bonus.shape[0]
    obs = jnp.concatenate([batch["obs"], batch["next_obs"]])
    action = jnp.concatenate([batch["action"], next_action])

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        q, stats = _module(cfg).apply(critic | {"params": params}, obs, action, True, mutable=["stats"])
        q, following = q[:, :rows, 0], lax.stop_gradient(q[:, rows:, 0])
        y = batch["reward"] + batch["discount"] * (following.min(0) + bonus)
        return jnp.square(q - y[None]).mean(), (q.mean(), stats)

    (loss, (q, stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(critic["params"])
    return loss, q, grads, stats


def _value(cfg: Config, critic: Variables, batch: Batch, action: jax.Array, key: jax.Array) -> jax.Array:
    return _module(cfg).apply(critic, batch["obs"], action)[..., 0].min(0)


init, act, update, held_out, frozen, policy_params, policy_spec = sac.agent(
    sac.Critic(_make, _fit, _value, has_target=False, batch_norm=True)
)
