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

from magnet_jax.models.window_samples import (
    hats,
    index,
    matrix_of,
    missed_by,
    read_samples,
    turn,
    turn_back,
    write_samples,
)
from magnet_jax.models.window_tiles import PIXELS, Shape, add_tile, for_all_tiles, read_tile
from magnet_jax.models.windows import COLUMNS, TILE_ROWS, Cells

_MEMORY = 100 * 2**20  # Bytes of a TPU's fast memory, at most.


def _forward_kernel(
    shape: Shape, first_row, first_column, maps, raw, centres, out, missed, values, turned, samples, down
):
    strip, places = pl.program_id(1), shape.cells.lanes
    left = [first_column[strip, level] for level in range(shape.levels)]

    def read(group, level, tile):
        values[group, shape.tiles[level] + tile] = read_tile(maps, shape, group, level, tile, left[level]).T

    for_all_tiles(shape, read)

    def of_cell(block, any_missed):
        at = pl.ds(pl.multiple_of(block * places, places), places)
        top = [first_row[block, level] for level in range(shape.levels)]
        turn(raw[at, :], turned, shape)
        for group in range(shape.groups):
            read_samples(turned, samples, centres[block], shape, group)
            any_missed = jnp.maximum(any_missed, missed_by(samples, shape, top, left))
            total = jnp.zeros((shape.width, shape.lanes), jnp.float32)
            for level in range(shape.levels):
                across = hats(samples, down, shape, level)
                first = shape.tiles[level] + jax.lax.div(top[level], TILE_ROWS)
                for tile in range(shape.cells.rows[level].length // TILE_ROWS):
                    matrix = matrix_of(down, across, tile, values.dtype)
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


def _backward_kernel(shape: Shape, *refs):
    first_row, first_column, maps, raw, centres, gradient, by_raw, by_maps, *scratch = refs
    values, by_values, turned, by_turned, samples, by_samples, down = scratch
    strip, places = pl.program_id(1), shape.cells.lanes
    left = [first_column[strip, level] for level in range(shape.levels)]

    def read(group, level, tile):
        values[group, shape.tiles[level] + tile] = read_tile(maps, shape, group, level, tile, left[level])
        by_values[group, shape.tiles[level] + tile] = jnp.zeros(by_values.shape[2:], jnp.float32)

    for_all_tiles(shape, read)

    def of_cell(block, _):
        at = pl.ds(pl.multiple_of(block * places, places), places)
        turn(raw[at, :], turned, shape)
        for group in range(shape.groups):
            read_samples(turned, samples, centres[block], shape, group)
            own = gradient[at, shape.channels_of(group)].astype(jnp.float32)
            channel = jax.lax.broadcasted_iota(jnp.int32, (1, shape.width), 1)
            head_of = jax.lax.div(channel, shape.channels)
            by_sums = jnp.concatenate([jnp.where(head_of == h, own, 0.0) for h in range(shape.together)])
            by_sums_turned = by_sums.T.astype(values.dtype)  # [width, lanes]
            by_sums = by_sums.astype(values.dtype)
            for level in range(shape.levels):
                across = hats(samples, down, shape, level)
                first = shape.tiles[level] + jax.lax.div(first_row[block, level], TILE_ROWS)
                rows = jnp.floor(samples[shape.rows_of(level, 1)])
                rows = [rows[point : point + 1] for point in range(shape.points)]
                # What the pixels of the window would add, of the row above each point and of the one below.
                above = [jnp.zeros((COLUMNS, shape.lanes), jnp.float32) for _ in rows]
                below = list(above)
                for tile in range(shape.cells.rows[level].length // TILE_ROWS):
                    by_values[group, first + tile] += _dot(
                        matrix_of(down, across, tile, values.dtype), by_sums
                    )
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
            write_samples(by_turned, by_samples, shape, group)
        by_raw[at, :] = turn_back(by_turned, shape)

    jax.lax.fori_loop(0, shape.cells.blocks, of_cell, None)

    def add(group, level, tile):
        by_tile = by_values[group, shape.tiles[level] + tile]
        new = jnp.where(strip == 0, 0, first_column[jnp.maximum(strip - 1, 0), level] + COLUMNS)
        add_tile(by_maps, by_tile, shape, group, level, tile, left[level], new)

    for_all_tiles(shape, add)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision)


def _of_point(x, y, weight, across, above, below) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients by x, y and weight of a point, each `[1, lanes]`; above, below: those of the pixels of its two rows."""
    level = above + (y - jnp.floor(y)) * (below - above)
    distance = index(across.shape) - jnp.floor(x)
    slope = jnp.where(distance == 1, level, 0.0) - jnp.where(distance == 0, level, 0.0)
    return (
        weight * slope.sum(0, keepdims=True),
        weight * ((below - above) * across).sum(0, keepdims=True),
        (level * across).sum(0, keepdims=True),
    )


def forward(maps, raw, cells: Cells, heads: int, offsets: bool) -> tuple[jax.Array, jax.Array]:
    """Weighted sums `[B, places, heads * D]`, and whether a window missed what a sample needs, so that they are wrong."""
    shape = Shape.of(maps, raw, cells, heads, offsets)
    values = pltpu.VMEM((shape.groups, shape.tiles[-1], shape.width, PIXELS), maps.dtype)
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
    shape = Shape.of(maps, raw, cells, heads, offsets)
    tiles = (shape.groups, shape.tiles[-1], PIXELS, shape.width)
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


def _of_samples(shape: Shape):
    """Memory for the samples of a cell: `turned`, `samples` and `down` of the kernels."""
    longest = max(rows.length for rows in shape.cells.rows)
    return (
        pltpu.VMEM((shape.heads * shape.samples, 3 * shape.cells.lanes), jnp.float32),
        pltpu.VMEM((3 * shape.samples, shape.lanes), jnp.float32),
        pltpu.VMEM((shape.points, longest, shape.lanes), jnp.float32),
    )


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


def _call(kernel, shape: Shape, arrays, results, scratch):
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
