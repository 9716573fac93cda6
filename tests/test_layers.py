"""The linear layer, whose gradients stay float32 where the computation is not; resampling and norms by loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError
from jax.sharding import PartitionSpec

from magnet_jax.hlo_text import COLLECTIVES, cost
from magnet_jax.models.layers import (
    Dense,
    adaptive_average_pool,
    add_bias,
    add_position,
    batch_split_by,
    resize_align_corners,
)
from magnet_jax.sharding import batch_sharding, make_mesh


def inputs(dtype):
    rng = np.random.default_rng(0)
    x, target = (jnp.asarray(rng.normal(size=(4, 100, size)), dtype) for size in (12, 6))
    params = {"kernel": rng.normal(size=(12, 6)), "bias": rng.normal(size=6)}
    return {"params": jax.tree.map(lambda a: a.astype(np.float32), params)}, x, target


def gradients(layer, params, x, target):
    def score(params, x):
        return (layer.apply(params, x) * target).astype(jnp.float32).sum()

    return jax.jit(jax.grad(score, (0, 1)))(params, x)


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_flax(bias):
    params, x, target = inputs(jnp.float32)
    if not bias:
        del params["params"]["bias"]
    ours, theirs = (kind(6, use_bias=bias, dtype=jnp.float32) for kind in (Dense, nn.Dense))
    assert jax.tree.structure(ours.init(jax.random.key(0), x)) == jax.tree.structure(params)
    np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), rtol=1e-6)
    found = (jax.tree.leaves(gradients(layer, params, x, target)) for layer in (ours, theirs))
    for mine, flax in zip(*found, strict=True):
        np.testing.assert_allclose(mine, flax, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16_is_that_of_flax(bias):
    params, x, _ = inputs(jnp.bfloat16)
    if not bias:
        del params["params"]["bias"]
    ours, theirs = (kind(6, use_bias=bias, dtype=jnp.bfloat16).apply(params, x) for kind in (Dense, nn.Dense))
    assert ours.dtype == theirs.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, theirs)


def test_a_parameter_of_another_shape_is_refused():
    x = jnp.ones((2, 3))
    params = Dense(4, name="a").init(jax.random.key(0), x)
    with pytest.raises(ScopeParamShapeError, match=r'"kernel".*\(3, 5\).*\(3, 4\)'):
        Dense(5).apply(params, x)


def test_gradients_of_parameters_are_not_rounded():
    """Against the product in float64 of what the layer saw in bfloat16: flax's are off by up to 2**-9, ours are exact."""
    params, x, target = inputs(jnp.bfloat16)
    expected = np.einsum("bnc,bnd->cd", np.float64(x), np.float64(target))
    error = {}
    for name, layer in (("ours", Dense(6, dtype=jnp.bfloat16)), ("flax", nn.Dense(6, dtype=jnp.bfloat16))):
        found = gradients(layer, params, x, target)[0]["params"]
        error[name] = np.abs(found["kernel"] - expected).max() / np.abs(expected).max()
        if name == "ours":
            np.testing.assert_allclose(found["bias"], np.float64(target).sum((0, 1)), rtol=1e-5, atol=1e-4)
    assert error["ours"] < 1e-6 < 1e-4 < error["flax"]


def test_devices_add_up_float32():
    params, x, target = inputs(jnp.bfloat16)
    mesh = make_mesh((("data", -1),))
    split = jax.NamedSharding(mesh, PartitionSpec("data"))
    layer = Dense(6, dtype=jnp.bfloat16)

    def score(params, x):
        return (layer.apply(params, x) * x[..., :6]).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(score)).lower(params, jax.device_put(x, split)).compile().as_text()
    reduced = [line for line in compiled.splitlines() if f" {COLLECTIVES[0]}(" in line]
    assert reduced
    assert not [line for line in reduced if "bf16" in line]


def test_parameters_travel_and_activations_stay():
    """Where both are split over the same devices, kernels are gathered, their gradients added up, and no pixel sent."""
    mesh = make_mesh((("fsdp", -1),))
    by_batch = batch_sharding(mesh)
    layers = [Dense(size, use_bias=False, dtype=jnp.bfloat16) for size in (256, 64)]
    kernels = np.ones((64, 256), np.float32), np.ones((256, 64), np.float32)
    shardings = tuple(jax.NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, "fsdp"), ("fsdp",)))
    x = np.ones((8, 512, 64), np.float32)

    def score(kernels, x):
        for _ in range(2):
            y = x
            for layer, kernel in zip(layers, kernels, strict=True):
                y = layer.apply({"params": {"kernel": kernel}}, jnp.sin(y))
            x += y
        return x.sum()

    def sent(sharding):
        def step(kernels, x):
            with batch_split_by(sharding, len(x)):
                return jax.grad(score)(kernels, x)

        jitted = jax.jit(step, in_shardings=(shardings, by_batch), out_shardings=shardings)
        return cost(jitted.lower(kernels, x).compile().as_text())

    held, free = sent(by_batch), sent(None)
    assert held.counts.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    # Gathered for each use, forward and backward, and one sum.
    assert held.wire <= 5 * sum(kernel.nbytes for kernel in kernels)
    assert free.wire > 5 * held.wire


@pytest.mark.parametrize(("height", "width", "size"), [(6, 6, 3), (7, 5, 3), (4, 3, 6), (5, 9, 1), (3, 3, 2)])
def test_adaptive_pool(height, width, size):
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    expected = np.zeros((2, size, size, 3))
    for i in range(size):
        for j in range(size):
            rows = range(int(np.floor(i * height / size)), int(np.ceil((i + 1) * height / size)))
            columns = range(int(np.floor(j * width / size)), int(np.ceil((j + 1) * width / size)))
            expected[:, i, j] = np.mean([x[:, y, z] for y in rows for z in columns], 0)
    np.testing.assert_allclose(adaptive_average_pool(x, size), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "new"), [((2, 3), (5, 7)), ((6, 6), (3, 4)), ((1, 1), (4, 3)), ((3, 4), (1, 1))]
)
def test_resize_align_corners(size, new):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    expected = np.zeros((2, *new, 3))
    for i in range(new[0]):
        for j in range(new[1]):
            y = i * (size[0] - 1) / (new[0] - 1) if new[0] > 1 else 0.0
            z = j * (size[1] - 1) / (new[1] - 1) if new[1] > 1 else 0.0
            top, left = min(int(y), size[0] - 1), min(int(z), size[1] - 1)
            bottom, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
            upper = x[:, top, left] * (1 - z + left) + x[:, top, right] * (z - left)
            lower = x[:, bottom, left] * (1 - z + left) + x[:, bottom, right] * (z - left)
            expected[:, i, j] = upper * (1 - y + top) + lower * (y - top)
    np.testing.assert_allclose(resize_align_corners(x, new), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_have_the_gradients_of_plain_ones(dtype):
    """What comes back goes on to x as it is, and is added up in float32 for the bias and for the table."""
    rng = np.random.default_rng(0)
    x, target = (jnp.asarray(rng.normal(size=(3, 50, 6)), dtype) for _ in range(2))
    bias, table, fixed = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (6, (4, 6), (50, 6)))
    which = rng.integers(0, 3, 50)  # Nobody has the last one.

    def both(add, *arrays):
        result, pull = jax.vjp(add, *arrays)
        return result, *pull(target)

    found = both(add_bias, x, bias)
    expected = jax.vjp(lambda x, bias: x + bias.astype(dtype), x, bias)[0]
    np.testing.assert_array_equal(found[0], expected)
    np.testing.assert_array_equal(found[1], target)
    assert found[2].dtype == jnp.float32
    np.testing.assert_allclose(found[2], np.float64(target).sum((0, 1)), rtol=1e-5, atol=1e-5)

    found = both(lambda x, table: add_position(x, fixed, table, which), x, table)
    np.testing.assert_array_equal(found[0], x + (fixed + table[which]).astype(dtype))
    np.testing.assert_array_equal(found[1], target)
    assert found[2].dtype == jnp.float32
    for row in range(4):
        expected = np.float64(target)[:, which == row].sum((0, 1))
        np.testing.assert_allclose(found[2][row], expected, rtol=1e-5, atol=1e-5)
