"""Samples a point at a time: deformable attention for GPUs ('rows') and CPUs ('points').

'rows' reads the four neighbours of a point as one long row of a table made for it; 'points' reads them one by one from
the map in a frame of zeros. Both sum up as they go, and keep nothing for the backward pass but their arguments, which
are those of `sampling.sample`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.models.windows import Levels

# So many numbers are read at a time on the way back: 0.75 MiB, within the second cache of a server's core.
BLOCK = 3 * 2**16


@dataclasses.dataclass(frozen=True)
class _Points:
    """The samples of all queries by the rows of a table that has a frame around every level: `[L * P, B, Q, heads]`.

    In a `jax.lax.scan` over them, one sample of every query: `[B, Q, heads]`.
    """

    row: jax.Array  # int32: of the upper left neighbour.
    right: jax.Array  # How far the point is to the right of its left neighbours, 0 to 1,
    down: jax.Array  # and below its upper ones.
    weight: jax.Array  # Zero where none of the neighbours is in the map.
    inside: jax.Array  # Whether one is.
    line: jax.Array  # [L * P] int32: rows from a pixel to the one below.

    @classmethod
    def of(cls, x, y, weights, levels: Levels, frame: int) -> _Points:
        """frame: columns, and rows, that a level has more in the table than in the map."""
        points = x.shape[-1] // len(levels)
        height, width = (np.repeat([level[axis] for level in levels], points) for axis in (0, 1))
        start = np.repeat(np.cumsum([0] + [(h + frame) * (w + frame) for h, w in levels])[:-1], points)
        left, top = jnp.floor(x), jnp.floor(y)
        inside = (left >= -1) & (left < width) & (top >= -1) & (top < height)
        column = jnp.clip(left, -1, width - 1).astype(jnp.int32) + 1
        row = start + (jnp.clip(top, -1, height - 1).astype(jnp.int32) + 1) * (width + frame) + column
        arrays = (row, x - left, y - top, jnp.where(inside, weights, 0), inside)
        return cls(*(jnp.moveaxis(a, -1, 0) for a in arrays), jnp.asarray(width + frame, jnp.int32))

    def interleaved(self) -> _Points:
        """The same for a table in which every pixel has a row for each head."""
        heads = self.row.shape[-1]
        return dataclasses.replace(self, row=self.row * heads + np.arange(heads), line=self.line * heads)

    def shares(self) -> tuple[jax.Array, ...]:
        """What the upper left, upper right, lower left and lower right neighbour count."""
        upper, lower = (1 - self.down) * self.weight, self.down * self.weight
        return upper * (1 - self.right), upper * self.right, lower * (1 - self.right), lower * self.right

    def wide_shares(self, channels: int) -> jax.Array:
        """The same for every number of a row with all four: `[..., 4 * channels]`."""
        corner = np.arange(4 * channels) // channels
        right, down = self.right[..., None], self.down[..., None]
        across = jnp.where(corner % 2 == 1, right, 1 - right)
        return jnp.where(corner // 2 == 1, down, 1 - down) * across * self.weight[..., None]

    def slopes(self, g00, g01, g10, g11) -> tuple[jax.Array, ...]:
        """Gradients by x, y and weight, from what every neighbour would add if it counted fully."""
        upper, lower = g00 + self.right * (g01 - g00), g10 + self.right * (g11 - g10)
        x_gradient = self.weight * ((1 - self.down) * (g01 - g00) + self.down * (g11 - g10))
        weight_gradient = jnp.where(self.inside, upper + self.down * (lower - upper), 0)
        return x_gradient, self.weight * (lower - upper), weight_gradient


jax.tree_util.register_dataclass(_Points)


# ---------------------------------------------------------------------------------------------- rows of four neighbours


def _neighbourhoods(value: jax.Array, levels: Levels) -> jax.Array:
    """The four neighbours of every place between pixels, side by side: `[B, heads, sum((H + 1) * (W + 1)), 4 D]`.

    Outside the map is zero. So that a point reads one long row of memory instead of four short ones.
    """
    tables, start = [], 0
    for height, width in levels:
        level = value[:, start : start + height * width].transpose(0, 2, 1, 3)
        level = level.reshape(*level.shape[:2], height, width, -1)
        padded = jnp.pad(level, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
        upper, lower = padded[:, :, :-1], padded[:, :, 1:]
        table = jnp.concatenate(
            [upper[..., :-1, :], upper[..., 1:, :], lower[..., :-1, :], lower[..., 1:, :]], -1
        )
        tables.append(table.reshape(*table.shape[:2], -1, table.shape[-1]))
        start += height * width
    return jnp.concatenate(tables, 2)


def rows_forward(value, x, y, weights, levels):
    """Weighted sums `[B, Q, heads, D]`."""
    x, y, weights = (a.swapaxes(1, 2) for a in (x, y, weights))  # Heads first, as the table has them.
    table, channels = _neighbourhoods(value, levels), value.shape[-1]

    def add(total, point):
        return total + point.wide_shares(channels) * _read(table, point.row), None

    total = jnp.zeros((*x.shape[:3], 4 * channels), jnp.float32)
    total, _ = jax.lax.scan(add, total, _Points.of(x, y, weights, levels, frame=1))
    return total.reshape(*x.shape[:3], 4, channels).sum(-2).astype(value.dtype).swapaxes(1, 2)


def _read(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows `[B, heads, Q]` of `[B, heads, S, C]`, which are all there."""
    read = jax.vmap(jax.vmap(lambda table, rows: table.at[rows].get(mode="promise_in_bounds")))
    return read(table, rows)


def rows_backward(levels, residuals, gradient):
    """Gradients by value, x, y and weights, which the residuals are, for one `[B, Q, heads, D]`."""
    value, *points = residuals
    channels = value.shape[-1]
    table, spread = jax.vjp(lambda value: _neighbourhoods(value, levels), value.astype(jnp.float32))
    table = table.astype(value.dtype)
    gradient = jnp.tile(gradient.astype(jnp.float32), 4).swapaxes(1, 2)
    by_corner = np.repeat(np.eye(4, dtype=np.float32), channels, axis=0)  # [4 D, 4]
    scatter = jax.vmap(jax.vmap(lambda table, rows, add: table.at[rows].add(add, mode="promise_in_bounds")))

    def add(total, point):
        total = scatter(total, point.row, point.wide_shares(channels) * gradient)
        corners = jnp.einsum(
            "bhqc,ck->kbhq",
            gradient * _read(table, point.row),
            by_corner,
            precision=jax.lax.Precision.HIGHEST,
        )
        return total, point.slopes(*corners)

    points = _Points.of(*(a.swapaxes(1, 2) for a in points), levels, frame=1)
    total, gradients = jax.lax.scan(add, jnp.zeros(table.shape, jnp.float32), points)
    return spread(total)[0].astype(value.dtype), *(g.transpose(1, 3, 2, 0) for g in gradients)


# --------------------------------------------------------------------------------------------------- corner by corner


def _padded(value: jax.Array, levels: Levels) -> jax.Array:
    """All levels within a frame of zeros, pixel by pixel, head by head: `[B, sum((H + 2) * (W + 2)) * heads, D]`."""
    tables, start = [], 0
    for height, width in levels:
        level = value[:, start : start + height * width].reshape(
            value.shape[0], height, width, *value.shape[2:]
        )
        level = jnp.pad(level, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
        tables.append(level.reshape(value.shape[0], -1, value.shape[-1]))
        start += height * width
    return jnp.concatenate(tables, 1)


# Rows [B, N] of tables [B, S, C], which are all there.
_take = jax.vmap(lambda table, rows: table.at[rows].get(mode="promise_in_bounds"))
_put = jax.vmap(lambda table, rows, add: table.at[rows].add(add, mode="promise_in_bounds"))


def _neighbour_rows(point: _Points, heads: int) -> tuple[jax.Array, ...]:
    below = point.row + point.line
    return point.row, point.row + heads, below, below + heads


def points_forward(value, x, y, weights, levels):
    """Weighted sums `[B, Q, heads, D]`."""
    heads, table = value.shape[2], _padded(value, levels)

    def add(total, point):
        for rows, share in zip(_neighbour_rows(point, heads), point.shares(), strict=True):
            total += share[..., None] * _take(table, rows)
        return total, None

    points = _Points.of(x, y, weights, levels, frame=2).interleaved()
    total = jnp.zeros((*points.row.shape[1:], value.shape[-1]), jnp.float32)
    return jax.lax.scan(add, total, points)[0].astype(value.dtype)


def points_backward(levels, residuals, gradient):
    """Gradients by value, x, y and weights, which the residuals are, for one `[B, Q, heads, D]`."""
    value, x, y, weights = residuals
    batch, queries, heads, channels = gradient.shape
    table, spread = jax.vjp(lambda value: _padded(value, levels), value.astype(jnp.float32))
    table = table.astype(value.dtype)

    # What is read for some queries after the others is still in the cache when it is multiplied.
    blocks = -(-gradient.size // BLOCK)
    size = -(-queries // blocks)

    def split(array):
        padded = jnp.pad(array, ((0, 0), (0, blocks * size - queries), (0, 0), (0, 0)))
        return jnp.moveaxis(padded.reshape(batch, blocks, size, *array.shape[2:]), 1, 0)

    def join(array):
        return jnp.moveaxis(array, 0, 1).reshape(batch, blocks * size, *array.shape[3:])[:, :queries]

    def add_block(total, block):
        gradient, *points = block

        def add(total, point):
            corners = []
            for rows, share in zip(_neighbour_rows(point, heads), point.shares(), strict=True):
                part = (share[..., None] * gradient).reshape(batch, -1, channels)
                total = _put(total, rows.reshape(batch, -1), part)
                # As a product: XLA:CPU takes ten times as long for a sum along the last axis of what was multiplied.
                corners.append(jnp.einsum("bqhd,bqhd->bqh", _take(table, rows), gradient))
            return total, point.slopes(*corners)

        points = _Points.of(*points, levels, frame=2).interleaved()
        total, gradients = jax.lax.scan(add, total, points)
        return total, [jnp.moveaxis(g, 0, -1) for g in gradients]

    arrays = gradient.astype(jnp.float32), x, y, weights
    total, gradients = jax.lax.scan(add_block, jnp.zeros(table.shape, jnp.float32), [*map(split, arrays)])
    return spread(total)[0].astype(value.dtype), *map(join, gradients)
