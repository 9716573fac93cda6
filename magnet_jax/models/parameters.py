"""Parameters and their initial values: what they are drawn from, and how a whole network's are drawn."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.extend.random
import jax.numpy as jnp
from flax import traverse_util
from flax.core.scope import LazyRng

# Spec section 4b.
truncated_normal = nn.initializers.truncated_normal(0.02)
normal = nn.initializers.normal(0.02)
unit_normal = nn.initializers.normal(1.0)
xavier_uniform = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()
ones = nn.initializers.ones_init()
# Uniform in +-1/sqrt(fan_in), and in +-sqrt(3/fan_in).
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
kaiming_uniform = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


@functools.cache
def uniform_within(bound: float) -> nn.initializers.Initializer:
    """Uniform in +-bound."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclasses.dataclass
class _Draws:
    """What is to be drawn for a module: by the path of each parameter, of what kind and how its key is made."""

    key: jax.Array
    kinds: dict[tuple[str, ...], tuple[Callable, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    folded: dict[tuple[str, ...], jax.Array] = dataclasses.field(default_factory=dict)


_draws: contextvars.ContextVar[_Draws | None] = contextvars.ContextVar("draws", default=None)
# A generator whose key is what was folded in last.
_FOLDED = jax.extend.random.define_prng_impl(
    key_shape=(),
    seed=lambda seed: seed.astype(jnp.uint32),
    split=None,
    random_bits=None,
    fold_in=lambda key, data: data.astype(jnp.uint32),
    name="folded",
)


def parameter(module: nn.Module, name: str, initializer: Callable, shape: tuple[int, ...]) -> jax.Array:
    """As `module.param`, but one that is there already is only compared with `shape`.

    Flax would let JAX trace `initializer` for its shape, a thousand times for each program. Raises flax's
    `ScopeParamShapeError` for another shape.
    """
    if module.has_variable("params", name):
        value = module.get_variable("params", name)
        if jnp.shape(value) != shape:
            raise flax.errors.ScopeParamShapeError(name, module.scope.path_text, jnp.shape(value), shape)
        return value
    draws = _draws.get()
    # Within a transformation of flax, keys may be made in another way.
    if draws is None or initializer in (zeros, ones) or module.scope.rngs["params"].rng is not draws.key:
        return module.param(name, initializer, shape)

    def stand_in(_: jax.Array) -> jax.Array:
        path, scope = (*module.path, name), module.scope
        of_module = LazyRng(jax.random.key(0, impl=_FOLDED), scope.rngs["params"].suffix)
        key = LazyRng.create(of_module, scope.rng_counters["params"]).as_jax_rng()
        draws.kinds[path], draws.folded[path] = (initializer, shape), jax.random.key_data(key)
        return jnp.zeros(shape)

    return module.param(name, stand_in)


def init_with_output(module: nn.Module, key: jax.Array, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """As `module.init_with_output`, with an output that is right in its shapes only, and by a far smaller program.

    Flax would make a key and draw values for each of a thousand parameters, all of which a compiler writes out. Here all
    keys are made at once, and parameters of one initialiser and shape are drawn in one loop; the values are the same.
    """
    draws = _Draws(key)
    token = _draws.set(draws)
    try:
        output, variables = module.init_with_output(key, *arguments)
    finally:
        _draws.reset(token)
    if not draws.kinds:
        return output, variables
    groups: dict[tuple, list[tuple[str, ...]]] = {}
    for path, kind in draws.kinds.items():
        groups.setdefault(kind, []).append(path)
    folded = jnp.stack([draws.folded[path] for paths in groups.values() for path in paths])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, folded)
    params, start = traverse_util.flatten_dict(variables["params"]), 0
    for (initializer, shape), paths in groups.items():
        of_group = jax.lax.slice_in_dim(keys, start, start + len(paths))
        values = jax.lax.map(functools.partial(initializer, shape=shape), of_group)
        params.update(zip(paths, values, strict=True))
        start += len(paths)
    return output, {**variables, "params": traverse_util.unflatten_dict(params)}
