"""Deformable attention within windows as two Pallas kernels for TPUs, forward and backward (see `windows`).

A kernel goes through the strips of a picture, whose maps of values stay in the fast memory meanwhile. Of a strip, it reads
the columns of each level that its windows have, in tiles of 8 rows by 16 columns; then, cell by cell, it makes the matrix of
hat functions of a window, [pixels, heads * queries], and multiplies, 128 pixels at a time. Heads lie side by side in the
lanes, so that of a product with the channels of all of them the blocks are kept that belong to one head.

Cells and tiles go in pairs with memory of their own, so that while one waits for a result, the other works. In the backward
pass, a sample's gradients come of those by the four pixels around it, of which one row and one column are even, and one odd:
looking for the even row among even rows alone, and for the odd one among the others, halves the search.

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

from magnet_jax.models.kernel_parts import Words, dot, in_pairs, words_of
from magnet_jax.models.window_samples import (
    by_samples_of,
    hats,
    index,
    missed_by,
    neighbours,
    products,
    read_samples,
    turn,
    turn_back,
    write_samples,
)
from magnet_jax.models.window_tiles import PIXELS, Shape, add_tile, for_all_tiles, read_tile
from magnet_jax.models.windows import COLUMNS, TILE_ROWS, Cells, Windows

_MEMORY = 100 * 2**20  # Bytes of a TPU's fast memory, at most.


def _forward_kernel(
    shape: Shape,
    first_row,
    first_column,
    maps,
    raw,
    centres,
    out,
    missed,
    *,
    values,
    wide,
    turned,
    samples,
    down,
    matrices,
):
    values, wide = words_of((values, wide), maps.dtype)
    strip, places = pl.program_id(1), shape.cells.lanes
    left = [first_column[strip, level] for level in range(shape.levels)]

    def read(level, tile, parity):
        for group in range(shape.groups):
            found = read_tile(maps, wide[parity][group], shape, group, level, tile, left[level])
            values[group].write((shape.tiles[level] + tile) * shape.width, found.T, shape.width)

    for_all_tiles(shape, read)

    def of_cell(block, parity, any_missed):
        at = pl.ds(pl.multiple_of(block * places, places), places)
        top = [first_row[block, level] for level in range(shape.levels)]
        turn(raw[at, :], turned[parity], shape)
        for group in range(shape.groups):
            own = samples[parity][group]
            read_samples(turned[parity], own, centres[block], shape, group)
            any_missed = jnp.maximum(any_missed, missed_by(own, shape, top, left))
            total = jnp.zeros((shape.width, shape.lanes), jnp.float32)
            for level, rows in enumerate(shape.cells.rows):
                across = hats(own, down[parity][group][level], shape, level)
                matrix = matrices[parity][group][level]
                first = _write_matrix(matrix, down[parity][group][level], across, rows, top[level])
                for tile in range(rows.tiles):
                    at_tile = (shape.tiles[level] + first + tile) * shape.width
                    turned_values = values[group].read(at_tile, shape.width, shape.width)
                    total += dot(turned_values, matrix[tile * PIXELS : (tile + 1) * PIXELS])
            sums = total.T  # [lanes, width], of which each head has its own channels.
            channel = jax.lax.broadcasted_iota(jnp.int32, (1, shape.width), 1)
            found = sums[:places]
            for head in range(1, shape.together):
                of_head = sums[head * places : (head + 1) * places]
                found = jnp.where(channel < head * shape.channels, found, of_head)
            out[at, shape.channels_of(group)] = found.astype(out.dtype)
        return any_missed

    any_missed = in_pairs(shape.cells.blocks, of_cell, jnp.zeros((1, shape.lanes), jnp.float32))
    missed[...] = jnp.broadcast_to(any_missed, missed.shape)


def _write_matrix(matrix, down, across, rows: Windows, top) -> jax.Array:
    """Writes the matrix of a window to that of the tiles in which it is, `[pixels, lanes]`; returns the first of them."""
    height = rows.tiles * TILE_ROWS
    first = jnp.minimum(jax.lax.div(top, TILE_ROWS), rows.padded // TILE_ROWS - rows.tiles)
    above = top - first * TILE_ROWS

    def put(row, part):
        matrix[pl.ds(pl.multiple_of(row * COLUMNS, COLUMNS), len(part)), :] = part

    for start, some in _in_tiles(rows.length):
        put(above + start, products(down, across, some, matrix.dtype))
    for row in range(rows.length, height):
        put(jax.lax.rem(above + row, height), jnp.zeros((COLUMNS, down.shape[-1]), matrix.dtype))
    return first


def _in_tiles(length: int) -> list[tuple[int, range]]:
    """The rows of a window, as many at a time as a tile has: the first and all."""
    return [(start, range(start, min(start + TILE_ROWS, length))) for start in range(0, length, TILE_ROWS)]


def _backward_kernel(
    shape: Shape,
    first_row,
    first_column,
    maps,
    raw,
    centres,
    gradient,
    by_raw,
    by_maps,
    *,
    values,
    by_values,
    wide,
    turned,
    by_turned,
    samples,
    down,
    corners,
):
    values, wide = words_of((values, wide), maps.dtype)
    strip, places = pl.program_id(1), shape.cells.lanes
    left = [first_column[strip, level] for level in range(shape.levels)]

    def pixels_of(level, tile):
        return pl.ds(pl.multiple_of((shape.tiles[level] + tile) * PIXELS, PIXELS), PIXELS)

    def read(level, tile, parity):
        for group in range(shape.groups):
            found = read_tile(maps, wide[parity][group], shape, group, level, tile, left[level])
            values[group].write((shape.tiles[level] + tile) * PIXELS, found, PIXELS)
            by_values[group][pixels_of(level, tile), :] = jnp.zeros((PIXELS, shape.width), jnp.float32)

    for_all_tiles(shape, read)

    def of_cell(block, parity, _):
        at = pl.ds(pl.multiple_of(block * places, places), places)
        turn(raw[at, :], turned[parity], shape)
        for group in range(shape.groups):
            own, by_out = samples[parity][group], gradient[at, shape.channels_of(group)].astype(jnp.float32)
            read_samples(turned[parity], own, centres[block], shape, group)
            channel = jax.lax.broadcasted_iota(jnp.int32, (1, shape.width), 1)
            head_of = jax.lax.div(channel, shape.channels)
            by_sums = jnp.concatenate([jnp.where(head_of == h, by_out, 0.0) for h in range(shape.together)])
            by_sums_turned = by_sums.T.astype(maps.dtype)  # [width, lanes]
            by_sums = by_sums.astype(maps.dtype)
            for level, windows in enumerate(shape.cells.rows):
                across = hats(own, down[parity][group][level], shape, level)
                columns, rows = (neighbours(own[shape.rows_of(level, kind)]) for kind in range(2))
                of_rows = [_Rows(wanted, shape.points) for wanted in rows]
                first = shape.tiles[level] * TILE_ROWS + first_row[block, level]
                for start, some in _in_tiles(windows.length):
                    at_row, count = (first + start) * COLUMNS, len(some) * COLUMNS
                    matrix = products(down[parity][group][level], across, some, maps.dtype)
                    by_values[group][pl.ds(pl.multiple_of(at_row, COLUMNS), count), :] += dot(matrix, by_sums)
                    by_matrix = dot(values[group].read(at_row, count, COLUMNS), by_sums_turned)
                    for number, row in enumerate(some):
                        of_rows[row % 2].see(row, by_matrix[number * COLUMNS : (number + 1) * COLUMNS])
                _write_corners(corners[parity][group], columns, of_rows, level)
            by_own = by_samples_of(own, corners[parity][group], shape)
            write_samples(by_turned[parity], by_own, shape, group)
        by_raw[at, :] = turn_back(by_turned[parity], shape)

    in_pairs(shape.cells.blocks, of_cell)

    def add(level, tile, _):
        by_tiles = [by_values[group][pixels_of(level, tile), :] for group in range(shape.groups)]
        new = jnp.where(strip == 0, 0, first_column[jnp.maximum(strip - 1, 0), level] + COLUMNS)
        add_tile(by_maps, by_tiles, shape, level, tile, left[level], new)

    for_all_tiles(shape, add)


class _Rows:
    """Of every point one row of pixels, out of those that are seen one by one.

    wanted: their numbers, `[P, lanes]`; found: `[16, lanes]` of every point, zero where it was not seen.
    """

    def __init__(self, wanted: jax.Array, points: int):
        size = COLUMNS, wanted.shape[1]
        self._wanted = [jnp.broadcast_to(wanted[point : point + 1], size) for point in range(points)]
        self.found = [jnp.zeros(size, jnp.float32)] * points

    def see(self, number: int, row: jax.Array) -> None:
        pairs = zip(self._wanted, self.found, strict=True)
        self.found = [jnp.where(wanted == float(number), row, found) for wanted, found in pairs]


def _write_corners(corners, columns, of_rows: list[_Rows], level: int) -> None:
    """Writes the pixels of the even and the odd column out of the even and the odd row of every point of a level."""
    points = len(of_rows[0].found)
    column = index(of_rows[0].found[0].shape)
    for point in range(points):
        near = (column == columns[0][point : point + 1]) | (column == columns[1][point : point + 1])
        for kind, rows in enumerate(of_rows):
            # One even and one odd sublane are left. Each is added to what is zero, until every second row has it.
            pixels = jnp.where(near, rows.found[point], 0.0)
            pixels = pixels[:8] + pixels[8:]
            pixels += pltpu.roll(pixels, 4, 0)
            pixels += pltpu.roll(pixels, 2, 0)
            at = 2 * (level * points + point)
            corners[kind][at : at + 2, :] = pixels[at % 8 : at % 8 + 2]


def forward(maps, raw, cells: Cells, heads: int, offsets: bool) -> tuple[jax.Array, jax.Array]:
    """Weighted sums `[B, places, heads * D]`, and whether a window missed what a sample needs, so that they are wrong."""
    shape = Shape.of(maps, raw, cells, heads, offsets)
    results = [
        (jax.ShapeDtypeStruct((*raw.shape[:2], maps.shape[-1]), maps.dtype), _strip),
        (jax.ShapeDtypeStruct((len(maps), 8 * cells.strips, shape.lanes), jnp.float32), _strip),
    ]
    matrices = [pltpu.VMEM((rows.tiles * PIXELS, shape.lanes), maps.dtype) for rows in cells.rows]
    memory = _memory(shape, maps) | {
        "values": [Words.memory((shape.tiles[-1] * shape.width, PIXELS), maps.dtype)] * shape.groups,
        "matrices": [[matrices] * shape.groups] * 2,
    }
    out, missed = _call(_forward_kernel, shape, [(maps, _picture), (raw, _strip)], results, memory)
    return out, missed.max() > 0


def backward(maps, raw, gradient, cells: Cells, heads: int, offsets: bool) -> tuple[jax.Array, jax.Array]:
    """Gradients by maps, float32 and without a meaning beyond the levels, and by raw, for one by the sums."""
    shape = Shape.of(maps, raw, cells, heads, offsets)
    results = [
        (jax.ShapeDtypeStruct(raw.shape, raw.dtype), _strip),
        (jax.ShapeDtypeStruct(maps.shape, jnp.float32), _picture),
    ]
    pixels = shape.tiles[-1] * PIXELS, shape.width
    corners = [pltpu.VMEM((2 * shape.samples, shape.lanes), jnp.float32)] * 2
    memory = _memory(shape, maps)
    memory |= {
        "values": [Words.memory(pixels, maps.dtype)] * shape.groups,
        "by_values": [pltpu.VMEM(pixels, jnp.float32)] * shape.groups,
        "by_turned": memory["turned"],
        "corners": [[corners] * shape.groups] * 2,
    }
    arrays = [(maps, _picture_alone), (raw, _strip), (gradient, _strip)]
    by_raw, by_maps = _call(_backward_kernel, shape, arrays, results, memory)
    return by_maps, by_raw


def _memory(shape: Shape, maps) -> dict[str, list]:
    """What both kernels need: for each of two tiles or cells at a time, and mostly for each group.

    Every piece is memory of its own, since a compiler takes two places in one piece for the same, and then waits.
    """
    down = [pltpu.VMEM((shape.points, rows.length, shape.lanes), jnp.float32) for rows in shape.cells.rows]
    of_group = {
        "wide": Words.memory((2 * PIXELS, shape.width), maps.dtype),
        "samples": pltpu.VMEM((3 * shape.samples, shape.lanes), jnp.float32),
        "down": down,
    }
    turned = pltpu.VMEM((shape.heads * shape.samples, 3 * shape.cells.lanes), jnp.float32)
    return {"turned": [turned] * 2} | {name: [[one] * shape.groups] * 2 for name, one in of_group.items()}


def _strip(shape: Shape, array) -> pl.BlockSpec:
    """A step of the kernel sees the part that belongs to its strip,"""
    size = (None, array.shape[1] // shape.cells.strips, array.shape[2])
    return pl.BlockSpec(size, lambda picture, strip, *_: (picture, strip, 0))


def _picture(shape: Shape, array) -> pl.BlockSpec:
    """or all that belongs to its picture."""
    return pl.BlockSpec((1, *array.shape[1:]), lambda picture, strip, *_: (picture, 0, 0))


def _picture_alone(shape: Shape, array) -> pl.BlockSpec:
    """The next picture is not read before, which saves memory."""
    spec = _picture(shape, array)
    return dataclasses.replace(spec, pipeline_mode=pl.Buffered(1))


def _call(kernel, shape: Shape, arrays, results, memory: dict):
    """Runs a kernel over pictures and strips; anywhere but on a TPU, it is interpreted.

    arrays, results: each with `_strip` or `_picture`; memory: what the kernel has for itself, by name.
    """
    cells = shape.cells
    first_row = np.stack([rows.first for rows in cells.rows], 1)
    first_column = np.stack([columns.first for columns in cells.columns], 1)
    centres = np.tile(cells.centres if shape.offsets else cells.origins, (1, 1, 1, shape.together))
    centre_spec = pl.BlockSpec((None, *centres.shape[1:]), lambda picture, strip, *_: (strip, 0, 0, 0))

    def with_names(*refs):
        kernel(shape, *refs[: -len(memory)], **dict(zip(memory, refs[-len(memory) :], strict=True)))

    def run(first, second, *others, interpret):
        return pl.pallas_call(
            with_names,
            name=f"deformable_attention{kernel.__name__.removesuffix('_kernel')}",
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(len(first), cells.strips),
                in_specs=[*specs[:2], centre_spec, *specs[2:]],
                out_specs=[spec(shape, result) for result, spec in results],
                scratch_shapes=list(memory.values()),
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
