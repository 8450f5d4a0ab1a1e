"""XQC (Palenicek et al. 2025): critics whose loss is well conditioned, so that few updates a step suffice.

    critics: batch norm, hidden kernels of fixed length, the value a distribution over `atoms` in [-reach, reach],
        in units of a scale such that the largest return so far (`return_max` of the batch) lies at 0.8 of it
    one pass for (s, a) and (s', a') together, normalised by the statistics of both, through target and critics
    goal = that target's distribution whose mean is least, moved to reward / scale + discount * (atom - temperature
        * log pi(a'|s')) and projected onto the atoms (C51, Bellemare et al. 2017)
    L_Q  = mean over critics and batch of the divergence KL(goal || Q): the cross-entropy less what no critic can take
        away, so that 0 is a perfect fit;      Q' <- (1 - tau) Q' + tau Q
    the actor (batch norm, kernels of fixed length, too) climbs the least mean, normalised by running statistics

What is common to the soft actor-critics is in `sac`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import sac
from .networks import Critics
from .sac import Batch, State, Variables

__all__ = ["Config", "State", "act", "frozen", "held_out", "init", "policy_params", "policy_spec", "update"]

FILLED = 0.8  # of the reach, by the largest return: the rest is for entropy, and for what is still to come


@dataclass(frozen=True)
class Config(sac.Config):
    """As published, but for the size of the critics: 2 x 256, not 4 x 512."""

    ensemble: int = 2
    init_temperature: float = 0.01
    utd: int = 2
    atoms: int = 101
    reach: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        atoms, reach = (self.atoms >= 2, "must be at least 2"), (self.reach > 0, "must be above 0")
        sac.check(self, {"atoms": atoms, "reach": reach})


def _module(cfg: Config) -> Any:
    return Critics(cfg.ensemble, cfg.hidden, "batch", cfg.atoms)


def _support(cfg: Config) -> jax.Array:
    return jnp.linspace(-cfg.reach, cfg.reach, cfg.atoms)


def _make(cfg: Config, key: jax.Array, obs_size: int, action_size: int) -> Variables:
    return _module(cfg).init(key, jnp.zeros((1, obs_size)), jnp.zeros((1, action_size)))


def _unit(cfg: Config, batch: Batch) -> jax.Array:
    return jnp.maximum(batch["return_max"], 1e-6) / (FILLED * cfg.reach)


def project(cfg: Config, probabilities: jax.Array, places: jax.Array) -> jax.Array:
    """(b, atoms) probabilities at (b, atoms) places -> (b, atoms) on the atoms: each shared by its two neighbours."""
    spots = (jnp.clip(places, -cfg.reach, cfg.reach) + cfg.reach) * (cfg.atoms - 1) / (2 * cfg.reach)
    below = jnp.clip(jnp.floor(spots), 0, cfg.atoms - 2)
    above = probabilities * (spots - below)  # what goes to the upper neighbour
    rows, columns = jnp.arange(places.shape[0])[:, None], below.astype(jnp.int32)
    return jnp.zeros_like(places).at[rows, columns].add(probabilities - above).at[rows, columns + 1].add(above)


def _fit(
    cfg: Config, critic: Variables, target: Variables, batch: Batch, next_action: jax.Array, bonus: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, Any, Any]:  # fmt: skip
    rows, support, module = bonus.shape[0], _support(cfg), _module(cfg)
    obs = jnp.concatenate([batch["obs"], batch["next_obs"]])
    action = jnp.concatenate([batch["action"], next_action])
    logits, _ = module.apply(target, obs, action, True, rows=slice(rows, None), mutable=["stats"])
    following = jax.nn.softmax(logits)
    least = (following @ support).argmin(0)
    chosen = jnp.take_along_axis(following, least[None, :, None], 0)[0]
    scale = _unit(cfg, batch)
    reward = batch["reward"] / scale
    places = reward[:, None] + batch["discount"][:, None] * (support[None] + bonus[:, None])
    goal = project(cfg, chosen, places)

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        variables = critic | {"params": params}
        logits, stats = module.apply(variables, obs, action, True, rows=slice(rows), mutable=["stats"])
        values = jax.nn.softmax(logits) @ support
        return optax.kl_divergence(jax.nn.log_softmax(logits), goal[None]).mean(), (values.mean(), stats)

    (loss, (value, stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(critic["params"])
    return loss, value * scale.mean(), grads, stats


def _value(cfg: Config, critic: Variables, batch: Batch, action: jax.Array, key: jax.Array) -> jax.Array:
    return (jax.nn.softmax(_module(cfg).apply(critic, batch["obs"], action)) @ _support(cfg)).min(0)


init, act, update, held_out, frozen, policy_params, policy_spec = sac.agent(
    sac.Critic(_make, _fit, _value, unit=_unit, unit_kernels=True, batch_norm=True)
)
