"""LAVT, the baseline: Swin whose stages read a finished BERT encoding, and a convolutional decoder (spec section 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from magnet_jax.models.activations import relu
from magnet_jax.models.alignment import Gate, PixelWordAttention
from magnet_jax.models.bert import Bert, attention_bias
from magnet_jax.models.layers import Remat, fan_in_dense, resize_align_corners
from magnet_jax.models.norms import LayerNorm
from magnet_jax.models.output import Output
from magnet_jax.models.parameters import fan_in_uniform
from magnet_jax.models.swin import Swin


class ConvDecoder(nn.Module):
    """From coarse to fine: resize, join the next map, two 3x3 convolutions with BatchNorm; at the end two classes.

    Maps `[B, H, W, *]` of widths (C, 2C, 4C, 8C), fine to coarse -> (features `[B, H, W, 4C]`, logits `[B, H, W, 2]`
    float32) at the finest. Running statistics are in the collection 'batch_stats', means over the whole batch on
    however many devices it lies.
    """

    dtype: Any = jnp.float32
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], *, train: bool = False) -> tuple[jax.Array, jax.Array]:
        width = 4 * maps[0].shape[-1]
        y = maps[-1]
        for level in (2, 1, 0):
            y = jnp.concatenate([resize_align_corners(y, maps[level].shape[1:3]), maps[level]], -1)
            for i in (1, 2):
                y = nn.Conv(
                    width,
                    (3, 3),
                    use_bias=False,
                    kernel_init=fan_in_uniform,
                    dtype=self.dtype,
                    name=f"conv{i}_{level}",
                )(y)
                norm = nn.BatchNorm(
                    momentum=0.9,
                    epsilon=1e-5,
                    dtype=self.dtype,
                    use_fast_variance=False,  # Whose rounding grows with the mean.
                    axis_name=None if self.is_initializing() else self.batch_axis,
                    name=f"norm{i}_{level}",
                )
                y = relu(norm(y, use_running_average=not train))
        return y, fan_in_dense(2, width, dtype=self.dtype, name="classes")(y).astype(jnp.float32)


class Lavt(nn.Module):
    """The network of "LAVT: Language-Aware Vision Transformer for Referring Image Segmentation" (arXiv 2112.02244).

    image `[B, H, W, 3]` normalised, text_ids `[B, L]`, text_mask `[B, L]` of {0, 1} -> `Output`; without deep
    supervision, class logits and text embedding; `pairs` as of MagNet. Fields `swin` and `bert` hold the fields of these
    modules. Random numbers for training: 'dropout'; running statistics: 'batch_stats'. Spec section 8.
    """

    swin: Mapping[str, Any]
    bert: Mapping[str, Any]
    fusion_heads: Sequence[int] = (1, 1, 1, 1)
    fusion_dropout: float = 0.0
    gate_init: str = "open"  # or 'released'
    remat: Sequence[str] = ()  # as of MagNet, without 'decoder'
    remat_policy: str = "nothing"
    batch_axis: str | None = None  # of `jax.pmap`, over which BatchNorm takes its statistics
    scan: bool = False  # layers of one kind as loops, see `loop`
    dtype: Any = jnp.float32
    has_class_logits = has_text_embedding = False

    def setup(self):
        dtype, remat, scan = self.dtype, Remat(tuple(self.remat), self.remat_policy), self.scan
        self.image = Swin(**self.swin, scan=scan, dtype=dtype, remat=remat)
        self.text = Bert(**self.bert, dtype=dtype, remat=remat)
        gate = "normal" if self.gate_init == "released" else "open"
        self.image_fusion = [
            PixelWordAttention(heads, "instance", self.fusion_dropout, dtype) for heads in self.fusion_heads
        ]
        self.image_gate = [Gate(gate, relu, dtype) for _ in range(4)]
        self.image_norm = [LayerNorm() for _ in range(4)]
        self.decoder = ConvDecoder(dtype, self.batch_axis)

    def __call__(self, image, text_ids, text_mask, pairs=None, *, train: bool = False) -> Output:
        scales, kept = self.image.scales(image.shape[0], train=train), self.text.kept(text_ids, train=train)
        words = self.text.embed(text_ids, kept)
        bias = attention_bias(text_mask)
        for part in range(len(self.text.splits)):
            words = self.text.layers(part, words, bias, kept)
        if pairs is not None:
            words, text_mask = words[pairs[1]], text_mask[pairs[1]]
        x = self.image.patch_embed(image)
        stage_features = []
        for k in range(4):
            x = self.image.stage[k](x, scales[k])
            if pairs is not None and k == 0:
                x = x[pairs[0]]
            flat = x.reshape(x.shape[0], -1, x.shape[-1])
            r = self.image_fusion[k](flat, words, text_mask, train=train).reshape(x.shape)
            stage_features.append(self.image_norm[k](r))
            x += self.image_gate[k](r) * r
            if k < 3:
                x = self.image.merge[k](x)
        features, logits = self.decoder(stage_features, train=train)
        return Output(
            mask_logits=logits[..., 1] - logits[..., 0],
            mask_features=features,
            word_features=words,
            stage_features=tuple(stage_features),
            word_embedding=self.text.embeddings.word.embedding,
            pixel_logits=logits,
        )
