"""The train step: one pure function that composes all losses, and the evaluation step beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from magnet_jax import losses
from magnet_jax.models import Output
from magnet_jax.models.grounding import mask_words
from magnet_jax.models.layers import resize_align_corners
from magnet_jax.network import Network, normalise

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that training changes. Randomness follows from (seed, step), so that no generator has to be kept."""

    step: jax.Array  # int32 []
    params: Any
    batch_stats: Any  # Running statistics; empty for a network without BatchNorm.
    opt_state: Any
    seed: jax.Array  # uint32 []

    @property
    def variables(self) -> dict[str, Any]:
        """What evaluation needs: `{'params': ..., 'batch_stats': ...}`."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(network: Network, tx: optax.GradientTransformation, seed: int, batch: Batch) -> TrainState:
    """The state at step 0 for batches shaped like `batch`; pure, so that it can be traced for shapes or sharded."""
    variables = network.init(jax.random.key(seed), batch)
    opt_state = tx.init(variables["params"])
    return TrainState(jnp.zeros((), jnp.int32), **variables, opt_state=opt_state, seed=jnp.uint32(seed))


def segmentation_losses(output: Output, batch: Batch, config: ConfigDict) -> dict[str, jax.Array]:
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
            logits = jax.vmap(lambda x: _resize(x, size))(logits)
        target = losses.area_reduce(batch["mask"], logits.shape[2:])
        if config.bce:
            bce = jax.vmap(losses.binary_cross_entropy, (0, None, None))(logits, target, weight)
            terms["bce"] = config.bce * bce.sum()
        if config.dice:
            dice = jax.vmap(losses.dice, (0, None, None))(logits, target, weight * present)
            terms["dice"] = config.dice * dice.sum()
    if config.class_:
        terms["class"] = config.class_ * losses.class_cross_entropy(
            output.class_logits, present.astype(jnp.int32), weight
        )
    if config.cross_entropy:
        logits = _resize(output.mask_logits, size)
        terms["cross_entropy"] = config.cross_entropy * losses.weighted_cross_entropy(
            logits, batch["mask"], weight, config.class_weights
        )
    return terms


def _resize(logits: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Mask logits `[B, h, w]` at the size of the image."""
    return resize_align_corners(logits[..., None], size)[..., 0]


def alignment_losses(
    output: Output, text_embedding: jax.Array, batch: Batch, config: ConfigDict
) -> dict[str, jax.Array]:
    """Pixel-to-pixel and pixel-to-text contrast at the configured stride (spec section 6)."""
    # Mask and features are averaged over the same cells, which cover the image.
    size = tuple(max(side // config.alignment_stride, 1) for side in batch["mask"].shape[1:])
    features = losses.area_reduce(output.mask_features, size)
    features = features.reshape(*features.shape[:1], -1, features.shape[-1])
    foreground = losses.area_reduce(batch["mask"], size).reshape(features.shape[:2]) > 0.5
    weight = batch["valid"].astype(jnp.float32)
    block = config.alignment_block or None
    pixel = losses.pixel_to_pixel(features, foreground, weight, tau=config.tau_pixel, block=block)
    text = losses.pixel_to_text(features, text_embedding, foreground, weight, tau=config.tau_text)
    return {"pixel_to_pixel": config.alignment * pixel, "pixel_to_text": config.alignment * text}


def total_loss(
    network: Network, params: Any, batch_stats: Any, batch: Batch, key: jax.Array, config: ConfigDict
) -> tuple[jax.Array, tuple[Metrics, Any]]:
    """Sum of all weighted loss terms; with it the terms one by one and the new running statistics.

    A weight of 0 removes a term and its computation.
    """
    mask_key, dropout_key, clean_key, head_key = _keys(key)
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
        masked_ids, labels = _hide_words(mask_key, ids, text_mask, config)
        grounded, updates = forward(masked_ids, dropout_key)
        output, updates = (grounded, updates) if config.grounding_shared_pass else forward(ids, clean_key)
    else:
        output, updates = forward(ids, dropout_key)

    terms = segmentation_losses(output, batch, config)
    if config.alignment:
        text_embedding = output.text_embedding
        if network.text_projection is not None:
            text_embedding = network.text_projection.apply(
                {"params": params["text_projection"]},
                output.word_features,
                text_mask,
                output.mask_features.shape[-1],
            )
        terms |= alignment_losses(output, text_embedding, batch, config)
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
        terms["grounding"] = config.grounding * losses.masked_words(logits, labels, weight)
    loss = sum(terms.values(), jnp.zeros(()))
    metrics = {"loss": loss} | {f"loss/{name}": term for name, term in terms.items()}
    return loss, (metrics, updates.get("batch_stats", {}))


def _keys(key: jax.Array) -> tuple[jax.Array, ...]:
    """For the words that are hidden, the dropout, that of a clean pass of its own, and that of the head."""
    return tuple(jax.random.split(key, 4))


def _hide_words(
    key: jax.Array, ids: jax.Array, text_mask: jax.Array, config: ConfigDict
) -> tuple[jax.Array, jax.Array]:
    return mask_words(
        key,
        ids,
        maskable_words(text_mask),
        config.mask_id,
        ratio=config.mask_ratio,
        keep=config.mask_keep,
        at_least_one=config.mask_at_least_one,
        sentences=config.mask_sentences,
    )


def step_key(seed: jax.Array | int, step: jax.Array | int) -> jax.Array:
    """The key of all that is random in the step that follows `step` steps."""
    return jax.random.fold_in(jax.random.key(seed), step)


def masked_sentences(seed: int, step: int, batch: Batch, config: ConfigDict) -> jax.Array:
    """What the network reads in that step: ids `[B, L]` with hidden words, whole ones without Mask Grounding."""
    if not config.grounding:
        return batch["text_ids"]
    mask_key = _keys(step_key(seed, step))[0]
    return _hide_words(mask_key, batch["text_ids"], batch["text_mask"], config)[0]


def maskable_words(text_mask: jax.Array) -> jax.Array:
    """Words that Mask Grounding may hide, all real tokens but the first and the last ([CLS], [SEP]): `[B, L]` bool."""
    last = text_mask.sum(-1, keepdims=True) - 1
    position = jnp.arange(text_mask.shape[-1])
    return (position > 0) & (position < last)


def make_train_step(
    network: Network,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    schedule: Callable[[Any], Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure step `(state, batch) -> (state, metrics)`; `config` is `config.loss`; `schedule` adds its rate."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = step_key(state.seed, state.step)
        gradient_of = jax.value_and_grad(total_loss, argnums=1, has_aux=True)
        (_, (metrics, batch_stats)), gradient = gradient_of(
            network, state.params, state.batch_stats, batch, key, config
        )
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.global_norm(gradient)
        # Of examples that the data could not give; padding does not occur in training.
        metrics["left_out"] = (~batch["valid"]).sum().astype(jnp.float32)
        if schedule is not None:
            metrics["learning_rate"] = schedule(state.step)
        new = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
        return new, metrics

    return train_step


def make_eval_step(network: Network) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """The pure step `(variables, batch) -> outputs`: mask logits `[B, h, w]`, class logits `[B, 2]`, intersection, union.

    Intersection and union are int32 `[B]`, pixels at the model's size against `batch['mask']` (the `squash` protocol);
    both are 0 for padded examples. A network without class logits never says that nothing matches.
    """

    def eval_step(variables: Any, batch: Batch) -> dict[str, jax.Array]:
        output = network.apply(variables, batch)
        # sigmoid > 0.5 is a positive logit.
        predicted, truth = _resize(output.mask_logits, batch["mask"].shape[1:]) > 0, batch["mask"] > 0
        valid = batch["valid"][:, None, None]
        class_logits = output.class_logits
        return {
            "mask_logits": output.mask_logits,
            "class_logits": jnp.zeros((len(valid), 2)) if class_logits is None else class_logits,
            "intersection": (predicted & truth & valid).sum((1, 2), dtype=jnp.int32),
            "union": ((predicted | truth) & valid).sum((1, 2), dtype=jnp.int32),
        }

    return eval_step
