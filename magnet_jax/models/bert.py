"""BERT encoder, layer by layer, so that a network can fuse the image between the layers (spec section 2)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from magnet_jax.models.activations import gelu
from magnet_jax.models.attention import attend
from magnet_jax.models.layers import Dense, Remat, drop, kept_by_dropout
from magnet_jax.models.norms import LayerNorm
from magnet_jax.models.parameters import normal


class BertEmbeddings(nn.Module):
    """Sum of word, position and first-type embeddings, normalised: ids `[B, L] -> [B, L, T]`.

    kept bool `[B, L, T]`: what dropout keeps; None for all.
    """

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

    def __call__(self, ids, kept=None):
        x = self.word(ids) + self.position.embedding[: ids.shape[1]] + self.token_type.embedding[0]
        return drop(self.norm(x).astype(self.dtype), kept, self.dropout)


class BertLayer(nn.Module):
    """Post-norm Transformer encoder layer: x `[B, L, T]`, additive bias `[B, 1, 1, L]` -> `[B, L, T]`.

    kept bool `[B, 2, L, T]`: what dropout keeps of attention and MLP; None for all.
    """

    heads: int
    intermediate: int
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, bias, kept=None):
        hidden = x.shape[-1]
        of_attention, of_mlp = (None, None) if kept is None else (kept[:, 0], kept[:, 1])

        def dense(features, name):
            return Dense(features, kernel_init=normal, dtype=self.dtype, name=name)

        def split(y):
            return y.reshape(*y.shape[:-1], self.heads, hidden // self.heads)

        query, key, value = (split(dense(hidden, name)(x)) for name in ("query", "key", "value"))
        y = attend(query, key, value, scale=(hidden // self.heads) ** -0.5, bias=bias).reshape(x.shape)
        y = drop(dense(hidden, "output")(y), of_attention, self.dropout)
        x = LayerNorm(1e-12, name="attention_norm")(x + y)
        y = dense(hidden, "fc2")(gelu(dense(self.intermediate, "fc1")(x)))
        return LayerNorm(1e-12, name="output_norm")(x + drop(y, of_mlp, self.dropout))


def attention_bias(word_mask: jax.Array) -> jax.Array:
    """Additive mask for `BertLayer`: word mask `[B, L]` of {0, 1} -> `[B, 1, 1, L]` of {-10000, 0}."""
    return (word_mask[:, None, None].astype(jnp.float32) - 1.0) * 10000.0


class Bert(nn.Module):
    """BERT as separate steps: `embed(ids)`, then `layers(k, x, bias)` for the k-th part of `splits`.

    In training both are given what dropout keeps, which `kept` draws.

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
        layer = self.remat(BertLayer, "text")
        self.embeddings = BertEmbeddings(
            self.vocab_size, self.hidden, self.max_positions, self.dropout, self.dtype
        )
        self.layer = [
            layer(self.heads, self.intermediate, self.dropout, self.dtype) for _ in range(self.splits[-1])
        ]

    def kept(self, ids, *, train: bool) -> jax.Array | None:
        """What dropout keeps of the embeddings and, twice, of each layer: bool `[B, 1 + 2 layers, L, T]`; None for all."""
        if not train or not self.dropout:
            return None
        shape = (ids.shape[0], 1 + 2 * self.splits[-1], ids.shape[1], self.hidden)
        return kept_by_dropout(self.make_rng("dropout"), self.dropout, shape)

    def embed(self, ids, kept=None):
        """ids `[B, L]` -> `[B, L, T]`."""
        return self.embeddings(ids, None if kept is None else kept[:, 0])

    def layers(self, part: int, x, bias, kept=None):
        """The layers of a part: x `[B, L, T]`, additive bias `[B, 1, 1, L]` -> `[B, L, T]`."""
        for i in range(self.splits[part - 1] if part else 0, self.splits[part]):
            x = self.layer[i](x, bias, None if kept is None else kept[:, 1 + 2 * i : 3 + 2 * i])
        return x
