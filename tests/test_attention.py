"""Attention against its formula, differentiated by JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.models.attention import attend, attend_by_head

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 4, 5, 6


def formula(query, key, value, scale, bias):
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key) * scale
    weights = jnp.exp(logits if bias is None else logits + bias)
    return jnp.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "bias",
    [
        None,
        (BATCH, HEADS, QUERIES, KEYS),
        (HEADS, QUERIES, KEYS),
        (BATCH, 1, 1, KEYS),
        (1, HEADS, 1, KEYS),
    ],
)
def test_values_and_gradients(bias, dtype):
    rng = np.random.default_rng(0)
    query, key, value, gradient = (
        jnp.asarray(rng.normal(size=(BATCH, HEADS, n, WIDTH)), dtype) for n in (QUERIES, KEYS, KEYS, QUERIES)
    )
    arrays = [query, key, value]
    if bias is not None:
        arrays.append(rng.normal(size=bias).astype(np.float32))

    def results(function, *arrays):
        def of(query, key, value, bias=None):
            return function(query, key, value, scale=0.3, bias=bias)

        out, pull = jax.vjp(of, *arrays)
        return out, *pull(gradient.astype(out.dtype))

    found = results(attend_by_head, *arrays)
    assert [one.dtype for one in found] == [query.dtype] + [array.dtype for array in arrays]
    expected = results(formula, *(np.float32(array) for array in arrays))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.float32(a), b, atol=tolerance * max(np.abs(b).max(), 1e-2))


def test_heads_side_by_side():
    """`attend` is the same with the heads behind the positions."""
    rng = np.random.default_rng(1)
    query, key, value = (
        rng.normal(size=(BATCH, n, HEADS, WIDTH)).astype(np.float32) for n in (QUERIES, KEYS, KEYS)
    )
    found = attend(query, key, value, scale=0.3)
    expected = formula(*(x.swapaxes(1, 2) for x in (query, key, value)), 0.3, None)
    np.testing.assert_allclose(found, expected.swapaxes(1, 2), atol=1e-6)


def test_of_one_key_all_is_given():
    """Whatever the query; the short way there has the gradients of the long one."""
    rng = np.random.default_rng(1)
    query, key, value, gradient = (
        jnp.float32(rng.normal(size=(BATCH, n, HEADS, WIDTH))) for n in (QUERIES, 1, 1, QUERIES)
    )

    def results(**bias):
        out, pull = jax.vjp(lambda *arrays: attend(*arrays, scale=0.3, **bias), query, key, value)
        return out, *pull(gradient)

    for a, b in zip(results(), results(bias=jnp.zeros((1, 1, 1))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
