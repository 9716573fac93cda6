"""Mask Grounding: predict masked words from the other words, the image and where the object is (spec section 5).

It takes arrays only, and so attaches to any network that has word features and an image feature map.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.models.activations import gelu
from magnet_jax.models.bert import BertLayer, attention_bias
from magnet_jax.models.layers import Dense, example_keys, kept_by_dropout
from magnet_jax.models.norms import LayerNorm
from magnet_jax.models.parameters import normal, parameter, zeros


def mask_words(
    key: jax.Array,
    ids: jax.Array,
    maskable: jax.Array,
    mask_id: int,
    *,
    ratio: float = 0.15,
    keep: float = 0.1,
    at_least_one: bool = True,
    sentences: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Selects words at random and replaces most of them by [MASK].

    ids `[B, L]`; maskable `[B, L]` bool: real words, never [CLS], [SEP] or padding. Every maskable word is selected with
    probability `ratio`; where that selects none, one is drawn uniformly if `at_least_one`. A share `keep` of the
    selected words stays as it is. A share `sentences` of the sentences takes part, the others stay whole. Returns
    (masked ids `[B, L]`, labels `[B, L]`: the id where selected, else -1).
    """
    length = ids.shape[1]

    def uniform(key, *shape):
        return jax.vmap(lambda k: jax.random.uniform(k, shape))(example_keys(key, len(ids)))

    select_key, fallback_key, keep_key, sentence_key = jax.random.split(key, 4)
    if sentences < 1:
        maskable &= uniform(sentence_key, 1) < sentences
    selected = maskable & (uniform(select_key, length) < ratio)
    if at_least_one:
        draw = jnp.where(maskable, uniform(fallback_key, length), -1.0)
        one = jax.nn.one_hot(draw.argmax(-1), ids.shape[-1], dtype=bool) & maskable
        selected = jnp.where(selected.any(-1, keepdims=True), selected, one)
    replaced = selected & (uniform(keep_key, length) >= keep)
    return jnp.where(replaced, mask_id, ids), jnp.where(selected, ids, -1)


def mask_centre(mask: jax.Array) -> jax.Array:
    """Centroid (x, y) of every mask in [0, 1], pixel centres at (i + 0.5) / size; an empty mask has the image's centre.

    mask `[B, H, W]` of {0, 1} -> `[B, 2]` float32.
    """
    mask = mask.astype(jnp.float32)
    height, width = mask.shape[1:]
    area = mask.sum((1, 2))
    x = (mask.sum(1) * ((jnp.arange(width) + 0.5) / width)).sum(-1)
    y = (mask.sum(2) * ((jnp.arange(height) + 0.5) / height)).sum(-1)
    centre = jnp.stack([x, y], -1) / jnp.maximum(area, 1.0)[:, None]
    return jnp.where(area[:, None] > 0, centre, 0.5)


def pixel_centres(height: int, width: int) -> jax.Array:
    """Centres (x, y) of the pixels of a map in [0, 1]: `[height * width, 2]`."""
    y, x = np.mgrid[:height, :width] + 0.5
    return jnp.asarray(np.stack([x / width, y / height], -1).reshape(-1, 2), jnp.float32)


def fourier_position(points: jax.Array, channels: int) -> jax.Array:
    """Sines and cosines of points (x, y) in [0, 1]: `[..., 2]` -> `[..., channels]` float32.

    From half a period to four over the image. The sine embedding of the decoder has at most one, and most of its channels
    hardly change: by it neighbours are told apart only after long training.
    """
    features = -(-channels // 4)
    periods = np.geomspace(0.5, 4, features, dtype=np.float32)
    angles = points.astype(jnp.float32)[..., None] * (2 * np.pi * periods)
    code = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return code.reshape(*points.shape[:-1], -1)[..., :channels]


class MaskGrounding(nn.Module):
    """Word logits from the concatenation [words ; image features ; mask token].

    Pixels and mask token carry the place they stand for in one code, so that a token finds the pixels around the object.
    words `[B, L, T]`, word_mask `[B, L]`, image_features `[B, H, W, C]`, mask `[B, H', W']` of {0, 1}, word_embedding
    `[V, T]` (the language encoder's table, tied to the vocabulary projection) -> logits `[B, L, V]` float32.
    Source: paper section 3.2; spec section 5.
    """

    layers: int = 4
    heads: int = 12
    intermediate: int = 3072
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, words, word_mask, image_features, mask, word_embedding, *, train: bool = False):
        batch, length, hidden = words.shape
        height, width = image_features.shape[1:3]

        def dense(features, name):
            return Dense(features, kernel_init=normal, dtype=self.dtype, name=name)

        image = dense(hidden, "image")(image_features.reshape(batch, height * width, -1))
        centre = mask_centre(mask)[:, None]
        token = dense(hidden, "mask_2")(gelu(dense(hidden, "mask_1")(centre)))
        seen = [LayerNorm(name="image_norm")(image), LayerNorm(name="mask_norm")(token)]
        pixels = jnp.broadcast_to(pixel_centres(height, width), (batch, height * width, 2))
        places = jnp.concatenate([pixels, centre], 1)
        seen = jnp.concatenate(seen, 1) + fourier_position(places, hidden).astype(self.dtype)
        x = jnp.concatenate([LayerNorm(name="word_norm")(words.astype(self.dtype)), seen], 1)
        present = jnp.concatenate([word_mask, jnp.ones((batch, height * width + 1), word_mask.dtype)], 1)
        bias, kept = attention_bias(present), None
        if train and self.dropout:
            shape = (batch, self.layers, 2, *x.shape[1:])
            kept = kept_by_dropout(self.make_rng("dropout"), self.dropout, shape)
        for i in range(self.layers):
            x = BertLayer(self.heads, self.intermediate, self.dropout, self.dtype, name=f"layer_{i}")(
                x, bias, None if kept is None else kept[:, i]
            )

        x = LayerNorm(1e-12, name="head_norm")(gelu(dense(hidden, "head")(x[:, :length])))
        bias = parameter(self, "vocabulary_bias", zeros, (word_embedding.shape[0],))
        logits = jnp.einsum(
            "blt,vt->blv", x, word_embedding.astype(self.dtype), preferred_element_type=jnp.float32
        )
        return logits + bias
