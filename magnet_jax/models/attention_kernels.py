"""Window attention as two Pallas kernels for TPUs, forward and backward: logits never leave the fast memory.

Heads stay side by side in the lanes, 128 channels at once; each sees queries and values in which the channels of the others
are zero (see `attention.attend_by_lanes`). Arrays of a kernel, for B pictures of W windows with N pixels:

- qkv `[B, W, N, 3 * C]`: queries, keys and values, each of all heads;
- bias `[heads, N, N]` and masks `[kinds, N, N]`, float32, are added to the logits; kinds `[W]`: which mask a window has.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from magnet_jax.models.kernel_parts import dot, in_pairs

LANES = 128
_MEMORY = 60 * 2**20  # Bytes of a TPU's fast memory, at most.


def fits(heads: int, channels: int) -> bool:
    """Whether heads fill the lanes, so that these kernels can be used."""
    width = channels // heads
    return channels % LANES == 0 and width % 8 == 0 and LANES % width == 0


def _group(ref, part: int, group, channels: int) -> jax.Array:
    """Queries (0), keys (1) or values (2) of a group of heads: `[N, LANES]`."""
    return ref[:, pl.ds(pl.multiple_of(part * channels + group * LANES, LANES), LANES)]


def _own(array: jax.Array, head: int, width: int) -> jax.Array:
    """Zero in the channels of other heads."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    own = (lane >= head * width) & (lane < (head + 1) * width)
    return jnp.where(own, array.astype(jnp.float32), 0.0).astype(array.dtype)


def _exponentials(query, key, bias, mask) -> tuple[jax.Array, jax.Array]:
    """Of the logits, and their sums: `[N, N]` and `[N, 1]` float32."""
    logits = dot(query, key, (1, 1)) + bias
    if mask is not None:
        logits += mask
    exponentials = jnp.exp(logits - logits.max(1, keepdims=True))
    return exponentials, exponentials.sum(1, keepdims=True)


def _forward_kernel(width: int, scale: float, kinds, qkv, bias, masks, out):
    channels = out.shape[-1]
    kind = kinds[pl.program_id(1)]

    def of_group(group, *_):
        query, key, value = (_group(qkv, part, group, channels) for part in range(3))
        query = (query.astype(jnp.float32) * scale).astype(query.dtype)
        total = jnp.zeros(query.shape, jnp.float32)
        for head in range(LANES // width):
            own = bias[group * (LANES // width) + head]
            weights, sums = _exponentials(
                _own(query, head, width), key, own, None if masks is None else masks[kind]
            )
            total += dot(weights.astype(value.dtype), _own(value, head, width), (1, 0)) / sums
        out[:, pl.ds(pl.multiple_of(group * LANES, LANES), LANES)] = total.astype(out.dtype)

    in_pairs(channels // LANES, of_group)


def _backward_kernel(width: int, scale: float, kinds, qkv, bias, masks, gradient, by_qkv, by_bias):
    channels, dtype = gradient.shape[-1], gradient.dtype
    first, kind = (pl.program_id(0) == 0) & (pl.program_id(1) == 0), kinds[pl.program_id(1)]

    def of_group(group, *_):
        query, key, value = (_group(qkv, part, group, channels) for part in range(3))
        query = (query.astype(jnp.float32) * scale).astype(query.dtype)
        by_out = _group(gradient, 0, group, channels)
        by_query, by_key, by_value = (jnp.zeros(query.shape, jnp.float32) for _ in range(3))
        for head in range(LANES // width):
            number = group * (LANES // width) + head
            own_query, own_by_out = _own(query, head, width), _own(by_out, head, width)
            weights, sums = _exponentials(
                own_query, key, bias[number], None if masks is None else masks[kind]
            )
            weights /= sums
            by_value += dot(weights.astype(dtype), own_by_out, (0, 0))
            by_weights = dot(own_by_out, value, (1, 1))
            by_logits = weights * (by_weights - (weights * by_weights).sum(1, keepdims=True))
            by_bias[number] = by_logits + jnp.where(first, 0.0, by_bias[number])
            by_logits = by_logits.astype(dtype)
            by_query += dot(by_logits, _own(key, head, width), (1, 0))
            by_key += dot(by_logits, own_query, (0, 0))
        for part, found in enumerate((by_query * scale, by_key, by_value)):
            at = pl.multiple_of(part * channels + group * LANES, LANES)
            by_qkv[:, pl.ds(at, LANES)] = found.astype(dtype)

    in_pairs(channels // LANES, of_group)


def forward(qkv, bias, mask, scale: float, interpret: bool = False) -> jax.Array:
    """What attention gives, `[B, W, N, C]`; mask: None or (kinds, masks)."""
    shape = (*qkv.shape[:3], qkv.shape[3] // 3)
    out = jax.ShapeDtypeStruct(shape, qkv.dtype)
    return _call(_forward_kernel, bias, mask, scale, [qkv], [out], interpret)[0]


def backward(qkv, bias, gradient, mask, scale: float, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Gradients by qkv and bias for one by the result."""
    results = [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), jax.ShapeDtypeStruct(bias.shape, jnp.float32)]
    return _call(_backward_kernel, bias, mask, scale, [qkv, gradient], results, interpret)


def _call(kernel, bias, mask, scale: float, arrays, results, interpret: bool):
    """Runs a kernel over pictures and windows."""
    width = arrays[0].shape[3] // 3 // len(bias)

    def window(array):
        return pl.BlockSpec(
            (None, None, *array.shape[2:]), lambda picture, window, _: (picture, window, 0, 0)
        )

    def whole(array):
        return pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))

    kinds, masks = (np.zeros(arrays[0].shape[1], np.int32), None) if mask is None else mask
    constants = [bias] if masks is None else [bias, masks]

    def run(kinds, qkv, *rest):
        rest = (*rest[:1], None, *rest[1:]) if masks is None else rest
        kernel(width, scale, kinds, qkv, *rest)

    return pl.pallas_call(
        run,
        name=f"window_attention{kernel.__name__.removesuffix('_kernel')}",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=arrays[0].shape[:2],
            in_specs=[window(arrays[0]), *map(whole, constants), *map(window, arrays[1:])],
            out_specs=[whole(result) if len(result.shape) == 3 else window(result) for result in results],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_MEMORY),
        interpret=interpret,
    )(kinds, arrays[0], *constants, *arrays[1:])
