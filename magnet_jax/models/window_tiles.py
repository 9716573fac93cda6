"""What the kernels of `window_kernels` know of their work, and tiles of the maps that they read and add to."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from magnet_jax.models.kernel_parts import Words, in_pairs
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
    """`run(level, tile, parity)` for the tiles of a strip, see `in_pairs`."""
    for level, rows in enumerate(shape.cells.rows):
        in_pairs(rows.padded // TILE_ROWS, lambda tile, parity, _, level=level: run(level, tile, parity))


def read_tile(maps, wide: Words, shape: Shape, group: int, level: int, tile, first) -> jax.Array:
    """A tile of a map, from a column on, an even one: `[pixels of a tile, width]`. What is beyond the map is zero.

    wide: memory of its own for two tiles.
    """
    rows, columns = shape.cells.rows[level], shape.cells.columns[level]
    # Read are twice as many pixels from a multiple of 16 on, and of these, in memory that allows it, the 16.
    width = 2 * COLUMNS if columns.padded > COLUMNS else COLUMNS
    from_left = jax.lax.rem(first, COLUMNS) if columns.padded > COLUMNS else 0
    starts = [
        shape.cells.starts[level] + (tile * TILE_ROWS + row) * columns.padded for row in range(TILE_ROWS)
    ]
    parts = [
        maps[0, pl.ds(pl.multiple_of(start + first - from_left, COLUMNS), width), shape.channels_of(group)]
        for start in starts
    ]
    if width > COLUMNS:
        wide.write(0, jnp.concatenate(parts), PIXELS)
        parts = [wide.read(row * width + from_left, COLUMNS, 2) for row in range(TILE_ROWS)]
    values = jnp.concatenate(parts)
    if rows.padded > rows.size or columns.padded == COLUMNS > columns.size:
        pixel = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        inside = tile * TILE_ROWS + jax.lax.div(pixel, COLUMNS) < rows.size
        inside &= first + jax.lax.rem(pixel, COLUMNS) < columns.size
        values = jnp.where(inside, values, jnp.zeros_like(values))
    return values


def add_tile(by_maps, by_tiles: list[jax.Array], shape: Shape, level: int, tile, first, new) -> None:
    """Adds the gradients of a tile, of every group, to those of the map: what `read_tile` reads, the other way round.

    From the column `new` on nothing has been written before.
    """
    width = shape.cells.columns[level].padded
    sums = []
    for group, by_tile in enumerate(by_tiles):
        for row in range(TILE_ROWS):
            at, size = shape.cells.starts[level] + (tile * TILE_ROWS + row) * width, COLUMNS
            part, aligned = by_tile[row * COLUMNS : (row + 1) * COLUMNS], 0
            if width > COLUMNS:
                from_left = jax.lax.rem(first, COLUMNS)
                at, size, aligned = at + first - from_left, 2 * COLUMNS, first - from_left
                part = pltpu.roll(jnp.concatenate([part, jnp.zeros_like(part)]), from_left, 0)
            place = 0, pl.ds(pl.multiple_of(at, COLUMNS), size), shape.channels_of(group)
            column = aligned + jax.lax.broadcasted_iota(jnp.int32, part.shape, 0)
            sums.append((place, part + jnp.where(column < new, by_maps[place], 0.0)))
    # All are read before one is written, as nobody but us knows that these rows are not the same.
    for place, total in sums:
        by_maps[place] = total
