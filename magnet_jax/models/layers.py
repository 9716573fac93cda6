"""Building blocks that several parts of the networks share: initialisers, linear layers, norms, resampling, drop path."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from magnet_jax.models.parameters import fan_in_uniform, parameter, uniform_within, xavier_uniform, zeros

_batch: contextvars.ContextVar[tuple[NamedSharding, int] | None] = contextvars.ContextVar(
    "batch", default=None
)


@contextlib.contextmanager
def batch_split_by(sharding: NamedSharding | None, size: int) -> Iterator[None]:
    """While this is traced, what linear layers read and write of `size` examples is split by `sharding`.

    With parameters that are split over the same devices, the compiler could also gather the activations and leave each
    device a part of the products, which is far more to send.
    """
    token = _batch.set(None if sharding is None or sharding.mesh.size == 1 else (sharding, size))
    try:
        yield
    finally:
        _batch.reset(token)


def _split(x: jax.Array) -> jax.Array:
    if _batch.get() is None or x.shape[0] != _batch.get()[1]:
        return x
    sharding = _batch.get()[0]
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, *free))
    )


def on_each_device(function: Callable, *arrays: jax.Array, shared: tuple[jax.Array, ...] = ()):
    """`function(*arrays, *shared)` of arrays `[B, ...]` and with such results, by each device of its own examples.

    For what the compiler cannot divide by itself, or does not see to be divided as examples are. `batch_split_by` says over
    what they are split; within the function they are not any more.
    """
    if _batch.get() is None:
        return function(*arrays, *shared)
    sharding, size = _batch.get()
    spec = sharding.spec if len(arrays[0]) == size else PartitionSpec()
    specs = (*len(arrays) * (spec,), *len(shared) * (PartitionSpec(),))

    def on_device(*arrays):
        with batch_split_by(None, 0):
            return function(*arrays)

    return jax.shard_map(on_device, mesh=sharding.mesh, in_specs=specs, out_specs=spec, check_vma=False)(
        *arrays, *shared
    )


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """What `Dense` computes, in the dtype of x: `[..., C] -> [..., features]`."""
    y = _split(x) @ kernel.astype(x.dtype)
    return _split(y if bias is None else y + bias.astype(x.dtype))


def _linear_forward(x, kernel, bias):
    return linear(x, kernel, bias), (x, kernel, bias)


def _linear_backward(residuals, gradient):
    x, kernel, bias = residuals
    gradient = _split(gradient)
    leading = tuple(range(x.ndim - 1))
    # As one product of two matrices in memory: a TPU's compiler makes a far longer program of one with two summed axes, or
    # within which x is computed anew.
    rows = (a.reshape(-1, a.shape[-1]) for a in (jax.lax.optimization_barrier(x), gradient))
    kernel_gradient = jax.lax.dot_general(
        *rows, (((0,), (0,)), ((), ())), preferred_element_type=kernel.dtype
    )
    bias_gradient = None if bias is None else gradient.astype(bias.dtype).sum(leading)
    return _split(gradient @ kernel.astype(x.dtype).T), kernel_gradient, bias_gradient


linear.defvjp(_linear_forward, _linear_backward)


class Dense(nn.Module):
    """Linear layer `[..., C] -> [..., features]` in `dtype`, with float32 parameters.

    As flax's, but gradients of the parameters are float32 from the product on: its sums over examples are not rounded to
    `dtype` before devices, or parts of an accumulated gradient, are added up.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = xavier_uniform
    bias_init: nn.initializers.Initializer = zeros

    @nn.compact
    def parameters(self, channels: int) -> tuple[jax.Array, jax.Array | None]:
        """Kernel `[channels, features]` and bias `[features]`, float32, for those who use them in another way."""
        kernel = parameter(self, "kernel", self.kernel_init, (channels, self.features))
        return kernel, parameter(self, "bias", self.bias_init, (self.features,)) if self.use_bias else None

    def __call__(self, x):
        return linear(x.astype(self.dtype), *self.parameters(x.shape[-1]))

    def without_bias(self, x) -> tuple[jax.Array, jax.Array | None]:
        """The product alone, and the bias to be added later."""
        kernel, bias = self.parameters(x.shape[-1])
        return linear(x.astype(self.dtype), kernel, None), bias


def fan_in_dense(features: int, fan_in: int, *, dtype: Any, name: str | None = None) -> Dense:
    """Linear layer whose kernel and bias both start uniform in +-1/sqrt(fan_in)."""
    bias_init = uniform_within(fan_in**-0.5)
    return Dense(features, kernel_init=fan_in_uniform, bias_init=bias_init, dtype=dtype, name=name)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x `[B, S, C]` + bias `[C]`, where the gradient comes from a kernel, not from a product that could add it up too."""
    return x + bias.astype(x.dtype)


def _add_bias_backward(bias, gradient):
    (by_bias,) = _sums_of_rows(gradient, jnp.ones((gradient.shape[1], 1)), bias.dtype)
    return gradient, by_bias


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _add_bias_backward)


@jax.custom_vjp
def add_position(x: jax.Array, fixed: jax.Array, table: jax.Array, which: np.ndarray) -> jax.Array:
    """x `[B, S, C]` + fixed `[S, C]` + a learnt vector out of a table `[K, C]`: which `[S]` says which."""
    return x + (fixed + table[which]).astype(x.dtype)


def _add_position_forward(x, fixed, table, which):
    return add_position(x, fixed, table, which), (table, which)


def _add_position_backward(residuals, gradient):
    table, which = residuals
    return gradient, None, _sums_of_rows(gradient, jax.nn.one_hot(which, len(table)), table.dtype), None


add_position.defvjp(_add_position_forward, _add_position_backward)


def _sums_of_rows(array: jax.Array, weights: jax.Array, dtype) -> jax.Array:
    """Weighted sums of the rows of all examples, `[B, S, C]` by `[S, K] -> [K, C]`, as a product.

    As a sum, a TPU takes several times as long for it. It makes one of a product with a single row, so there are eight.
    """
    count = weights.shape[1]
    weights = jnp.pad(weights, ((0, 0), (0, -count % 8))).astype(array.dtype)
    weights = _split(jnp.broadcast_to(weights, (len(array), *weights.shape)))
    rows = (a.reshape(-1, a.shape[-1]) for a in (weights, _split(array)))
    return jax.lax.dot_general(*rows, (((0,), (0,)), ((), ())), preferred_element_type=dtype)[:count]


REMAT_PARTS = ("stage_1", "stage_2", "stage_3", "stage_4", "text", "decoder")
_POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Remat:
    """Which parts of a network are computed again in the backward pass rather than kept, block by block.

    `parts` are some of `REMAT_PARTS`; `policy` is 'nothing' (keep no more than the inputs of the blocks) or 'dots' (also
    what linear layers give). Raises ValueError for another name.
    """

    parts: tuple[str, ...] = ()
    policy: str = "nothing"

    def __post_init__(self):
        if unknown := sorted(set(self.parts) - set(REMAT_PARTS)):
            raise ValueError(f"remat has {', '.join(unknown)}; expected some of {', '.join(REMAT_PARTS)}")
        if self.policy not in _POLICIES:
            raise ValueError(f"remat_policy is '{self.policy}'; expected one of {', '.join(_POLICIES)}")

    def __call__(self, block: type[nn.Module], part: str, static: int | None = None) -> type[nn.Module]:
        """The class of a block of that part; `static`: number of the argument that says whether this is training."""
        if part not in self.parts:
            return block
        return nn.remat(
            block, policy=_POLICIES[self.policy], static_argnums=() if static is None else (static,)
        )


_positions: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("positions", default=None)


@contextlib.contextmanager
def examples_at(positions: jax.Array) -> Iterator[None]:
    """While this is traced, the examples of a batch are those at `positions [B]` of a larger one."""
    token = _positions.set(positions)
    try:
        yield
    finally:
        _positions.reset(token)


def example_keys(key: jax.Array, batch: int) -> jax.Array:
    """A key for each of B examples, by its position in the whole batch: `[B]`.

    So random numbers belong to an example, and do not change with how the batch is divided: over devices by jit or pmap,
    or over the parts of an accumulated gradient.
    """
    positions = _positions.get()
    positions = jnp.arange(batch) if positions is None else positions
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def kept_by_dropout(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Which values dropout keeps: bool of `shape`, `[B, ...]`.

    For many layers at once, since each draw is some 350 operations of the program, which a compiler writes out.
    """
    keys = example_keys(key, shape[0])
    return _split(jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape[1:]))(keys))


def drop(x: jax.Array, kept: jax.Array | None, rate: float) -> jax.Array:
    """0 where x is not kept, the rest rescaled; x as it is where `kept` is None."""
    return x if kept is None else jnp.where(kept, x / (1 - rate), 0)


class Dropout(nn.Module):
    """Drops single values and rescales the rest. x [B, ...]."""

    rate: float

    @nn.compact
    def __call__(self, x, *, train: bool):
        if not train or self.rate == 0.0:
            return x
        return drop(x, kept_by_dropout(self.make_rng("dropout"), self.rate, x.shape), self.rate)


def path_scales(key: jax.Array, rates: Sequence[float], batch: int) -> jax.Array:
    """Stochastic depth: what the two branches of every block are multiplied with, `[blocks, 2, B]`.

    0 where an example goes without the branch, else what keeps the mean, 1 / (1 - rate).
    """
    kept = 1 - np.asarray(rates, np.float32)[:, None, None]
    draw = jax.vmap(lambda key: jax.random.uniform(key, (len(rates), 2)), out_axes=-1)
    return jnp.where(draw(example_keys(key, batch)) < kept, 1 / kept, 0)


@functools.cache
def _align_corners_matrix(size_in: int, size_out: int) -> np.ndarray:
    """[size_out, size_in] weights of linear interpolation that maps the first sample to the first, the last to the last."""
    position = np.arange(size_out) * ((size_in - 1) / max(size_out - 1, 1))
    return np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(size_in))).astype(np.float32)


@functools.cache
def _pool_matrix(size_in: int, size_out: int) -> np.ndarray:
    """[size_out, size_in] averaging weights of bins floor(i*n/p) .. ceil((i+1)*n/p)."""
    matrix = np.zeros((size_out, size_in), np.float32)
    for i in range(size_out):
        start, stop = i * size_in // size_out, -(-(i + 1) * size_in // size_out)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix


def _resample(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    x = jnp.einsum("yh,bhwc->bywc", rows.astype(x.dtype), x)
    return jnp.einsum("xw,bywc->byxc", columns.astype(x.dtype), x)


def resize_align_corners(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear resize with align_corners=True, as one matrix product per axis: `[B, H, W, C] -> [B, *size, C]`."""
    return _resample(
        x, _align_corners_matrix(x.shape[1], size[0]), _align_corners_matrix(x.shape[2], size[1])
    )


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """Means over size x size bins that cover the map and may overlap: `[B, H, W, C] -> [B, size, size, C]`."""
    return _resample(x, _pool_matrix(x.shape[1], size), _pool_matrix(x.shape[2], size))


def resize_half_pixel(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear resize with align_corners=False and no antialiasing: `[B, H, W] -> [B, *size]`."""
    return jax.image.resize(x, (x.shape[0], *size), "linear", antialias=False)


def sine_position(height: int, width: int, channels: int) -> jax.Array:
    """Sine embedding of pixel positions, y features then x features: `[height * width, channels]`. Spec section 3."""
    features = channels // 2
    divisor = 10000.0 ** (2 * (np.arange(features) // 2) / features)

    def axis(size):
        angle = ((np.arange(size) + 1) / (size + 1e-6) * 2 * np.pi)[:, None] / divisor
        return np.where(np.arange(features) % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)

    # Put together by the program, which is megabytes shorter for it.
    rows = jnp.broadcast_to(axis(height)[:, None], (height, width, features))
    columns = jnp.broadcast_to(axis(width)[None], (height, width, features))
    return jnp.concatenate([rows, columns], -1).reshape(height * width, channels)
