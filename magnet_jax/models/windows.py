"""Samples near their queries as matrix products: the core of deformable attention on TPUs.

A TPU gathers slowly and multiplies matrices fast. So the picture is cut into cells, and the queries of one cell, of all
levels together (128 where each level has twice the pixels of the next: a TPU's lanes), read one window of every level.
The sum of a query is then the product of that window with a matrix of hat functions,
`weight * max(0, 1 - |x - column|) * max(0, 1 - |y - row|)` summed over its points, which is made where it is multiplied
and never kept. This is exact while every sample is outside the map or in its query's window (`covered`).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

CELL = (8, 12)  # Pixels of the finest level in a cell: with the coarser levels (96 + 24 + 6 + 2) 128 queries.
REACH = (
    6  # Pixels of its level that a sample may at least be away from its query: an untrained one is up to 4.
)
_LANES = 128

Levels = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The windows of one level along one axis."""

    size: int  # Pixels of the level.
    first: np.ndarray  # [cells along the axis] int: the first pixel of each window; outside the map as well.
    length: int  # Pixels of a window.

    @classmethod
    def of(cls, size: int, cells: int, step: int) -> _Axis:
        """step: what the length is a multiple of."""
        edges = np.arange(cells + 1) * size / cells - 0.5
        reached = np.floor(edges[:-1] - REACH), np.floor(edges[1:] + REACH) + 1
        length = min(
            int((reached[1] - reached[0]).max()) + 1, size + 2
        )  # All of the map, and zeros around it.
        length = -(-length // step) * step
        first = np.round((edges[:-1] + edges[1:] - length + 1) / 2)
        return cls(size, np.clip(first, -1, max(-1, size + 1 - length)).astype(np.int32), length)

    @property
    def frame(self) -> tuple[int, int]:
        """Zeros before and after the map that the windows need."""
        return max(0, -int(self.first[0])), max(0, int(self.first[-1]) + self.length - self.size)


@dataclasses.dataclass(frozen=True)
class _Cells:
    """How queries, all pixels of all levels, are divided."""

    grid: tuple[int, int]  # Cells in a column and in a row of the picture.
    queries: (
        np.ndarray
    )  # [cells, lanes] int32: which query each lane has; a lane left over has the first one.
    used: np.ndarray  # [cells, lanes] bool.
    places: np.ndarray  # [queries] int32: where each query is, of all cells * lanes.
    axes: tuple[tuple[_Axis, _Axis], ...]  # Of every level, rows and columns.


@functools.lru_cache
def _cells(levels: Levels) -> _Cells:
    finest = max(levels, key=math.prod)
    grid = tuple(-(-size // step) for size, step in zip(finest, CELL, strict=True))
    cell = []
    for level in levels:
        row, column = (((np.arange(n) + 0.5) / n * m).astype(int) for n, m in zip(level, grid, strict=True))
        cell.append((row[:, None] * grid[1] + column).ravel())
    cell = np.concatenate(cell)
    counts = np.bincount(cell, minlength=math.prod(grid))
    order = np.argsort(cell, kind="stable")
    lane = np.arange(len(cell)) - np.repeat(np.cumsum(counts) - counts, counts)
    queries, used = np.zeros((2, len(counts), counts.max()), np.int32)
    queries[cell[order], lane], used[cell[order], lane] = order, 1
    places = np.zeros(len(cell), np.int32)
    places[order] = cell[order] * counts.max() + lane
    # Columns are the outer axis of a window, for which any length does; rows lie in sublanes, eight at a time.
    axes = tuple((_Axis.of(height, grid[0], 8), _Axis.of(width, grid[1], 1)) for height, width in levels)
    return _Cells(grid, queries, used.astype(bool), places, axes)


def covered(x: jax.Array, y: jax.Array, levels: Levels) -> jax.Array:
    """Whether the forms of this file are exact for these samples: a scalar bool.

    x, y `[B, Q, heads, levels * P]` in pixels of their level; queries are all pixels of all levels.
    """
    cells, points = _cells(levels), x.shape[-1] // len(levels)
    cell = cells.places // cells.queries.shape[1]
    inside, outside = True, False
    for axis, (coordinate, index) in enumerate(((y, cell // cells.grid[1]), (x, cell % cells.grid[1]))):
        axes = [pair[axis] for pair in cells.axes]
        first = np.stack([np.repeat(a.first[index][:, None], points, 1) for a in axes], 1)
        first = jnp.asarray(first.reshape(len(cell), 1, -1), jnp.float32)
        last = first + np.repeat(np.float32([a.length - 1 for a in axes]), points)
        size = np.repeat(np.float32([a.size for a in axes]), points)
        # Strictly before the last pixel, as a slope looks one further.
        inside &= (coordinate >= first) & (coordinate < last)
        outside |= (coordinate < -1) | (coordinate >= size)
    return jnp.all(inside | outside)


def _to_cells(cells: _Cells, array: jax.Array) -> jax.Array:
    """`[B, Q, C]` -> `[B, rows of cells, cells in a row, lanes, C]`."""
    array = jnp.take(array, cells.queries.ravel(), axis=1)
    return array.reshape(len(array), *cells.grid, cells.queries.shape[1], -1)


def _from_cells(cells: _Cells, array: jax.Array) -> jax.Array:
    """The inverse: `[B, Q, C]`."""
    return jnp.take(array.reshape(len(array), cells.queries.size, -1), cells.places, axis=1)


def _samples(cells: _Cells, x, y, weights):
    """`[rows of cells, 3, B, cells in a row, heads, levels * P, lanes]`."""
    batch, queries, heads, samples = x.shape
    stacked = _to_cells(cells, jnp.stack([x, y, weights], 2).reshape(batch, queries, -1))
    stacked = stacked.swapaxes(-1, -2).reshape(*stacked.shape[:3], 3, heads, samples, -1)
    return stacked.transpose(1, 3, 0, 2, 4, 5, 6)


def _framed(cells: _Cells, value: jax.Array, levels: Levels) -> list[jax.Array]:
    """Every level within its zeros, columns first: `[B, W + frame, H + frame, heads * D]`."""
    framed, start = [], 0
    for (height, width), (rows, columns) in zip(levels, cells.axes, strict=True):
        level = value[:, start : start + height * width].reshape(len(value), height, width, -1)
        framed.append(jnp.pad(level, ((0, 0), rows.frame, columns.frame, (0, 0))).swapaxes(1, 2))
        start += height * width
    return framed


def _starts(cells: _Cells) -> tuple[jax.Array, jax.Array]:
    """Of every row of cells `[rows of cells, levels]`: its windows' first row in the map, and within the frame."""
    first = np.stack([rows.first for rows, _ in cells.axes], 1)
    return jnp.asarray(first, jnp.float32), jnp.asarray(first + [rows.frame[0] for rows, _ in cells.axes])


def _band(framed: jax.Array, start: jax.Array, rows: _Axis) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(framed, start, rows.length, 2)


def _columns(columns: _Axis) -> list[slice]:
    """Of each window in a band."""
    return [slice(f, f + columns.length) for f in (columns.first + columns.frame[0]).tolist()]


def _hat(position: jax.Array, length: int) -> jax.Array:
    """`[..., lanes]` in pixels of the window -> `[..., length, lanes]`."""
    return jnp.maximum(0, 1 - jnp.abs(position[..., None, :] - np.arange(length, dtype=np.float32)[:, None]))


def _slope(position: jax.Array, length: int) -> jax.Array:
    """The derivative of `_hat`; at a pixel's centre the one to the right."""
    distance = np.arange(length, dtype=np.float32)[:, None] - position[..., None, :]
    return jnp.where((distance > -1) & (distance <= 0), -1.0, 0.0) + jnp.where(
        (distance > 0) & (distance <= 1), 1.0, 0.0
    )


@dataclasses.dataclass(frozen=True)
class _Heads:
    """As many heads as lie side by side in the lanes of a TPU; a product keeps those of one by zeros in the others."""

    lanes: slice
    own: tuple[tuple[int, np.ndarray], ...]  # The number of each head, and 1 where its channels are.

    @classmethod
    def groups(cls, heads: int, channels: int) -> list[_Heads]:
        together = math.gcd(heads, max(1, _LANES // channels))
        own = np.repeat(np.eye(together, dtype=np.float32), channels, 1)
        return [
            cls(
                slice(start * channels, (start + together) * channels),
                tuple((start + i, own[i]) for i in range(together)),
            )
            for start in range(0, heads, together)
        ]


def _matrix(x, y, weights, columns: _Axis, rows: _Axis) -> jax.Array:
    """`[B, cells, P, lanes]` in pixels of the windows -> `[B, cells, columns, rows, lanes]`."""
    total = 0
    for point in range(x.shape[2]):
        across = _hat(x[:, :, point], columns.length)
        down = _hat(y[:, :, point], rows.length) * weights[:, :, point, None]
        total += across[:, :, :, None] * down[:, :, None]
    return total


def _of_head(cells: _Cells, samples: jax.Array, top: jax.Array, level: int, head: int):
    """Samples `[3, B, cells, heads, levels * P, lanes]` of one level and head, in pixels of their windows."""
    points = samples.shape[-2] // len(cells.axes)
    x, y, weights = samples[:, :, :, head, level * points : (level + 1) * points]
    left = np.float32(cells.axes[level][1].first)[:, None, None]
    return x - left, y - top[level], weights


def forward(value: jax.Array, x: jax.Array, y: jax.Array, weights: jax.Array, levels: Levels) -> jax.Array:
    """Weighted sums of samples `[B, Q, heads, D]`, all `covered`; arguments as `sampling.sample` has them."""
    cells, (heads, channels) = _cells(levels), value.shape[2:]
    groups = _Heads.groups(heads, channels)
    framed = _framed(cells, value, levels)

    def add_row(_, row):
        samples, tops, starts = row
        totals = [0.0] * len(groups)
        for level, (rows, columns) in enumerate(cells.axes):
            band = _band(framed[level], starts[level], rows)
            for number, group in enumerate(groups):
                windows = jnp.stack([band[:, part, :, group.lanes] for part in _columns(columns)], 1)
                for head, own in group.own:
                    matrix = _matrix(*_of_head(cells, samples, tops, level, head), columns, rows)
                    totals[number] += jnp.einsum(
                        "bncrq,bncrk->bnqk",
                        matrix.astype(value.dtype),
                        windows * own.astype(value.dtype),
                        preferred_element_type=jnp.float32,
                    )
        return None, jnp.concatenate(totals, -1).astype(value.dtype)

    out = jax.lax.scan(add_row, None, (_samples(cells, x, y, weights), *_starts(cells)))[1]
    return _from_cells(cells, out.swapaxes(0, 1)).reshape(*x.shape[:3], channels)


def backward(levels: Levels, residuals, gradient: jax.Array):
    """Gradients by value, x, y and weights `(value, x, y, weights)` for one by the sums `[B, Q, heads, D]`."""
    value, x, y, weights = residuals
    cells, (heads, channels) = _cells(levels), value.shape[2:]
    groups = _Heads.groups(heads, channels)
    framed = _framed(cells, value, levels)
    gradient = _to_cells(cells, gradient.reshape(*gradient.shape[:2], -1))
    if not cells.used.all():
        gradient *= cells.used.reshape(*cells.grid, -1, 1)

    def add_row(totals, row):
        samples, gradient, tops, starts = row
        found = [[None] * len(cells.axes) for _ in range(heads)]
        for level, (rows, columns) in enumerate(cells.axes):
            band = _band(framed[level], starts[level], rows)
            parts = []
            for group in groups:
                windows = jnp.stack([band[:, part, :, group.lanes] for part in _columns(columns)], 1)
                by_windows = 0.0
                for head, own in group.own:
                    of_head = _of_head(cells, samples, tops, level, head)
                    masked = (gradient[..., group.lanes] * own).astype(value.dtype)
                    by_windows += jnp.einsum(
                        "bncrq,bnqk->bncrk",
                        _matrix(*of_head, columns, rows).astype(value.dtype),
                        masked,
                        preferred_element_type=jnp.float32,
                    )
                    by_matrix = jnp.einsum(
                        "bncrk,bnqk->bncrq", windows, masked, preferred_element_type=jnp.float32
                    )
                    found[head][level] = _matrix_backward(*of_head, by_matrix)
                by_band = jnp.zeros((*band.shape[:3], by_windows.shape[-1]), jnp.float32)
                for number, part in enumerate(_columns(columns)):
                    by_band = by_band.at[:, part].add(by_windows[:, number])
                parts.append(by_band)
            by_band = jnp.concatenate(parts, -1) + _band(totals[level], starts[level], rows)
            totals[level] = jax.lax.dynamic_update_slice_in_dim(totals[level], by_band, starts[level], 2)
        # [3, B, cells in a row, heads, levels * P, lanes]
        return totals, jnp.stack([jnp.concatenate(of_head, 3) for of_head in found], 3)

    totals = [jnp.zeros(level.shape, jnp.float32) for level in framed]
    rows = (_samples(cells, x, y, weights), gradient.swapaxes(0, 1), *_starts(cells))
    totals, found = jax.lax.scan(add_row, totals, rows)
    # [rows of cells, 3, B, cells in a row, heads, levels * P, lanes] -> [3, B, Q, heads, levels * P]
    found = found.transpose(2, 0, 3, 6, 1, 4, 5)
    found = _from_cells(cells, found).reshape(*x.shape[:2], 3, *x.shape[2:])
    by_value = []
    for total, (height, width), (rows, columns) in zip(totals, levels, cells.axes, strict=True):
        inner = total[:, columns.frame[0] :][:, :width, rows.frame[0] :][:, :, :height]
        by_value.append(inner.swapaxes(1, 2).reshape(len(total), height * width, heads, channels))
    return jnp.concatenate(by_value, 1).astype(value.dtype), *(found[:, :, i] for i in range(3))


def _matrix_backward(x, y, weights, gradient: jax.Array) -> jax.Array:
    """Gradients by x, y and weights `[3, B, cells, P, lanes]` for one by `_matrix`."""
    columns, rows = gradient.shape[2:4]
    found = []
    for point in range(x.shape[2]):
        # Columns first: they are the outer axis.
        level = (_hat(x[:, :, point], columns)[:, :, :, None] * gradient).sum(2)
        steep = (_slope(x[:, :, point], columns)[:, :, :, None] * gradient).sum(2)
        down, fall, weight = _hat(y[:, :, point], rows), _slope(y[:, :, point], rows), weights[:, :, point]
        found.append((weight * (steep * down).sum(2), weight * (level * fall).sum(2), (level * down).sum(2)))
    return jnp.stack([jnp.stack(kind, 2) for kind in zip(*found, strict=True)])
