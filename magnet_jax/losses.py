"""Losses: arrays in, scalar out; they know no network (spec sections 5-7). All sums are float32.

Every loss is a weighted mean. `total` is what its weights sum to in the whole batch, where the examples given are a part of
it (on one of several devices, or of an accumulated gradient): the parts' losses then add up to that of the whole.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Total = jax.Array | None


def _mean(values: jax.Array, weights: jax.Array, total: Total = None) -> jax.Array:
    """Weighted mean; 0 where all weights are 0."""
    return (values * weights).sum() / jnp.maximum(weights.sum() if total is None else total, 1e-12)


def area_reduce(mask: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Means over cells that cover the map: `[B, H, W, ...] -> [B, *size, ...]` float32; size need not divide H, W.

    Of a mask it is the share of every cell that the mask covers.
    """

    def overlap(size_in, size_out):
        edge = jnp.arange(size_out + 1) * (size_in / size_out)
        start = jnp.maximum(edge[:-1, None], jnp.arange(size_in))
        stop = jnp.minimum(edge[1:, None], jnp.arange(size_in) + 1)
        return jnp.maximum(stop - start, 0.0) * (size_out / size_in)

    if mask.shape[1:] == tuple(size):
        return mask.astype(jnp.float32)
    rows, columns = overlap(mask.shape[1], size[0]), overlap(mask.shape[2], size[1])
    return jnp.einsum("yh,bhw...,xw->byx...", rows, mask.astype(jnp.float32), columns)


def binary_cross_entropy(
    logits: jax.Array, target: jax.Array, weight: jax.Array, total: Total = None
) -> jax.Array:
    """Mean over pixels, then over samples. logits, target in [0, 1] `[B, H, W]`, weight `[B]`."""
    logits = logits.astype(jnp.float32)
    loss = jnp.maximum(logits, 0) - logits * target + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return _mean(loss.mean((1, 2)), weight, total)


def weighted_cross_entropy(
    logits: jax.Array,
    target: jax.Array,
    weight: jax.Array,
    class_weights: tuple[float, float],
    total: Total = None,
) -> jax.Array:
    """Cross-entropy of two classes a pixel, mean over all pixels by the weight of their class (LAVT's loss).

    logits `[B, H, W]` (object minus background), target `[B, H, W]` of {0, 1}, weight `[B]`; class weights of
    background and object. Spec section 8.
    """
    logits = logits.astype(jnp.float32)
    loss = jax.nn.softplus(jnp.where(target > 0, -logits, logits))
    # Sample by sample, since a sum over every pixel of a batch at once loses digits.
    loss = (loss * jnp.where(target > 0, class_weights[1], class_weights[0])).mean((1, 2))
    pixels = pixel_weights(target, weight, class_weights)
    return (loss * weight).sum() / jnp.maximum(pixels.sum() if total is None else total, 1e-12)


def pixel_weights(target: jax.Array, weight: jax.Array, class_weights: tuple[float, float]) -> jax.Array:
    """What samples weigh in `weighted_cross_entropy`, the mean over their pixels: `[B]`."""
    background, present = class_weights
    return weight * (background + (present - background) * (target > 0).mean((1, 2), dtype=jnp.float32))


def dice(logits: jax.Array, target: jax.Array, weight: jax.Array, total: Total = None) -> jax.Array:
    """1 - (2 sum(s y) + 1) / (sum(s) + sum(y) + 1) per sample, then the mean. Shapes as `binary_cross_entropy`."""
    probability = jax.nn.sigmoid(logits.astype(jnp.float32))
    overlap = (probability * target).sum((1, 2))
    size = probability.sum((1, 2)) + target.sum((1, 2))
    return _mean(1 - (2 * overlap + 1) / (size + 1), weight, total)


def class_cross_entropy(
    logits: jax.Array, target: jax.Array, weight: jax.Array, total: Total = None
) -> jax.Array:
    """Cross-entropy of logits `[B, 2]` (nothing matches, object present) and target `[B]`; mean over weight `[B]`."""
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
    return _mean(-jnp.take_along_axis(log_probability, target[:, None], 1)[:, 0], weight, total)


def masked_words(logits: jax.Array, labels: jax.Array, weight: jax.Array, total: Total = None) -> jax.Array:
    """Cross-entropy at the selected words, mean over all of them in the batch.

    logits `[B, L, V]`, labels `[B, L]` with -1 where nothing was selected, weight `[B]` (0 for padded examples).
    """
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_probability, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return _mean(-chosen, word_weights(labels, weight), total)


def word_weights(labels: jax.Array, weight: jax.Array) -> jax.Array:
    """The weights of `masked_words`: `[B, L]`."""
    return (labels >= 0) * weight[:, None]


def _normalise(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


def contrast_weights(foreground: jax.Array, weight: jax.Array) -> jax.Array:
    """The weights of `pixel_to_pixel` and `pixel_to_text`: samples with two foreground pixels and background, `[B]`."""
    count = foreground.sum(-1)
    return weight * (count >= 2) * (count < foreground.shape[-1])


def _masked_logsumexp(similarity: jax.Array, keep: jax.Array) -> jax.Array:
    # A finite floor: with -inf an empty row would make the gradient NaN.
    return jax.nn.logsumexp(jnp.where(keep, similarity, -1e9), axis=-1)


def _pixel_rows(rows, features, positive, index, foreground, tau):
    """Loss of some foreground pixels against all: rows `[R, C]` at `index [R]` of features `[N, C]` -> sum over the rows."""
    similarity = rows @ features.T / tau
    own = index[:, None] == jnp.arange(features.shape[0])
    same = _masked_logsumexp(similarity, foreground & ~own)
    other = _masked_logsumexp(similarity, ~foreground)
    return jnp.where(positive, jax.nn.softplus(other - same), 0.0).sum()


def pixel_to_pixel(
    features: jax.Array,
    foreground: jax.Array,
    weight: jax.Array,
    *,
    tau: float = 0.1,
    block: int | None = None,
    total: Total = None,
) -> jax.Array:
    """Contrasts every foreground pixel's likeness to its object with that to the background (spec section 6).

    features `[B, N, C]` (normalised here), foreground `[B, N]` bool, weight `[B]`. `block` computes that many rows of
    the N x N similarity at a time, in the backward pass too; None holds it whole. Samples with fewer than two
    foreground pixels or without background contribute nothing.
    """
    features = _normalise(features)
    batch, pixels, channels = features.shape
    index = jnp.arange(pixels)

    def sample(features, foreground):
        if block is None:
            return _pixel_rows(features, features, foreground, index, foreground, tau)
        padding = -pixels % block
        rows = jnp.pad(features, ((0, padding), (0, 0))).reshape(-1, block, channels)
        positive = jnp.pad(foreground, (0, padding)).reshape(-1, block)
        indices = jnp.pad(index, (0, padding)).reshape(-1, block)

        @jax.checkpoint
        def step(carry, part):
            return carry + _pixel_rows(part[0], features, part[1], part[2], foreground, tau), None

        return jax.lax.scan(step, jnp.zeros(()), (rows, positive, indices))[0]

    sums = jax.vmap(sample)(features, foreground)
    return _mean(sums / jnp.maximum(foreground.sum(-1), 1), contrast_weights(foreground, weight), total)


def pixel_to_text(
    features: jax.Array,
    text: jax.Array,
    foreground: jax.Array,
    weight: jax.Array,
    *,
    tau: float = 0.1,
    total: Total = None,
) -> jax.Array:
    """Contrasts the sentence's likeness to every foreground pixel with that to the background (spec section 6).

    text `[B, C]` (normalised here); the rest as `pixel_to_pixel`.
    """
    similarity = jnp.einsum("bnc,bc->bn", _normalise(features), _normalise(text)) / tau
    background = _masked_logsumexp(similarity, ~foreground)
    loss = jnp.where(foreground, jax.nn.softplus(background[:, None] - similarity), 0.0).sum(-1)
    return _mean(loss / jnp.maximum(foreground.sum(-1), 1), contrast_weights(foreground, weight), total)
