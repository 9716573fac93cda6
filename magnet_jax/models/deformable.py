"""Multi-scale deformable attention: a query samples a few points of every level (spec section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.models.layers import Dense, xavier_uniform, zeros
from magnet_jax.models.sampling import sample


def reference_points(shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Centres (x, y) in [0, 1] of the pixels of all levels, level after level, row by row: `[sum(H * W), 2]`."""
    points = []
    for height, width in shapes:
        y, x = np.meshgrid(
            (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij"
        )
        points.append(np.stack([x, y], -1).reshape(-1, 2))
    return np.concatenate(points).astype(np.float32)


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
    `sampling`: the form of `sampling.sample`.
    Source: Deformable DETR (arXiv 2010.04159); spec section 3.
    """

    heads: int = 8
    points: int = 4
    sampling: str = "auto"
    dtype: Any = jnp.float32

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
        value = dense(channels, "value", kernel_init=xavier_uniform)(source)
        value = value.reshape(batch, queries, heads, channels // heads)
        samples = levels * points
        offsets = dense(heads * samples * 2, "offsets", jnp.float32, kernel_init=zeros, bias_init=fan)(query)
        offsets = offsets.reshape(batch, queries, heads, samples, 2)
        weights = dense(heads * samples, "weights", jnp.float32, kernel_init=zeros)(query)
        weights = jax.nn.softmax(weights.reshape(batch, queries, heads, samples), axis=-1)

        # Offsets are in pixels of the level that is sampled.
        height, width = (np.repeat([shape[axis] for shape in shapes], points) for axis in (0, 1))
        centre = reference_points(shapes)[:, None]
        x = offsets[..., 0] + (centre[..., :1] * width - 0.5)
        y = offsets[..., 1] + (centre[..., 1:] * height - 0.5)
        out = sample(value, x, y, weights, tuple(map(tuple, shapes)), self.sampling)
        return dense(channels, "output", kernel_init=xavier_uniform)(out.reshape(batch, queries, channels))
