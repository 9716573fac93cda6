"""Samples of a cell within the kernels of `window_kernels`, and the hat functions that they become."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from magnet_jax.models.window_tiles import Shape
from magnet_jax.models.windows import COLUMNS

_FAR = 1e30


def turn(raw: jax.Array, turned, shape: Shape) -> None:
    """`[places, 3 * heads * samples]` of a cell -> `[heads * samples, 3 * places]`."""
    width = shape.heads * shape.samples
    turned[...] = jnp.concatenate([raw[:, kind * width : (kind + 1) * width] for kind in range(3)]).T


def turn_back(turned, shape: Shape) -> jax.Array:
    found, places = turned[...].T, shape.cells.lanes
    return jnp.concatenate([found[kind * places : (kind + 1) * places] for kind in range(3)], 1)


def read_samples(turned, samples, centres: jax.Array, shape: Shape, group: int) -> None:
    """Writes those of a group, heads side by side, in pixels of their windows: `[3 * samples, lanes]`."""
    places, count = shape.cells.lanes, shape.samples
    for kind in range(3):
        parts = [
            turned[head * count : (head + 1) * count, kind * places : (kind + 1) * places]
            for head in shape.heads_of(group)
        ]
        part = jnp.concatenate(parts, 1)
        if kind < 2:
            part += jnp.concatenate(
                [
                    jnp.broadcast_to(centres[row : row + 1], (shape.points, shape.lanes))
                    for row in range(kind * shape.levels, (kind + 1) * shape.levels)
                ]
            )
        elif shape.offsets:
            part = jnp.exp(part - part.max(0, keepdims=True))
            part /= part.sum(0, keepdims=True)
        samples[shape.kind(kind)] = part


def write_samples(turned, samples: jax.Array, shape: Shape, group: int) -> None:
    """The way back: those of a group to where `read_samples` reads them."""
    places, count = shape.cells.lanes, shape.samples
    for kind in range(3):
        part = samples[shape.kind(kind)]
        for number, head in enumerate(shape.heads_of(group)):
            turned[head * count : (head + 1) * count, kind * places : (kind + 1) * places] = part[
                :, number * places : (number + 1) * places
            ]


def missed_by(samples, shape: Shape, first_row, first_column) -> jax.Array:
    """1 where a sample needs a pixel of the map that its window has not, else 0: `[1, lanes]`.

    first_row, first_column: of the windows of all levels.
    """
    missed = jnp.zeros((1, shape.lanes), jnp.float32)
    for level in range(shape.levels):
        near, outside = True, False
        for kind, first, axis in ((0, first_column, shape.cells.columns), (1, first_row, shape.cells.rows)):
            at, windows = samples[shape.rows_of(level, kind)], axis[level]
            first = first[level]
            # What is beyond the map is zero, whether it is in the window or not.
            low = jnp.where(first == 0, -_FAR, 0.0)
            high = jnp.where(first + windows.length >= windows.size, _FAR, windows.length - 1.0)
            # Strictly before the last pixel, as a slope looks one further.
            near &= (at >= low) & (at < high)
            first = first.astype(jnp.float32)
            outside |= (at < -1 - first) | (at >= windows.size - first)
        missed = jnp.maximum(missed, jnp.where(near | outside, 0.0, 1.0).max(0, keepdims=True))
    return missed


def index(shape: tuple[int, int]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.float32)


def _hat(distance: jax.Array) -> jax.Array:
    return jnp.maximum(0.0, 1.0 - jnp.abs(distance))


def hats(samples, down, shape: Shape, level: int) -> list[jax.Array]:
    """Writes those along the rows, times the weights, to `down` `[P, rows, lanes]` of the level.

    Returns those along the columns, `[16, lanes]` of every point.
    """
    across = []
    for point in range(shape.points):
        x, y, weight = (samples[shape.rows_of(level, kind)][point : point + 1] for kind in range(3))
        height = shape.cells.rows[level].length
        down[point, :height] = _hat(y - index((height, shape.lanes))) * weight
        across.append(_hat(x - index((COLUMNS, shape.lanes))))
    return across


def products(down, across: list[jax.Array], rows: range, dtype) -> jax.Array:
    """The matrix of some rows of a window: the products of hats, summed over the points, `[rows * 16, lanes]`."""
    parts = []
    for row in rows:
        total = down[0, row : row + 1, :] * across[0]
        for point in range(1, len(across)):
            total += down[point, row : row + 1, :] * across[point]
        parts.append(total)
    return jnp.concatenate(parts).astype(dtype)


def neighbours(at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two pixels between which a place is, of its own if it is one and the next: the even one, and the odd one."""
    half = 0.5 * at
    return 2 * jnp.floor(half + 0.5), 2 * jnp.floor(half) + 1


def by_samples_of(samples, corners, shape: Shape) -> jax.Array:
    """Gradients by the samples of a group, as they are laid out, of those by the four pixels around each.

    corners: those of the even row and of the odd one, `[2 * samples, lanes]`, the even column's before the odd one's.
    """
    x, y, weights = (samples[shape.kind(kind)] for kind in range(3))
    (x_even, x_odd), (y_even, y_odd) = neighbours(x), neighbours(y)
    (even_even, even_odd), (odd_even, odd_odd) = (
        [corners[row][pl.ds(column, shape.samples, stride=2), :] for column in range(2)] for row in range(2)
    )
    from_x, from_y = jnp.abs(x - x_even), jnp.abs(y - y_even)
    even_row, odd_row = (a + from_x * (b - a) for a, b in ((even_even, even_odd), (odd_even, odd_odd)))
    even_column, odd_column = (a + from_y * (b - a) for a, b in ((even_even, odd_even), (even_odd, odd_odd)))
    by_x = weights * (x_odd - x_even) * (odd_column - even_column)
    by_y = weights * (y_odd - y_even) * (odd_row - even_row)
    by_weights = even_row + from_y * (odd_row - even_row)
    if shape.offsets:
        by_weights = weights * (by_weights - (weights * by_weights).sum(0, keepdims=True))
    return jnp.concatenate([by_x, by_y, by_weights])
