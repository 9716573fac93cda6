"""Swin Transformer, stage by stage, so that a network can fuse language between the stages (spec section 2)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from magnet_jax.models.layers import (
    Dense,
    DropPath,
    LayerNorm,
    Remat,
    attend_by_head,
    gelu,
    sine_position,
    truncated_normal,
)


@functools.cache
def relative_position_index(window: int) -> np.ndarray:
    """Row of the bias table for every (query, key) of a window: `[window**2, window**2]`, d = query minus key."""
    y, x = np.divmod(np.arange(window * window), window)
    dy, dx = y[:, None] - y[None], x[:, None] - x[None]
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


@functools.cache
def shift_mask(height: int, width: int, window: int) -> np.ndarray:
    """Additive mask of a rolled map that keeps its nine regions apart: `[windows, window**2, window**2]`, 0 or -100."""

    def region(size):
        index = np.arange(size)
        return (index >= size - window).astype(int) + (index >= size - window // 2)

    regions = region(height)[:, None] * 3 + region(width)[None]
    regions = regions.reshape(height // window, window, width // window, window)
    regions = regions.transpose(0, 2, 1, 3).reshape(-1, window * window)
    return np.where(regions[:, :, None] == regions[:, None], 0.0, -100.0).astype(np.float32)


class WindowAttention(nn.Module):
    """Multi-head attention within (shifted) windows: `[B, H, W, C] -> [B, H, W, C]`."""

    heads: int
    window: int
    shifted: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        window, shift = self.window, self.window // 2
        padded_height, padded_width = -(-height // window) * window, -(-width // window) * window
        rows, columns = padded_height // window, padded_width // window

        # The padding is of zeros, for which the product need not be computed: only the bias is added to it.
        dense = Dense(3 * channels, kernel_init=truncated_normal, dtype=self.dtype, name="qkv")
        qkv, qkv_bias = dense.without_bias(x)
        qkv = jnp.pad(qkv, ((0, 0), (0, padded_height - height), (0, padded_width - width), (0, 0)))
        if self.shifted:
            qkv = jnp.roll(qkv, (-shift, -shift), (1, 2))
        qkv = qkv.reshape(batch, rows, window, columns, window, 3, self.heads, channels // self.heads)
        qkv = qkv.transpose(5, 0, 1, 3, 6, 2, 4, 7).reshape(
            3, batch, rows * columns, self.heads, window * window, channels // self.heads
        )
        qkv = (qkv + qkv_bias.reshape(3, 1, 1, self.heads, 1, -1)).astype(self.dtype)

        table = self.param("relative_position_bias", truncated_normal, ((2 * window - 1) ** 2, self.heads))
        bias = table[relative_position_index(window)].transpose(2, 0, 1)  # [heads, pixels, pixels]
        if self.shifted:
            bias = bias + shift_mask(padded_height, padded_width, window)[:, None]
        x = attend_by_head(*qkv, scale=(channels // self.heads) ** -0.5, bias=bias)

        x = x.reshape(batch, rows, columns, self.heads, window, window, -1).transpose(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(batch, padded_height, padded_width, channels)
        if self.shifted:
            x = jnp.roll(x, (shift, shift), (1, 2))
        x = x[:, :height, :width]
        return Dense(channels, kernel_init=truncated_normal, dtype=self.dtype, name="proj")(x)


class SwinBlock(nn.Module):
    """Window attention and a four times wider MLP, pre-norm, both residual: `[B, H, W, C] -> [B, H, W, C]`."""

    heads: int
    window: int
    shifted: bool
    drop_path: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        y = LayerNorm(name="norm1")(x)
        y = WindowAttention(self.heads, self.window, self.shifted, self.dtype, name="attn")(y)
        x += DropPath(self.drop_path)(y, train=train)
        y = LayerNorm(name="norm2")(x)
        y = gelu(Dense(4 * x.shape[-1], kernel_init=truncated_normal, dtype=self.dtype, name="fc1")(y))
        y = Dense(x.shape[-1], kernel_init=truncated_normal, dtype=self.dtype, name="fc2")(y)
        return x + DropPath(self.drop_path)(y, train=train)


class SwinStage(nn.Module):
    """The blocks of one stage, every second one shifted: `[B, H, W, C] -> [B, H, W, C]`."""

    heads: int
    window: int
    drop_paths: Sequence[float]  # one rate a block
    dtype: Any = jnp.float32
    number: int = 1  # 1 is the finest
    remat: Remat = Remat()

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        block = self.remat(SwinBlock, f"stage_{self.number}", static=2)
        for i, rate in enumerate(self.drop_paths):
            x = block(self.heads, self.window, i % 2 == 1, rate, self.dtype, name=f"block_{i}")(x, train)
        return x


class PatchEmbed(nn.Module):
    """Non-overlapping patches to vectors; the image is zero-padded right and bottom: `[B, H, W, 3] -> [B, h, w, C]`.

    `position` adds a fixed sine embedding of where a patch is; the windows alone know only where pixels are to each other.
    """

    channels: int
    patch: int = 4
    position: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image):
        pad_height, pad_width = -image.shape[1] % self.patch, -image.shape[2] % self.patch
        image = jnp.pad(image.astype(self.dtype), ((0, 0), (0, pad_height), (0, pad_width), (0, 0)))
        kernel = (self.patch, self.patch)
        x = nn.Conv(
            self.channels,
            kernel,
            kernel,
            "VALID",
            kernel_init=truncated_normal,
            dtype=self.dtype,
            name="proj",
        )(image)
        x = LayerNorm(name="norm")(x)
        if self.position:
            height, width = x.shape[1:3]
            x += sine_position(height, width, self.channels).reshape(height, width, -1).astype(x.dtype)
        return x


class PatchMerging(nn.Module):
    """2x2 neighbours to one pixel of twice the width: `[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]`."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        # Order of the published layout: the row offset varies fastest, then the column offset.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, height // 2, width // 2, 4 * channels)
        x = LayerNorm(name="norm")(x)
        dense = Dense(
            2 * channels, use_bias=False, kernel_init=truncated_normal, dtype=self.dtype, name="reduction"
        )
        return dense(x)


class Swin(nn.Module):
    """Swin Transformer as separate steps: `patch_embed`, then for every stage `stage[k]` and `merge[k]`.

    Source: Swin Transformer (arXiv 2103.14030); spec section 2.
    """

    embed_dim: int = 128
    depths: Sequence[int] = (2, 2, 18, 2)
    heads: Sequence[int] = (4, 8, 16, 32)
    window: int = 12
    patch: int = 4
    drop_path: float = 0.3  # of the last block; rises linearly from 0
    position: bool = False  # absolute position of the patches, which the published networks do without
    dtype: Any = jnp.float32
    remat: Remat = Remat()

    def setup(self):
        rates = np.linspace(0, self.drop_path, sum(self.depths)).tolist()
        ends = np.cumsum(self.depths).tolist()
        self.patch_embed = PatchEmbed(self.embed_dim, self.patch, self.position, self.dtype)
        self.stage = [
            SwinStage(heads, self.window, tuple(rates[end - depth : end]), self.dtype, number, self.remat)
            for number, (heads, depth, end) in enumerate(zip(self.heads, self.depths, ends, strict=True), 1)
        ]
        self.merge = [PatchMerging(self.dtype) for _ in self.depths[:-1]]
