"""Norms against flax's own, values and gradients, and by hand where flax has none."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.models.norms import GroupNorm, LayerNorm, instance_norm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (LayerNorm(), nn.LayerNorm(epsilon=1e-5, use_fast_variance=False), (2, 3, 5, 16)),
        (LayerNorm(1e-2), nn.LayerNorm(epsilon=1e-2, use_fast_variance=False), (4, 16)),
        (GroupNorm(4), nn.GroupNorm(4, epsilon=1e-5, use_fast_variance=False), (2, 6, 16)),
    ],
)
def test_values_and_gradients_are_those_of_flax(ours, theirs, shape, dtype):
    """In bfloat16 the numbers are the same, rounded; statistics and sums are float32 in both."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(2 + 3 * rng.normal(size=shape), dtype)
    params = {name: rng.normal(size=16).astype(np.float32) for name in ("scale", "bias")}
    gradient = jnp.asarray(rng.normal(size=shape), dtype)

    def results(module, x):
        value, pull = jax.vjp(
            lambda params, x: module.apply({"params": params}, x).astype(x.dtype), params, x
        )
        return value, *pull(gradient.astype(x.dtype))

    found, expected = results(ours, x), results(theirs, x.astype(jnp.float32))
    assert found[0].dtype == found[2].dtype == x.dtype
    assert found[1]["scale"].dtype == jnp.float32
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.float32(a), b, atol=tolerance * np.abs(b).max())


def test_instance_norm_over_some_positions():
    rng = np.random.default_rng(0)
    x = (3 + 2 * rng.normal(size=(3, 7, 4))).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 1, 0, 0], [1] * 7, [0] * 7], np.int32)
    result = np.asarray(instance_norm(x, mask))
    for b in range(3):
        for c in range(4):
            real = [float(x[b, i, c]) for i in range(7) if mask[b, i]]
            if not real:
                assert (result[b] == 0).all()
                continue
            mean = sum(real) / len(real)
            variance = sum((value - mean) ** 2 for value in real) / len(real)
            for i in range(7):
                expected = (x[b, i, c] - mean) / np.sqrt(variance + 1e-5) * mask[b, i]
                assert result[b, i, c] == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(instance_norm(x)[1], result[1], atol=1e-6)
