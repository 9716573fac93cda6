"""Pixel decoder: a deformable-attention encoder over the four fused stages (spec section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from magnet_jax.models.activations import relu
from magnet_jax.models.deformable import DeformableAttention
from magnet_jax.models.feed_forward import feed_forward
from magnet_jax.models.layers import Dense, Remat, add_position, sine_position
from magnet_jax.models.loop import LEAST, loop
from magnet_jax.models.norms import GroupNorm, LayerNorm
from magnet_jax.models.order import arrange, restore
from magnet_jax.models.parameters import kaiming_uniform, parameter, unit_normal, xavier_uniform
from magnet_jax.models.sampling import automatic, cells_for
from magnet_jax.models.windows import Levels


class PixelDecoderLayer(nn.Module):
    """Post-norm encoder layer: deformable attention and a ReLU MLP. source `[B, S, C]` -> `[B, S, C]`.

    position: what `add_position` adds to the source for the query.
    """

    heads: int
    points: int
    feedforward: int
    sampling: str = "auto"
    dtype: Any = jnp.float32
    in_cells: bool = False

    @nn.compact
    def __call__(self, source, position, shapes):
        attention = DeformableAttention(
            self.heads, self.points, self.sampling, self.dtype, self.in_cells, name="attn"
        )
        source = LayerNorm(name="norm1")(source + attention(add_position(source, *position), source, shapes))
        fc1 = Dense(self.feedforward, kernel_init=xavier_uniform, dtype=self.dtype, name="fc1")
        fc2 = Dense(source.shape[-1], kernel_init=xavier_uniform, dtype=self.dtype, name="fc2")
        if self.in_cells:  # On TPUs, where hidden values had better not be kept.
            parameters = *fc1.parameters(source.shape[-1]), *fc2.parameters(self.feedforward)
            y = feed_forward(source.astype(self.dtype), *parameters)
        else:
            y = fc2(relu(fc1(source)))
        return LayerNorm(name="norm2")(source + y)


class PixelDecoder(nn.Module):
    """Multi-scale deformable pixel decoder.

    features: maps `[B, H, W, C]` fine to coarse -> (mask features `[B, h, w, channels]` at the finest resolution, list of
    the refined maps `[B, H, W, channels]`, coarse to fine). With `scan`, three layers and more are a loop.
    """

    channels: int = 256
    layers: int = 4
    heads: int = 8
    points: int = 4
    feedforward: int = 1024
    groups: int = 32
    sampling: str = "auto"
    platform: str = ""  # What is compiled for; where it is not known, 'auto' chooses when it is.
    dtype: Any = jnp.float32
    remat: Remat = Remat()
    scan: bool = False

    @nn.compact
    def __call__(self, features: Sequence[jnp.ndarray]):
        features = features[::-1]  # coarse to fine
        shapes = [feature.shape[1:3] for feature in features]
        batch = features[0].shape[0]
        level_embedding = parameter(self, "level_embedding", unit_normal, (len(features), self.channels))

        sources, positions = [], []
        for i, (feature, (height, width)) in enumerate(zip(features, shapes, strict=True)):
            x = feature.reshape(batch, height * width, feature.shape[-1])
            x = Dense(self.channels, kernel_init=xavier_uniform, dtype=self.dtype, name=f"input_{i}")(x)
            sources.append(GroupNorm(self.groups, name=f"input_norm_{i}")(x))
            positions.append(sine_position(height, width, self.channels))
        source = jnp.concatenate(sources, 1)
        sizes = [height * width for height, width in shapes]
        position, level = jnp.concatenate(positions), np.repeat(np.arange(len(sizes)), sizes)
        form = self.form(tuple(shapes))
        cells = (
            cells_for(tuple(shapes), self.heads, self.channels // self.heads) if form == "windows" else None
        )
        if cells is not None:  # All layers in the order that sampling wants.
            rows = cells.order.rows
            source, position, level = arrange(source, cells.order), position[rows], level[rows]
        block = self.remat(PixelDecoderLayer, "decoder", static=3)
        fields = (self.heads, self.points, self.feedforward, form, self.dtype, cells is not None)
        place = (position, level_embedding, level)
        if self.scan and self.layers >= LEAST and not self.is_initializing():
            params, layer = self.variables["params"], block(*fields, parent=None)

            def run(source, of_layer, _):
                return layer.apply({"params": of_layer}, source, place, tuple(shapes)), None

            source, _ = loop(run, source, [params[f"layer_{i}"] for i in range(self.layers)])
        else:
            for i in range(self.layers):
                source = block(*fields, name=f"layer_{i}")(source, place, tuple(shapes))
        if cells is not None:
            source = restore(source, cells.order)

        ends = np.cumsum(sizes)[:-1]
        refined = [
            part.reshape(batch, *shape, self.channels)
            for part, shape in zip(jnp.split(source, ends, 1), shapes, strict=True)
        ]
        mask_features = Dense(
            self.channels, kernel_init=kaiming_uniform, dtype=self.dtype, name="mask_features"
        )
        return mask_features(refined[-1]), refined

    def form(self, shapes: Levels) -> str:
        """How samples are taken: what 'auto' means, where it is known by now."""
        if self.sampling == "auto" and self.platform:
            return automatic(self.platform, shapes, self.heads, self.channels // self.heads)
        return self.sampling
