"""Deformable attention within windows as two Pallas kernels for TPUs, forward and backward (see `windows`).

A kernel goes through the strips of a picture, whose maps of values stay in the fast memory meanwhile. Of a strip, it reads
the columns of each level that its windows have, in tiles of 8 rows by 16 columns; then, cell by cell, it makes the matrix of
hat functions of a tile, [128 pixels, heads * queries], and multiplies. Heads lie side by side in the lanes, so that of a
product with the channels of all of them the blocks are kept that belong to one head.

Arrays of a kernel, of B pictures:

- maps `[B, pixels, heads * D]`, the padded maps of `windows.Cells`;
- raw `[B, places, 3 * heads * L * P]` float32: with `offsets`, of every place how far its samples are from it, x and then y,
  in pixels of their level, and the logits of their weights; else where they are in the map, and their weights.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from magnet_jax.models.windows import COLUMNS, TILE_ROWS, Cells, heads_together

_PIXELS = TILE_ROWS * COLUMNS  # Of a tile.
_MEMORY = 100 * 2**20  # Bytes of a TPU's fast memory, at most.
_FAR = 1e30


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a kernel has to know when it is made."""

    cells: Cells
    heads: int
    channels: int  # Of a head.
    points: int  # Of a level.
    offsets: bool

    @classmethod
    def of(cls, maps: jax.Array, raw: jax.Array, cells: Cells, heads: int, offsets: bool) -> _Shape:
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


# ------------------------------------------------------------------------------------------------------ tiles of maps


def _for_all_tiles(shape: _Shape, run) -> None:
    """`run(group, level, tile)` for the tiles of a strip; those of all groups together, so that units need not wait."""

    def of_tile(level, tile):
        for group in range(shape.groups):
            run(group, level, tile)

    for level, rows in enumerate(shape.cells.rows):
        jax.lax.fori_loop(
            0, rows.padded // TILE_ROWS, lambda tile, _, level=level: of_tile(level, tile), None
        )


def _read_tile(maps, shape: _Shape, group: int, level: int, tile, first) -> jax.Array:
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


def _add_tile(by_maps, by_tile: jax.Array, shape: _Shape, group: int, level: int, tile, first, new) -> None:
    """Adds a tile's gradient to that of the map: what `_read_tile` reads, the other way round.

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


# ------------------------------------------------------------------------------------------------- samples of a cell


def _turn(raw: jax.Array, turned, shape: _Shape) -> None:
    """`[places, 3 * heads * samples]` of a cell -> `[heads * samples, 3 * places]`."""
    width = shape.heads * shape.samples
    turned[...] = jnp.concatenate([raw[:, kind * width : (kind + 1) * width] for kind in range(3)]).T


def _turn_back(turned, shape: _Shape) -> jax.Array:
    found, places = turned[...].T, shape.cells.lanes
    return jnp.concatenate([found[kind * places : (kind + 1) * places] for kind in range(3)], 1)


def _read_samples(turned, samples, centres: jax.Array, shape: _Shape, group: int) -> None:
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


def _write_samples(turned, samples: jax.Array, shape: _Shape, group: int) -> None:
    """The way back: those of a group to where `_read_samples` reads them."""
    places, count = shape.cells.lanes, shape.samples
    for kind in range(3):
        part = samples[shape.kind(kind)]
        for number, head in enumerate(shape.heads_of(group)):
            turned[head * count : (head + 1) * count, kind * places : (kind + 1) * places] = part[
                :, number * places : (number + 1) * places
            ]


def _missed(samples, shape: _Shape, first_row, first_column) -> jax.Array:
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


# ------------------------------------------------------------------------------------------------------ hat functions


def _index(shape: tuple[int, int]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.float32)


def _hat(distance: jax.Array) -> jax.Array:
    return jnp.maximum(0.0, 1.0 - jnp.abs(distance))


def _hats(samples, down, shape: _Shape, level: int) -> list[jax.Array]:
    """Writes those along the rows, times the weights, to `down` `[P, rows, lanes]`.

    Returns those along the columns, `[16, lanes]` of every point.
    """
    across = []
    for point in range(shape.points):
        x, y, weight = (samples[shape.rows_of(level, kind)][point : point + 1] for kind in range(3))
        height = shape.cells.rows[level].length
        down[point, :height] = _hat(y - _index((height, shape.lanes))) * weight
        across.append(_hat(x - _index((COLUMNS, shape.lanes))))
    return across


def _matrix(down, across: list[jax.Array], tile: int, dtype) -> jax.Array:
    """The products of a tile, summed over the points: `[pixels of a tile, lanes]`."""
    parts = []
    for row in range(tile * TILE_ROWS, (tile + 1) * TILE_ROWS):
        total = down[0, row : row + 1, :] * across[0]
        for point in range(1, len(across)):
            total += down[point, row : row + 1, :] * across[point]
        parts.append(total.astype(dtype))
    return jnp.concatenate(parts)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision)


# -------------------------------------------------------------------------------------------------------- the kernels


def _forward_kernel(
    shape: _Shape, first_row, first_column, maps, raw, centres, out, missed, values, turned, samples, down
):
    strip, places = pl.program_id(1), shape.cells.lanes
    left = [first_column[strip, level] for level in range(shape.levels)]

    def read(group, level, tile):
        values[group, shape.tiles[level] + tile] = _read_tile(maps, shape, group, level, tile, left[level]).T

    _for_all_tiles(shape, read)

    def of_cell(block, any_missed):
        at = pl.ds(pl.multiple_of(block * places, places), places)
        top = [first_row[block, level] for level in range(shape.levels)]
        _turn(raw[at, :], turned, shape)
        for group in range(shape.groups):
            _read_samples(turned, samples, centres[block], shape, group)
            any_missed = jnp.maximum(any_missed, _missed(samples, shape, top, left))
            total = jnp.zeros((shape.width, shape.lanes), jnp.float32)
            for level in range(shape.levels):
                across = _hats(samples, down, shape, level)
                first = shape.tiles[level] + jax.lax.div(top[level], TILE_ROWS)
                for tile in range(shape.cells.rows[level].length // TILE_ROWS):
                    matrix = _matrix(down, across, tile, values.dtype)
                    total += _dot(values[group, first + tile], matrix)
            sums = total.T  # [lanes, width], of which each head has its own channels.
            channel = jax.lax.broadcasted_iota(jnp.int32, (1, shape.width), 1)
            found = sums[:places]
            for head in range(1, shape.together):
                of_head = sums[head * places : (head + 1) * places]
                found = jnp.where(channel < head * shape.channels, found, of_head)
            out[at, shape.channels_of(group)] = found.astype(out.dtype)
        return any_missed

    any_missed = jnp.zeros((1, shape.lanes), jnp.float32)
    any_missed = jax.lax.fori_loop(0, shape.cells.blocks, of_cell, any_missed)
    missed[...] = jnp.broadcast_to(any_missed, missed.shape)


def _backward_kernel(shape: _Shape, *refs):
    first_row, first_column, maps, raw, centres, gradient, by_raw, by_maps, *scratch = refs
    values, by_values, turned, by_turned, samples, by_samples, down = scratch
    strip, places = pl.program_id(1), shape.cells.lanes
    left = [first_column[strip, level] for level in range(shape.levels)]

    def read(group, level, tile):
        values[group, shape.tiles[level] + tile] = _read_tile(maps, shape, group, level, tile, left[level])
        by_values[group, shape.tiles[level] + tile] = jnp.zeros(by_values.shape[2:], jnp.float32)

    _for_all_tiles(shape, read)

    def of_cell(block, _):
        at = pl.ds(pl.multiple_of(block * places, places), places)
        _turn(raw[at, :], turned, shape)
        for group in range(shape.groups):
            _read_samples(turned, samples, centres[block], shape, group)
            own = gradient[at, shape.channels_of(group)].astype(jnp.float32)
            channel = jax.lax.broadcasted_iota(jnp.int32, (1, shape.width), 1)
            head_of = jax.lax.div(channel, shape.channels)
            by_sums = jnp.concatenate([jnp.where(head_of == h, own, 0.0) for h in range(shape.together)])
            by_sums_turned = by_sums.T.astype(values.dtype)  # [width, lanes]
            by_sums = by_sums.astype(values.dtype)
            for level in range(shape.levels):
                across = _hats(samples, down, shape, level)
                first = shape.tiles[level] + jax.lax.div(first_row[block, level], TILE_ROWS)
                rows = jnp.floor(samples[shape.rows_of(level, 1)])
                rows = [rows[point : point + 1] for point in range(shape.points)]
                # What the pixels of the window would add, of the row above each point and of the one below.
                above = [jnp.zeros((COLUMNS, shape.lanes), jnp.float32) for _ in rows]
                below = list(above)
                for tile in range(shape.cells.rows[level].length // TILE_ROWS):
                    by_values[group, first + tile] += _dot(_matrix(down, across, tile, values.dtype), by_sums)
                    by_matrix = _dot(values[group, first + tile], by_sums_turned)
                    for row in range(TILE_ROWS):
                        part = by_matrix[row * COLUMNS : (row + 1) * COLUMNS]
                        number = float(tile * TILE_ROWS + row)
                        for point in range(shape.points):
                            above[point] = jnp.where(rows[point] == number, part, above[point])
                            below[point] = jnp.where(rows[point] == number - 1, part, below[point])
                for point in range(shape.points):
                    of_point = [samples[shape.rows_of(level, kind)][point : point + 1] for kind in range(3)]
                    found = _of_point(*of_point, across[point], above[point], below[point])
                    for kind, value in enumerate(found):
                        row = kind * shape.samples + level * shape.points + point
                        by_samples[row : row + 1, :] = value
            if shape.offsets:
                weights, by_weights = samples[shape.kind(2)], by_samples[shape.kind(2)]
                mean = (weights * by_weights).sum(0, keepdims=True)
                by_samples[shape.kind(2)] = weights * (by_weights - mean)
            _write_samples(by_turned, by_samples, shape, group)
        by_raw[at, :] = _turn_back(by_turned, shape)

    jax.lax.fori_loop(0, shape.cells.blocks, of_cell, None)

    def add(group, level, tile):
        by_tile = by_values[group, shape.tiles[level] + tile]
        new = jnp.where(strip == 0, 0, first_column[jnp.maximum(strip - 1, 0), level] + COLUMNS)
        _add_tile(by_maps, by_tile, shape, group, level, tile, left[level], new)

    _for_all_tiles(shape, add)


def _of_point(x, y, weight, across, above, below) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients by x, y and weight of a point, each `[1, lanes]`; above, below: those of the pixels of its two rows."""
    level = above + (y - jnp.floor(y)) * (below - above)
    distance = _index(across.shape) - jnp.floor(x)
    slope = jnp.where(distance == 1, level, 0.0) - jnp.where(distance == 0, level, 0.0)
    return (
        weight * slope.sum(0, keepdims=True),
        weight * ((below - above) * across).sum(0, keepdims=True),
        (level * across).sum(0, keepdims=True),
    )


# -------------------------------------------------------------------------------------------------------- their calls


def forward(maps, raw, cells: Cells, heads: int, offsets: bool) -> tuple[jax.Array, jax.Array]:
    """Weighted sums `[B, places, heads * D]`, and whether a window missed what a sample needs, so that they are wrong."""
    shape = _Shape.of(maps, raw, cells, heads, offsets)
    values = pltpu.VMEM((shape.groups, shape.tiles[-1], shape.width, _PIXELS), maps.dtype)
    results = [
        (jax.ShapeDtypeStruct((*raw.shape[:2], maps.shape[-1]), maps.dtype), _strip),
        (jax.ShapeDtypeStruct((len(maps), 8 * cells.strips, shape.lanes), jnp.float32), _strip),
    ]
    out, missed = _call(
        _forward_kernel, shape, [(maps, _picture), (raw, _strip)], results, [values, *_of_samples(shape)]
    )
    return out, missed.max() > 0


def backward(maps, raw, gradient, cells: Cells, heads: int, offsets: bool) -> tuple[jax.Array, jax.Array]:
    """Gradients by maps, float32 and without a meaning beyond the levels, and by raw, for one by the sums."""
    shape = _Shape.of(maps, raw, cells, heads, offsets)
    tiles = (shape.groups, shape.tiles[-1], _PIXELS, shape.width)
    turned, samples, down = _of_samples(shape)
    scratch = [pltpu.VMEM(tiles, maps.dtype), pltpu.VMEM(tiles, jnp.float32)]
    by_raw, by_maps = _call(
        _backward_kernel,
        shape,
        [(maps, _picture_alone), (raw, _strip), (gradient, _strip)],
        [
            (jax.ShapeDtypeStruct(raw.shape, raw.dtype), _strip),
            (jax.ShapeDtypeStruct(maps.shape, jnp.float32), _picture),
        ],
        [*scratch, turned, turned, samples, samples, down],
    )
    return by_maps, by_raw


def _of_samples(shape: _Shape):
    """Memory for the samples of a cell: `turned`, `samples` and `down` of the kernels."""
    longest = max(rows.length for rows in shape.cells.rows)
    return (
        pltpu.VMEM((shape.heads * shape.samples, 3 * shape.cells.lanes), jnp.float32),
        pltpu.VMEM((3 * shape.samples, shape.lanes), jnp.float32),
        pltpu.VMEM((shape.points, longest, shape.lanes), jnp.float32),
    )


def _strip(shape: _Shape, array) -> pl.BlockSpec:
    """A step of the kernel sees the part that belongs to its strip,"""
    size = (None, array.shape[1] // shape.cells.strips, array.shape[2])
    return pl.BlockSpec(size, lambda picture, strip, *_: (picture, strip, 0))


def _picture(shape: _Shape, array) -> pl.BlockSpec:
    """or all that belongs to its picture."""
    return pl.BlockSpec((1, *array.shape[1:]), lambda picture, strip, *_: (picture, 0, 0))


def _picture_alone(shape: _Shape, array) -> pl.BlockSpec:
    """The next picture is not read before, which saves memory."""
    spec = _picture(shape, array)
    return dataclasses.replace(spec, pipeline_mode=pl.Buffered(1))


def _call(kernel, shape: _Shape, arrays, results, scratch):
    """Runs a kernel over pictures and strips; anywhere but on a TPU, it is interpreted.

    arrays, results: each with `_strip` or `_picture`.
    """
    cells = shape.cells
    first_row = np.stack([rows.first for rows in cells.rows], 1)
    first_column = np.stack([columns.first for columns in cells.columns], 1)
    centres = np.tile(cells.centres if shape.offsets else cells.origins, (1, 1, 1, shape.together))
    centre_spec = pl.BlockSpec((None, *centres.shape[1:]), lambda picture, strip, *_: (strip, 0, 0, 0))

    def run(first, second, *others, interpret):
        return pl.pallas_call(
            functools.partial(kernel, shape),
            name=f"deformable_attention{kernel.__name__.removesuffix('_kernel')}",
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(len(first), cells.strips),
                in_specs=[*specs[:2], centre_spec, *specs[2:]],
                out_specs=[spec(shape, result) for result, spec in results],
                scratch_shapes=scratch,
            ),
            out_shape=[result for result, _ in results],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_MEMORY
            ),
            interpret=interpret,
        )(first_row, first_column, first, second, centres, *others)

    specs = [spec(shape, array) for array, spec in arrays]
    return jax.lax.platform_dependent(
        *(array for array, _ in arrays),
        tpu=functools.partial(run, interpret=False),
        default=functools.partial(run, interpret=True),
    )
