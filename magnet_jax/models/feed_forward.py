"""The MLP of a transformer's layer, on TPUs by Pallas kernels whose hidden values never leave the fast memory.

Hidden values are by far the largest that such a layer has. The kernels go through blocks of rows: forward, they make a
block's hidden values, and at once what follows from them; backward, they make them again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from magnet_jax.models.activations import relu
from magnet_jax.models.kernel_parts import dot, on_tpu
from magnet_jax.models.layers import linear

_LANES = 128
_ROWS = 512  # Of a block, at most.
_HIDDEN = 512  # Hidden values of a row that are made at a time, at most.
_PARAMETERS = 2**19  # Of a kernel, at most, since they and their gradients stay in the fast memory.
_MEMORY = 60 * 2**20  # Bytes of a TPU's fast memory, at most.

Parameters = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def feed_forward(x: jax.Array, kernel1, bias1, kernel2, bias2) -> jax.Array:
    """`relu(x @ kernel1 + bias1) @ kernel2 + bias2`, in the dtype of x: `[B, S, C] -> [B, S, C]`.

    kernel1 `[C, hidden]`, kernel2 `[hidden, C]`, and biases are float32, and so are their gradients.
    """

    def by_kernel(x, *parameters):
        return _by_rows(_forward, x, parameters)

    return _on_tpu(by_kernel, _plain, (x,), (kernel1, bias1, kernel2, bias2))


def _feed_forward_backward(residuals, gradient):
    x, *parameters = residuals

    def by_kernel(x, gradient, *parameters):
        by_x, *others = _by_rows(_backward, x, parameters, gradient)
        return by_x, *(array[None] for array in others)

    def plain(x, gradient, *parameters):
        by_x, *others = jax.vjp(_plain, x, *parameters)[1](gradient)
        return by_x, *(array[None] for array in others)

    by_x, *others = _on_tpu(by_kernel, plain, (x, gradient), tuple(parameters))
    return by_x, *(array.sum(0) for array in others)  # Over the devices.


feed_forward.defvjp(lambda *arrays: (feed_forward(*arrays), arrays), _feed_forward_backward)


def _plain(x, kernel1, bias1, kernel2, bias2):
    return linear(relu(linear(x, kernel1, bias1)), kernel2, bias2)


def _on_tpu(by_kernel, other, arrays, parameters: Parameters):
    """By a kernel on a TPU, where it suits."""
    rows, (channels, hidden) = arrays[0].shape[1], parameters[0].shape
    if rows % 16 or channels % _LANES or hidden % _LANES or channels * hidden > _PARAMETERS:
        by_kernel = other
    return on_tpu(by_kernel, other, *arrays, shared=parameters)


def _by_rows(run, x: jax.Array, parameters: Parameters, *more: jax.Array, interpret: bool = False):
    """`run` of the rows of all examples."""
    rows = [array.reshape(-1, array.shape[-1]) for array in (x, *more)]
    found = run(*rows, *parameters, interpret=interpret)
    if isinstance(found, tuple):
        return found[0].reshape(x.shape), *found[1:]
    return found.reshape(x.shape)


def _chunks(hidden: int) -> list[slice]:
    """The hidden values in equal parts."""
    size = max(n for n in range(_LANES, _HIDDEN + 1, _LANES) if hidden % n == 0)
    return [slice(start, start + size) for start in range(0, hidden, size)]


def _forward_kernel(x, kernel1, bias1, kernel2, bias2, out):
    total = jnp.zeros(out.shape, jnp.float32)
    for part in _chunks(kernel1.shape[1]):
        hidden = jnp.maximum(dot(x[...], kernel1[:, part]) + bias1[:, part], 0)
        total += dot(hidden.astype(x.dtype), kernel2[part, :])
    out[...] = (total + bias2[...]).astype(out.dtype)


def _backward_kernel(
    x, gradient, kernel1, bias1, turned1, turned2, by_x, by_kernel1, by_bias1, by_turned2, by_bias2
):
    @pl.when(pl.program_id(0) == 0)
    def _():
        for array in (by_kernel1, by_bias1, by_turned2, by_bias2):
            array[...] = jnp.zeros(array.shape, jnp.float32)

    # Sums over rows are products with turned x and turned gradient, which have the fewest channels.
    turned_x, turned_gradient = (array[...].astype(jnp.float32).T.astype(x.dtype) for array in (x, gradient))
    total = jnp.zeros(x.shape, jnp.float32)
    for part in _chunks(kernel1.shape[1]):
        hidden = jnp.maximum(dot(x[...], kernel1[:, part]) + bias1[:, part], 0)
        by_hidden = jnp.where(hidden > 0, dot(gradient[...], turned2[:, part]), 0)
        by_bias1[:, part] += by_hidden.sum(0, keepdims=True)
        hidden, by_hidden = hidden.astype(x.dtype), by_hidden.astype(x.dtype)
        by_turned2[:, part] += dot(turned_gradient, hidden)
        by_kernel1[:, part] += dot(turned_x, by_hidden)
        total += dot(by_hidden, turned1[part, :])
    by_x[...] = total.astype(by_x.dtype)
    by_bias2[...] += gradient[...].astype(jnp.float32).sum(0, keepdims=True)


def _forward(x, kernel1, bias1, kernel2, bias2, interpret: bool):
    constants = [kernel1.astype(x.dtype), bias1[None], kernel2.astype(x.dtype), bias2[None]]
    return _call(_forward_kernel, [x], constants, [], interpret)[0]


def _backward(x, gradient, kernel1, bias1, kernel2, bias2, interpret: bool):
    kernels = (kernel1, kernel1.T, kernel2.T)
    kernel1, turned1, turned2 = (kernel.astype(x.dtype) for kernel in kernels)
    sums = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (kernel1, bias1[None], turned2, bias2[None])]
    constants = [kernel1, bias1[None], turned1, turned2]
    found = _call(_backward_kernel, [x, gradient], constants, sums, interpret)
    by_x, by_kernel1, by_bias1, by_turned2, by_bias2 = found
    return by_x, by_kernel1, by_bias1[0], by_turned2.T, by_bias2[0]


def _call(kernel, rows, constants, sums, interpret: bool):
    """Runs a kernel over blocks of rows; its results are one of rows, and sums over all of them."""
    count, channels = rows[0].shape
    size = max(n for n in range(16, _ROWS + 1, 16) if count % n == 0)

    def whole(array):
        return pl.BlockSpec(array.shape, lambda block: (0,) * len(array.shape))

    block = pl.BlockSpec((size, channels), lambda block: (block, 0))
    return pl.pallas_call(
        kernel,
        name=f"feed_forward{kernel.__name__.removesuffix('_kernel')}",
        grid=(count // size,),
        in_specs=[block] * len(rows) + [whole(array) for array in constants],
        out_specs=[block, *(whole(array) for array in sums)],
        out_shape=[jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype), *sums],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=_MEMORY),
        interpret=interpret,
    )(*rows, *constants)
