"""Layers of one kind as a loop, for a shorter program, which is loaded sooner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

LEAST = 3  # Rounds from which on a loop is worth it.


def loop(step: Callable, carry: Any, rounds: Sequence[Any], xs: Any = None) -> tuple[Any, Any]:
    """`carry, output = step(carry, parameters, x)` for every round; the last carry, and outputs side by side.

    rounds: the parameters of each, trees of one structure and of the same shapes, which are put side by side. xs: arrays
    with an entry for each round, or None.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rounds)
    return jax.lax.scan(lambda carry, of_round: step(carry, *of_round), carry, (stacked, xs))
