"""What Pallas kernels for TPUs share: products, loops in pairs, memory that is read from any row on, and who runs them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from magnet_jax.models.layers import on_each_device


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """Products of two matrices over an axis of each, float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    contracted = ((axes[:1], axes[1:]), ((), ()))
    return jax.lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)


def on_tpu(by_kernel, other, *arrays: jax.Array, shared: tuple[jax.Array, ...] = ()):
    """`on_each_device` by a kernel where that is a TPU, and else by another function."""

    def on_device(*arrays):
        return jax.lax.platform_dependent(*arrays, tpu=by_kernel, default=other)

    return on_each_device(on_device, *arrays, shared=shared)


def in_pairs(count: int, run, carry=None):
    """`carry = run(number, parity, carry)` for all numbers, two of them in a step, so that neither has to wait for itself.

    parity: 0 or 1, constant; what the two of a step write should not be the same memory.
    """
    carry = jax.lax.fori_loop(0, count // 2, lambda i, carry: run(2 * i + 1, 1, run(2 * i, 0, carry)), carry)
    return run(count - 1, 0, carry) if count % 2 else carry


class Words:
    """Memory `[rows, lanes]` of a kernel that can be read from any row on, and is written as fast as there is.

    Numbers of 16 bits are kept two by two, those of an even row and the next, in words of 32 bits.
    """

    def __init__(self, words, dtype):
        self._words, self.dtype = words, dtype
        self._packed = words.dtype != dtype

    @classmethod
    def memory(cls, shape: tuple[int, int], dtype):
        """What a kernel needs for them."""
        rows, lanes = shape
        packed = jnp.dtype(dtype).itemsize == 2
        return pltpu.VMEM((rows // 2 if packed else rows, lanes), jnp.uint32 if packed else dtype)

    def _rows(self, start, count: int, multiple: int):
        if self._packed:
            start, count, multiple = jax.lax.div(start, 2), count // 2, multiple // 2
        return pl.ds(start if multiple == 1 else pl.multiple_of(start, multiple), count)

    def read(self, start, count: int, multiple: int) -> jax.Array:
        """Rows from `start` on, which is a multiple of `multiple`."""
        found = self._words[self._rows(start, count, multiple), :]
        return pltpu.bitcast(found, self.dtype) if self._packed else found

    def write(self, start, values: jax.Array, multiple: int) -> None:
        rows = self._rows(start, len(values), multiple)
        self._words[rows, :] = pltpu.bitcast(values, jnp.uint32) if self._packed else values


def words_of(memory, dtype):
    """The same lists, of `Words` in place of references."""
    return jax.tree.map(lambda words: Words(words, dtype), memory)
