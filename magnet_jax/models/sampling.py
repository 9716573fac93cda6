"""Bilinear samples of a pyramid at any places, weighted and summed: the core of deformable attention, in several forms."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.models import windows
from magnet_jax.models.windows import Levels

# Up to this many pixels in all levels together, sampling is a matrix product on accelerators.
DENSE_PIXELS = 2048

# Shapes of this file: value [B, S, heads, D], S pixels of all levels, level after level, row by row; x, y in pixels of
# their own level, 0 the centre of its first one, any value (what lies outside the map is zero), and weights
# [B, Q, heads, levels * P]; levels: (H, W) of each.


def _corners(levels: Levels, points: int, x: jax.Array, y: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Row in the S pixels and whether inside the map, of the upper left, upper right, lower left, lower right neighbour."""
    height, width = (np.repeat([level[axis] for level in levels], points) for axis in (0, 1))
    start = np.repeat(np.cumsum([0] + [h * w for h, w in levels])[:-1], points)
    left, top = jnp.floor(x), jnp.floor(y)
    corners = []
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        corner_x, corner_y = left + column, top + row
        inside = (corner_x >= 0) & (corner_x < width) & (corner_y >= 0) & (corner_y < height)
        pixel = start + jnp.clip(corner_y, 0, height - 1) * width + jnp.clip(corner_x, 0, width - 1)
        corners.append((pixel.astype(jnp.int32), inside))
    return corners


def sample_gather(
    value: jax.Array, x: jax.Array, y: jax.Array, weights: jax.Array, levels: Levels
) -> jax.Array:
    """Weighted sums of bilinear samples `[B, Q, heads, D]`, by gathering the four corners of every point: the reference."""
    batch, queries, heads, samples = x.shape
    right, down = x - jnp.floor(x), y - jnp.floor(y)
    shares = ((1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right)
    out = jnp.zeros((*x.shape[:3], value.shape[-1]), value.dtype)
    for share, (pixel, inside) in zip(shares, _corners(levels, samples // len(levels), x, y), strict=True):
        weight = jnp.where(inside, weights * share, 0).astype(value.dtype)
        pixel = pixel.swapaxes(2, 3).reshape(batch, queries * samples, heads, 1)
        corner = jnp.take_along_axis(value, pixel, axis=1).reshape(batch, queries, samples, heads, -1)
        out += jnp.einsum("bqhp,bqphd->bqhd", weight, corner)
    return out


def _hat_matrices(x: jax.Array, y: jax.Array, weights: jax.Array, levels: Levels) -> list[jax.Array]:
    """Weight of every pixel in every query's sum, level by level: `[B, Q, heads, H * W]` each."""
    points, matrices = x.shape[-1] // len(levels), []
    for level, (height, width) in enumerate(levels):
        matrix = 0
        for point in range(level * points, (level + 1) * points):
            rows = (
                jnp.maximum(0, 1 - jnp.abs(y[..., point, None] - jnp.arange(height)))
                * weights[..., point, None]
            )
            columns = jnp.maximum(0, 1 - jnp.abs(x[..., point, None] - jnp.arange(width)))
            matrix += rows[..., :, None] * columns[..., None, :]
        matrices.append(matrix.reshape(*x.shape[:-1], height * width))
    return matrices


def _dense_forward(value, x, y, weights, levels):
    out, start = 0, 0
    for matrix in _hat_matrices(x, y, weights, levels):
        stop = start + matrix.shape[-1]
        out += jnp.einsum("bqhn,bnhd->bqhd", matrix.astype(value.dtype), value[:, start:stop])
        start = stop
    return out


def _dense_backward(levels, residuals, gradient):
    value, x, y, weights = residuals
    value_gradient = [
        jnp.einsum("bqhn,bqhd->bnhd", matrix.astype(value.dtype), gradient)
        for matrix in _hat_matrices(x, y, weights, levels)
    ]
    # Only the corners of a point have a part in its gradient: pick these scalars out of the matrix's gradient.
    matrix_gradient = jnp.einsum("bqhd,bnhd->bqhn", gradient, value, preferred_element_type=jnp.float32)
    corners = _corners(levels, x.shape[-1] // len(levels), x, y)
    picked = jnp.take_along_axis(matrix_gradient, jnp.concatenate([pixel for pixel, _ in corners], -1), -1)
    g00, g01, g10, g11 = (
        jnp.where(inside, part, 0)
        for part, (_, inside) in zip(jnp.split(picked, 4, -1), corners, strict=True)
    )
    right, down = x - jnp.floor(x), y - jnp.floor(y)
    upper, lower = g00 + right * (g01 - g00), g10 + right * (g11 - g10)
    x_gradient = weights * ((1 - down) * (g01 - g00) + down * (g11 - g10))
    y_gradient = weights * (lower - upper)
    return jnp.concatenate(value_gradient, 1), x_gradient, y_gradient, upper + down * (lower - upper)


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


def _rows_forward(value, x, y, weights, levels):
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


def _rows_backward(levels, residuals, gradient):
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


# ------------------------------------------------------------------------------- a point at a time, by separate corners


def _padded(value: jax.Array, levels: Levels) -> jax.Array:
    """All levels within a frame of zeros, pixel by pixel, head by head: `[B, sum((H + 2) * (W + 2)) * heads, D]`."""
    tables, start = [], 0
    for height, width in levels:
        level = value[:, start : start + height * width].reshape(len(value), height, width, *value.shape[2:])
        level = jnp.pad(level, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
        tables.append(level.reshape(len(value), -1, value.shape[-1]))
        start += height * width
    return jnp.concatenate(tables, 1)


# Rows [B, N] of tables [B, S, C], which are all there.
_take = jax.vmap(lambda table, rows: table.at[rows].get(mode="promise_in_bounds"))
_put = jax.vmap(lambda table, rows, add: table.at[rows].add(add, mode="promise_in_bounds"))


def _neighbour_rows(point: _Points, heads: int) -> tuple[jax.Array, ...]:
    below = point.row + point.line
    return point.row, point.row + heads, below, below + heads


def _points_forward(value, x, y, weights, levels):
    heads, table = value.shape[2], _padded(value, levels)

    def add(total, point):
        for rows, share in zip(_neighbour_rows(point, heads), point.shares(), strict=True):
            total += share[..., None] * _take(table, rows)
        return total, None

    points = _Points.of(x, y, weights, levels, frame=2).interleaved()
    total = jnp.zeros((*points.row.shape[1:], value.shape[-1]), jnp.float32)
    return jax.lax.scan(add, total, points)[0].astype(value.dtype)


def _points_backward(levels, residuals, gradient):
    value, x, y, weights = residuals
    batch, _, heads, channels = value.shape
    table, spread = jax.vjp(lambda value: _padded(value, levels), value.astype(jnp.float32))
    table = table.astype(value.dtype)
    gradient = gradient.astype(jnp.float32)

    def add(total, point):
        corners = []
        for rows, share in zip(_neighbour_rows(point, heads), point.shares(), strict=True):
            part = (share[..., None] * gradient).reshape(batch, -1, channels)
            total = _put(total, rows.reshape(batch, -1), part)
            # As a product: XLA:CPU takes ten times as long for a sum along the last axis of what was multiplied.
            corners.append(jnp.einsum("bqhd,bqhd->bqh", _take(table, rows), gradient))
        return total, point.slopes(*corners)

    points = _Points.of(x, y, weights, levels, frame=2).interleaved()
    total, gradients = jax.lax.scan(add, jnp.zeros(table.shape, jnp.float32), points)
    return spread(total)[0].astype(value.dtype), *(jnp.moveaxis(g, 0, -1) for g in gradients)


# ------------------------------------------------------------------------------------------------------ choosing a form


def _windows_forward(value, x, y, weights, levels):
    return jax.lax.cond(
        windows.covered(x, y, levels),
        lambda *arrays: windows.forward(*arrays, levels),
        lambda *arrays: _rows_forward(*arrays, levels),
        *(value, x, y, weights),
    )


def _windows_backward(levels, residuals, gradient):
    return jax.lax.cond(
        windows.covered(residuals[1], residuals[2], levels),
        lambda *arrays: windows.backward(levels, *arrays),
        lambda *arrays: _rows_backward(levels, *arrays),
        *(residuals, gradient),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sample(value, x, y, weights, levels: Levels, form: str):
    return _by_platform(0, form, levels, x.shape[1])(value, x, y, weights)


def _sample_forward(value, x, y, weights, levels, form):
    return _sample(value, x, y, weights, levels, form), (value, x, y, weights)


def _sample_backward(levels, form, residuals, gradient):
    return _by_platform(1, form, levels, residuals[1].shape[1])(residuals, gradient)


_sample.defvjp(_sample_forward, _sample_backward)
# Forward (value, x, y, weights, levels), backward (levels, (value, x, y, weights), gradient); nothing else is kept.
_FORMS = {
    "dense": (_dense_forward, _dense_backward),
    "rows": (_rows_forward, _rows_backward),
    "points": (_points_forward, _points_backward),
    "windows": (_windows_forward, _windows_backward),
}


def _by_platform(direction: int, form: str, levels: Levels, queries: int):
    def of(name):
        function = _FORMS[name][direction]
        if direction:
            return functools.partial(function, levels)
        return lambda *arrays: function(*arrays, levels)

    if form != "auto":
        return of(form)
    pixels = sum(height * width for height, width in levels)
    few, own = pixels <= DENSE_PIXELS, queries == pixels
    return lambda *arrays: jax.lax.platform_dependent(
        *arrays,
        cpu=of("points"),
        tpu=of("dense" if few else "windows" if own else "rows"),
        default=of("dense" if few else "rows"),
    )


FORMS = ("gather", *_FORMS)


def sample(
    value: jax.Array, x: jax.Array, y: jax.Array, weights: jax.Array, levels: Levels, form: str = "auto"
) -> jax.Array:
    """Weighted sums of bilinear samples `[B, Q, heads, D]`; value `[B, S, heads, D]`, the rest `[B, Q, heads, L * P]`.

    S pixels of all levels (H, W), level after level, row by row; x, y in pixels of their own level, 0 the centre of its
    first one, any value: what lies outside the map is zero. All forms give the same values and gradients:

    - 'gather', the four corners of every point at once: the reference;
    - 'dense', products of [Q, S] matrices of hat-function weights with the values, for few pixels;
    - 'windows', the same within windows around the queries, for TPUs; queries must be the pixels themselves (ValueError);
      where a sample is outside its window, at run time, 'rows' instead;
    - 'rows', a point at a time, which reads one long row with all four corners;
    - 'points', a point at a time, corner by corner, for CPUs;
    - 'auto' chooses by the platform that is compiled for and the number of pixels.
    """
    if form == "gather":
        return sample_gather(value, x, y, weights, levels)
    if form == "windows" and x.shape[1] != value.shape[1]:
        raise ValueError(f"'windows' needs a query for each of the {value.shape[1]} pixels; got {x.shape[1]}")
    return _sample(value, x, y, weights, levels, form)
