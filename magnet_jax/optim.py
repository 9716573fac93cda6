"""Learning-rate schedules and the optax chain."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from magnet_jax.errors import UserError
from magnet_jax.sharding import JOINED, compile_pattern, path_name

Schedule = Callable[[int], jax.Array]

SMALL = 65_536  # Values of an array that is joined with others; 1119 of MagNet's 1439 are no larger.


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


def make_optimizer(
    config: ConfigDict, total_steps: int
) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
    """AdamW or Muon with global-norm clipping, weight decay by name and learning-rate multipliers by name.

    Muon moves the linear layers' matrices and Adam the rest. Returns the transformation, whose `update` may be told the
    gradient's `norm`, and its schedule (before multipliers), which the log shows. Raises UserError for an unknown name
    and a negative norm.
    """
    if config.name not in ("adamw", "muon"):
        raise UserError(f"config.optimizer.name is '{config.name}'; expected 'adamw' or 'muon'")
    if config.clip_norm < 0:
        raise UserError(f"config.optimizer.clip_norm is {config.clip_norm}; expected a norm, or 0 for never")
    schedule = make_schedule(config, total_steps)
    movers = {"adam": optax.scale_by_adam(config.b1, config.b2, config.eps)}
    if config.name == "muon":
        movers["muon"] = scale_by_stacked_muon()
    factors = [factor for _, factor in _multipliers(config)]

    def decayed(groups):
        return {mover: {decay: decay == "decayed" for decay in kinds} for mover, kinds in groups.items()}

    def multiply(updates, params=None):
        def one(path, update):
            index = path[2].key
            return update if index == "rest" else update * factors[int(index)]

        return jax.tree_util.tree_map_with_path(one, updates)

    chain = optax.chain(
        clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.partition(movers, lambda groups: {mover: mover for mover in groups}),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.stateless(multiply),
        optax.scale_by_learning_rate(schedule),
    )
    return _on_groups(chain, functools.partial(_places, config=config)), schedule


def _multipliers(config: ConfigDict) -> list[tuple[re.Pattern, float]]:
    pairs = config.lr_multipliers
    try:
        numbers = {pattern: float(factor) for pattern, factor in pairs}
    except (TypeError, ValueError):
        raise UserError(
            f"config.optimizer.lr_multipliers is {pairs}; expected pairs of an expression and a number: "
            "(('^grounding/', 5.0),)"
        ) from None
    return [
        (compile_pattern(pattern, "optimizer.lr_multipliers"), factor) for pattern, factor in numbers.items()
    ]


class Place(NamedTuple):
    """Where an array of the parameters is among those that the chain sees.

    keys: 'adam' or 'muon', 'decayed' or 'spared', the number of its multiplier or 'rest', and a name.
    start: its first value in the vector of that name; None for an array of its own.
    """

    keys: tuple[str, ...]
    start: int | None


def _places(params, config: ConfigDict) -> list[Place]:
    """The place of each array of `params`: the small ones that Adam moves alike are joined into vectors.

    A network has a thousand small arrays, and the dozen operations on each would be much of the program, which takes long
    to compile and to load. With `config.flatten` all that Adam moves are small.
    """
    muon = config.name == "muon"
    decays = jax.tree.leaves(decay_mask(params, config.no_decay))
    movers = jax.tree.leaves(muon_labels(params, config.muon_largest)) if muon else ["adam"] * len(decays)
    patterns = [pattern for pattern, _ in _multipliers(config)]
    places, filled = [], {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), mover, decay in zip(leaves, movers, decays, strict=True):
        name = path_name(path)
        multiplier = next((str(i) for i, pattern in enumerate(patterns) if pattern.search(name)), "rest")
        kind = (mover, "decayed" if decay else "spared", multiplier)
        if mover == "muon" or not (config.flatten or leaf.size <= SMALL):
            places.append(Place((*kind, *name.split("/")), None))
        else:
            places.append(Place((*kind, JOINED), filled.get(kind, 0)))
            filled[kind] = filled.get(kind, 0) + leaf.size
    return places


def _on_groups(
    tx: optax.GradientTransformationExtraArgs, places_of: Callable[[Any], list[Place]]
) -> optax.GradientTransformationExtraArgs:
    """`tx`, which is given its arrays as `{mover: {decay: {multiplier: {name: array}}}}`."""

    def grouped(tree):
        groups = {}
        for place, leaf in zip(places_of(tree), jax.tree.leaves(tree), strict=True):
            groups.setdefault(place.keys, []).append(leaf if place.start is None else leaf.ravel())
        return unflatten_dict(
            {keys: jnp.concatenate(parts) if len(parts) > 1 else parts[0] for keys, parts in groups.items()}
        )

    def init(params):
        return tx.init(grouped(params))

    def update(updates, state, params=None, **extra):
        groups = None if params is None else grouped(params)
        groups, state = tx.update(grouped(updates), state, groups, **extra)
        groups, leaves = flatten_dict(groups), []
        for (keys, start), leaf in zip(places_of(updates), jax.tree.leaves(updates), strict=True):
            value = groups[keys]
            if start is not None:
                value = value[start : start + leaf.size].reshape(leaf.shape)
            leaves.append(value)
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), state

    return optax.GradientTransformationExtraArgs(init, update)


def clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """One factor for all gradients, by which their norm is at most `limit`; `update` may be told their `norm`.

    optax divides each array and chooses between the two, which on a CPU is another pass over all of them.
    """

    def update(updates, state, params=None, *, norm=None, **extra):
        del params, extra
        norm = optax.global_norm(updates) if norm is None else norm
        factor = jnp.minimum(1.0, limit / norm)
        return jax.tree.map(lambda array: array * factor.astype(array.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def global_norm(tree) -> jax.Array:
    """The root of the sum of all squares; one sum for all small arrays, as in the optimizer."""
    leaves = jax.tree.leaves(tree)
    small = [leaf.ravel() for leaf in leaves if leaf.size <= SMALL]
    large = [leaf for leaf in leaves if leaf.size > SMALL]
    return optax.global_norm([*large, jnp.concatenate(small)] if small else large)


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
