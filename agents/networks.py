"""Actor and critics: flax.linen modules, variables in, numbers out."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
LAYER_EPSILON, BATCH_EPSILON = 1e-6, 1e-5  # added to variances
MOMENTUM = 0.99  # of the running statistics of batch norm (CrossQ)

_xavier = nn.initializers.xavier_uniform()
_xavier_each = nn.initializers.xavier_uniform(in_axis=-2, out_axis=-1, batch_axis=0)


class BatchNorm(nn.Module):
    """Normalises (batch, width) over the batch: by its own statistics when training, else by running ones.

    With `members`, (members, batch, width), each by its own. Scale and, if `use_bias`, bias are learned.
    """

    members: int | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shape = (x.shape[-1],) if self.members is None else (self.members, 1, x.shape[-1])
        mean = self.variable("stats", "mean", jnp.zeros, shape)
        var = self.variable("stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape) if self.use_bias else 0.0
        m, v = mean.value, var.value
        if train:
            m = x.mean(-2).reshape(shape)
            v = jnp.square(x - jnp.broadcast_to(m, x.shape)).mean(-2).reshape(shape)
            if not self.is_initializing():
                mean.value = MOMENTUM * mean.value + (1.0 - MOMENTUM) * m
                var.value = MOMENTUM * var.value + (1.0 - MOMENTUM) * v
        gain = scale * jax.lax.rsqrt(v + BATCH_EPSILON)
        return x * jnp.broadcast_to(gain, x.shape) + jnp.broadcast_to(bias - m * gain, x.shape)


class Actor(nn.Module):
    """A Gaussian before the tanh: (..., obs) -> mean and log standard deviation, (..., action) each.

    Dense -> ReLU per hidden layer, with `batch_norm` of the input and before each ReLU (`sac.policy_params` takes
    it out again); the parameter names are those of the onboard runtime. What batch norm would take out, it lacks:
    the biases before one.
    """

    hidden: tuple[int, ...]
    action_size: int
    batch_norm: bool = False

    @nn.compact
    def __call__(self, obs: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        x = BatchNorm(use_bias=False, name="input")(obs, train) if self.batch_norm else obs
        for i, width in enumerate(self.hidden):
            x = nn.Dense(width, not self.batch_norm, kernel_init=_xavier, name=f"dense{i}")(x)
            if self.batch_norm:
                x = BatchNorm(name=f"norm{i}")(x, train)
            x = nn.relu(x)
        mean = nn.Dense(self.action_size, kernel_init=_xavier, name="mean")(x)
        log_std = nn.Dense(self.action_size, kernel_init=_xavier, name="log_std")(x)
        return mean, jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)


class Critics(nn.Module):
    """An ensemble of independent Q functions: (batch, obs), (batch, action) -> (members, batch, outputs).

    Each layer Dense -> norm -> ReLU; `norm` is "layer" (RLPD), "none" or "batch" (CrossQ: also of the input, and
    without the biases that it would take out).
    All members at once as batched products: parameters (members, in, out), so a subset of members is an index
    into the parameters. With `dropout` (before the norm: DroQ) layer i takes its mask from fold_in(key, i).
    `rows`: those of the batch whose outputs are wanted; the others count in batch norm's statistics alone.
    """

    members: int
    hidden: tuple[int, ...]
    norm: str = "layer"
    outputs: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, obs: jax.Array, action: jax.Array, train: bool = False, key: jax.Array | None = None,
        rows: slice = slice(None),
    ) -> jax.Array:  # fmt: skip
        x = jnp.concatenate([obs, action], axis=-1)
        x = jnp.broadcast_to(x, (self.members, *x.shape))  # (members, batch, in)
        if self.norm == "batch":
            x = BatchNorm(self.members, use_bias=False, name="input")(x, train)
        for i, width in enumerate(self.hidden):
            x = self._dense(f"dense{i}", x, width, use_bias=self.norm != "batch")
            if self.dropout and key is not None:
                x = x * dropout_mask(jax.random.fold_in(key, i), x.shape, self.dropout)
            if self.norm == "layer":
                x = self._layer_norm(f"norm{i}", x)
            elif self.norm == "batch":
                x = BatchNorm(self.members, name=f"norm{i}")(x, train)
            x = nn.relu(x)
        return self._dense("value", x[:, rows], self.outputs)

    def _dense(self, name: str, x: jax.Array, width: int, use_bias: bool = True) -> jax.Array:
        x = x @ self.param(f"{name}_kernel", _xavier_each, (self.members, x.shape[-1], width))
        return x + self.param(f"{name}_bias", nn.initializers.zeros, (self.members, width))[:, None] if use_bias else x

    def _layer_norm(self, name: str, x: jax.Array) -> jax.Array:
        scale = self.param(f"{name}_scale", nn.initializers.ones, (self.members, x.shape[-1]))
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (self.members, x.shape[-1]))
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + LAYER_EPSILON) * scale[:, None] + bias[:, None]


def dropout_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """0 with probability `rate`, else 1 / (1 - rate), from a hash of element number and key.

    The hash (Wellons' lowbias32) is a dozen integer operations that fuse into the product with the mask;
    drawing the mask with threefry costs as much as the layer.
    """
    words = jax.random.key_data(key).reshape(-1)
    x = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) * jnp.uint32(0x9E3779B9) + words[0]
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D) ^ words[1]
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    x = x ^ (x >> 16)
    return jnp.where(x >= jnp.uint32(int(rate * 2**32)), 1.0 / (1.0 - rate), 0.0)


def unit_kernels(params: dict[str, Any]) -> dict[str, Any]:
    """The same with every hidden kernel's columns scaled to length 1: behind a norm only their direction counts,
    and a fixed length keeps the step size of an optimiser what it is (Palenicek et al. 2025)."""

    def scaled(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="_")
        if "dense" not in name or not name.endswith("kernel"):
            return x
        return x * jax.lax.rsqrt(jnp.square(x).sum(-2, keepdims=True) + 1e-12)

    return jax.tree_util.tree_map_with_path(scaled, params)


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
