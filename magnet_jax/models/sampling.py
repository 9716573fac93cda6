"""Bilinear samples of a pyramid at any places, weighted and summed: the core of deformable attention, in several forms."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from magnet_jax.models import points, window_kernels, windows
from magnet_jax.models.layers import on_each_device
from magnet_jax.models.order import arrange, restore, take_rows
from magnet_jax.models.windows import Cells, Levels

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


# ------------------------------------------------------------------------------------------------- windows of cells


def cells_for(levels: Levels, heads: int, channels: int) -> Cells | None:
    """The cells in which 'windows' has the queries of that many heads; None where a pyramid has none."""
    return windows.cells_of(levels, windows.LANES // windows.heads_together(heads, channels))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def sample_in_cells(
    value: jax.Array, raw: jax.Array, levels: Levels, heads: int, offsets: bool = True
) -> jax.Array:
    """As `sample` with 'windows', of queries and values in cells: value `[B, places, heads * D]`, as is the result.

    raw `[B, places, 3 * heads * L * P]` float32: with `offsets`, x of the samples from their query in pixels of their level,
    y, and logits of the weights; without, x and y in the map, and weights. What is at places without a query means nothing.
    """
    return _sample_in_cells(value, raw, levels, heads, offsets)[0]


def _sample_in_cells(value, raw, levels, heads, offsets):
    """The result and, of each device, whether rows were read, as windows missed what a sample needs: `[1]` bool."""

    def on_device(value, raw):
        maps = take_rows(value, cells.pixels)
        out, missed = window_kernels.forward(maps, raw, cells, heads, offsets)

        def by_rows(value, raw):
            return _row_major(_rows_in_cells(value, raw, levels, heads, offsets))

        return jax.lax.cond(missed, by_rows, lambda *_: out, value, raw), missed[None]

    cells = cells_for(levels, heads, value.shape[-1] // heads)
    return on_each_device(on_device, value, raw)


def _rows_in_cells(value, raw, levels, heads, offsets):
    """The same by 'rows'."""
    cells = cells_for(levels, heads, value.shape[-1] // heads)
    x, y, weights = jnp.split(raw.reshape(*raw.shape[:2], 3 * heads, -1), 3, 2)
    if offsets:
        centres = pixel_centres(levels, x.shape[-1] // len(levels), cells.order.rows)
        x, y = (a + centre for a, centre in zip((x, y), centres, strict=True))
        weights = jax.nn.softmax(weights, -1)
    value = _by_head(restore(value, cells.order), heads)
    return _flat(_sample(value, x, y, weights, levels, "rows"))


def _row_major(array: jax.Array) -> jax.Array:
    """The same array, laid out as kernels do, so that the results of branches need no copies."""
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


def _sample_in_cells_forward(value, raw, *fields):
    out, missed = _sample_in_cells(value, raw, *fields)
    return out, (value, raw, missed)


def _sample_in_cells_backward(levels, heads, offsets, residuals, gradient):
    def by_kernel(value, raw, gradient):
        maps = take_rows(value, cells.pixels)
        by_maps, by_raw = window_kernels.backward(maps, raw, gradient, cells, heads, offsets)
        by_value = jnp.where(cells.order.used[:, None], take_rows(by_maps, cells.in_maps), 0)
        return by_value.astype(value.dtype), by_raw

    def by_rows(value, raw, gradient):
        rows = functools.partial(_rows_in_cells, levels=levels, heads=heads, offsets=offsets)
        return tuple(map(_row_major, jax.vjp(rows, value, raw)[1](gradient)))

    def on_device(value, raw, missed, gradient):
        return jax.lax.cond(missed[0], by_rows, by_kernel, value, raw, gradient)

    cells = cells_for(levels, heads, gradient.shape[-1] // heads)
    return on_each_device(on_device, *residuals, gradient)


sample_in_cells.defvjp(_sample_in_cells_forward, _sample_in_cells_backward)


def pixel_centres(levels: Levels, points: int, rows: np.ndarray | slice = slice(None)) -> list[jax.Array]:
    """x and y of all pixels, or of `rows`, in pixels of the level of every sample: `[S, 1, L * P]` float32 each."""
    centre = np.concatenate([windows.centres(level) for level in levels])[rows, None]
    found = []
    for axis in (1, 0):
        at = (centre[..., axis, None] * [level[axis] for level in levels] - 0.5).astype(np.float32)
        # Repeated by the program, of which it would be most of the text.
        found.append(jnp.broadcast_to(at[..., None], (*at.shape, points)).reshape(*at.shape[:2], -1))
    return found


def _flat(array: jax.Array) -> jax.Array:
    return array.reshape(*array.shape[:2], -1)


def _by_head(array: jax.Array, heads: int) -> jax.Array:
    return array.reshape(*array.shape[:2], heads, -1)


def _windows_forward(value, x, y, weights, levels):
    heads, channels = value.shape[2:]
    cells = cells_for(levels, heads, channels)
    raw = jnp.concatenate([_flat(a) for a in (x, y, weights)], -1)
    arrays = (arrange(array, cells.order) for array in (_flat(value), raw))
    return _by_head(restore(sample_in_cells(*arrays, levels, heads, False), cells.order), heads)


def _windows_backward(levels, residuals, gradient):
    return jax.vjp(lambda *arrays: _windows_forward(*arrays, levels), *residuals)[1](gradient)


# ------------------------------------------------------------------------------------------------------ choosing a form


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sample(value, x, y, weights, levels: Levels, form: str):
    return _by_platform(0, form, levels, value, x.shape[1])(value, x, y, weights)


def _sample_forward(value, x, y, weights, levels, form):
    return _sample(value, x, y, weights, levels, form), (value, x, y, weights)


def _sample_backward(levels, form, residuals, gradient):
    value, x = residuals[:2]
    return _by_platform(1, form, levels, value, x.shape[1])(residuals, gradient)


_sample.defvjp(_sample_forward, _sample_backward)
# Forward (value, x, y, weights, levels), backward (levels, (value, x, y, weights), gradient); nothing else is kept.
_FORMS = {
    "dense": (_dense_forward, _dense_backward),
    "rows": (points.rows_forward, points.rows_backward),
    "points": (points.points_forward, points.points_backward),
    "windows": (_windows_forward, _windows_backward),
}


def automatic(platform: str, levels: Levels, heads: int, channels: int, own: bool = True) -> str:
    """The form that 'auto' means on a platform ('cpu', 'tpu', ...); `own`: queries are the pixels themselves."""
    if platform == "cpu":
        return "points"
    if sum(height * width for height, width in levels) <= DENSE_PIXELS:
        return "dense"
    full = windows.heads_together(heads, channels) * channels == windows.LANES
    if platform == "tpu" and own and full and cells_for(levels, heads, channels) is not None:
        return "windows"
    return "rows"


def _by_platform(direction: int, form: str, levels: Levels, value: jax.Array, queries: int):
    def of(name):
        function = _FORMS[name][direction]
        if direction:
            return functools.partial(function, levels)
        return lambda *arrays: function(*arrays, levels)

    if form not in ("auto", "anywhere"):
        return of(form)
    by_platform = {"cpu": of("points"), "default": of(automatic("cuda", levels, *value.shape[2:]))}
    if form == "auto":
        by_platform["tpu"] = of(automatic("tpu", levels, *value.shape[2:], queries == value.shape[1]))
    return lambda *arrays: jax.lax.platform_dependent(*arrays, **by_platform)


FORMS = ("gather", *_FORMS, "anywhere")


def sample(
    value: jax.Array, x: jax.Array, y: jax.Array, weights: jax.Array, levels: Levels, form: str = "auto"
) -> jax.Array:
    """Weighted sums of bilinear samples `[B, Q, heads, D]`; value `[B, S, heads, D]`, the rest `[B, Q, heads, L * P]`.

    S pixels of all levels (H, W), level after level, row by row; x, y in pixels of their own level, 0 the centre of its
    first one, any value: what lies outside the map is zero. All forms give the same values and gradients:

    - 'gather', the four corners of every point at once: the reference;
    - 'dense', products of [Q, S] matrices of hat-function weights with the values, for few pixels;
    - 'windows', the same within windows around the queries, for TPUs; queries must be the pixels themselves, and each level
      about half of the next (ValueError); where a sample is outside its window, at run time, 'rows' instead;
    - 'rows', a point at a time, which reads one long row with all four corners;
    - 'points', a point at a time, corner by corner, for CPUs;
    - 'auto' chooses by the platform that is compiled for and the number of pixels; 'anywhere' too, without a kernel, for
      programs of several platforms.
    """
    if form == "gather":
        return sample_gather(value, x, y, weights, levels)
    if form == "windows" and x.shape[1] != value.shape[1]:
        raise ValueError(f"'windows' needs a query for each of the {value.shape[1]} pixels; got {x.shape[1]}")
    if form == "windows" and cells_for(levels, *value.shape[2:]) is None:
        raise ValueError(f"'windows' needs levels that are about halves of each other; got {levels}")
    return _sample(value, x, y, weights, levels, form)
