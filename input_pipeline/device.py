"""Host batches to global jax.Arrays: which examples of a batch a process has to give, and how they get to its devices."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np


def rows_by_process(sharding: jax.sharding.Sharding, batch_size: int) -> dict[int, np.ndarray]:
    """Rows of a global batch that the devices of each process hold, ascending.

    They follow from the mesh, which need not go through the processes in order, and where an axis of the mesh splits no
    examples several processes hold the same ones.
    """
    rows: dict[int, set[int]] = {}
    for device, index in sharding.devices_indices_map((batch_size,)).items():
        rows.setdefault(device.process_index, set()).update(range(*index[0].indices(batch_size)))
    return {process: np.array(sorted(held)) for process, held in sorted(rows.items())}


def to_device(
    batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding, batch_size: int
) -> dict[str, jax.Array]:
    """The global arrays `[batch_size, ...]`, laid out by `sharding`; a process gives the rows that its devices hold."""
    rows = rows_by_process(sharding, batch_size)[jax.process_index()]

    def place(value: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return value[slice(*np.searchsorted(rows, (start, stop)))]

        return jax.make_array_from_callback((batch_size, *value.shape[1:]), sharding, part)

    return {name: place(value) for name, value in batch.items()}


def prefetch_to_device(
    batches: Iterable[Mapping[str, np.ndarray]],
    sharding: jax.sharding.Sharding,
    batch_size: int,
    size: int = 2,
) -> Iterator[dict[str, jax.Array]]:
    """Keeps `size` batches on their way to the devices ahead of the one in use."""
    waiting: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in batches:
        waiting.append(to_device(batch, sharding, batch_size))
        if len(waiting) > size:
            yield waiting.popleft()
    yield from waiting
