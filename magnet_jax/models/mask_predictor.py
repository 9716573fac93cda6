"""Mask predictor: a Transformer decoder with one query and masked cross-attention (spec section 4)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from magnet_jax.models.activations import relu
from magnet_jax.models.attention import attend
from magnet_jax.models.layers import Dense, fan_in_dense, resize_half_pixel, sine_position
from magnet_jax.models.loop import LEAST, loop
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


class Prediction(nn.Module):
    """What a state `[B, 1, C]` says of mask features `[B, h, w, C]`: mask logits `[B, h, w]`, class logits `[B, 2]`."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, state, mask_features):
        channels = state.shape[-1]

        def dense(features, name):
            return fan_in_dense(features, channels, dtype=self.dtype, name=name)

        h = LayerNorm(name="norm")(state)[:, 0]
        embedding = relu(dense(channels, "mask_1")(relu(dense(channels, "mask_0")(h))))
        embedding = dense(channels, "mask_2")(embedding)
        masks = jnp.einsum("bc,bhwc->bhw", embedding, mask_features, preferred_element_type=jnp.float32)
        return masks, dense(2, "class")(h).astype(jnp.float32)


class MaskPredictor(nn.Module):
    """One query that reads the pyramid and describes one mask.

    features: three maps `[B, H, W, C]` coarse to fine; mask_features `[B, h, w, C]` ->
    (mask logits `[layers + 1, B, h, w]`, class logits `[layers + 1, B, 2]`), the last prediction last.
    With `scan`, nine layers and more are a loop over rounds of three, one for each map.
    Source: Mask2Former (arXiv 2112.01527); spec section 4.
    """

    layers: int = 9
    heads: int = 8
    feedforward: int = 2048
    dtype: Any = jnp.float32
    scan: bool = False

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

        head = Prediction(self.dtype, name="prediction")
        nn.share_scope(self, head)  # Its parameters are named as the predictor's own.
        fields = (self.heads, self.feedforward, self.dtype)

        def advance(layer, predict, level, state, masks):
            # sigmoid < 0.5 is a negative logit.
            blocked = resize_half_pixel(jax.lax.stop_gradient(masks), features[level].shape[1:3]) < 0
            blocked = blocked.reshape(batch, 1, 1, -1)
            blocked &= ~blocked.all(-1, keepdims=True)
            bias = jnp.where(blocked, -jnp.inf, 0.0)
            state = layer(state, query_position, memories[level], positions[level], bias)
            return state, predict(state, mask_features)

        state = jnp.broadcast_to(query.astype(self.dtype), (batch, 1, channels))
        predictions, levels = [head(state, mask_features)], len(features)
        rounds = self.layers // levels if self.scan and not self.is_initializing() else 0
        start = rounds * levels if rounds >= LEAST else 0
        if start:
            params, layer = self.variables["params"], PredictorLayer(*fields, parent=None)
            predict = functools.partial(head.clone(parent=None, name=None).apply, {"params": params})

            def advance_round(carry, of_layers, _):
                (state, masks), found = carry, []
                for level, of_layer in enumerate(of_layers):
                    run = functools.partial(layer.apply, {"params": of_layer})
                    state, (masks, classes) = advance(run, predict, level, state, masks)
                    found.append((masks, classes))
                return (state, masks), found

            of_rounds = [
                [params[f"layer_{i}"] for i in range(first, first + levels)]
                for first in range(0, start, levels)
            ]
            (state, _), found = loop(advance_round, (state, predictions[0][0]), of_rounds)
            predictions += [
                jax.tree.map(lambda leaf, r=r: leaf[r], one) for r in range(rounds) for one in found
            ]
        for i in range(start, self.layers):
            layer = PredictorLayer(*fields, name=f"layer_{i}")
            state, prediction = advance(layer, head, i % levels, state, predictions[-1][0])
            predictions.append(prediction)
        mask_logits, class_logits = zip(*predictions, strict=True)
        return jnp.stack(mask_logits), jnp.stack(class_logits)
