"""RLPD (Ball et al. 2023): SAC with an ensemble of LayerNorm critics and many updates per step.

    y   = r + discount * min_{j in Z} Q'_j(s', a')  [- discount * temperature * log pi(a'|s')],  a' ~ pi(s')
    L_Q = mean over critics and batch of (Q_i(s, a) - y)^2;      Q' <- (1 - tau) Q' + tau Q
    once, on the last mini-batch:
    L_pi = mean of temperature * log pi(a|s) - mean_i Q_i(s, a)
    L_t  = temperature * (entropy - target entropy)

Prior data come in through the batches (`replay.symmetric`). With `max_delta` the action is squashed into
[prev - max_delta, prev + max_delta] within [-1, 1]: when acting, in the actor loss and in the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax import lax

from .networks import Actor, Critics, into, tanh_normal, window

AVERAGED = 500.0  # steps: time constant of the mean of past actors that is frozen
Batch = dict[str, Any]  # as replay.Replay.sample makes it
Params = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """What does not change during training; the defaults are the published ones."""

    ensemble: int = 10
    subset: int = 2  # critics drawn for the target's minimum
    hidden: tuple[int, ...] = (256, 256)
    critic_lr: float = 3e-4
    actor_lr: float = 3e-4
    temp_lr: float = 3e-4
    tau: float = 0.005
    gamma: float = 0.99  # for the replay buffer, which makes the discounts
    n_step: int = 1  # likewise
    init_temperature: float = 1.0
    target_entropy: float | None = None  # None: half a nat per action below a uniform window's scale
    backup_entropy: bool = True
    batch: int = 256  # of each update, half of it prior data where there is any
    utd: int = 20  # updates per step
    max_delta: float | None = None  # largest change of an action per step
    layer_norm: bool = True  # of the critics

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))  # a list would not hash
        shares = ("critic_lr", "actor_lr", "temp_lr", "tau", "gamma")
        rules = {name: (0 <= getattr(self, name) <= 1, "must lie between 0 and 1") for name in shares}
        rules |= {name: (getattr(self, name) >= 1, "must be at least 1") for name in ("n_step", "utd")}
        rules |= {
            "hidden": (min(self.hidden, default=0) >= 1, "must be the widths of the layers"),
            "subset": (1 <= self.subset <= self.ensemble, f"must lie in 1 ... ensemble = {self.ensemble}"),
            "batch": (self.batch >= 2 and self.batch % 2 == 0, "must be even, half of it is prior data"),
            "max_delta": (self.max_delta is None or 0 < self.max_delta <= 2, "must lie in (0, 2] or be None"),
            "init_temperature": (self.init_temperature > 0, "must be above 0"),
        }
        for name, (holds, says) in rules.items():
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)}: {says}")

    def entropy_goal(self, action_size: int) -> float:
        """Target entropy: -|A|/2, and with `max_delta` as far below what fits into the window.

        The density is that of the action itself, so a window of half-width d holds log d less per action;
        without this the goal -|A|/2 would be out of reach for d < 0.3 and the temperature would run away.
        """
        if self.target_entropy is not None:
            return self.target_entropy
        return action_size * (-0.5 + (math.log(min(self.max_delta, 1.0)) if self.max_delta else 0.0))


class State(NamedTuple):
    """All that changes. Saving it saves the training; `update` consumes it (its buffers are donated)."""

    actor: Params
    average: Params  # of past actors
    critic: Params  # leaves (ensemble, ...)
    target: Params
    log_temperature: jax.Array
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    temp_opt: optax.OptState
    key: jax.Array


@partial(jax.jit, static_argnames=("cfg", "obs_size", "action_size"))
def init(cfg: Config, key: jax.Array, obs_size: int, action_size: int) -> State:
    """A fresh agent for (obs_size,) observations and (action_size,) actions."""
    key, actor_key, critic_key = jax.random.split(key, 3)
    obs, action = jnp.zeros((1, obs_size)), jnp.zeros((1, action_size))
    actor = Actor(cfg.hidden, action_size).init(actor_key, obs)["params"]
    critic = Critics(cfg.ensemble, cfg.hidden, cfg.layer_norm).init(critic_key, obs, action)["params"]
    log_temperature = jnp.log(jnp.float32(cfg.init_temperature))
    return State(
        actor=actor,
        average=jax.tree.map(jnp.copy, actor),  # a shared buffer could not be donated
        critic=critic,
        target=jax.tree.map(jnp.copy, critic),
        log_temperature=log_temperature,
        actor_opt=optax.adam(cfg.actor_lr).init(actor),
        critic_opt=optax.adam(cfg.critic_lr).init(critic),
        temp_opt=optax.adam(cfg.temp_lr).init(log_temperature),
        key=key,
    )


@partial(jax.jit, static_argnames="cfg")
def act(cfg: Config, params: Params, obs: jax.Array, prev_action: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Action in [-1, 1] for (..., obs) and the executed previous action: the mean, or a sample with a key."""
    return _sample(cfg, params, obs, prev_action, key)[0]


@partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def update(cfg: Config, state: State, batches: Batch) -> tuple[State, dict[str, jax.Array]]:
    """One critic update per mini-batch, then one of actor and temperature on the last mini-batch.

    `batches`: leaves (utd, batch, ...) float32: obs, action, prev_action, reward, discount, next_obs,
    next_prev_action. `state` is consumed. Metrics are scalars on the device; losses of the critics are
    means over the mini-batches.
    """
    key, next_key, subset_key, actor_key = jax.random.split(state.key, 4)
    temperature = jnp.exp(state.log_temperature)

    def step(carry: Any, inputs: Any) -> Any:
        critic, target, opt = carry
        batch, next_action, next_log_prob, members = inputs
        drawn = target if members is None else jax.tree.map(lambda x: x[members], target)
        value = _q(cfg, drawn, batch["next_obs"], next_action).min(0)
        if cfg.backup_entropy:
            value = value - temperature * next_log_prob
        y = batch["reward"] + batch["discount"] * value
        (loss, q), grads = jax.value_and_grad(partial(_critic_loss, cfg), has_aux=True)(critic, batch, y)
        critic, opt = _descend(cfg.critic_lr, grads, opt, critic)
        target = optax.incremental_update(critic, target, cfg.tau)
        return (critic, target, opt), (loss, q)

    # the actor is constant until the critics are done: one forward pass for all mini-batches
    next_action, next_log_prob = _sample(cfg, state.actor, batches["next_obs"], batches["next_prev_action"], next_key)
    members = _subsets(cfg, subset_key, next_log_prob.shape[0])
    carry = (state.critic, state.target, state.critic_opt)
    inputs = (batches, next_action, next_log_prob, members)
    (critic, target, critic_opt), (losses, values) = lax.scan(step, carry, inputs)

    last = jax.tree.map(lambda x: x[-1], batches)
    actor_loss = partial(_actor_loss, cfg, critic=critic, batch=last, temperature=temperature, key=actor_key)
    (loss, entropy), grads = jax.value_and_grad(actor_loss, has_aux=True)(state.actor)
    actor, actor_opt = _descend(cfg.actor_lr, grads, state.actor_opt, state.actor)
    share = jnp.maximum(1.0 / AVERAGED, 1.0 / actor_opt[0].count)  # at first, of all there were
    average = optax.incremental_update(actor, state.average, share)

    goal = cfg.entropy_goal(next_action.shape[-1])
    grad = jax.grad(lambda log_t: jnp.exp(log_t) * (entropy - goal))(state.log_temperature)
    log_temperature, temp_opt = _descend(cfg.temp_lr, grad, state.temp_opt, state.log_temperature)

    metrics = {"critic_loss": losses.mean(), "q_mean": values.mean(), "actor_loss": loss}
    metrics |= {"temperature": temperature, "entropy": entropy}
    state = State(actor, average, critic, target, log_temperature, actor_opt, critic_opt, temp_opt, key)
    return state, metrics


def frozen(state: State) -> State:
    """The state whose actor is to be evaluated and deployed: the mean of the last ones.

    The newest drives at the limit, now on this side of it and now on that (Polyak & Juditsky 1992 on averages).
    """
    return state._replace(actor=state.average)


def policy_params(cfg: Config, state: State) -> dict[str, np.ndarray]:
    """The actor's weights for the onboard runtime: a copy, "dense0/kernel" (in, out), "mean/bias", ..."""
    # a copy: update donates the original
    return {name: np.array(value, np.float32) for name, value in flatten_dict(state.actor, sep="/").items()}


def policy_spec(cfg: Config, state: State) -> dict[str, Any]:
    """The layers of the actor as the onboard runtime takes them, ready for JSON."""
    return {
        "observation_size": int(state.actor["dense0"]["kernel"].shape[0]),
        "action_size": int(state.actor["mean"]["bias"].shape[0]),
        "hidden": list(cfg.hidden),
        "max_delta": cfg.max_delta,
    }


def _q(cfg: Config, params: Params, obs: jax.Array, action: jax.Array) -> Any:
    """(members, batch) values; as many members as the parameters have."""
    module = Critics(params["value_bias"].shape[0], cfg.hidden, cfg.layer_norm)
    return module.apply({"params": params}, obs, action)


def _sample(
    cfg: Config, params: Params, obs: jax.Array, prev_action: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Action (the mean without a key) and its log-density, within the window where there is one."""
    module = Actor(cfg.hidden, params["mean"]["bias"].shape[0])
    mean, log_std = cast(tuple[jax.Array, jax.Array], module.apply({"params": params}, obs))
    noise = jnp.zeros_like(mean) if key is None else jax.random.normal(key, mean.shape)
    action, log_prob = tanh_normal(mean, log_std, noise)
    if cfg.max_delta is None:
        return action, log_prob
    low, high = window(prev_action, cfg.max_delta)
    return into(low, high, action), log_prob - jnp.log(0.5 * (high - low)).sum(-1)


def _subsets(cfg: Config, key: jax.Array, updates: int) -> jax.Array | None:
    """(updates, subset) members of each target's minimum; None when it is over all of them."""
    if cfg.subset == cfg.ensemble:
        return None
    # the largest of random numbers: a draw without replacement
    return lax.top_k(jax.random.uniform(key, (updates, cfg.ensemble)), cfg.subset)[1]


def _critic_loss(cfg: Config, critic: Params, batch: Batch, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    q = _q(cfg, critic, batch["obs"], batch["action"])
    return jnp.square(q - y[None]).mean(), q.mean()


def _actor_loss(
    cfg: Config, actor: Params, critic: Params, batch: Batch, temperature: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    action, log_prob = _sample(cfg, actor, batch["obs"], batch["prev_action"], key)
    q = _q(cfg, critic, batch["obs"], action).mean(0)
    return (temperature * log_prob - q).mean(), -log_prob.mean()


def _descend(lr: float, grads: Any, opt: optax.OptState, params: Any) -> tuple[Any, optax.OptState]:
    updates, opt = optax.adam(lr).update(grads, opt, params)
    return optax.apply_updates(params, updates), opt
