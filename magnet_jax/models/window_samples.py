"""Samples of a cell within the kernels of `window_kernels`, and the hat functions that they become."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from magnet_jax.models.window_tiles import Shape
from magnet_jax.models.windows import COLUMNS, TILE_ROWS

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
    """Writes those along the rows, times the weights, to `down` `[P, rows, lanes]`.

    Returns those along the columns, `[16, lanes]` of every point.
    """
    across = []
    for point in range(shape.points):
        x, y, weight = (samples[shape.rows_of(level, kind)][point : point + 1] for kind in range(3))
        height = shape.cells.rows[level].length
        down[point, :height] = _hat(y - index((height, shape.lanes))) * weight
        across.append(_hat(x - index((COLUMNS, shape.lanes))))
    return across


def matrix_of(down, across: list[jax.Array], tile: int, dtype) -> jax.Array:
    """The products of a tile, summed over the points: `[pixels of a tile, lanes]`."""
    parts = []
    for row in range(tile * TILE_ROWS, (tile + 1) * TILE_ROWS):
        total = down[0, row : row + 1, :] * across[0]
        for point in range(1, len(across)):
            total += down[point, row : row + 1, :] * across[point]
        parts.append(total.astype(dtype))
    return jnp.concatenate(parts)
