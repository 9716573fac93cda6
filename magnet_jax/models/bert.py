"""BERT encoder, layer by layer, so that a network can fuse the image between the layers (spec section 2)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from magnet_jax.models.activations import gelu
from magnet_jax.models.attention import attend
from magnet_jax.models.layers import Dense, Dropout, Remat
from magnet_jax.models.norms import LayerNorm
from magnet_jax.models.parameters import normal


class BertEmbeddings(nn.Module):
    """Sum of word, position and first-type embeddings, normalised: ids `[B, L] -> [B, L, T]`."""

    vocab_size: int
    hidden: int
    max_positions: int = 512
    dropout: float = 0.1
    dtype: Any = jnp.float32

    def setup(self):
        self.word = nn.Embed(self.vocab_size, self.hidden, embedding_init=normal)
        self.position = nn.Embed(self.max_positions, self.hidden, embedding_init=normal)
        self.token_type = nn.Embed(2, self.hidden, embedding_init=normal)
        self.norm = LayerNorm(1e-12)
        self.drop = Dropout(self.dropout)

    def __call__(self, ids, *, train: bool = False):
        x = self.word(ids) + self.position.embedding[: ids.shape[1]] + self.token_type.embedding[0]
        return self.drop(self.norm(x).astype(self.dtype), train=train)


class BertLayer(nn.Module):
    """Post-norm Transformer encoder layer: x `[B, L, T]`, additive bias `[B, 1, 1, L]` -> `[B, L, T]`."""

    heads: int
    intermediate: int
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, bias, train: bool = False):
        hidden = x.shape[-1]

        def dense(features, name):
            return Dense(features, kernel_init=normal, dtype=self.dtype, name=name)

        def split(y):
            return y.reshape(*y.shape[:-1], self.heads, hidden // self.heads)

        query, key, value = (split(dense(hidden, name)(x)) for name in ("query", "key", "value"))
        y = attend(query, key, value, scale=(hidden // self.heads) ** -0.5, bias=bias).reshape(x.shape)
        y = Dropout(self.dropout)(dense(hidden, "output")(y), train=train)
        x = LayerNorm(1e-12, name="attention_norm")(x + y)
        y = dense(hidden, "fc2")(gelu(dense(self.intermediate, "fc1")(x)))
        y = Dropout(self.dropout)(y, train=train)
        return LayerNorm(1e-12, name="output_norm")(x + y)


def attention_bias(word_mask: jax.Array) -> jax.Array:
    """Additive mask for `BertLayer`: word mask `[B, L]` of {0, 1} -> `[B, 1, 1, L]` of {-10000, 0}."""
    return (word_mask[:, None, None].astype(jnp.float32) - 1.0) * 10000.0


class Bert(nn.Module):
    """BERT as separate steps: `embeddings`, then `layers(k, x, bias)` for the k-th part of `splits`.

    Source: BERT (arXiv 1810.04805); spec section 2. No pooler.
    """

    vocab_size: int = 30522
    hidden: int = 768
    heads: int = 12
    intermediate: int = 3072
    splits: tuple[int, ...] = (3, 6, 9, 12)  # layers done after each part
    max_positions: int = 512
    dropout: float = 0.1
    dtype: Any = jnp.float32
    remat: Remat = Remat()

    def setup(self):
        layer = self.remat(BertLayer, "text", static=3)
        self.embeddings = BertEmbeddings(
            self.vocab_size, self.hidden, self.max_positions, self.dropout, self.dtype
        )
        self.layer = [
            layer(self.heads, self.intermediate, self.dropout, self.dtype) for _ in range(self.splits[-1])
        ]

    def layers(self, part: int, x, bias, *, train: bool = False):
        for layer in self.layer[self.splits[part - 1] if part else 0 : self.splits[part]]:
            x = layer(x, bias, train)
        return x
