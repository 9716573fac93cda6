"""Host batches to global jax.Arrays."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np


def to_device(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """The global arrays of which each process gives its own rows, laid out by `sharding`."""
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def prefetch_to_device(
    batches: Iterable[Mapping[str, np.ndarray]], sharding: jax.sharding.Sharding, size: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Keeps `size` batches on their way to the devices ahead of the one in use."""
    waiting: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in batches:
        waiting.append(to_device(batch, sharding))
        if len(waiting) > size:
            yield waiting.popleft()
    yield from waiting
