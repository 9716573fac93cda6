"""Layers of one kind as a loop, for a shorter program, which is loaded sooner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEAST = 3  # Rounds from which on a loop is worth it.
_SMALL = 65_536  # Values of an array that goes through the loop as a part of a longer one.


def loop(step: Callable, carry: Any, rounds: Sequence[Any], xs: Any = None) -> tuple[Any, Any]:
    """`carry, output = step(carry, parameters, x)` for every round; the last carry, and outputs side by side.

    rounds: the parameters of each, trees of one structure, of the same shapes and of one dtype, which are put side by
    side. xs: arrays with an entry for each round, or None.
    """
    leaves, structure = jax.tree.flatten(rounds[0])
    small = [i for i, leaf in enumerate(leaves) if leaf.size <= _SMALL]
    ends = np.cumsum([leaves[i].size for i in small]).tolist()

    def joined(params):
        """Large arrays as they are, and one of all the small ones: each array has a few operations of its own."""
        of_round = dict(enumerate(jax.tree.leaves(params)))
        vectors = [of_round.pop(i).ravel() for i in small]
        return list(of_round.values()), jnp.concatenate(vectors) if vectors else None

    def parted(large, vector):
        parts = {} if vector is None else dict(zip(small, jnp.split(vector, ends[:-1]), strict=True))
        large = iter(large)
        values = [
            parts[i].reshape(leaf.shape) if i in parts else next(large) for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, values)

    def run_round(carry, of_round):
        params, x = of_round
        return step(carry, parted(*params), x)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(joined(params) for params in rounds))
    return jax.lax.scan(run_round, carry, (stacked, xs))
