"""All losses composed: what a batch, or a part of one, costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from magnet_jax import losses
from magnet_jax.models import Output
from magnet_jax.models.grounding import mask_words
from magnet_jax.models.layers import resize_align_corners
from magnet_jax.network import Network, normalise

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def loss_totals(batch: Batch, config: ConfigDict) -> Metrics:
    """What the weights of each loss sum to over a batch, by which it divides (see `magnet_jax.losses`).

    Nothing here depends on the network, so that a batch may be taken in parts.
    """
    weight, mask = batch["valid"].astype(jnp.float32), batch["mask"]
    totals = {"examples": weight.sum(), "objects": (weight * mask.any((1, 2))).sum()}
    if config.cross_entropy:
        totals["pixels"] = losses.pixel_weights(mask, weight, config.class_weights).sum()
    if config.alignment:
        totals["contrasts"] = losses.contrast_weights(_foreground(mask, config), weight).sum()
    if config.grounding:
        totals["words"] = losses.word_weights(batch["labels"], weight).sum()
    return totals


def segmentation_losses(
    output: Output, batch: Batch, totals: Metrics, config: ConfigDict
) -> dict[str, jax.Array]:
    """BCE and dice of every prediction (deep supervision), the class loss and the pixel cross-entropy of the last.

    A sample whose mask is empty has no object: class target 0 and no dice term. Spec sections 7 and 8.
    """
    weight = batch["valid"].astype(jnp.float32)
    present = batch["mask"].any((1, 2))
    size = batch["mask"].shape[1:]
    terms = {}
    if config.bce or config.dice:
        logits = output.mask_logits[None]  # [predictions, B, h, w]
        if output.aux_mask_logits is not None:
            logits = jnp.concatenate([output.aux_mask_logits, logits])
        if config.full_resolution:
            logits = jax.vmap(lambda x: resize_logits(x, size))(logits)
        target = losses.area_reduce(batch["mask"], logits.shape[2:])
        if config.bce:
            bce = jax.vmap(losses.binary_cross_entropy, (0, None, None, None))
            terms["bce"] = config.bce * bce(logits, target, weight, totals["examples"]).sum()
        if config.dice:
            dice = jax.vmap(losses.dice, (0, None, None, None))
            terms["dice"] = config.dice * dice(logits, target, weight * present, totals["objects"]).sum()
    if config.class_:
        terms["class"] = config.class_ * losses.class_cross_entropy(
            output.class_logits, present.astype(jnp.int32), weight, totals["examples"]
        )
    if config.cross_entropy:
        logits = resize_logits(output.mask_logits, size)
        terms["cross_entropy"] = config.cross_entropy * losses.weighted_cross_entropy(
            logits, batch["mask"], weight, config.class_weights, totals["pixels"]
        )
    return terms


def resize_logits(logits: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Mask logits `[B, h, w]` at the size of the image."""
    return resize_align_corners(logits[..., None], size)[..., 0]


def _alignment_size(mask: jax.Array, config: ConfigDict) -> tuple[int, ...]:
    return tuple(max(side // config.alignment_stride, 1) for side in mask.shape[1:])


def _foreground(mask: jax.Array, config: ConfigDict) -> jax.Array:
    """Compared pixels that lie mostly in the mask: `[B, N]` bool."""
    return losses.area_reduce(mask, _alignment_size(mask, config)).reshape(len(mask), -1) > 0.5


def alignment_losses(
    output: Output, text_embedding: jax.Array, batch: Batch, totals: Metrics, config: ConfigDict
) -> dict[str, jax.Array]:
    """Pixel-to-pixel and pixel-to-text contrast at the configured stride (spec section 6)."""
    # Mask and features are averaged over the same cells, which cover the image.
    features = losses.area_reduce(output.mask_features, _alignment_size(batch["mask"], config))
    features = features.reshape(*features.shape[:1], -1, features.shape[-1])
    foreground = _foreground(batch["mask"], config)
    weight = batch["valid"].astype(jnp.float32)
    block, total = config.alignment_block or None, totals["contrasts"]
    pixel = losses.pixel_to_pixel(
        features, foreground, weight, tau=config.tau_pixel, block=block, total=total
    )
    text = losses.pixel_to_text(
        features, text_embedding, foreground, weight, tau=config.tau_text, total=total
    )
    return {"pixel_to_pixel": config.alignment * pixel, "pixel_to_text": config.alignment * text}


def total_loss(
    network: Network, params: Any, batch_stats: Any, batch: Batch, key: jax.Array, config: ConfigDict
) -> tuple[jax.Array, tuple[Metrics, Any]]:
    """Sum of all weighted loss terms; with it the terms one by one and the new running statistics.

    A weight of 0 removes a term and its computation.
    """
    batch = hide_words(batch, key, config)
    return partial_loss(network, params, batch_stats, batch, loss_totals(batch, config), key, config)


def partial_loss(
    network: Network,
    params: Any,
    batch_stats: Any,
    batch: Batch,
    totals: Metrics,
    key: jax.Array,
    config: ConfigDict,
) -> tuple[jax.Array, tuple[Metrics, Any]]:
    """What a part of a batch, with its words hidden, adds to the loss of the whole, whose `loss_totals` are given."""
    dropout_key, clean_key, head_key = _keys(key)[1:]
    image, ids, text_mask = normalise(batch["image"]), batch["text_ids"], batch["text_mask"]

    def forward(ids, key):
        return network.model.apply(
            {"params": params["model"], "batch_stats": batch_stats},
            image,
            ids,
            text_mask,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )

    if config.grounding:
        grounded, updates = forward(batch["masked_ids"], dropout_key)
        output, updates = (grounded, updates) if config.grounding_shared_pass else forward(ids, clean_key)
    else:
        output, updates = forward(ids, dropout_key)

    with jax.named_scope("losses"):
        terms = segmentation_losses(output, batch, totals, config)
    if config.alignment:
        text_embedding = output.text_embedding
        if network.text_projection is not None:
            text_embedding = network.text_projection.apply(
                {"params": params["text_projection"]},
                output.word_features,
                text_mask,
                output.mask_features.shape[-1],
            )
        with jax.named_scope("losses"):
            terms |= alignment_losses(output, text_embedding, batch, totals, config)
    if config.grounding:
        logits = network.grounding.apply(
            {"params": params["grounding"]},
            grounded.word_features,
            text_mask,
            grounded.stage_features[network.grounding_stage - 1],
            batch["mask"],
            grounded.word_embedding,
            train=True,
            rngs={"dropout": head_key},
        )
        weight = batch["valid"].astype(jnp.float32)
        with jax.named_scope("losses"):
            words = losses.masked_words(logits, batch["labels"], weight, totals["words"])
        terms["grounding"] = config.grounding * words
    loss = sum(terms.values(), jnp.zeros(()))
    metrics = {"loss": loss} | {f"loss/{name}": term for name, term in terms.items()}
    return loss, (metrics, updates.get("batch_stats", {}))


def _keys(key: jax.Array) -> tuple[jax.Array, ...]:
    """For the words that are hidden, the dropout, that of a clean pass of its own, and that of the head."""
    return tuple(jax.random.split(key, 4))


def hide_words(batch: Batch, key: jax.Array, config: ConfigDict) -> Batch:
    """The batch with `masked_ids` and `labels [B, L]` of Mask Grounding, where that has a weight."""
    if not config.grounding:
        return batch
    ids, labels = mask_words(
        _keys(key)[0],
        batch["text_ids"],
        maskable_words(batch["text_mask"]),
        config.mask_id,
        ratio=config.mask_ratio,
        keep=config.mask_keep,
        at_least_one=config.mask_at_least_one,
        sentences=config.mask_sentences,
    )
    return {**batch, "masked_ids": ids, "labels": labels}


def maskable_words(text_mask: jax.Array) -> jax.Array:
    """Words that Mask Grounding may hide, all real tokens but the first and the last ([CLS], [SEP]): `[B, L]` bool."""
    last = text_mask.sum(-1, keepdims=True) - 1
    position = jnp.arange(text_mask.shape[-1])
    return (position > 0) & (position < last)
