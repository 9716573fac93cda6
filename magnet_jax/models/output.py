"""What every network of this kind returns, and so all that losses, evaluation and prediction know of a network."""

from __future__ import annotations

import flax.struct
import jax


@flax.struct.dataclass
class Output:
    """B batch, L words, T text width, h x w the mask resolution (stride 4).

    Logits are float32; features have the compute dtype. What a network does not have is None.
    """

    mask_logits: jax.Array  # [B, h, w]
    mask_features: jax.Array  # [B, h, w, C]
    word_features: jax.Array  # [B, L, T], after the last layer and fusion
    stage_features: tuple[jax.Array, ...]  # four maps [B, H, W, C], fine to coarse
    word_embedding: jax.Array  # [V, T], the language encoder's table
    class_logits: jax.Array | None = None  # [B, 2]: nothing matches, object present
    aux_mask_logits: jax.Array | None = None  # [predictions before the last, B, h, w]
    aux_class_logits: jax.Array | None = None  # [predictions before the last, B, 2]
    # [B, h, w, 2]: background, object, of a network that classifies pixels; mask_logits is their difference.
    pixel_logits: jax.Array | None = None
    text_embedding: jax.Array | None = None  # [B, C]: the sentence in the space of the mask features
    # Normalised fused features of every stage; nothing here reads them, training heads may.
    image_context: tuple[jax.Array, ...] = ()  # [B, H, W, C]
    word_context: tuple[jax.Array, ...] = ()  # [B, L, T]
