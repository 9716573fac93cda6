"""Which example comes when: a pure function of (seed, epoch, position)."""

from __future__ import annotations

import functools

import numpy as np


@functools.lru_cache(maxsize=8)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch shows its n examples, int64 [n] (read-only, since it is shared)."""
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(n)
    order.flags.writeable = False
    return order


@functools.lru_cache(maxsize=8)
def _uniforms(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 1]))).random(n)


class Groups:
    """Sentences grouped by object: row of any of an object's sentences, without a Python object per group."""

    def __init__(self, objects: np.ndarray):
        self._rows = np.argsort(objects, kind="stable")
        _, self._starts, self._counts = np.unique(objects[self._rows], return_index=True, return_counts=True)

    def __len__(self) -> int:
        return len(self._starts)

    def choose(self, groups: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """One row of each group, by (seed, epoch, group) alone."""
        draws = _uniforms(len(self), seed, epoch)[groups]
        return self._rows[self._starts[groups] + (draws * self._counts[groups]).astype(np.int64)]
