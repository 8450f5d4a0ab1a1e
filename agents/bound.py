"""The soft bound of APRL (Smith et al. 2023) for any soft actor-critic: actions may leave a bound only at a price;
the bound grows while the world behaves as expected and falls back when it surprises.

    the actor climbs Q(s, a) - bound_weight * sum_j max(|a_j| - bound, 0)
    a model predicts s' - s from (s, a), over as many steps as the returns; its error on one of the newest WINDOW steps,
        averaged over a short while (`recent`) and a long one (`usual`), says how much the world surprises
    bound: from `bound_start` up to `bound_end` over `bound_steps` steps, again from the start where
        recent > surprise * usual

A price and no clip: the critics see actions on both sides of it. Unlike the released code, each value pays for its
own excess only (there all values pay in full once one is over), and surprise is a ratio, which has no unit (there
it is an error of 1.5 in the units of the observation). The price is in reward, whatever unit the critics count in.

The model is trained with the critics and lies among their parameters; the bound lies among their statistics.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

WINDOW = 256  # steps that are new, as published
RECENT, USUAL = 256, 4096  # steps, time constants of the two means
SETTLED = 2000  # steps after a start until the means say something


class Dynamics(nn.Module):
    """What the observation changes by: (batch, obs), (batch, action) -> (batch, obs)."""

    hidden: tuple[int, ...] = (256, 256)

    @nn.compact
    def __call__(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        x = jnp.concatenate([obs, action], axis=-1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, name=f"hidden{i}")(x))
        return nn.Dense(obs.shape[-1], name="change")(x)


def soft(critic: Any) -> Any:
    """A `sac.Critic` that is this one where `cfg.bound_start` is None, and this one within a bound where it is not."""

    def make(cfg: Any, key: jax.Array, obs_size: int, action_size: int) -> Any:
        made = critic.make(cfg, key, obs_size, action_size)
        if cfg.bound_start is None:
            return made
        shapes = jnp.zeros((1, obs_size)), jnp.zeros((1, action_size))
        dynamics = Dynamics().init(jax.random.fold_in(key, 1), *shapes)["params"]
        bound = {"now": jnp.float32(cfg.bound_start)} | {k: jnp.float32(0.0) for k in ("recent", "usual", "age")}
        return {
            "params": {"critics": made["params"], "dynamics": dynamics},
            "stats": {"critics": made.get("stats", {}), "bound": bound},
        }

    def fit(cfg: Any, online: Any, target: Any, batch: Any, *rest: Any) -> Any:
        if cfg.bound_start is None:
            return critic.fit(cfg, online, target, batch, *rest)
        loss, q, grads, new = critic.fit(cfg, inner(online), inner(target), batch, *rest)

        def errors(params: Any) -> tuple[jax.Array, jax.Array]:
            change = Dynamics().apply({"params": params}, batch["obs"], batch["action"])
            each = jnp.square(change - (batch["next_obs"] - batch["obs"])).mean(-1)
            return each.mean(), each[0]  # a new one comes first

        (_, new_step), of_model = jax.value_and_grad(errors, has_aux=True)(online["params"]["dynamics"])
        stats = {"critics": new.get("stats", {}), "bound": moved(cfg, online["stats"]["bound"], new_step)}
        return loss, q, {"critics": grads, "dynamics": of_model}, {"stats": stats}

    def value(cfg: Any, online: Any, batch: Any, action: jax.Array, key: jax.Array) -> jax.Array:
        if cfg.bound_start is None:
            return critic.value(cfg, online, batch, action, key)
        excess = jnp.maximum(jnp.abs(action) - online["stats"]["bound"]["now"], 0.0).sum(-1)
        price = cfg.bound_weight / critic.unit(cfg, batch)
        return critic.value(cfg, inner(online), batch, action, key) - price * excess

    return critic._replace(make=make, fit=fit, value=value)


def inner(variables: Any) -> Any:
    """The variables of the critics alone; of an empty target those of none."""
    return {kind: tree["critics"] for kind, tree in variables.items() if tree["critics"]}


def moved(cfg: Any, bound: dict[str, jax.Array], error: jax.Array) -> dict[str, jax.Array]:
    """The bound after another update, in which the model erred so much on a new step."""
    age = bound["age"] + 1.0 / cfg.utd  # steps since it began to grow
    share = [jnp.maximum(1.0 / (cfg.utd * steps), 1.0 / (cfg.utd * age)) for steps in (RECENT, USUAL)]
    recent, usual = (bound[k] + s * (error - bound[k]) for k, s in zip(("recent", "usual"), share, strict=True))
    grown = jnp.minimum(bound["now"] + (cfg.bound_end - cfg.bound_start) / (cfg.bound_steps * cfg.utd), cfg.bound_end)
    surprised = (age > SETTLED) & (recent > cfg.surprise * usual)
    now = jnp.where(surprised, jnp.maximum(cfg.bound_start, grown / 2), grown)
    return {"now": now, "recent": recent, "usual": usual, "age": jnp.where(surprised, 0.0, age)}
