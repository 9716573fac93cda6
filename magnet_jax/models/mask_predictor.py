"""Mask predictor: a Transformer decoder with one query and masked cross-attention (spec section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from magnet_jax.models.activations import relu
from magnet_jax.models.attention import attend
from magnet_jax.models.layers import Dense, fan_in_dense, resize_half_pixel, sine_position
from magnet_jax.models.norms import LayerNorm
from magnet_jax.models.parameters import parameter, unit_normal, xavier_uniform


class Attention(nn.Module):
    """Multi-head attention: query `[B, Q, C]`, key and value `[B, K, C]`, bias `[B, 1, 1, K]` or None -> `[B, Q, C]`."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, query, key, value, bias=None):
        channels = query.shape[-1]

        def project(x, name):
            y = Dense(channels, kernel_init=xavier_uniform, dtype=self.dtype, name=name)(x)
            return y.reshape(*y.shape[:-1], self.heads, channels // self.heads)

        y = attend(
            project(query, "query"),
            project(key, "key"),
            project(value, "value"),
            scale=(channels // self.heads) ** -0.5,
            bias=bias,
        )
        y = y.reshape(query.shape)
        return Dense(channels, kernel_init=xavier_uniform, dtype=self.dtype, name="output")(y)


class PredictorLayer(nn.Module):
    """Cross-attention, self-attention, MLP, each post-norm. state, query_position `[B, Q, C]` -> `[B, Q, C]`."""

    heads: int
    feedforward: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, state, query_position, memory, memory_position, bias):
        cross = Attention(self.heads, self.dtype, name="cross_attn")
        y = cross(state + query_position, memory + memory_position, memory, bias)
        state = LayerNorm(name="cross_norm")(state + y)
        query = state + query_position
        y = Attention(self.heads, self.dtype, name="self_attn")(query, query, state)
        state = LayerNorm(name="self_norm")(state + y)
        y = relu(Dense(self.feedforward, kernel_init=xavier_uniform, dtype=self.dtype, name="fc1")(state))
        y = Dense(state.shape[-1], kernel_init=xavier_uniform, dtype=self.dtype, name="fc2")(y)
        return LayerNorm(name="mlp_norm")(state + y)


class MaskPredictor(nn.Module):
    """One query that reads the pyramid and describes one mask.

    features: three maps `[B, H, W, C]` coarse to fine; mask_features `[B, h, w, C]` ->
    (mask logits `[layers + 1, B, h, w]`, class logits `[layers + 1, B, 2]`), the last prediction last.
    Source: Mask2Former (arXiv 2112.01527); spec section 4.
    """

    layers: int = 9
    heads: int = 8
    feedforward: int = 2048
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], mask_features: jax.Array):
        batch, channels = mask_features.shape[0], mask_features.shape[-1]
        query = parameter(self, "query", unit_normal, (1, channels))
        query_position = parameter(self, "query_position", unit_normal, (1, channels)).astype(self.dtype)
        level_embedding = parameter(self, "level_embedding", unit_normal, (len(features), channels)).astype(
            self.dtype
        )
        memories = [
            feature.reshape(batch, -1, channels) + level_embedding[i] for i, feature in enumerate(features)
        ]
        positions = [sine_position(*feature.shape[1:3], channels).astype(self.dtype) for feature in features]

        norm = LayerNorm(name="norm")
        class_head = fan_in_dense(2, channels, dtype=self.dtype, name="class")
        mask_head = [fan_in_dense(channels, channels, dtype=self.dtype, name=f"mask_{i}") for i in range(3)]

        def predict(state):
            h = norm(state)[:, 0]
            embedding = mask_head[2](relu(mask_head[1](relu(mask_head[0](h)))))
            masks = jnp.einsum("bc,bhwc->bhw", embedding, mask_features, preferred_element_type=jnp.float32)
            return masks, class_head(h).astype(jnp.float32)

        state = jnp.broadcast_to(query.astype(self.dtype), (batch, 1, channels))
        masks, classes = predict(state)
        mask_logits, class_logits = [masks], [classes]
        for i in range(self.layers):
            level = i % len(features)
            # sigmoid < 0.5 is a negative logit.
            blocked = resize_half_pixel(jax.lax.stop_gradient(masks), features[level].shape[1:3]) < 0
            blocked = blocked.reshape(batch, 1, 1, -1)
            blocked &= ~blocked.all(-1, keepdims=True)
            layer = PredictorLayer(self.heads, self.feedforward, self.dtype, name=f"layer_{i}")
            state = layer(
                state, query_position, memories[level], positions[level], jnp.where(blocked, -jnp.inf, 0.0)
            )
            masks, classes = predict(state)
            mask_logits.append(masks)
            class_logits.append(classes)
        return jnp.stack(mask_logits), jnp.stack(class_logits)
