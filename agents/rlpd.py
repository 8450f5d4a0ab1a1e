"""RLPD (Ball et al. 2023): SAC with an ensemble of LayerNorm critics and many updates per step.

    y   = r + discount * min_{j in Z} Q'_j(s', a')  [- discount * temperature * log pi(a'|s')],  a' ~ pi(s')
    L_Q = mean over critics and batch of (Q_i(s, a) - y)^2;      Q' <- (1 - tau) Q' + tau Q
    the actor climbs the mean of the critics

Prior data come in through the batches. What is common to the soft actor-critics is in `sac`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import native, sac
from .networks import Critics
from .sac import Batch, State, Variables

__all__ = ["Config", "State", "act", "frozen", "held_out", "init", "policy_params", "policy_spec", "update"]


@dataclass(frozen=True)
class Config(sac.Config):
    """As published; what is common to all is in `sac.Config`."""

    subset: int = 2  # critics drawn for the target's minimum
    layer_norm: bool = True  # of the critics
    dropout: float = 0.0  # of the critics' layers (DroQ)
    native: bool = False  # the critics' updates in compiled code of our own, for CPUs; needs a C++ compiler

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.subset <= self.ensemble:
            raise ValueError(f"subset = {self.subset}: must lie in 1 ... ensemble = {self.ensemble}")
        if self.native and self.bound_start is not None:
            raise ValueError("native = True: there is no native update within a bound; leave one of the two out")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: must lie in [0, 1)")


def _module(cfg: Config, members: int) -> Any:
    return Critics(members, cfg.hidden, "layer" if cfg.layer_norm else "none", dropout=cfg.dropout)


def _make(cfg: Config, key: jax.Array, obs_size: int, action_size: int) -> Variables:
    return _module(cfg, cfg.ensemble).init(key, jnp.zeros((1, obs_size)), jnp.zeros((1, action_size)))


def _q(cfg: Config, critic: Variables, obs: jax.Array, action: jax.Array, key: jax.Array) -> jax.Array:
    """(members, batch) values; as many members as the parameters have."""
    members = critic["params"]["value_bias"].shape[0]
    return _module(cfg, members).apply(critic, obs, action, key=key)[..., 0]


def _draw(cfg: Config, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(subset,) members of the target's minimum; keys for the masks of target and online pass."""
    subset_key, target_key, online_key = jax.random.split(key, 3)
    if cfg.subset == cfg.ensemble:
        return jnp.arange(cfg.ensemble), target_key, online_key
    # the largest of random numbers: a draw without replacement
    return lax.top_k(jax.random.uniform(subset_key, (cfg.ensemble,)), cfg.subset)[1], target_key, online_key


def _fit(
    cfg: Config, critic: Variables, target: Variables, batch: Batch, next_action: jax.Array, bonus: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, Any, Any]:  # fmt: skip
    members, target_key, online_key = _draw(cfg, key)
    if cfg.subset < cfg.ensemble:
        target = jax.tree.map(lambda x: x[members], target)
    value = _q(cfg, target, batch["next_obs"], next_action, target_key).min(0) + bonus
    y = batch["reward"] + batch["discount"] * value

    def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
        q = _q(cfg, {"params": params}, batch["obs"], batch["action"], online_key)
        return jnp.square(q - y[None]).mean(), q.mean()

    (loss, q), grads = jax.value_and_grad(loss_of, has_aux=True)(critic["params"])
    return loss, q, grads, {}


def _fit_all(
    cfg: Config, state: State, batches: Batch, next_action: jax.Array, bonus: jax.Array, keys: jax.Array
) -> Any:
    """All of `_fit` in native code: as `sac.fit_all`."""
    members, *rest = jax.vmap(partial(_draw, cfg))(keys)
    layers = jnp.arange(len(cfg.hidden))
    words = [jax.random.key_data(jax.vmap(lambda k: jax.vmap(partial(jax.random.fold_in, k))(layers))(k)) for k in rest]
    params, target, opt, losses, values = native.critics(
        cfg, state.critic["params"], state.target["params"], state.critic_opt, batches, next_action, bonus, members,
        jnp.stack(words, 1),
    )  # fmt: skip
    return {"params": params}, {"params": target}, opt, losses, values


def _value(cfg: Config, critic: Variables, batch: Batch, action: jax.Array, key: jax.Array) -> jax.Array:
    return _q(cfg, critic, batch["obs"], action, key).mean(0)


CRITIC = sac.Critic(_make, _fit, _value, lambda cfg: _fit_all if cfg.native else None)
init, act, update, held_out, frozen, policy_params, policy_spec = sac.agent(CRITIC)
