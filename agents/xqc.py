"""XQC (Palenicek et al. 2025): a categorical critic, batch norm, kernels of fixed length. Few updates a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import sac
from .networks import Critics
from .sac import Batch, Variables


@dataclass(frozen=True)
class Config(sac.Config):
    ensemble: int = 2
    hidden: tuple[int, ...] = (256, 256)
    adam_b1: float = 0.9
    init_temperature: float = 0.01
    utd: int = 2
    actor_every: int | None = None
    atoms: int = 101
    reach: float = 5.0  # the atoms lie in [-reach, reach], in units of the scaled return
    joint: bool = True
    pessimistic: bool = True


def _module(cfg: Config) -> Critics:
    return Critics(cfg.ensemble, cfg.hidden, "batch", cfg.atoms)


def _make(cfg: Config, key: jax.Array, obs_size: int, action_size: int) -> Variables:
    return _module(cfg).init(key, jnp.zeros((1, obs_size)), jnp.zeros((1, action_size)))


def project(cfg: Config, probabilities: jax.Array, places: jax.Array) -> jax.Array:
    """(b, atoms) probabilities of (b, atoms) places onto the atoms: each to its two neighbours (C51)."""
    support = jnp.linspace(-cfg.reach, cfg.reach, cfg.atoms)
    width = 2 * cfg.reach / (cfg.atoms - 1)
    places = jnp.clip(places, -cfg.reach, cfg.reach)
    share = jnp.clip(1.0 - jnp.abs(places[:, :, None] - support) / width, 0.0, 1.0)  # (b, from, to)
    return jnp.einsum("bf,bft->bt", probabilities, share)


def _fit(
    cfg: Config, critic: Variables, target: Variables, batch: Batch, next_action: jax.Array, bonus: jax.Array, key: Any
) -> Any:
    module, rows = _module(cfg), bonus.shape[0]
    support = jnp.linspace(-cfg.reach, cfg.reach, cfg.atoms)
    scale = batch["scale"]
    obs = jnp.concatenate([batch["obs"], batch["next_obs"]])
    action = jnp.concatenate([batch["action"], next_action])
    if cfg.joint:
        logits, _ = module.apply(target, obs, action, True, mutable=["stats"])
        logits = logits[:, rows:]
    else:
        logits = module.apply(target, batch["next_obs"], next_action)
    probabilities = jax.nn.softmax(logits)
    worst = (probabilities @ support).argmin(0)
    chosen = jnp.take_along_axis(probabilities, worst[None, :, None], 0)[0]
    places = batch["reward"][:, None] / scale + batch["discount"][:, None] * (support + bonus[:, None])
    goal = project(cfg, chosen, places)
    stats = {k: v for k, v in critic.items() if k != "params"}

    def loss_of(params: Any) -> Any:
        logits, new = module.apply({"params": params} | stats, obs, action, True, mutable=["stats"])
        logits = logits[:, :rows]
        loss = optax.softmax_cross_entropy(logits, goal[None]).mean()
        return loss, (new, (jax.nn.softmax(logits) @ support).mean())

    (loss, (new, value)), grads = jax.value_and_grad(loss_of, has_aux=True)(critic["params"])
    return loss, value, grads, new


def _value(cfg: Config, critic: Variables, obs: jax.Array, action: jax.Array, key: jax.Array) -> jax.Array:
    values = jax.nn.softmax(_module(cfg).apply(critic, obs, action)) @ jnp.linspace(-cfg.reach, cfg.reach, cfg.atoms)
    return values.min(0) if cfg.pessimistic else values.mean(0)


init, act, update, frozen, policy_params, policy_spec = sac.agent(
    sac.Critic(_make, _fit, _value, unit_kernels=True, batch_norm=True)
)
