"""Patches of Swin: of the image at the beginning, and of four pixels between the stages (spec section 2)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.models.layers import Dense, sine_position
from magnet_jax.models.norms import LayerNorm
from magnet_jax.models.order import TILE, Order, arrange, from_rows, into_rows
from magnet_jax.models.parameters import parameter, truncated_normal, zeros


class PatchProjection(nn.Module):
    """Convolution whose kernel is as large as its stride, of images that it divides: `[B, H, W, 3] -> [B, h, w, C]`.

    With `by_planes` as a product of matrices, which suits TPUs: these would spread three channels over a register of 128.
    """

    channels: int
    patch: int
    by_planes: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image):
        size = (self.patch, self.patch)
        kernel = parameter(self, "kernel", truncated_normal, (*size, image.shape[-1], self.channels))
        bias = parameter(self, "bias", zeros, (self.channels,)).astype(self.dtype)
        image, kernel = image.astype(self.dtype), kernel.astype(self.dtype)
        if self.by_planes:
            return _project_planes(image, kernel) + bias
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(image, kernel, size, "VALID", dimension_numbers=axes) + bias


def _project_planes(image: jax.Array, kernel: jax.Array) -> jax.Array:
    """128 columns of the planes, for all rows of a patch, times a matrix that has the kernel once for each patch in them."""
    batch, height, width, planes = image.shape
    patch, channels = kernel.shape[0], kernel.shape[-1]
    together = max(1, _COLUMNS // patch)  # Patches,
    columns = together * patch
    blocks = -(-width // columns)
    image = jnp.pad(jnp.moveaxis(image, -1, 1), ((0, 0), (0, 0), (0, 0), (0, blocks * columns - width)))
    image = image.reshape(batch, planes, height // patch, patch, blocks, columns).transpose(0, 2, 4, 1, 3, 5)
    matrix = jnp.einsum("yxpc,mn->pymxnc", kernel, jnp.eye(together, dtype=kernel.dtype))
    x = image.reshape(-1, planes * patch * columns) @ matrix.reshape(-1, together * channels)
    return x.reshape(batch, height // patch, blocks * together, channels)[:, :, : width // patch]


_COLUMNS = 128  # Of a TPU's registers.


class PatchEmbed(nn.Module):
    """Non-overlapping patches to vectors; the image is zero-padded right and bottom: `[B, H, W, 3] -> [B, h, w, C]`.

    `position` adds a fixed sine embedding of where a patch is; the windows alone know only where pixels are to each other.
    """

    channels: int
    patch: int = 4
    position: bool = False
    by_planes: bool = False  # See `PatchProjection`.
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image):
        pad_height, pad_width = -image.shape[1] % self.patch, -image.shape[2] % self.patch
        image = jnp.pad(image, ((0, 0), (0, pad_height), (0, pad_width), (0, 0)))
        x = PatchProjection(self.channels, self.patch, self.by_planes, self.dtype, name="proj")(image)
        x = LayerNorm(name="norm")(x)
        if self.position:
            height, width = x.shape[1:3]
            x += sine_position(height, width, self.channels).reshape(height, width, -1).astype(x.dtype)
        return x


@functools.cache
def quarter_order(height: int, width: int) -> Order:
    """The rows of `into_rows` in four parts of `into_rows` of half the size, by which pixel of 2x2 they are.

    In the published layout's order: the row offset varies fastest, then the column offset.
    """
    rows, columns = -(-height // 2), -(-width // 2)
    quarter = -(-rows * columns // TILE) * TILE
    y, x = np.arange(height)[:, None], np.arange(width)
    places = ((2 * (x % 2) + y % 2) * quarter + y // 2 * columns + x // 2).ravel()
    return Order.of(np.pad(places, (0, -len(places) % TILE), constant_values=-1), 4 * quarter)


class PatchMerging(nn.Module):
    """2x2 neighbours to one pixel of twice the width: `[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]`.

    With `by_rows` by a gather of pixels, which suits TPUs.
    """

    by_rows: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        size = (-(-height // 2), -(-width // 2))
        if self.by_rows:
            x = arrange(into_rows(x), quarter_order(height, width)).reshape(batch, 4, -1, channels)
            x = jnp.concatenate([x[:, quarter] for quarter in range(4)], -1)
        else:
            x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
            x = x.reshape(batch, size[0], 2, size[1], 2, channels).transpose(0, 1, 3, 4, 2, 5)
            x = x.reshape(batch, *size, 4 * channels)
        x = LayerNorm(name="norm")(x)
        x = Dense(
            2 * channels, use_bias=False, kernel_init=truncated_normal, dtype=self.dtype, name="reduction"
        )(x)
        return from_rows(x, size) if self.by_rows else x
