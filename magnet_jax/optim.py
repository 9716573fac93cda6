"""Learning-rate schedules and the optax chain."""

import re
from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict

from magnet_jax.errors import UserError
from magnet_jax.sharding import path_name

Schedule = Callable[[int], jax.Array]


def make_schedule(config: ConfigDict, total_steps: int) -> Schedule:
    """Learning rate by step: linear warm-up from 0, then decay to 0 at `total_steps`."""
    decay_steps = max(total_steps - config.warmup_steps, 1)
    if config.schedule == "polynomial":
        decay = optax.polynomial_schedule(config.learning_rate, 0.0, config.power, decay_steps)
    elif config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(config.learning_rate, decay_steps)
    elif config.schedule == "constant":
        decay = optax.constant_schedule(config.learning_rate)
    else:
        raise UserError(
            f"config.optimizer.schedule is '{config.schedule}'; expected 'polynomial', 'cosine' or 'constant'"
        )
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(config: ConfigDict, total_steps: int) -> tuple[optax.GradientTransformation, Schedule]:
    """AdamW with global-norm clipping, weight decay by name and learning-rate multipliers by name.

    Returns the transformation and its schedule (before multipliers), which the log shows.
    """
    if config.name != "adamw":
        raise UserError(f"config.optimizer.name is '{config.name}'; expected 'adamw'")
    schedule = make_schedule(config, total_steps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adam = optax.chain(clip, optax.scale_by_adam(config.b1, config.b2, config.eps))
    chain = [
        optax.flatten(adam) if config.flatten else adam,
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda params: decay_mask(params, config.no_decay)
        ),
    ]
    if config.lr_multipliers:
        chain.append(_scale_by_name(tuple(config.lr_multipliers)))
    return optax.chain(*chain, optax.scale_by_learning_rate(schedule)), schedule


def decay_mask(params, no_decay: tuple[str, ...]):
    """A tree like `params` of bool: True where no expression of `no_decay` is found in the parameter's name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(re.search(pattern, path_name(path)) for pattern in no_decay), params
    )


def _scale_by_name(multipliers: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    def scale(updates, params=None):
        def one(path, update):
            for pattern, factor in multipliers:
                if re.search(pattern, path_name(path)):
                    return update * factor
            return update

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.stateless(scale)
