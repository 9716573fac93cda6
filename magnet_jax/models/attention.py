"""Scaled dot-product attention, in the forms that suit different processors."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.models import attention_kernels
from magnet_jax.models.kernel_parts import on_tpu

_LANES = 128  # Of a TPU's registers and of its matrix unit.


def attend(query, key, value, *, scale: float, bias=None) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax.

    query [..., Q, H, D], key and value [..., K, H, D], bias broadcastable to [..., H, Q, K] -> [..., Q, H, D].
    """
    if key.shape[-3] == 1 and bias is None:
        return jnp.broadcast_to(value, query.shape)  # All of the weight is on the one there is.
    by_head = (jnp.swapaxes(x, -3, -2) for x in (query, key, value))
    return jnp.swapaxes(attend_by_head(*by_head, scale=scale, bias=bias), -3, -2)


def attend_by_head(query, key, value, *, scale: float, bias=None) -> jax.Array:
    """As `attend`, of query [..., H, Q, D], key and value [..., H, K, D] -> [..., H, Q, D].

    In this order, a CPU computes products, bias and softmax as one operation.
    """
    return _attend(query, key, value, bias, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, bias, scale):
    return _attend_forward(query, key, value, bias, scale)[0]


def _attend_forward(query, key, value, bias, scale):
    logits = jnp.matmul(query * scale, _transposed(key), preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.matmul(weights, value), (query, key, value, bias, weights)


def _attend_backward(scale, residuals, gradient):
    # The compiler would keep the exponentials and the transposed weights as well; none of the weights' size is needed but
    # they themselves, and what is transposed is small.
    query, key, value, bias, weights = residuals
    by_weights = jnp.matmul(gradient, _transposed(value), preferred_element_type=jnp.float32) * weights
    by_logits = by_weights - weights * by_weights.sum(-1, keepdims=True)
    by_bias = None if bias is None else _summed_to(bias.shape, by_logits).astype(bias.dtype)
    by_logits = by_logits.astype(query.dtype)
    by_query = jnp.matmul(by_logits, key) * scale
    by_key = _transposed(jnp.matmul(_transposed(query * scale), by_logits))
    by_value = _transposed(jnp.matmul(_transposed(gradient), weights))
    return by_query, by_key, by_value, by_bias


_attend.defvjp(_attend_forward, _attend_backward)


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _summed_to(shape: tuple[int, ...], x: jax.Array) -> jax.Array:
    """The sum over all axes along which an array of that shape is repeated to be of the shape of x."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    repeated = tuple(axis for axis, (own, size) in enumerate(zip(shape, x.shape, strict=True)) if own < size)
    return x.sum(repeated, keepdims=True)


def attend_by_lanes(query, key, value, bias, *, scale: float, mask: jax.Array | None = None) -> jax.Array:
    """Multi-head attention within windows, without taking the heads apart: `[B, windows, N, C]` each, and the result.

    bias [heads, N, N] and mask [windows, N, N] are added to the logits. As many heads as fit side by side into the lanes of
    a register stay so; each sees queries and values in which the channels of the others are zero. The products, short of a
    matrix unit's width, cost no more, and nothing is laid out anew.
    """
    heads, channels = bias.shape[0], query.shape[-1]
    width = channels // heads
    counts = (count for count in range(1, heads + 1) if heads % count == 0 and count * width <= _LANES)
    together = max(counts, default=1)
    own = np.arange(together)[:, None] == np.arange(together * width) // width  # [together, together * width]
    own = jnp.asarray(own[:, None], query.dtype)
    outputs = []
    for group in range(heads // together):
        lanes = slice(group * together * width, (group + 1) * together * width)
        q, k, v = (x[..., lanes] for x in (query, key, value))
        logits = jnp.einsum(
            "bnhqc,bnkc->bnhqk", (q * scale)[:, :, None] * own, k, preferred_element_type=jnp.float32
        )
        logits += bias[group * together : (group + 1) * together]
        if mask is not None:
            logits += mask[:, None]
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        outputs.append(jnp.einsum("bnhqk,bnhkc->bnqc", weights, v[:, :, None] * own))
    return jnp.concatenate(outputs, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class WindowMask:
    """What is added to the logits of every window; few kinds of windows differ."""

    kinds: np.ndarray  # [windows] int32: which mask each has.
    masks: np.ndarray  # [kinds, N, N] float32, 0 or -100.

    @classmethod
    def of(cls, regions: np.ndarray) -> WindowMask:
        """Attention is between pixels of one region only; regions `[windows, N]`."""
        same = regions[:, :, None] == regions[:, None]
        masks, kinds = np.unique(same, axis=0, return_inverse=True)
        return cls(kinds.ravel().astype(np.int32), np.where(masks, 0.0, -100.0).astype(np.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend_in_windows(qkv: jax.Array, bias: jax.Array, mask: WindowMask | None, scale: float) -> jax.Array:
    """`attend_by_lanes` of queries, keys and values side by side, `[B, windows, N, 3 * C]` -> `[B, windows, N, C]`.

    On a TPU by kernels that keep logits in the fast memory, where the heads suit them.
    """

    def by_kernel(qkv, bias):
        return attention_kernels.forward(qkv, bias, _for_kernel(mask), scale)

    return _on_tpu(by_kernel, functools.partial(_by_lanes, mask=mask, scale=scale), qkv, bias)


def _attend_in_windows_backward(mask, scale, residuals, gradient):
    def by_kernel(qkv, gradient, bias):
        by_qkv, by_bias = attention_kernels.backward(qkv, bias, gradient, _for_kernel(mask), scale)
        return by_qkv, by_bias[None]

    def by_lanes(qkv, gradient, bias):
        by_qkv, by_bias = jax.vjp(functools.partial(_by_lanes, mask=mask, scale=scale), qkv, bias)[1](
            gradient
        )
        return by_qkv, by_bias[None]

    qkv, bias = residuals
    by_qkv, by_bias = _on_tpu(by_kernel, by_lanes, qkv, gradient, bias)
    return by_qkv, by_bias.sum(0)  # Over the devices.


attend_in_windows.defvjp(
    lambda qkv, bias, *fields: (attend_in_windows(qkv, bias, *fields), (qkv, bias)),
    _attend_in_windows_backward,
)


def _by_lanes(qkv, bias, mask: WindowMask | None, scale: float) -> jax.Array:
    added = None if mask is None else jnp.asarray(mask.masks)[mask.kinds]
    return attend_by_lanes(*jnp.split(qkv, 3, -1), bias, scale=scale, mask=added)


def _for_kernel(mask: WindowMask | None):
    return None if mask is None else (mask.kinds, mask.masks)


def _on_tpu(by_kernel, other, *arrays):
    """By a kernel on a TPU, where it suits; the last of the arrays is the bias, of which every device has all."""
    *of_examples, bias = arrays
    if not attention_kernels.fits(len(bias), of_examples[0].shape[-1] // 3):
        by_kernel = other
    return on_tpu(by_kernel, other, *of_examples, shared=(bias,))
