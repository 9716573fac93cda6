"""Fusion of pixels and words: PWAM and the two directions of the Cross-modal Alignment Module (spec section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from magnet_jax.models.activations import gelu
from magnet_jax.models.attention import attend
from magnet_jax.models.layers import Dense, Dropout, adaptive_average_pool, fan_in_dense, resize_align_corners
from magnet_jax.models.loop import LEAST, side_by_side
from magnet_jax.models.norms import LayerNorm, instance_norm
from magnet_jax.models.parameters import fan_in_uniform, normal, truncated_normal, zeros


class PixelWordAttention(nn.Module):
    """PWAM: every pixel attends to the words and is multiplied by what it finds.

    x `[B, N, C]`, words `[B, L, T]`, word_mask `[B, L]` of {0, 1} -> `[B, N, C]`. `norm` is 'layer' (MagNet) or
    'instance' (LAVT: over pixels, without parameters). Logits are scaled by the full width C even with several heads.
    """

    heads: int = 1
    norm: str = "layer"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, words, word_mask, *, train: bool = False):
        channels, text = x.shape[-1], words.shape[-1]
        keep = word_mask[..., None].astype(self.dtype)

        def normalise(y, name):
            return LayerNorm(name=name)(y) if self.norm == "layer" else instance_norm(y)

        def split(y):
            return y.reshape(*y.shape[:-1], self.heads, channels // self.heads)

        def dense(name):
            if self.norm == "instance":  # A convolution of width 1 there, which starts otherwise.
                return fan_in_dense(channels, channels, dtype=self.dtype, name=name)
            return Dense(channels, kernel_init=truncated_normal, dtype=self.dtype, name=name)

        def drop(y):
            return Dropout(self.dropout)(y, train=train)

        query = normalise(dense("query")(x), "query_norm")
        key = fan_in_dense(channels, text, dtype=self.dtype, name="key")(words) * keep
        value = fan_in_dense(channels, text, dtype=self.dtype, name="value")(words) * keep
        bias = 1e4 * word_mask[:, None, None].astype(jnp.float32) - 1e4
        language = attend(split(query), split(key), split(value), scale=channels**-0.5, bias=bias).reshape(
            x.shape
        )
        language = normalise(dense("output")(language), "output_norm")
        visual = drop(gelu(fan_in_dense(channels, channels, dtype=self.dtype, name="visual")(x)))
        return drop(gelu(fan_in_dense(channels, channels, dtype=self.dtype, name="mixed")(visual * language)))


class Gate(nn.Module):
    """How much of a fused feature enters an encoder: tanh(Linear(activation(Linear(r)))), no biases, same shape as r.

    `start` 'open': the second linear starts at zero, so that the network is unchanged at step 0 and yet the gate learns;
    'normal': both start normal .02; 'zero': both zero, which never opens (section 2b).
    """

    start: str
    activation: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, r):
        first = zeros if self.start == "zero" else normal
        second = normal if self.start == "normal" else zeros
        y = Dense(r.shape[-1], use_bias=False, kernel_init=first, dtype=self.dtype, name="fc1")(r)
        y = Dense(r.shape[-1], use_bias=False, kernel_init=second, dtype=self.dtype, name="fc2")(
            self.activation(y)
        )
        return jnp.tanh(y)


class Pyramid(nn.Module):
    """One granularity of the alignment module: a pooled map, fused with the words.

    x `[B, ..., C]` of N pixels, words `[B, L, T]`, word_mask `[B, L]` -> `[B, N, C/4]`.
    """

    heads: int = 1
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, words, word_mask, *, train: bool = False):
        channels = x.shape[-1]

        def dense(features, name):
            return Dense(features, use_bias=False, kernel_init=fan_in_uniform, dtype=self.dtype, name=name)

        y = LayerNorm(1e-6, name="norm")(dense(4 * channels, "fc1")(x))
        y = dense(channels // 4, "fc3")(gelu(dense(channels, "fc2")(y)))
        y = y.reshape(y.shape[0], -1, channels // 4)
        pwam = PixelWordAttention(self.heads, "layer", self.dropout, self.dtype, name="pwam")
        return pwam(y, words, word_mask, train=train)


class ImageAlignment(nn.Module):
    """Cross-modal Alignment Module, image side (paper figure 4).

    x `[B, H, W, C]`, words `[B, L, T]`, word_mask `[B, L]` -> (decoder feature s `[B, H, W, C]`, fused r `[B, H, W, C]`).
    Without `pyramids` it is the plain PWAM fusion, and s is r. With `scan`, three pyramids and more are computed
    at once in training.
    """

    pyramids: Sequence[int] = (1, 2, 3, 6)
    heads: int = 1
    dropout: float = 0.0
    dtype: Any = jnp.float32
    scan: bool = False

    @nn.compact
    def __call__(self, x, words, word_mask, *, train: bool = False):
        batch, height, width, channels = x.shape
        flat = x.reshape(batch, height * width, channels)
        pwam = PixelWordAttention(self.heads, "layer", self.dropout, self.dtype, name="pwam")
        r = pwam(flat, words, word_mask, train=train).reshape(x.shape)
        if not self.pyramids:
            return r, r
        maps = [
            resize_align_corners(y.reshape(batch, size, size, -1), (height, width))
            for size, y in zip(self.pyramids, self._fuse(x, words, word_mask, train), strict=True)
        ]
        s = Dense(channels, kernel_init=truncated_normal, dtype=self.dtype, name="mixer1")(
            jnp.concatenate([*maps, r], -1)
        )
        s = LayerNorm(name="mixer_norm")(s)
        s = Dense(channels, kernel_init=truncated_normal, dtype=self.dtype, name="mixer2")(s)
        return gelu(s), r

    def _fuse(self, x, words, word_mask, train: bool) -> list[jax.Array]:
        """The pooled maps of all sizes, fused with the words: `[B, size**2, C/4]` each."""
        names = [f"pyramid_{i}" for i in range(len(self.pyramids))]
        pooled = [adaptive_average_pool(x, size) for size in self.pyramids]
        fields = (self.heads, self.dropout, self.dtype)
        # Without a backward pass it takes as long to put the parameters side by side as to use them.
        scan = self.scan and train and not self.dropout and len(names) >= LEAST
        if not scan or self.is_initializing():
            pyramids = [Pyramid(*fields, name=name) for name in names]
            return [
                pyramid(y, words, word_mask, train=train) for pyramid, y in zip(pyramids, pooled, strict=True)
            ]
        pyramid, params = Pyramid(*fields, parent=None), self.variables["params"]

        def run(params, y):
            return pyramid.apply({"params": params}, y, words, word_mask)

        # What becomes of a pixel depends on no other, so that there may be more of them.
        pixels, most = [size**2 for size in self.pyramids], max(self.pyramids) ** 2
        flat = [y.reshape(y.shape[0], -1, y.shape[-1]) for y in pooled]
        padded = jnp.stack([jnp.pad(y, ((0, 0), (0, most - y.shape[1]), (0, 0))) for y in flat])
        fused = jax.vmap(run)(side_by_side([params[name] for name in names]), padded)
        return [y[:, :count] for y, count in zip(fused, pixels, strict=True)]


class LanguageAlignment(nn.Module):
    """Cross-modal Alignment Module, language side: every word attends to the pixels.

    words `[B, L, T]`, x `[B, N, C]`, word_mask `[B, L]` of {0, 1} -> r_l `[B, L, T]`.
    `mode` 'masked' zeroes the queries of padding and takes the statistics over words from real words. 'released' has the
    behaviour that the published weights depend on: the additive mask 0 / -10000 takes the place of {0, 1} (spec
    section 2); its rounding matters, so it is computed in float32 whatever the compute dtype.
    """

    mode: str = "masked"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, words, x, word_mask):
        hidden, channels = words.shape[-1], x.shape[-1]
        dtype = jnp.float32 if self.mode == "released" else self.dtype

        def dense(fan_in, name):
            return fan_in_dense(hidden, fan_in, dtype=dtype, name=name)

        query = dense(hidden, "query")(words)
        key, value = dense(channels, "key"), dense(channels, "value")
        if self.mode == "released":
            mask = (word_mask.astype(jnp.float32) - 1.0) * 10000.0
            statistics, row_bias = None, (1e4 * mask - 1e4)[..., None]
        else:
            mask = word_mask.astype(dtype)
            statistics, row_bias = word_mask, 0.0
        query = query * mask[..., None]
        folded = self.mode == "masked" and x.shape[1] >= 2 * channels
        attend_to_pixels = _attend_to_pixels_folded if folded else _attend_to_pixels
        language, weights = attend_to_pixels(query, x.astype(dtype), key, value, row_bias)
        self.sow("intermediates", "pixels", weights)  # For those who ask to see it: where each word looks.
        language = instance_norm(dense(hidden, "output")(language), statistics)
        visual = gelu(dense(hidden, "visual")(words))
        return gelu(dense(hidden, "mixed")(visual * language)).astype(self.dtype)


def _attend_to_pixels(query, x, key, value, row_bias):
    """Attention of words `[B, L, T]` to pixels `[B, N, C]` by instance-normalised keys and values.

    Returns what is found `[B, L, T]` and the weights `[B, L, N]`.
    """
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("blt,bnt->bln", query, instance_norm(key(x)), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * scale + row_bias, axis=-1).astype(x.dtype)
    return jnp.einsum("bln,bnt->blt", weights, instance_norm(value(x))), weights


def _attend_to_pixels_folded(query, x, key, value, row_bias, epsilon: float = 1e-5):
    """The same without a key or value of any pixel, which for many pixels are by far the most of the work.

    What is linear changes its place: a query meets the pixels after the key's kernel, the pixels that are found pass the
    value's. Normalising takes away the biases, and a variance over pixels follows from their covariance `[B, C, C]`.
    """
    centred = x.astype(jnp.float32)
    centred = (centred - centred.mean(1, keepdims=True)).astype(x.dtype)
    covariance = jnp.einsum("bnc,bnd->bcd", centred, centred, preferred_element_type=jnp.float32) / x.shape[1]

    def kernel_and_scale(dense):
        kernel, _ = dense.parameters(x.shape[-1])
        variance = jnp.einsum("bct,ct->bt", jnp.einsum("bcd,dt->bct", covariance, kernel), kernel)
        return kernel, jax.lax.rsqrt(variance + epsilon)[:, None]

    kernel, scale = kernel_and_scale(key)
    query = jnp.einsum("blt,ct->blc", query * (scale * query.shape[-1] ** -0.5), kernel).astype(x.dtype)
    logits = jnp.einsum("blc,bnc->bln", query, centred, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits + row_bias, axis=-1).astype(x.dtype)
    kernel, scale = kernel_and_scale(value)
    found = jnp.einsum("bln,bnc->blc", weights, centred, preferred_element_type=jnp.float32)
    return ((found @ kernel) * scale).astype(x.dtype), weights


def mean_of_words(words: jax.Array, word_mask: jax.Array) -> jax.Array:
    """Mean over real words: words `[B, L, T]`, word_mask `[B, L]` of {0, 1} -> `[B, T]`."""
    weight = word_mask[..., None].astype(words.dtype)
    return (words * weight).sum(1) / jnp.maximum(weight.sum(1), 1)


class TextProjection(nn.Module):
    """The sentence in the space of mask features, for the alignment loss (section 6).

    words `[B, L, T]`, word_mask `[B, L]` of {0, 1} -> `[B, channels]`.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, words, word_mask, channels: int):
        dense = fan_in_dense(channels, words.shape[-1], dtype=self.dtype, name="dense")
        return dense(mean_of_words(words, word_mask))
