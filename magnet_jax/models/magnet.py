"""MagNet: Swin and BERT that talk to each other at every stage, a deformable pixel decoder and a one-query predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from magnet_jax.models.activations import gelu, relu
from magnet_jax.models.alignment import Gate, ImageAlignment, LanguageAlignment, mean_of_words
from magnet_jax.models.bert import Bert, attention_bias
from magnet_jax.models.layers import Remat, fan_in_dense
from magnet_jax.models.mask_predictor import MaskPredictor
from magnet_jax.models.norms import LayerNorm
from magnet_jax.models.output import Output
from magnet_jax.models.pixel_decoder import PixelDecoder
from magnet_jax.models.swin import Swin


class MagNet(nn.Module):
    """The network of "Mask Grounding for Referring Image Segmentation" (arXiv 2312.12198); spec sections 1-4.

    image `[B, H, W, 3]` normalised, text_ids `[B, L]`, text_mask `[B, L]` of {0, 1} -> `Output`. With `pairs`, two rows of
    numbers `[2, N]`, image and text may be of different number, and the output is of N examples: picture `pairs[0]` with
    sentence `pairs[1]`; what depends on one of them only is computed once. Fields `swin`, `bert`, `pixel_decoder` and
    `mask_predictor` hold the fields of these modules. Random numbers for training: 'dropout'.
    """

    swin: Mapping[str, Any]
    bert: Mapping[str, Any]
    pixel_decoder: Mapping[str, Any]
    mask_predictor: Mapping[str, Any]
    # The Cross-modal Alignment Module; without it plain PWAM fusion, and words never see the image.
    alignment: bool = True
    pyramids: Sequence[int] = (1, 2, 3, 6)
    fusion_heads: Sequence[int] = (1, 1, 1, 1)
    fusion_dropout: float = 0.0
    language_fusion: str = "masked"  # or 'released', which published weights need
    gate_init: str = "open"  # or 'released'
    # Language gates that are exactly zero, of which a run can be sure: words do not depend on the picture, and with `pairs`
    # BERT runs once for each sentence.
    closed_gates: bool = False
    remat: Sequence[str] = ()  # parts that the backward pass computes again, see `layers.Remat`
    remat_policy: str = "nothing"
    scan: bool = False  # layers of one kind as loops, see `loop`
    dtype: Any = jnp.float32
    has_class_logits = has_text_embedding = True

    def setup(self):
        dtype, remat, scan = self.dtype, Remat(tuple(self.remat), self.remat_policy), self.scan
        self.image = Swin(**self.swin, scan=scan, dtype=dtype, remat=remat)
        self.text = Bert(**self.bert, dtype=dtype, remat=remat)
        released = self.gate_init == "released"
        pyramids = tuple(self.pyramids) if self.alignment else ()
        self.image_fusion = [
            ImageAlignment(pyramids, heads, self.fusion_dropout, dtype, scan) for heads in self.fusion_heads
        ]
        self.image_gate = [Gate("normal" if released else "open", gelu, dtype) for _ in range(4)]
        self.image_norm = [LayerNorm() for _ in range(4)]
        if self.alignment:
            self.text_fusion = [LanguageAlignment(self.language_fusion, dtype) for _ in range(4)]
            self.text_gate = [Gate("zero" if released else "open", relu, dtype) for _ in range(4)]
            self.text_norm = [LayerNorm() for _ in range(4)]
        self.decoder = PixelDecoder(**self.pixel_decoder, scan=scan, dtype=dtype, remat=remat)
        self.predictor = MaskPredictor(**self.mask_predictor, scan=scan, dtype=dtype)
        self.lang_proj = fan_in_dense(self.decoder.channels, self.text.hidden, dtype=dtype)

    def __call__(self, image, text_ids, text_mask, pairs=None, *, train: bool = False) -> Output:
        blind = self.closed_gates or not self.alignment  # Words do not depend on the picture.
        word_bias = attention_bias(text_mask)
        x = self.image.patch_embed(image)
        scales, kept = self.image.scales(image.shape[0], train=train), self.text.kept(text_ids, train=train)
        sentences = self.text.embed(text_ids, kept)
        stage_features, image_context, word_context = [], [], []
        for k in range(4):
            x = self.image.stage[k](x, scales[k])
            words = sentences = self.text.layers(k, sentences, word_bias, kept)
            if pairs is not None and k == 0:
                x, text_mask = x[pairs[0]], text_mask[pairs[1]]
                word_bias = word_bias if blind else attention_bias(text_mask)
            if pairs is not None and (k == 0 or blind):
                words = sentences[pairs[1]]
            s, r = self.image_fusion[k](x, words, text_mask, train=train)
            stage_features.append(s)
            image_context.append(self.image_norm[k](r))
            if self.alignment:
                # The ungated x, as it left the stage.
                r_l = self.text_fusion[k](words, x.reshape(x.shape[0], -1, x.shape[-1]), text_mask)
                word_context.append(self.text_norm[k](r_l))
                if not blind:
                    words += self.text_gate[k](r_l) * r_l
            if not blind:
                sentences = words
            x += self.image_gate[k](r) * r
            if k < 3:
                x = self.image.merge[k](x)

        mask_features, refined = self.decoder(stage_features)
        mask_logits, class_logits = self.predictor(refined[:3], mask_features)
        return Output(
            mask_logits=mask_logits[-1],
            class_logits=class_logits[-1],
            aux_mask_logits=mask_logits[:-1],
            aux_class_logits=class_logits[:-1],
            mask_features=mask_features,
            word_features=words,
            text_embedding=self.lang_proj(mean_of_words(words, text_mask)),
            stage_features=tuple(stage_features),
            image_context=tuple(image_context),
            word_context=tuple(word_context),
            word_embedding=self.text.embeddings.word.embedding,
        )
