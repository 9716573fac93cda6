"""Scaled dot-product attention, in the forms that suit different processors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_LANES = 128  # Of a TPU's registers and of its matrix unit.


def attend(query, key, value, *, scale: float, bias=None) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax.

    query [..., Q, H, D], key and value [..., K, H, D], bias broadcastable to [..., H, Q, K] -> [..., Q, H, D].
    """
    by_head = (jnp.swapaxes(x, -3, -2) for x in (query, key, value))
    return jnp.swapaxes(attend_by_head(*by_head, scale=scale, bias=bias), -3, -2)


def attend_by_head(query, key, value, *, scale: float, bias=None) -> jax.Array:
    """As `attend`, of query [..., H, Q, D], key and value [..., H, K, D] -> [..., H, Q, D].

    In this order, a CPU computes products, bias and softmax as one operation.
    """
    logits = jnp.matmul(query * scale, jnp.swapaxes(key, -1, -2), preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias
    return jnp.matmul(jax.nn.softmax(logits, axis=-1).astype(value.dtype), value)


def attend_by_lanes(query, key, value, bias, *, scale: float, regions: np.ndarray | None = None) -> jax.Array:
    """Multi-head attention within windows, without taking the heads apart: `[B, windows, N, C]` each, and the result.

    bias [heads, N, N]; regions [windows, N]: attention is between pixels of one region only (-100 elsewhere). As many heads
    as fit side by side into the lanes of a register stay so; each sees queries and values in which the channels of the
    others are zero. The products, short of a matrix unit's width, cost no more, and nothing is laid out anew.
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
        if regions is not None:
            same = regions[:, None, :, None] == regions[:, None, None]
            logits += jnp.where(same, 0.0, -100.0)
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        outputs.append(jnp.einsum("bnhqk,bnhkc->bnqc", weights, v[:, :, None] * own))
    return jnp.concatenate(outputs, -1)
