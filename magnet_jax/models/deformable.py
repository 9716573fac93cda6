"""Multi-scale deformable attention: a query samples a few points of every level (spec section 3)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.models.layers import Dense, add_bias, linear
from magnet_jax.models.parameters import xavier_uniform, zeros
from magnet_jax.models.sampling import pixel_centres, sample, sample_in_cells


def fan_bias(heads: int, levels: int, points: int) -> np.ndarray:
    """Initial offsets: head h looks along the angle 2 pi h / heads, point p (from 1) p pixels out (spec section 4b)."""
    angle = 2 * np.pi * np.arange(heads) / heads
    direction = np.stack([np.cos(angle), np.sin(angle)], -1)
    direction /= np.abs(direction).max(-1, keepdims=True)
    fan = direction[:, None, None] * np.arange(1, points + 1)[:, None]
    return np.broadcast_to(fan, (heads, levels, points, 2)).reshape(-1).astype(np.float32)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention of all pixels of a pyramid on all its levels.

    query and source `[B, sum(H * W), C]`, shapes: (H, W) of every level -> `[B, sum(H * W), C]`.
    `sampling`: the form of `sampling.sample`; with `in_cells`, it is 'windows', and all of these `[B, places, C]` as
    the order of `sampling.cells_for` has them.
    Source: Deformable DETR (arXiv 2010.04159); spec section 3.
    """

    heads: int = 8
    points: int = 4
    sampling: str = "auto"
    dtype: Any = jnp.float32
    in_cells: bool = False

    @nn.compact
    def __call__(self, query, source, shapes):
        batch, queries, channels = query.shape
        heads, levels, points = self.heads, len(shapes), self.points

        def fan(key, shape, dtype=jnp.float32):
            return jnp.asarray(fan_bias(heads, levels, points), dtype)

        def dense(features, name, dtype=self.dtype, **init):
            return Dense(features, dtype=dtype, name=name, **init)

        # Positions are float32: bfloat16 would round them to whole pixels.
        query = query.astype(jnp.float32)
        shapes, samples = tuple(map(tuple, shapes)), levels * points
        value = dense(channels, "value", kernel_init=xavier_uniform)(source)
        offsets = dense(heads * samples * 2, "offsets", jnp.float32, kernel_init=zeros, bias_init=fan)
        logits = dense(heads * samples, "weights", jnp.float32, kernel_init=zeros)
        if self.in_cells:
            # One product gives x, y and logits, as the kernels want them.
            kernels, biases = zip(offsets.parameters(channels), logits.parameters(channels), strict=True)
            kernel = jnp.concatenate([kernels[0][:, ::2], kernels[0][:, 1::2], kernels[1]], 1)
            bias = jnp.concatenate([biases[0][::2], biases[0][1::2], biases[1]])
            out = sample_in_cells(value, add_bias(linear(query, kernel, None), bias), shapes, heads)
        else:
            value = value.reshape(batch, queries, heads, channels // heads)
            x, y = jnp.moveaxis(offsets(query).reshape(batch, queries, heads, samples, 2), -1, 0)
            weights = jax.nn.softmax(logits(query).reshape(batch, queries, heads, samples), axis=-1)
            # Offsets are in pixels of the level that is sampled.
            centre_x, centre_y = pixel_centres(shapes, points)
            out = sample(value, x + centre_x, y + centre_y, weights, shapes, self.sampling)
        return dense(channels, "output", kernel_init=xavier_uniform)(out.reshape(batch, queries, channels))
