"""Actor and critics: flax.linen modules, parameters in, numbers out."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
NORM_EPSILON = 1e-6

_xavier = nn.initializers.xavier_uniform()
_xavier_each = nn.initializers.xavier_uniform(in_axis=-2, out_axis=-1, batch_axis=0)


class Actor(nn.Module):
    """A Gaussian before the tanh: (..., obs) -> mean and log standard deviation, (..., action) each.

    Dense -> ReLU per hidden layer; the parameter names are those of the onboard runtime.
    """

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = obs
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, kernel_init=_xavier, name=f"dense{i}")(x))
        mean = nn.Dense(self.action_size, kernel_init=_xavier, name="mean")(x)
        log_std = nn.Dense(self.action_size, kernel_init=_xavier, name="log_std")(x)
        return mean, jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)


class Critics(nn.Module):
    """An ensemble of independent Q functions: (batch, obs), (batch, action) -> (members, batch).

    Each layer Dense -> LayerNorm -> ReLU (RLPD). All members at once as batched products: parameters
    (members, in, out), so a subset of members is an index into the parameters.
    """

    members: int
    hidden: tuple[int, ...]
    layer_norm: bool = True

    @nn.compact
    def __call__(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        x = jnp.concatenate([obs, action], axis=-1)
        x = jnp.broadcast_to(x, (self.members, *x.shape))  # (members, batch, in)
        for i, width in enumerate(self.hidden):
            x = self._dense(f"dense{i}", x, width)
            if self.layer_norm:
                x = self._norm(f"norm{i}", x)
            x = nn.relu(x)
        return self._dense("value", x, 1)[..., 0]

    def _dense(self, name: str, x: jax.Array, width: int) -> jax.Array:
        kernel = self.param(f"{name}_kernel", _xavier_each, (self.members, x.shape[-1], width))
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (self.members, width))
        return x @ kernel + bias[:, None]

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        scale = self.param(f"{name}_scale", nn.initializers.ones, (self.members, x.shape[-1]))
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (self.members, x.shape[-1]))
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + NORM_EPSILON) * scale[:, None] + bias[:, None]


def tanh_normal(mean: jax.Array, log_std: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squashed sample in (-1, 1) and its log-density (..., ), from standard normal noise (..., action).

    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which does not overflow (SAC, appendix C).
    """
    u = mean + jnp.exp(log_std) * noise
    normal = -0.5 * jnp.square(noise) - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2.0 * (math.log(2.0) - u - nn.softplus(-2.0 * u))
    return jnp.tanh(u), (normal - squash).sum(-1)


def window(prev_action: jax.Array, max_delta: float) -> tuple[jax.Array, jax.Array]:
    """The actions allowed after `prev_action`: [prev - d, prev + d] within [-1, 1], (..., action) each."""
    prev_action = jnp.clip(prev_action, -1.0, 1.0)  # a reset may have left the box
    return jnp.maximum(prev_action - max_delta, -1.0), jnp.minimum(prev_action + max_delta, 1.0)


def into(low: jax.Array, high: jax.Array, squashed: jax.Array) -> jax.Array:
    """Map (-1, 1) linearly onto [low, high]; rounding never leaves it."""
    return jnp.minimum(low + (squashed + 1.0) * 0.5 * (high - low), high)
