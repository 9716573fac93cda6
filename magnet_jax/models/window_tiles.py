"""What the kernels of `window_kernels` know of their work, and tiles of the maps that they read and add to."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from magnet_jax.models.windows import COLUMNS, TILE_ROWS, Cells, heads_together

PIXELS = TILE_ROWS * COLUMNS  # Of a tile.


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel has to know when it is made."""

    cells: Cells
    heads: int
    channels: int  # Of a head.
    points: int  # Of a level.
    offsets: bool

    @classmethod
    def of(cls, maps: jax.Array, raw: jax.Array, cells: Cells, heads: int, offsets: bool) -> Shape:
        return cls(
            cells, heads, maps.shape[-1] // heads, raw.shape[-1] // 3 // heads // len(cells.rows), offsets
        )

    @property
    def levels(self) -> int:
        return len(self.cells.rows)

    @property
    def samples(self) -> int:
        """Points of all levels."""
        return self.levels * self.points

    @property
    def together(self) -> int:
        """Heads in the lanes of one product."""
        return heads_together(self.heads, self.channels)

    @property
    def groups(self) -> int:
        return self.heads // self.together

    @property
    def width(self) -> int:
        """Channels of the heads of a group."""
        return self.together * self.channels

    @property
    def lanes(self) -> int:
        """Queries of a cell, for all heads of a group."""
        return self.together * self.cells.lanes

    @property
    def tiles(self) -> list[int]:
        """The first tile of every level in a strip, and their number."""
        return np.cumsum([0] + [rows.padded // TILE_ROWS for rows in self.cells.rows]).tolist()

    def channels_of(self, group: int) -> slice:
        """Where the channels of a group are among those of all heads."""
        return slice(group * self.width, (group + 1) * self.width)

    def heads_of(self, group: int) -> range:
        return range(group * self.together, (group + 1) * self.together)

    def kind(self, number: int) -> slice:
        """Rows of x (0), y (1) and weights (2) among the samples of a group."""
        return slice(number * self.samples, (number + 1) * self.samples)

    def rows_of(self, level: int, kind: int = 0) -> slice:
        """Rows of the points of a level."""
        first = kind * self.samples + level * self.points
        return slice(first, first + self.points)


def for_all_tiles(shape: Shape, run) -> None:
    """`run(group, level, tile)` for the tiles of a strip; those of all groups together, so that units need not wait."""

    def of_tile(level, tile):
        for group in range(shape.groups):
            run(group, level, tile)

    for level, rows in enumerate(shape.cells.rows):
        jax.lax.fori_loop(
            0, rows.padded // TILE_ROWS, lambda tile, _, level=level: of_tile(level, tile), None
        )


def read_tile(maps, shape: Shape, group: int, level: int, tile, first) -> jax.Array:
    """A tile of a map, from a column on: `[pixels of a tile, width]`. What is beyond the map is zero."""
    rows, columns = shape.cells.rows[level], shape.cells.columns[level]
    packed = 4 // maps.dtype.itemsize  # Rows that share a sublane.
    parts = []
    for row in range(TILE_ROWS):
        at = shape.cells.starts[level] + (tile * TILE_ROWS + row) * columns.padded
        if columns.padded == COLUMNS:
            parts.append(maps[0, pl.ds(pl.multiple_of(at, COLUMNS), COLUMNS), shape.channels_of(group)])
            continue
        # Memory is read from multiples of 16 rows on: twice as much, turned until the first one is in front.
        from_left = jax.lax.rem(first, COLUMNS)
        at = pl.multiple_of(at + first - from_left, COLUMNS)
        part = maps[0, pl.ds(at, 2 * COLUMNS), shape.channels_of(group)]
        words = pltpu.bitcast(part, jnp.uint32) if packed == 2 else part
        turn = jax.lax.div(jax.lax.rem(2 * COLUMNS - from_left, 2 * COLUMNS), packed)
        words = pltpu.roll(words, turn, 0)[: COLUMNS // packed]
        parts.append(pltpu.bitcast(words, maps.dtype) if packed == 2 else words)
    values = jnp.concatenate(parts)
    if rows.padded > rows.size or columns.padded == COLUMNS > columns.size:
        pixel = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        inside = tile * TILE_ROWS + jax.lax.div(pixel, COLUMNS) < rows.size
        inside &= first + jax.lax.rem(pixel, COLUMNS) < columns.size
        values = jnp.where(inside, values, jnp.zeros_like(values))
    return values


def add_tile(by_maps, by_tile: jax.Array, shape: Shape, group: int, level: int, tile, first, new) -> None:
    """Adds a tile's gradient to that of the map: what `read_tile` reads, the other way round.

    From the column `new` on nothing has been written before.
    """
    width = shape.cells.columns[level].padded
    for row in range(TILE_ROWS):
        at, size = shape.cells.starts[level] + (tile * TILE_ROWS + row) * width, COLUMNS
        part, aligned = by_tile[row * COLUMNS : (row + 1) * COLUMNS], 0
        if width > COLUMNS:
            from_left = jax.lax.rem(first, COLUMNS)
            at, size, aligned = at + first - from_left, 2 * COLUMNS, first - from_left
            part = pltpu.roll(jnp.concatenate([part, jnp.zeros_like(part)]), from_left, 0)
        rows = pl.ds(pl.multiple_of(at, COLUMNS), size)
        column = aligned + jax.lax.broadcasted_iota(jnp.int32, part.shape, 0)
        before = by_maps[0, rows, shape.channels_of(group)]
        by_maps[0, rows, shape.channels_of(group)] = part + jnp.where(column < new, before, 0.0)
