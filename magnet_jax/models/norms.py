"""Normalisation, with float32 statistics whatever the compute dtype."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from magnet_jax.models.parameters import ones, parameter, zeros


class LayerNorm(nn.Module):
    """Layer normalisation over channels with float32 statistics.

    `[..., C] -> [..., C]` in the dtype of the input.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        scale = parameter(self, "scale", ones, (x.shape[-1],))
        bias = parameter(self, "bias", zeros, (x.shape[-1],))
        return _layer_norm(x, scale, bias, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
    mean, inverse = _statistics(x, -1, epsilon)
    y = (x.astype(jnp.float32) - mean) * inverse * scale + bias
    return y.astype(x.dtype), (x, mean, inverse, scale)


def _layer_norm_backward(epsilon, residuals, gradient):
    x, mean, inverse, scale = residuals
    y, gradient = (x.astype(jnp.float32) - mean) * inverse, gradient.astype(jnp.float32)
    leading = tuple(range(x.ndim - 1))
    by_y = gradient * scale
    by_x = by_y - by_y.mean(-1, keepdims=True) - y * (by_y * y).mean(-1, keepdims=True)
    return (by_x * inverse).astype(x.dtype), (gradient * y).sum(leading), gradient.sum(leading)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _statistics(x: jax.Array, axes: int | tuple[int, ...], epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Mean and one over the deviation, float32."""
    y = x.astype(jnp.float32)
    mean = y.mean(axes, keepdims=True)
    if x.dtype == jnp.float32:
        variance = jnp.square(y - mean).mean(axes, keepdims=True)
    else:  # One look at numbers of 8 bits gives both sums, with digits to spare.
        variance = jnp.maximum(jnp.square(y).mean(axes, keepdims=True) - jnp.square(mean), 0)
    return mean, jax.lax.rsqrt(variance + epsilon)


class GroupNorm(nn.Module):
    """Group normalisation over pixels and the channels of a group, with float32 statistics: `[B, N, C] -> [B, N, C]`."""

    groups: int = 32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        batch, pixels, channels = x.shape
        scale = parameter(self, "scale", ones, (channels,))
        bias = parameter(self, "bias", zeros, (channels,))
        y = x.reshape(batch, pixels, self.groups, -1)
        mean, inverse = _statistics(y, (1, 3), self.epsilon)
        y = (y.astype(jnp.float32) - mean) * inverse
        return (y.reshape(x.shape) * scale + bias).astype(x.dtype)


def instance_norm(x: jax.Array, mask: jax.Array | None = None, epsilon: float = 1e-5) -> jax.Array:
    """Normalises every channel over the positions of its own sample, without affine parameters, biased variance.

    x [B, N, C]; mask [B, N] of {0, 1} restricts the statistics to some positions (an all-zero mask gives zeros).
    Statistics are float32; the result has the dtype of x. Spec section 2.
    """
    y = x.astype(jnp.float32)
    if mask is None:
        y -= y.mean(1, keepdims=True)
        variance = jnp.square(y).mean(1, keepdims=True)
    else:
        weight = mask.astype(jnp.float32)[..., None]
        count = jnp.maximum(weight.sum(1, keepdims=True), 1.0)
        y = (y - (y * weight).sum(1, keepdims=True) / count) * weight
        variance = jnp.square(y).sum(1, keepdims=True) / count
    return (y * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)
