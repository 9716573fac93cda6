"""Learning-rate schedules and the optax chain."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from magnet_jax.errors import UserError
from magnet_jax.sharding import compile_pattern, path_name

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
    """AdamW or Muon with global-norm clipping, weight decay by name and learning-rate multipliers by name.

    Muon moves the linear layers' matrices and Adam the rest. Returns the transformation and its schedule (before
    multipliers), which the log shows. Raises UserError for an unknown name.
    """
    if config.name not in ("adamw", "muon"):
        raise UserError(f"config.optimizer.name is '{config.name}'; expected 'adamw' or 'muon'")
    schedule = make_schedule(config, total_steps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.flatten:
        clip, adam = optax.flatten(clip), optax.flatten(adam)
    chain = [clip]
    if config.name == "muon":
        labels = functools.partial(muon_labels, largest=config.muon_largest)
        chain.append(optax.partition({"muon": scale_by_stacked_muon(), "adam": adam}, labels))
    else:
        chain.append(adam)
    chain.append(
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda params: decay_mask(params, config.no_decay)
        )
    )
    if config.lr_multipliers:
        chain.append(_scale_by_name(tuple(config.lr_multipliers)))
    return optax.chain(*chain, optax.scale_by_learning_rate(schedule)), schedule


def muon_labels(params, largest: int):
    """A tree like `params` of 'muon' for the kernels of linear layers and 'adam' for all else.

    A kernel whose smaller side is above `largest` (0: no limit) is left to Adam: the cost grows with that side's square.
    """

    def label(path, leaf):
        matrix = leaf.ndim == 2 and path_name(path).endswith("/kernel")
        return "muon" if matrix and (not largest or min(leaf.shape) <= largest) else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def scale_by_stacked_muon() -> optax.GradientTransformation:
    """Orthogonalised momentum of matrices, all those of one shape at once, scaled to the size of Adam's steps.

    The scale 0.2 sqrt(larger side) lets both share a learning rate (arXiv 2502.16982).
    """
    axes = optax.contrib.MuonDimensionNumbers(1, 2)
    muon = optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda groups: jax.tree.map(lambda _: axes, groups)
    )

    def stack(tree):
        groups = {}
        for leaf in jax.tree.leaves(tree):
            groups.setdefault("x".join(map(str, leaf.shape)), []).append(leaf)
        return {name: jnp.stack(leaves) for name, leaves in groups.items()}

    def init(params):
        return muon.init(stack(params))

    def update(updates, state, params=None):
        del params
        stacked, state = muon.update(stack(updates), state)
        rest = {name: iter(0.2 * max(group.shape[1:]) ** 0.5 * group) for name, group in stacked.items()}
        return jax.tree.map(lambda leaf: next(rest["x".join(map(str, leaf.shape))]), updates), state

    return optax.GradientTransformation(init, update)


def decay_mask(params, no_decay: tuple[str, ...]):
    """A tree like `params` of bool: True where no expression of `no_decay` is found in the parameter's name."""
    patterns = [compile_pattern(pattern, "optimizer.no_decay") for pattern in no_decay]
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(pattern.search(path_name(path)) for pattern in patterns), params
    )


def _scale_by_name(multipliers: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    factors = [
        (compile_pattern(pattern, "optimizer.lr_multipliers"), factor) for pattern, factor in multipliers
    ]

    def scale(updates, params=None):
        def one(path, update):
            for pattern, factor in factors:
                if pattern.search(path_name(path)):
                    return update * factor
            return update

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.stateless(scale)
