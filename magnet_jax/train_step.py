"""The train step: one pure function that composes all losses, and the evaluation step beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from magnet_jax.models.layers import batch_split_by, examples_at
from magnet_jax.network import Network
from magnet_jax.optim import global_norm
from magnet_jax.total_loss import (
    Batch,
    Metrics,
    hide_words,
    loss_totals,
    partial_loss,
    resize_logits,
    total_loss,
)


@flax.struct.dataclass
class TrainState:
    """All that training changes. Randomness follows from (seed, step), so that no generator has to be kept."""

    step: jax.Array  # int32 []
    params: Any
    batch_stats: Any  # Running statistics; empty for a network without BatchNorm.
    opt_state: Any
    seed: jax.Array  # uint32 []
    ema: Any = None  # Running mean of the parameters, where one is kept.

    @property
    def variables(self) -> dict[str, Any]:
        """What evaluation needs: `{'params': ..., 'batch_stats': ...}`, of the running mean where one is kept."""
        return {"params": self.params if self.ema is None else self.ema, "batch_stats": self.batch_stats}


def init_state(
    network: Network, tx: optax.GradientTransformation, seed: jax.Array | int, batch: Batch, ema: bool = False
) -> TrainState:
    """The state at step 0 for batches shaped like `batch`; pure, so that it can be traced for shapes or sharded.

    ema: whether a running mean of the parameters is kept.
    """
    variables = network.init(jax.random.key(seed), batch)
    params, opt_state = variables["params"], tx.init(variables["params"])
    mean = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(
        jnp.zeros((), jnp.int32), **variables, opt_state=opt_state, seed=jnp.uint32(seed), ema=mean
    )


def step_key(seed: jax.Array | int, step: jax.Array | int) -> jax.Array:
    """The key of all that is random in the step that follows `step` steps."""
    return jax.random.fold_in(jax.random.key(seed), step)


def masked_sentences(seed: int, step: int, batch: Batch, config: ConfigDict) -> jax.Array:
    """What the network reads in that step: ids `[B, L]` with hidden words, whole ones without Mask Grounding."""
    return hide_words(batch, step_key(seed, step), config).get("masked_ids", batch["text_ids"])


def make_train_step(
    network: Network,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    schedule: Callable[[Any], Any] | None = None,
    *,
    accumulate: int = 1,
    ema: float = 0.0,
    axis_name: str | None = None,
    batch_sharding: NamedSharding | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure step `(state, batch) -> (state, metrics)`; `configured_train_step` is that of a whole configuration.

    Args: config: `config.loss`; schedule: adds its rate to the metrics; accumulate: parts that the batch is taken in one
    after another, with the result of the whole (but for BatchNorm, whose statistics are those of the parts); ema: decay
    of the running mean of the parameters, 0 for none; axis_name: of `jax.pmap`, where the batch is one device's share;
    batch_sharding: of the batch under `jax.jit`, which activations keep.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = step_key(state.seed, state.step)
        size = len(batch["valid"])
        positions = jnp.arange(size)
        if axis_name is not None:
            positions += size * jax.lax.axis_index(axis_name)
        with examples_at(positions):
            batch = hide_words(batch, key, config)
        totals = loss_totals(batch, config)
        if axis_name is not None:
            totals = jax.lax.psum(totals, axis_name)

        def gradient_of(batch_stats: Any, part: Batch, positions: jax.Array) -> tuple[Any, Metrics, Any]:
            with examples_at(positions), batch_split_by(batch_sharding, len(positions)):
                (_, (metrics, batch_stats)), gradient = jax.value_and_grad(
                    partial_loss, argnums=1, has_aux=True
                )(network, state.params, batch_stats, part, totals, key, config)
            return gradient, metrics, batch_stats

        if accumulate == 1:
            gradient, metrics, batch_stats = gradient_of(state.batch_stats, batch, positions)
        else:
            gradient, metrics, batch_stats = _accumulate(
                gradient_of, state.batch_stats, batch, positions, accumulate
            )
        # Of examples that the data could not give; padding does not occur in training.
        metrics["left_out"] = (~batch["valid"]).sum().astype(jnp.float32)
        if axis_name is not None:
            gradient, metrics = jax.lax.psum((gradient, metrics), axis_name)
        # All are needed before one is used. A TPU would else sum up squares while it multiplies matrices, which takes its
        # compiler minutes to arrange.
        gradient = jax.lax.optimization_barrier(gradient)
        metrics["grad_norm"] = global_norm(gradient)
        if schedule is not None:
            metrics["learning_rate"] = schedule(state.step)

        with jax.named_scope("optimizer"):
            updates, opt_state = optax.with_extra_args_support(tx).update(
                gradient, state.opt_state, state.params, norm=metrics["grad_norm"]
            )
            params = optax.apply_updates(state.params, updates)
        new = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
        if ema:
            new = new.replace(
                ema=jax.tree.map(lambda old, now: ema * old + (1 - ema) * now, state.ema, params)
            )
        return new, metrics

    return train_step


def configured_train_step(
    config: ConfigDict,
    network: Network,
    tx: optax.GradientTransformation,
    schedule: Callable[[Any], Any] | None = None,
    **where: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The train step of a whole configuration; `where`: `axis_name` or `batch_sharding` of `make_train_step`."""
    options = {"accumulate": config.train.accumulate, "ema": config.train.ema}
    return make_train_step(network, tx, config.loss, schedule, **options, **where)


def _accumulate(
    gradient_of: Callable, batch_stats: Any, batch: Batch, positions: jax.Array, parts: int
) -> tuple[Any, Metrics, Any]:
    """Gradient and metrics of a batch as the sums over its parts, one part in memory at a time."""

    def split(x: jax.Array) -> jax.Array:
        # Every part takes examples from all over the batch: then no device has to send any of its share.
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    split_batch, split_positions = jax.tree.map(split, (dict(batch), positions))
    shapes = jax.eval_shape(
        gradient_of, batch_stats, *jax.tree.map(lambda x: x[0], (split_batch, split_positions))
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[:2])

    def add(carry, part):
        gradient, metrics, stats = gradient_of(carry[1], *part)
        return (jax.tree.map(jnp.add, carry[0], (gradient, metrics)), stats), None

    (sums, batch_stats), _ = jax.lax.scan(add, (zeros, batch_stats), (split_batch, split_positions))
    return *sums, batch_stats


def make_gradient(
    network: Network, config: ConfigDict, batch_sharding: NamedSharding | None = None
) -> Callable[[Any, Batch], tuple[jax.Array, Any]]:
    """The pure `(variables, batch) -> (loss, gradient)` of all losses, for measuring; `config` is `config.loss`.

    batch_sharding: of the batch under `jax.jit`, which activations keep.
    """

    def gradient(variables: Any, batch: Batch) -> tuple[jax.Array, Any]:
        params, batch_stats = variables["params"], variables["batch_stats"]
        with batch_split_by(batch_sharding, len(batch["valid"])):
            (loss, _), gradient = jax.value_and_grad(total_loss, argnums=1, has_aux=True)(
                network, params, batch_stats, batch, step_key(0, 0), config
            )
        return loss, gradient

    return gradient


def make_eval_step(
    network: Network, batch_sharding: NamedSharding | None = None
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """The pure step `(variables, batch) -> outputs`: mask logits `[B, h, w]`, class logits `[B, 2]`, intersection, union.

    batch_sharding: of the batch under `jax.jit`, which activations keep. Intersection and union are int32 `[B]`, pixels at
    the model's size against `batch['mask']` (the `squash` protocol); both are 0 for padded examples. A network without
    class logits never says that nothing matches.
    """

    def eval_step(variables: Any, batch: Batch) -> dict[str, jax.Array]:
        with batch_split_by(batch_sharding, len(batch["valid"])):
            output = network.apply(variables, batch)
        # sigmoid > 0.5 is a positive logit.
        predicted, truth = resize_logits(output.mask_logits, batch["mask"].shape[1:]) > 0, batch["mask"] > 0
        valid = batch["valid"][:, None, None]
        class_logits = output.class_logits
        return {
            "mask_logits": output.mask_logits,
            "class_logits": jnp.zeros((len(valid), 2)) if class_logits is None else class_logits,
            "intersection": (predicted & truth & valid).sum((1, 2), dtype=jnp.int32),
            "union": ((predicted | truth) & valid).sum((1, 2), dtype=jnp.int32),
        }

    return eval_step
