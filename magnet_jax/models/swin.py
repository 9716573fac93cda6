"""Swin Transformer, stage by stage, so that a network can fuse language between the stages (spec section 2)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.models.activations import gelu, gelu_by_slope
from magnet_jax.models.attention import WindowMask, attend_by_head, attend_in_windows
from magnet_jax.models.layers import Dense, Remat, path_scales
from magnet_jax.models.loop import LEAST, loop
from magnet_jax.models.norms import LayerNorm
from magnet_jax.models.order import TILE, Order, arrange, from_rows, into_rows, restore
from magnet_jax.models.parameters import parameter, truncated_normal
from magnet_jax.models.patches import PatchEmbed, PatchMerging


@functools.cache
def relative_position_index(window: int) -> np.ndarray:
    """Row of the bias table for every (query, key) of a window: `[window**2, window**2]`, d = query minus key."""
    y, x = np.divmod(np.arange(window * window), window)
    dy, dx = y[:, None] - y[None], x[:, None] - x[None]
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


@functools.cache
def shift_regions(height: int, width: int, window: int) -> np.ndarray:
    """Which of the nine regions of a rolled map, that attention keeps apart, a pixel is in: `[windows, window**2]`."""

    def region(size):
        index = np.arange(size)
        return (index >= size - window).astype(np.int32) + (index >= size - window // 2)

    regions = region(height)[:, None] * 3 + region(width)[None]
    regions = regions.reshape(height // window, window, width // window, window)
    return regions.transpose(0, 2, 1, 3).reshape(-1, window * window)


def shift_mask(height: int, width: int, window: int) -> jax.Array:
    """Additive mask of a rolled map that keeps its regions apart: `[windows, window**2, window**2]`, 0 or -100."""
    # Compared by the program: as a constant of it, each block's mask would be megabytes.
    regions = jnp.asarray(shift_regions(height, width, window))
    return jnp.where(regions[:, :, None] == regions[:, None], 0.0, -100.0)


@functools.cache
def window_mask(height: int, width: int, window: int) -> WindowMask:
    """The same, as window attention in lanes takes it."""
    return WindowMask.of(shift_regions(height, width, window))


@functools.cache
def window_order(height: int, width: int, window: int, shifted: bool) -> Order:
    """The rows of `into_rows` at the places of the windows of `into_windows`."""
    rows, columns = -(-height // window), -(-width // window)
    shift = window // 2 if shifted else 0
    y = (np.arange(height) - shift) % (rows * window)
    x = (np.arange(width) - shift) % (columns * window)
    windows = (y // window)[:, None] * columns + x // window
    places = ((windows * window + (y % window)[:, None]) * window + x % window).ravel()
    places = np.pad(places, (0, -len(places) % TILE), constant_values=-1)
    return Order.of(places, rows * columns * window**2)


def into_windows(x: jax.Array, window: int, shifted: bool) -> jax.Array:
    """Pads with zeros to whole windows, rolls a map whose windows are shifted, and cuts it.

    `[B, H, W, C] -> [B, rows, window, columns, window, C]`.
    """
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
    if shifted:
        x = jnp.roll(x, (-(window // 2), -(window // 2)), (1, 2))
    return x.reshape(batch, x.shape[1] // window, window, x.shape[2] // window, window, channels)


def from_windows(x: jax.Array, height: int, width: int, shifted: bool) -> jax.Array:
    """The way back: `[B, rows, window, columns, window, C] -> [B, H, W, C]`."""
    batch, rows, window, columns, _, channels = x.shape
    x = x.reshape(batch, rows * window, columns * window, channels)
    if shifted:
        x = jnp.roll(x, (window // 2, window // 2), (1, 2))
    return x[:, :height, :width]


ATTENTION_FORMS = ("heads", "lanes")


class WindowAttention(nn.Module):
    """Multi-head attention within (shifted) windows: `[B, H, W, C] -> [B, H, W, C]`.

    `form` is how it is computed, with the same result: 'heads', one head after the other in memory, which suits CPUs and
    GPUs; 'lanes', the channels as they are, which suits TPUs (see `attend_by_lanes`). With the latter, `size` (H, W) says
    that pixels are rows already, as `into_rows` makes them: `[B, rows, C] -> [B, rows, C]`.
    """

    heads: int
    window: int
    shifted: bool
    dtype: Any = jnp.float32
    form: str = "heads"
    size: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x):
        batch, channels = x.shape[0], x.shape[-1]
        height, width = self.size or x.shape[1:3]
        window, head_width = self.window, channels // self.heads
        rows, columns = -(-height // window), -(-width // window)
        shape, pixels = (batch, rows, columns), window * window
        scale = head_width**-0.5
        qkv = Dense(3 * channels, kernel_init=truncated_normal, dtype=self.dtype, name="qkv")
        proj = Dense(channels, kernel_init=truncated_normal, dtype=self.dtype, name="proj")
        table = parameter(
            self, "relative_position_bias", truncated_normal, ((2 * window - 1) ** 2, self.heads)
        )
        bias = table[relative_position_index(window)].transpose(2, 0, 1)  # [heads, pixels, pixels]

        if self.form == "lanes":
            order = window_order(height, width, window, self.shifted)
            x = arrange(x if self.size else into_rows(x), order).reshape(
                batch, rows * columns, pixels, channels
            )
            mask = window_mask(rows * window, columns * window, window) if self.shifted else None
            x = attend_in_windows(qkv(x), bias, mask, scale)
            x = proj(restore(x.reshape(batch, -1, channels), order))
            return x if self.size else from_rows(x, (height, width))

        if self.shifted:
            bias = bias + shift_mask(rows * window, columns * window, window)[:, None]
        # The padding is of zeros, for which the product need not be computed: only the bias is added to it.
        x, qkv_bias = qkv.without_bias(x)
        x = into_windows(x, window, self.shifted).reshape(
            batch, rows, window, columns, window, 3, self.heads, head_width
        )
        x = x.transpose(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch, -1, self.heads, pixels, head_width)
        x = (x + qkv_bias.reshape(3, 1, 1, self.heads, 1, -1)).astype(self.dtype)
        x = attend_by_head(*x, scale=scale, bias=bias)
        x = x.reshape(*shape, self.heads, window, window, head_width).transpose(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(batch, rows, window, columns, window, channels)
        return proj(from_windows(x, height, width, self.shifted))


class SwinBlock(nn.Module):
    """Window attention and a four times wider MLP, pre-norm, both residual: `[B, H, W, C] -> [B, H, W, C]`.

    scales `[2, B]`: what the two branches are multiplied with; None for one.
    """

    heads: int
    window: int
    shifted: bool
    dtype: Any = jnp.float32
    attention: str = "heads"
    size: tuple[int, int] | None = None  # With 'lanes': see `WindowAttention`.
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x, scales=None):
        def scaled(branch, number):
            if scales is None:
                return branch
            return branch * scales[number].reshape(-1, *(1,) * (branch.ndim - 1)).astype(branch.dtype)

        y = LayerNorm(name="norm1")(x)
        attention = WindowAttention(
            self.heads, self.window, self.shifted, self.dtype, self.attention, self.size, name="attn"
        )
        x += scaled(attention(y), 0)
        y = LayerNorm(name="norm2")(x)
        y = Dense(4 * x.shape[-1], kernel_init=truncated_normal, dtype=self.dtype, name="fc1")(y)
        y = self.activation(y)
        y = Dense(x.shape[-1], kernel_init=truncated_normal, dtype=self.dtype, name="fc2")(y)
        return x + scaled(y, 1)


class SwinStage(nn.Module):
    """The blocks of one stage, every second one shifted: `[B, H, W, C] -> [B, H, W, C]`.

    scales `[depth, 2, B]`: see `SwinBlock`. With `scan`, six blocks and more are a loop over pairs of them.
    """

    heads: int
    window: int
    depth: int
    dtype: Any = jnp.float32
    number: int = 1  # 1 is the finest
    remat: Remat = Remat()
    attention: str = "heads"
    scan: bool = False

    @nn.compact
    def __call__(self, x, scales=None):
        block = self.remat(SwinBlock, f"stage_{self.number}")
        size, fields = x.shape[1:3], (self.dtype, self.attention)
        if self.attention == "lanes":
            x = into_rows(x)
            fields += (size,)
        pairs = self.depth // 2 if self.scan and not self.is_initializing() else 0
        start = 2 * pairs if pairs >= LEAST else 0
        if start:
            fixed = functools.partial(block, self.heads, self.window, activation=gelu_by_slope, parent=None)
            two = [fixed(shifted, *fields) for shifted in (False, True)]
            x = self._in_pairs(two, x, None if scales is None else scales[:start])
        for i in range(start, self.depth):
            one = block(self.heads, self.window, i % 2 == 1, *fields, name=f"block_{i}")
            x = one(x, None if scales is None else scales[i])
        return from_rows(x, size) if self.attention == "lanes" else x

    def _in_pairs(self, blocks: Sequence[nn.Module], x, scales):
        """Runs the first blocks of the stage, of which `blocks` are two."""
        params, count = self.variables["params"], self.depth // 2
        pairs = [[params[f"block_{2 * pair + i}"] for i in range(2)] for pair in range(count)]

        def run(x, params, scales):
            for number, block in enumerate(blocks):
                of_block = None if scales is None else scales[number]
                x = block.apply({"params": params[number]}, x, of_block)
            return x, None

        scales = None if scales is None else scales.reshape(count, 2, *scales.shape[1:])
        return loop(run, x, pairs, scales)[0]


class Swin(nn.Module):
    """Swin Transformer as separate steps: `patch_embed`, then for every stage `stage[k]` and `merge[k]`.

    In training `stage[k]` is given the k-th of `scales`. Source: Swin Transformer (arXiv 2103.14030); spec section 2.
    """

    embed_dim: int = 128
    depths: Sequence[int] = (2, 2, 18, 2)
    heads: Sequence[int] = (4, 8, 16, 32)
    window: int = 12
    patch: int = 4
    drop_path: float = 0.3  # of the last block; rises linearly from 0
    position: bool = False  # absolute position of the patches, which the published networks do without
    attention: str = "heads"  # form of `WindowAttention`; with 'lanes', the rest suits TPUs as well
    scan: bool = False  # see `SwinStage`
    dtype: Any = jnp.float32
    remat: Remat = Remat()

    def setup(self):
        lanes = self.attention == "lanes"
        self.patch_embed = PatchEmbed(self.embed_dim, self.patch, self.position, lanes, self.dtype)
        self.stage = [
            SwinStage(
                heads,
                self.window,
                depth,
                self.dtype,
                number,
                self.remat,
                self.attention,
                self.scan,
            )
            for number, (heads, depth) in enumerate(zip(self.heads, self.depths, strict=True), 1)
        ]
        self.merge = [PatchMerging(lanes, self.dtype) for _ in self.depths[:-1]]

    def scales(self, batch: int, *, train: bool) -> list[jax.Array | None]:
        """What stochastic depth multiplies the branches of each stage's blocks with: `[depth, 2, B]`, or None."""
        if not train or not self.drop_path:
            return [None] * len(self.depths)
        rates = np.linspace(0, self.drop_path, sum(self.depths))
        scales = path_scales(self.make_rng("dropout"), rates, batch)
        return jnp.split(scales, np.cumsum(self.depths)[:-1].tolist())
