"""Queries in cells, and windows around them: how deformable attention is laid out for TPUs.

A TPU gathers slowly and multiplies matrices fast. So the picture is cut into cells, and the queries of one cell, of all
levels together, read one window of every level, in which the sum of a query is a product with a matrix of hat functions,
`weight * max(0, 1 - |x - column|) * max(0, 1 - |y - row|)` summed over its points (`window_kernels`). This is exact while
every sample is outside the map or in its query's window, which the kernels find out.

Columns of cells are 'strips'. A window is 16 columns wide, from an even one on (a sublane holds two numbers of 16 bits), and
as high as it needs to be. Maps are read in tiles of 8 rows by 16 columns: the 128 lanes of a matrix unit.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from magnet_jax.models.order import Order

CELL = (
    6,
    4,
)  # Pixels of the finest level in a cell: with the coarser levels (24 + 6 + 1.5 + 0.4) 32 queries.
REACH = (
    5  # Pixels of its level that a sample may at least be away from its query: an untrained one is up to 4.
)
LANES = 128
TILE_ROWS, COLUMNS = 8, 16  # Of a tile; a window is as wide.
_HEADS = 4  # At most so many heads lie side by side in the lanes.

Levels = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """The windows of one level along one axis."""

    first: np.ndarray  # [cells along the axis] int32: the first pixel of each.
    length: int
    size: int  # Pixels of the level,
    padded: int  # and with what is read beyond them.

    @property
    def tiles(self) -> int:
        """Of the windows of rows: how many tiles one of them can be in."""
        return int((self.first % TILE_ROWS + self.length - 1).max()) // TILE_ROWS + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """How queries, all pixels of all levels, are divided into cells of `lanes` places each."""

    strips: int
    blocks: int  # Cells in a strip, from top to bottom.
    lanes: int
    order: Order  # Of the queries, at strips * blocks * lanes places.
    rows: tuple[Windows, ...]  # Of every level, for each block,
    columns: tuple[Windows, ...]  # and for each strip.
    pixels: np.ndarray  # [pixels of all maps] int32: places of the pixels of the padded maps, row by row,
    in_maps: np.ndarray  # [places] int32: and where each place's query is in them.
    # [strips, blocks, 2 * levels, lanes] float32: x of every level, then y, in pixels of the cell's windows; far outside
    # where there is no query.
    centres: np.ndarray  # Of the query's place,
    origins: np.ndarray  # and of the first pixel of the map.

    @property
    def starts(self) -> list[int]:
        """The first of its pixels of every level in the padded maps, and the end."""
        sizes = [rows.padded * columns.padded for rows, columns in zip(self.rows, self.columns, strict=True)]
        return np.cumsum([0, *sizes]).tolist()


def heads_together(heads: int, channels: int) -> int:
    """How many heads lie side by side in the lanes: 1, 2 or 4."""
    return max(n for n in (1, 2, _HEADS) if heads % n == 0 and (n == 1 or n * channels <= LANES))


@functools.lru_cache
def cells_of(levels: Levels, lanes: int) -> Cells | None:
    """The cells of a pyramid; None where its windows would be too wide, as the levels are no halves of each other."""
    finest = max(levels, key=math.prod)
    grid = np.array([-(-size // step) for size, step in zip(finest, CELL, strict=True)])
    at = np.concatenate([centres(level) for level in levels])
    cell, lane = _assign(at * finest / CELL, levels, grid, lanes)
    if cell is None:
        return None
    places = (cell[:, 1] * grid[0] + cell[:, 0]) * lanes + lane
    order = Order.of(places, math.prod(grid) * lanes)
    axes = []
    for axis in (0, 1):
        sizes = [level[axis] for level in levels]
        axes.append(tuple(_windows(at[:, axis] * n - 0.5, cell[:, axis], grid[axis], n, axis) for n in sizes))
    rows, columns = axes
    if any(windows.length > COLUMNS for windows in columns):
        return None
    pixels, in_maps, start = [], np.zeros(len(order.rows), np.int32), 0
    for (height, width), down, across in zip(levels, rows, columns, strict=True):
        level = places[start : start + height * width]
        padded = np.full((down.padded, across.padded), level[0], np.int32)
        padded[:height, :width] = level.reshape(height, width)
        row, column = np.divmod(np.arange(len(level)), width)
        in_maps[level] = sum(map(len, pixels)) + row * across.padded + column
        pixels.append(padded.ravel())
        start += height * width
    in_windows = [_in_windows(place, order.used, rows, columns, lanes) for place in (at[order.rows], None)]
    return Cells(
        int(grid[1]), int(grid[0]), lanes, order, rows, columns, np.concatenate(pixels), in_maps, *in_windows
    )


def _in_windows(at: np.ndarray | None, used: np.ndarray, rows, columns, lanes: int) -> np.ndarray:
    """Where `at` `[places, 2]` (y, x) is in the windows, or, if None, the first pixel."""
    found = []
    for axis, windows in ((1, columns), (0, rows)):
        for level in windows:
            place = 0 if at is None else at[:, axis] * level.size - 0.5
            place = np.where(used, place, -1e6).reshape(len(columns[0].first), len(rows[0].first), lanes)
            found.append(place - (level.first[:, None, None] if axis else level.first[:, None]))
    return np.stack(found, 2).astype(np.float32)


def centres(level: tuple[int, int]) -> np.ndarray:
    """Centres (y, x) of the pixels of a level in [0, 1]: `[H * W, 2]`."""
    y, x = np.meshgrid(*((np.arange(n) + 0.5) / n for n in level), indexing="ij")
    return np.stack([y, x], -1).reshape(-1, 2)


def _assign(at: np.ndarray, levels: Levels, grid: np.ndarray, lanes: int):
    """Which cell `[queries, 2]`, row and column, each query is in, and its place there; None where there is no room.

    Where a cell is full, the query goes to one beside it, if need be; `at` is in cells. Levels of few queries a cell are
    dealt out last, the coarsest first, since its queries can be anywhere in a cell.
    """
    ends = np.cumsum([0] + [math.prod(level) for level in levels])
    order = sorted(range(len(levels)), key=lambda i: -math.prod(levels[i]))
    order = order[:2] + order[:1:-1]
    rows, columns = grid.tolist()
    count = [[0] * rows for _ in range(columns)]
    cell, lane = np.zeros((len(at), 2), int), np.zeros(len(at), int)
    for query in np.concatenate([np.arange(ends[i], ends[i + 1]) for i in order]).tolist():
        y, x = at[query].tolist()
        row, column = int(y), int(x)
        if count[column][row] == lanes or y == row or x == column:
            choices = [
                # Columns matter more, as windows have none to spare; then evenness.
                (_outside(x, j), _outside(y, i), sum(count[j]), j, i)
                for j in range(max(0, column - 1), min(columns, column + 2))
                for i in range(max(0, row - 1), min(rows, row + 2))
                if count[j][i] < lanes
            ]
            if not choices:
                return None, None
            column, row = min(choices)[3:]
        cell[query], lane[query] = (row, column), count[column][row]
        count[column][row] += 1
    return cell, lane


def _outside(position: float, cell: int) -> float:
    """How far a position is outside a cell, along one axis."""
    return max(0.0, abs(position - cell - 0.5) - 0.5)


def _windows(at: np.ndarray, cell: np.ndarray, cells: int, size: int, axis: int) -> Windows:
    """Windows that reach far enough from all queries of a cell; `at`: where queries are, in pixels of the level."""
    step = 2 if axis else 1
    bounds = [
        (at[cell == i].min(), at[cell == i].max()) if (cell == i).any() else (0, 0) for i in range(cells)
    ]
    low, high = np.array(bounds).T
    first = np.clip(np.floor(low - REACH), 0, size - 1).astype(np.int32) // step * step
    last = np.clip(np.floor(high + REACH) + 1, 0, size - 1)
    length = int((last - first).max()) + 1
    length = max(length, COLUMNS) if axis else length
    padded = max(-(-size // step) * step, length)
    first = np.minimum(first, padded - length)
    if not axis:
        padded = -(-padded // TILE_ROWS) * TILE_ROWS
    elif padded != COLUMNS:  # Read are two times 16 columns that have the window in them.
        padded = int(first.max() // COLUMNS + 2) * COLUMNS
    return Windows(first, length, size, padded)
