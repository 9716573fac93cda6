"""Rows in another order, by gathering alone: what a compiler makes of the gradients of a gather would be scattered.

On a TPU this is many times as fast as the paddings, rolls and transpositions that it stands for.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.models.layers import on_each_device

TILE = 16  # Rows that lie together in a TPU's memory, of two bytes a number.


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """N rows at P places, of which some may be empty."""

    rows: np.ndarray  # [P] int32: which row is at each place; any if none is.
    used: np.ndarray  # [P] bool: whether one is.
    places: np.ndarray  # [N] int32: the place of each row.

    @classmethod
    def of(cls, places: np.ndarray, count: int) -> Order:
        """places: of every row, its place, of `count`; -1 for a row that means nothing."""
        known = np.flatnonzero(places >= 0)
        rows, used = np.zeros(count, np.int32), np.zeros(count, bool)
        rows[places[known]], used[places[known]] = known, True
        return cls(rows, used, places.astype(np.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def arrange(array: jax.Array, order: Order) -> jax.Array:
    """`[B, N, C]` -> `[B, P, C]`, zero at empty places."""
    return on_each_device(lambda array: _filled(take_rows(array, order.rows), order.used), array)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def restore(array: jax.Array, order: Order) -> jax.Array:
    """The way back, `[B, P, C]` -> `[B, N, C]`, zero where a row means nothing."""
    known = order.places >= 0
    return on_each_device(
        lambda array: _filled(take_rows(array, np.where(known, order.places, 0)), known), array
    )


arrange.defvjp(
    lambda array, order: (arrange(array, order), None), lambda order, _, gradient: (restore(gradient, order),)
)
restore.defvjp(
    lambda array, order: (restore(array, order), None), lambda order, _, gradient: (arrange(gradient, order),)
)


def _filled(array: jax.Array, used: np.ndarray) -> jax.Array:
    return array if used.all() else jnp.where(used[:, None], array, 0)


def take_rows(array: jax.Array, rows: np.ndarray) -> jax.Array:
    """`[B, N, C]` -> `[B, rows, C]`, as rows of one matrix: otherwise a TPU lays out the batch within them.

    To be called `on_each_device`, since a compiler does not see that the rows of an example are its own.
    """
    # Nor would it take pictures for parts of a matrix that end within a tile of its memory.
    array = pad_rows(array)
    batch, count, channels = array.shape
    padded = np.pad(rows, (0, -len(rows) % TILE))
    padded = (jnp.arange(batch, dtype=jnp.int32)[:, None] * count + padded).ravel()
    taken = array.reshape(batch * count, channels).at[padded].get(mode="promise_in_bounds")
    return taken.reshape(batch, -1, channels)[:, : len(rows)]


def pad_rows(array: jax.Array) -> jax.Array:
    """`[B, N, C]` with zeros up to the next multiple of TILE rows."""
    missing = -array.shape[1] % TILE
    return jnp.pad(array, ((0, 0), (0, missing), (0, 0))) if missing else array


def into_rows(x: jax.Array) -> jax.Array:
    """Pixels as rows, and as many of zeros after them as make a multiple of TILE: `[B, H, W, C] -> [B, rows, C]`."""
    return pad_rows(x.reshape(x.shape[0], -1, x.shape[-1]))


def from_rows(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The way back: `[B, rows, C] -> [B, H, W, C]`."""
    return x[:, : math.prod(size)].reshape(x.shape[0], *size, x.shape[-1])
