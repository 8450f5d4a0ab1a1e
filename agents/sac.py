"""What the soft actor-critics share (Haarnoja et al. 2018): settings, state, acting, and the frame of an update.

    y    = reward + discount * (V'(s', a') [- temperature * log pi(a'|s')]),  a' ~ pi(s')
    once every `actor_every` critic updates, on the last of their mini-batches:
    L_pi = mean of temperature * log pi(a|s) - Q(s, a)
    L_t  = temperature * (entropy - target entropy)

An algorithm adds its critic: how it is made, how it is fitted to one mini-batch, what the actor sees of it
(`Critic`). With `max_delta` the action is squashed into [prev - max_delta, prev + max_delta] within [-1, 1]:
when acting, in the actor loss and in the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax import lax

from . import bound
from .networks import BATCH_EPSILON, Actor, into, tanh_normal, unit_kernels, window

# time constant of the mean of past actors that is frozen: steps, or updates of the actor where a step has several
AVERAGED = 500.0
Batch = dict[str, Any]  # as replay.Replay.sample makes it
Variables = dict[str, Any]  # of a flax module: {"params": ...} and, with batch norm, {"stats": ...}


@dataclass(frozen=True)
class Config:
    """What does not change during training; the defaults are those published for RLPD."""

    ensemble: int = 10
    hidden: tuple[int, ...] = (256, 256)
    actor_hidden: tuple[int, ...] | None = None  # None: as the critics
    critic_lr: float = 3e-4
    actor_lr: float = 3e-4
    temp_lr: float = 3e-4
    adam_b1: float = 0.9
    tau: float = 0.005
    gamma: float = 0.99  # for the replay buffer, which makes the discounts
    n_step: int = 1  # likewise
    init_temperature: float = 1.0
    target_entropy: float | None = None  # None: half a nat per action below a uniform window's scale
    backup_entropy: bool = True
    batch: int = 256  # of each update
    utd: int = 20  # critic updates per step
    actor_every: int | None = None  # critic updates to one of actor and temperature; None: as many as a step has
    max_delta: float | None = None  # largest change of an action per step
    relative: bool = False  # the critics see by what share of `max_delta` an action changes, not the action
    bound_start: float | None = None  # beyond this an action costs (see `bound`); None: there is no such bound
    bound_end: float = 0.6  # and beyond this after so many steps without a surprise
    bound_steps: int = 30_000
    bound_weight: float = 12.0  # what it costs, in reward
    surprise: float = 1.5  # error of the model of the world over its usual error, above which the bound falls

    def __post_init__(self) -> None:
        check(self, {
            "actor_every": (
                self.period >= 1 and (self.utd % self.period == 0 or self.period % self.utd == 0),
                f"must divide utd = {self.utd}, or be a multiple of it",
            ),
            "relative": (
                not self.relative or (self.max_delta is not None and self.bound_start is None),
                "needs max_delta, and no bound_start",
            ),
            "init_temperature": (self.init_temperature > 0, "must be above 0"),
            "bound_start": (self.bound_start is None or 0 < self.bound_start <= 1, "must lie in (0, 1] or be None"),
            "bound_end": ((self.bound_start or 0) <= self.bound_end <= 1, "must lie between bound_start and 1"),
            "bound_steps": (self.bound_steps >= 1, "must be at least 1"),
            "surprise": (self.surprise > 1, "must be above 1"),
        })  # fmt: skip

    @property
    def period(self) -> int:
        """Critic updates to one actor update."""
        return self.utd if self.actor_every is None else self.actor_every

    def entropy_goal(self, action_size: int) -> float:
        """Target entropy: -|A|/2, and with `max_delta` as far below what fits into the window.

        The density is that of the action itself, so a window of half-width d holds log d less per action;
        without this the goal -|A|/2 would be out of reach for d < 0.3 and the temperature would run away.
        """
        if self.target_entropy is not None:
            return self.target_entropy
        return action_size * (-0.5 + (math.log(min(self.max_delta, 1.0)) if self.max_delta else 0.0))


def check(cfg: Any, rules: dict[str, tuple[bool, str]]) -> None:
    """Make lists of a Config tuples and raise ValueError for a setting that cannot be: name, value, what must be.

    What the settings common to all algorithms must be is said here; `rules` adds name: (holds, says).
    """
    names = vars(cfg)
    for name in names.keys() & {"hidden", "actor_hidden"}:
        if names[name] is not None:
            object.__setattr__(cfg, name, tuple(names[name]))  # a list would not hash
    first: dict[str, tuple[bool, str]] = {}
    for name in names.keys() & {"critic_lr", "actor_lr", "temp_lr", "tau", "gamma"}:
        first[name] = 0 <= names[name] <= 1, "must lie between 0 and 1"
    if "adam_b1" in names:  # the moments are divided by 1 - b1^t
        first["adam_b1"] = 0 <= names["adam_b1"] < 1, "must lie in [0, 1)"
    for name in names.keys() & {"ensemble", "n_step", "utd"}:
        first[name] = names[name] >= 1, "must be at least 1"
    delta = cfg.max_delta
    for name in ("hidden", "actor_hidden"):
        widths = getattr(cfg, name)
        first[name] = widths is None or min(widths, default=0) >= 1, "must be the widths of the layers"
    first["batch"] = cfg.batch >= 2 and cfg.batch % 2 == 0, "must be even, half of it is prior data"
    first["max_delta"] = delta is None or 0 < delta <= 2, "must lie in (0, 2] or be None"
    for name, (holds, says) in (first | rules).items():
        if not holds:
            raise ValueError(f"{name} = {names[name]}: {says}")


class State(NamedTuple):
    """All that changes. Saving it saves the training; `update` consumes it (its buffers are donated)."""

    actor: Variables
    average: Variables  # of past actors
    critic: Variables  # leaves (ensemble, ...)
    target: Variables  # empty where there is no target network
    log_temperature: jax.Array
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    temp_opt: optax.OptState
    updates: jax.Array  # of the critic
    key: jax.Array


class Critic(NamedTuple):
    """What an algorithm adds.

    make: (cfg, key, obs_size, action_size) -> variables
    fit: (cfg, critic, target, batch, next_action (b, a), bonus (b,), key) -> loss, values, gradients and new
        statistics; `bonus` is what entropy adds to the next state's value
    value: (cfg, critic, batch, action, key) -> (b,), what the actor climbs from the batch's observations
    at_once: (cfg) -> what makes all updates of a call in place of `fit_all`, or None
    unit: (cfg, batch) -> how much reward a value of 1 is
    """

    make: Callable[..., Variables]
    fit: Callable[..., tuple[jax.Array, jax.Array, Any, Any]]
    value: Callable[..., jax.Array]
    at_once: Callable[..., Any] = lambda cfg: None
    unit: Callable[..., Any] = lambda cfg, batch: 1.0
    has_target: bool = True
    unit_kernels: bool = False
    batch_norm: bool = False  # of the actor, too


def adam(cfg: Config, lr: float) -> optax.GradientTransformation:
    """The optimiser of actor, critics and temperature (Kingma & Ba 2015)."""
    return optax.adam(lr, b1=cfg.adam_b1)


def actor_module(cfg: Config, critic: Critic, action_size: int) -> Any:
    """The actor's net, as this critic needs it."""
    return Actor(cfg.actor_hidden or cfg.hidden, action_size, critic.batch_norm)


def init(critic: Critic, cfg: Config, key: jax.Array, obs_size: int, action_size: int) -> State:
    """A fresh agent for (obs_size,) observations and (action_size,) actions."""
    key, actor_key, critic_key = jax.random.split(key, 3)
    actor = actor_module(cfg, critic, action_size).init(actor_key, jnp.zeros((1, obs_size)))
    made = critic.make(cfg, critic_key, obs_size, action_size)
    if critic.unit_kernels:
        actor, made = unit_kernels(actor), unit_kernels(made)
    log_temperature = jnp.log(jnp.float32(cfg.init_temperature))
    return State(
        actor=actor,
        average=jax.tree.map(jnp.copy, actor),  # a shared buffer could not be donated
        critic=made,
        target=jax.tree.map(jnp.copy, made) if critic.has_target else {},
        log_temperature=log_temperature,
        actor_opt=adam(cfg, cfg.actor_lr).init(actor["params"]),
        critic_opt=adam(cfg, cfg.critic_lr).init(made["params"]),
        temp_opt=adam(cfg, cfg.temp_lr).init(log_temperature),
        updates=jnp.int32(0),
        key=key,
    )


def update(critic: Critic, cfg: Config, state: State, batches: Batch) -> tuple[State, dict[str, jax.Array]]:
    """`utd` critic updates, one per mini-batch, and those of actor and temperature that fall between them.

    `batches`: leaves (utd, batch, ...) float32: obs, action, prev_action, reward, discount, next_obs,
    next_prev_action, return_max. `state` is consumed. Metrics are scalars on the device; losses of the critics are
    means over the mini-batches.
    """
    period = cfg.period
    if period >= cfg.utd:
        state, metrics = _critics(critic, cfg, state, batches)
        last = jax.tree.map(lambda x: x[-1], batches)
        due = state.updates % period < cfg.utd  # whatever another run counted before it
        if period == cfg.utd:
            state, more = _actor(critic, cfg, state, last)
        else:
            state, more = lax.cond(due, partial(_actor, critic, cfg), partial(_idle, critic, cfg), state, last)
        return state, metrics | more

    def group(state: State, batches: Batch) -> Any:
        state, metrics = _critics(critic, cfg, state, batches)
        state, more = _actor(critic, cfg, state, jax.tree.map(lambda x: x[-1], batches))
        return state, metrics | more

    groups = jax.tree.map(lambda x: x.reshape(-1, period, *x.shape[1:]), batches)
    state, metrics = lax.scan(group, state, groups)
    return state, jax.tree.map(jnp.mean, metrics)


def _critics(critic: Critic, cfg: Config, state: State, batches: Batch) -> tuple[State, dict[str, jax.Array]]:
    key, next_key, fit_key = jax.random.split(state.key, 3)
    # the actor is constant until the critics are done: one forward pass for all mini-batches
    batches, next_action, bonus = _following(critic, cfg, state, batches, next_key)
    keys = jax.random.split(fit_key, bonus.shape[0])
    fit = critic.at_once(cfg) or partial(fit_all, critic)
    online, target, opt, losses, values = fit(cfg, state, batches, next_action, bonus, keys)
    done = state.updates + bonus.shape[0]
    state = state._replace(critic=online, target=target, critic_opt=opt, updates=done, key=key)
    metrics = {"critic_loss": losses.mean(), "q_mean": values.mean()}
    return state, metrics | ({"action_bound": online["stats"]["bound"]["now"]} if cfg.bound_start else {})


def _following(
    critic: Critic, cfg: Config, state: State, batch: Batch, key: jax.Array
) -> tuple[Batch, jax.Array, jax.Array]:
    """The batch and the policy's next action as the critics see them, and what entropy adds to its value."""
    action, log_prob = sample(cfg, critic, state.actor, batch["next_obs"], batch["next_prev_action"], key)
    bonus = -jnp.exp(state.log_temperature) * log_prob if cfg.backup_entropy else jnp.zeros_like(log_prob)
    batch = batch | {"action": _seen(cfg, batch["action"], batch["prev_action"])}
    return batch, _seen(cfg, action, batch["next_prev_action"]), bonus


def fit_all(
    critic: Critic, cfg: Config, state: State, batches: Batch, next_action: jax.Array, bonus: jax.Array, keys: jax.Array
) -> Any:
    """One update per mini-batch: the new critic, target and optimiser; losses and mean values of the updates."""

    def step(carry: Any, inputs: Any) -> Any:
        online, target, opt = carry
        loss, value, grads, stats = critic.fit(cfg, online, target, *inputs)
        params, opt = _descend(adam(cfg, cfg.critic_lr), grads, opt, online["params"])
        online = {"params": params} | stats
        if critic.unit_kernels:
            online = unit_kernels(online)
        if critic.has_target:
            target = optax.incremental_update(online, target, cfg.tau)
        return (online, target, opt), (loss, value)

    carry = (state.critic, state.target, state.critic_opt)
    carry, (losses, values) = lax.scan(step, carry, (batches, next_action, bonus, keys))
    return *carry, losses, values


def _actor(critic: Critic, cfg: Config, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    key, actor_key, value_key = jax.random.split(state.key, 3)
    temperature = jnp.exp(state.log_temperature)
    statistics = {k: v for k, v in state.actor.items() if k != "params"}

    def loss_of(params: Any) -> Any:
        variables = {"params": params} | statistics
        action, log_prob, stats = sample_train(
            cfg, critic, variables, batch["obs"], batch["prev_action"], actor_key
        )
        looked = _seen(cfg, action, batch["prev_action"])
        value = critic.value(cfg, state.critic, batch, looked, value_key)
        return (temperature * log_prob - value).mean(), (-log_prob.mean(), stats)

    (loss, (entropy, stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.actor["params"])
    params, actor_opt = _descend(adam(cfg, cfg.actor_lr), grads, state.actor_opt, state.actor["params"])
    actor = {"params": params} | stats
    if critic.unit_kernels:
        actor = unit_kernels(actor)
    steps = max(cfg.period / cfg.utd, 1.0)  # to one update of the actor
    share = jnp.maximum(steps / AVERAGED, 1.0 / actor_opt[0].count)  # at first, of all there were
    average = optax.incremental_update(actor, state.average, share)

    goal = cfg.entropy_goal(batch["action"].shape[-1])
    grad = jax.grad(lambda log_t: jnp.exp(log_t) * (entropy - goal))(state.log_temperature)
    log_temperature, temp_opt = _descend(adam(cfg, cfg.temp_lr), grad, state.temp_opt, state.log_temperature)
    state = state._replace(
        actor=actor, average=average, actor_opt=actor_opt, log_temperature=log_temperature, temp_opt=temp_opt, key=key
    )
    return state, {"actor_loss": loss, "temperature": temperature, "entropy": entropy}


def _idle(critic: Critic, cfg: Config, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    nan = jnp.float32(jnp.nan)
    return state, {"actor_loss": nan, "temperature": jnp.exp(state.log_temperature), "entropy": nan}


def sample(
    cfg: Config, critic: Critic, actor: Variables, obs: jax.Array, prev_action: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Action (the mean without a key) and its log-density, within the window where there is one."""
    mean, log_std = actor_module(cfg, critic, prev_action.shape[-1]).apply(actor, obs)
    return squashed(cfg, mean, log_std, prev_action, key)


def sample_train(
    cfg: Config, critic: Critic, actor: Variables, obs: jax.Array, prev_action: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """As `sample`, normalised by the batch, and the new running statistics."""
    module = actor_module(cfg, critic, prev_action.shape[-1])
    (mean, log_std), stats = module.apply(actor, obs, True, mutable=["stats"])
    return *squashed(cfg, mean, log_std, prev_action, key), stats


def squashed(
    cfg: Any, mean: jax.Array, log_std: jax.Array, prev_action: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Action (of the mean without a key) and its log-density, within the window where `cfg.max_delta` makes one."""
    noise = jnp.zeros_like(mean) if key is None else jax.random.normal(key, mean.shape)
    action, log_prob = tanh_normal(mean, log_std, noise)
    if cfg.max_delta is None:
        return action, log_prob
    low, high = window(prev_action, cfg.max_delta)
    return into(low, high, action), log_prob - jnp.log(0.5 * (high - low)).sum(-1)


def _seen(cfg: Config, action: jax.Array, prev_action: jax.Array) -> jax.Array:
    """What the critics see of an action: itself, or by what share of `max_delta` it differs from the one before."""
    return (action - prev_action) / (cfg.max_delta or 1.0) if cfg.relative else action


def _descend(tx: optax.GradientTransformation, grads: Any, opt: optax.OptState, params: Any) -> tuple[Any, Any]:
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt


def agent(critic: Critic) -> tuple[Callable[..., Any], ...]:
    """The functions of an algorithm with this critic: init, act, update, held_out, frozen, policy_params,
    policy_spec."""
    critic = bound.soft(critic)

    @partial(jax.jit, static_argnames=("cfg", "obs_size", "action_size"))
    def made(cfg: Config, key: jax.Array, obs_size: int, action_size: int) -> State:
        """A fresh agent for (obs_size,) observations and (action_size,) actions."""
        return init(critic, cfg, key, obs_size, action_size)

    @partial(jax.jit, static_argnames="cfg")
    def act(
        cfg: Config, actor: Variables, obs: jax.Array, prev_action: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """Action in [-1, 1] for (..., obs) and the executed previous action: the mean, or a sample with a key."""
        return sample(cfg, critic, actor, obs, prev_action, key)[0]

    @partial(jax.jit, static_argnames="cfg", donate_argnames="state")
    def updated(cfg: Config, state: State, batches: Batch) -> tuple[State, dict[str, jax.Array]]:
        """`sac.update` with this critic: leaves (utd, batch, ...) float32; `state` is consumed."""
        return update(critic, cfg, state, batches)

    @partial(jax.jit, static_argnames="cfg")
    def held_out(cfg: Config, state: State, batch: Batch) -> jax.Array:
        """The critics' loss on one mini-batch that they were not trained on; leaves (batch, ...)."""
        keys = jax.random.split(state.key)
        batch, next_action, bonus = _following(critic, cfg, state, batch, keys[0])
        return critic.fit(cfg, state.critic, state.target, batch, next_action, bonus, keys[1])[0]

    return made, act, updated, held_out, frozen, policy_params, policy_spec


def frozen(state: State) -> State:
    """The state whose actor is to be evaluated and deployed: the mean of the last ones.

    The newest drives at the limit, now on this side of it and now on that (Polyak & Juditsky 1992 on averages).
    """
    return state._replace(actor=state.average)


def policy_params(cfg: Config, state: State) -> dict[str, np.ndarray]:
    """The actor's weights for the onboard runtime: a copy, "dense0/kernel" (in, out), "mean/bias", ...

    Batch norm is folded into the layers: onboard there is none.
    """
    # a copy: update donates the original
    out = {name: np.array(value, np.float32) for name, value in flatten_dict(state.actor["params"], sep="/").items()}
    for norm, stats in state.actor.get("stats", {}).items():
        mean, var = np.asarray(stats["mean"], np.float32), np.asarray(stats["var"], np.float32)
        gain = out.pop(f"{norm}/scale") / np.sqrt(var + np.float32(BATCH_EPSILON))
        if norm == "input":  # before the first layer
            out["dense0/bias"] = -(mean * gain) @ out["dense0/kernel"]
            out["dense0/kernel"] *= gain[:, None]
        else:  # behind its layer
            layer = norm.replace("norm", "dense")
            out[f"{layer}/kernel"] *= gain
            out[f"{layer}/bias"] = (out.get(f"{layer}/bias", 0) - mean) * gain + out.pop(f"{norm}/bias")
    return out


def policy_spec(cfg: Config, state: State) -> dict[str, Any]:
    """The layers of the actor as the onboard runtime takes them, ready for JSON; from the shapes of a state, too."""
    params = state.actor["params"]
    return {
        "observation_size": int(params["dense0"]["kernel"].shape[0]),
        "action_size": int(params["mean"]["bias"].shape[0]),
        "hidden": list(cfg.actor_hidden or cfg.hidden),
        "max_delta": cfg.max_delta,
    }
