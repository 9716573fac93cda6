"""Multi-scale deformable attention: every query samples a few points of every level of a feature pyramid (spec section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.models.layers import xavier_uniform, zeros

# Below this many pixels a level is sampled by a matrix product, when the form is chosen automatically.
DENSE_PIXELS = 1024


def sample_gather(value: jax.Array, x: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum of bilinear samples, by gathering the four corners of every point: the reference form.

    value [B, H, W, heads, D]; x, y [B, heads, Q, P] in pixels, 0 the centre of the first one, any value: what lies
    outside the map is zero; weights [B, heads, Q, P] -> [B, heads, Q, D].
    """
    batch, height, width, heads, channels = value.shape
    queries, points = x.shape[2:]
    flat = value.reshape(batch, height * width, heads, channels).transpose(0, 2, 1, 3)
    left, top = jnp.floor(x), jnp.floor(y)
    out = jnp.zeros((batch, heads, queries, channels), value.dtype)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        corner_x, corner_y = left + column, top + row
        weight = weights * (1 - jnp.abs(x - corner_x)) * (1 - jnp.abs(y - corner_y))
        inside = (corner_x >= 0) & (corner_x < width) & (corner_y >= 0) & (corner_y < height)
        weight = jnp.where(inside, weight, 0).astype(value.dtype)
        index = jnp.clip(corner_y, 0, height - 1) * width + jnp.clip(corner_x, 0, width - 1)
        index = index.astype(jnp.int32).reshape(batch, heads, queries * points, 1)
        corner = jnp.take_along_axis(flat, index, axis=2).reshape(batch, heads, queries, points, channels)
        out += jnp.einsum("bhqp,bhqpd->bhqd", weight, corner)
    return out


def sample_dense(value: jax.Array, x: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
    """The same as `sample_gather`, as one product of a [Q, H * W] matrix of hat-function weights with the values."""
    batch, height, width, heads, channels = value.shape
    rows = jnp.maximum(0, 1 - jnp.abs(y[..., None] - jnp.arange(height))) * weights[..., None]  # [B, heads, Q, P, H]
    columns = jnp.maximum(0, 1 - jnp.abs(x[..., None] - jnp.arange(width)))  # [B, heads, Q, P, W]
    matrix = sum(
        rows[..., point, :, None] * columns[..., point, None, :] for point in range(x.shape[-1])
    )  # [B, heads, Q, H, W]
    matrix = matrix.reshape(batch, heads, -1, height * width).astype(value.dtype)
    return jnp.einsum("bhqn,bnhd->bhqd", matrix, value.reshape(batch, height * width, heads, channels))


def reference_points(shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Centres (x, y) in [0, 1] of the pixels of all levels, level after level, row by row: `[sum(H * W), 2]`."""
    points = []
    for height, width in shapes:
        y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
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
    `sampling` is 'gather', 'dense' or 'auto' (dense for small levels); all give the same values.
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

        value = nn.Dense(channels, kernel_init=xavier_uniform, dtype=self.dtype, name="value")(source)
        # Positions are float32: bfloat16 would round them to whole pixels.
        offsets = nn.Dense(heads * levels * points * 2, kernel_init=zeros, bias_init=fan, name="offsets")(
            query.astype(jnp.float32)
        )
        weights = nn.Dense(heads * levels * points, kernel_init=zeros, name="weights")(query.astype(jnp.float32))
        offsets = offsets.reshape(batch, queries, heads, levels, points, 2).transpose(0, 2, 1, 3, 4, 5)
        weights = jax.nn.softmax(weights.reshape(batch, queries, heads, levels * points), axis=-1)
        weights = weights.reshape(batch, queries, heads, levels, points).transpose(0, 2, 1, 3, 4)

        centre = reference_points(shapes)  # [Q, 2]
        out, start = jnp.zeros((batch, heads, queries, channels // heads), self.dtype), 0
        for level, (height, width) in enumerate(shapes):
            size = height * width
            level_value = value[:, start : start + size].reshape(batch, height, width, heads, channels // heads)
            # Offsets are in pixels of the sampled level.
            x = (centre[:, 0] * width - 0.5)[:, None] + offsets[:, :, :, level, :, 0]
            y = (centre[:, 1] * height - 0.5)[:, None] + offsets[:, :, :, level, :, 1]
            dense = self.sampling == "dense" or (self.sampling == "auto" and size <= DENSE_PIXELS)
            out += (sample_dense if dense else sample_gather)(level_value, x, y, weights[:, :, :, level])
            start += size
        out = out.transpose(0, 2, 1, 3).reshape(batch, queries, channels)
        return nn.Dense(channels, kernel_init=xavier_uniform, dtype=self.dtype, name="output")(out)
