"""Layers of one kind as a loop, or at once, for a shorter program, which is loaded sooner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

LEAST = 3  # Layers from which on it is worth it.


def side_by_side(parameters: Sequence[Any]) -> Any:
    """Trees of one structure and of the same shapes as one, whose arrays have an entry for each."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parameters)


def loop(step: Callable, carry: Any, rounds: Sequence[Any], xs: Any = None) -> tuple[Any, Any]:
    """`carry, output = step(carry, parameters, x)` for every round; the last carry, and outputs side by side.

    rounds: the parameters of each, see `side_by_side`. xs: arrays with an entry for each round, or None.
    """
    return jax.lax.scan(lambda carry, of_round: step(carry, *of_round), carry, (side_by_side(rounds), xs))
