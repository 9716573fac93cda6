"""Multi-scale deformable attention: a query samples a few points of every level (spec section 3)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.models.layers import xavier_uniform, zeros

# Up to this many pixels in all levels together, sampling is a matrix product when the form is chosen automatically.
DENSE_PIXELS = 2048

# Shapes of this file: value [B, S, heads, D], S pixels of all levels, level after level, row by row; x, y in pixels of
# their own level, 0 the centre of its first one, any value (what lies outside the map is zero), and weights
# [B, heads, Q, levels * P]; levels: (H, W) of each.
Levels = tuple[tuple[int, int], ...]


def _corners(levels: Levels, points: int, x: jax.Array, y: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Row in the S pixels and whether inside the map, of the upper left, upper right, lower left, lower right neighbour."""
    height, width = (np.repeat([level[axis] for level in levels], points) for axis in (0, 1))
    start = np.repeat(np.cumsum([0] + [h * w for h, w in levels])[:-1], points)
    left, top = jnp.floor(x), jnp.floor(y)
    corners = []
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        corner_x, corner_y = left + column, top + row
        inside = (corner_x >= 0) & (corner_x < width) & (corner_y >= 0) & (corner_y < height)
        pixel = start + jnp.clip(corner_y, 0, height - 1) * width + jnp.clip(corner_x, 0, width - 1)
        corners.append((pixel.astype(jnp.int32), inside))
    return corners


def sample_gather(
    value: jax.Array, x: jax.Array, y: jax.Array, weights: jax.Array, levels: Levels
) -> jax.Array:
    """Weighted sums of bilinear samples `[B, heads, Q, D]`, by gathering the four corners of every point: the reference."""
    batch, _, heads, channels = value.shape
    queries, samples = x.shape[2:]
    flat = value.transpose(0, 2, 1, 3)  # [B, heads, S, D]
    right, down = x - jnp.floor(x), y - jnp.floor(y)
    shares = ((1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right)
    out = jnp.zeros((batch, heads, queries, channels), value.dtype)
    for share, (pixel, inside) in zip(shares, _corners(levels, samples // len(levels), x, y), strict=True):
        weight = jnp.where(inside, weights * share, 0).astype(value.dtype)
        corner = jnp.take_along_axis(flat, pixel.reshape(batch, heads, -1, 1), axis=2)
        out += jnp.einsum(
            "bhqp,bhqpd->bhqd", weight, corner.reshape(batch, heads, queries, samples, channels)
        )
    return out


def _hat_matrices(x: jax.Array, y: jax.Array, weights: jax.Array, levels: Levels) -> list[jax.Array]:
    """Weight of every pixel in every query's sum, level by level: `[B, heads, Q, H * W]` each."""
    points, matrices = x.shape[-1] // len(levels), []
    for level, (height, width) in enumerate(levels):
        matrix = 0
        for point in range(level * points, (level + 1) * points):
            rows = (
                jnp.maximum(0, 1 - jnp.abs(y[..., point, None] - jnp.arange(height)))
                * weights[..., point, None]
            )
            columns = jnp.maximum(0, 1 - jnp.abs(x[..., point, None] - jnp.arange(width)))
            matrix += rows[..., :, None] * columns[..., None, :]
        matrices.append(matrix.reshape(*x.shape[:-1], height * width))
    return matrices


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def sample_dense(
    value: jax.Array, x: jax.Array, y: jax.Array, weights: jax.Array, levels: Levels
) -> jax.Array:
    """The same as `sample_gather`, as products of [Q, H * W] matrices of hat-function weights with the values.

    Forward and backward hold such matrices for every head; for maps of few pixels that is much faster than gathering.
    """
    out, start = 0, 0
    for matrix in _hat_matrices(x, y, weights, levels):
        stop = start + matrix.shape[-1]
        out += jnp.einsum("bhqn,bnhd->bhqd", matrix.astype(value.dtype), value[:, start:stop])
        start = stop
    return out


def _sample_dense_forward(value, x, y, weights, levels):
    return sample_dense(value, x, y, weights, levels), (value, x, y, weights)


def _sample_dense_backward(levels, residuals, gradient):
    value, x, y, weights = residuals
    value_gradient = [
        jnp.einsum("bhqn,bhqd->bnhd", matrix.astype(value.dtype), gradient)
        for matrix in _hat_matrices(x, y, weights, levels)
    ]
    # Only the corners of a point have a part in its gradient: pick these scalars out of the matrix's gradient.
    matrix_gradient = jnp.einsum("bhqd,bnhd->bhqn", gradient, value, preferred_element_type=jnp.float32)
    corners = _corners(levels, x.shape[-1] // len(levels), x, y)
    picked = jnp.take_along_axis(matrix_gradient, jnp.concatenate([pixel for pixel, _ in corners], -1), -1)
    g00, g01, g10, g11 = (
        jnp.where(inside, part, 0)
        for part, (_, inside) in zip(jnp.split(picked, 4, -1), corners, strict=True)
    )
    right, down = x - jnp.floor(x), y - jnp.floor(y)
    upper, lower = g00 + right * (g01 - g00), g10 + right * (g11 - g10)
    x_gradient = weights * ((1 - down) * (g01 - g00) + down * (g11 - g10))
    y_gradient = weights * (lower - upper)
    return jnp.concatenate(value_gradient, 1), x_gradient, y_gradient, upper + down * (lower - upper)


sample_dense.defvjp(_sample_dense_forward, _sample_dense_backward)


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
    `sampling` is 'gather', 'dense' or 'auto' (dense for small pyramids); all give the same values.
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
            return nn.Dense(features, dtype=dtype, name=name, **init)

        # Positions are float32: bfloat16 would round them to whole pixels.
        query = query.astype(jnp.float32)
        value = dense(channels, "value", kernel_init=xavier_uniform)(source)
        value = value.reshape(batch, queries, heads, channels // heads)
        samples = levels * points
        offsets = dense(heads * samples * 2, "offsets", jnp.float32, kernel_init=zeros, bias_init=fan)(query)
        offsets = offsets.reshape(batch, queries, heads, samples, 2).transpose(4, 0, 2, 1, 3)
        weights = dense(heads * samples, "weights", jnp.float32, kernel_init=zeros)(query)
        weights = jax.nn.softmax(
            weights.reshape(batch, queries, heads, samples).transpose(0, 2, 1, 3), axis=-1
        )

        # Offsets are in pixels of the level that is sampled.
        height, width = (np.repeat([shape[axis] for shape in shapes], points) for axis in (0, 1))
        centre = reference_points(shapes)
        x = offsets[0] + (centre[:, :1] * width - 0.5)
        y = offsets[1] + (centre[:, 1:] * height - 0.5)
        dense_form = self.sampling == "dense" or (self.sampling == "auto" and queries <= DENSE_PIXELS)
        out = (sample_dense if dense_form else sample_gather)(value, x, y, weights, tuple(map(tuple, shapes)))
        out = out.transpose(0, 2, 1, 3).reshape(batch, queries, channels)
        return dense(channels, "output", kernel_init=xavier_uniform)(out)
