"""The MLP of a layer: what its kernels for TPUs give, and their gradients, against plain products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.models import feed_forward as module
from magnet_jax.models.feed_forward import feed_forward
from magnet_jax.models.layers import batch_split_by
from magnet_jax.programs import count_flops
from magnet_jax.sharding import batch_sharding, make_mesh


def inputs(rows=40, channels=128, hidden=256, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    x, gradient = (jnp.asarray(rng.normal(size=(2, rows, channels)), dtype) for _ in range(2))
    sizes = (channels, hidden), (hidden,), (hidden, channels), (channels,)
    parameters = [jnp.asarray(rng.normal(size=size) / np.sqrt(channels), jnp.float32) for size in sizes]
    return x, gradient, parameters


def written_out(x, gradient, kernel1, bias1, kernel2, bias2):
    """The result and all gradients in float64."""
    x, gradient, kernel1, kernel2 = (np.float64(a) for a in (x, gradient, kernel1, kernel2))
    before = x @ kernel1 + np.float64(bias1)
    hidden = np.maximum(before, 0)
    by_before = gradient @ kernel2.T * (before > 0)
    by_kernel1 = np.einsum("bsc,bsh->ch", x, by_before)
    by_kernel2 = np.einsum("bsh,bsc->hc", hidden, gradient)
    by_biases = (a.sum((0, 1)) for a in (by_before, gradient))
    by_bias1, by_bias2 = by_biases
    return hidden @ kernel2 + bias2, by_before @ kernel1.T, by_kernel1, by_bias1, by_kernel2, by_bias2


def both(function, x, gradient, parameters):
    result, pull = jax.vjp(function, x, *parameters)
    return result, *pull(gradient)


def by_kernels(x, gradient, parameters):
    result = module._by_rows(module._forward, x, parameters, interpret=True)
    return result, *module._by_rows(module._backward, x, parameters, gradient, interpret=True)


@pytest.mark.parametrize("way", [functools.partial(both, feed_forward), by_kernels])
# Rows of one block and of several; hidden values at once, and in three parts.
@pytest.mark.parametrize(("rows", "hidden"), [(40, 256), (520, 256), (40, 1152)])
def test_result_and_gradients(way, rows, hidden):
    x, gradient, parameters = inputs(rows, hidden=hidden)
    found = way(x, gradient, parameters)
    for mine, expected in zip(found, written_out(x, gradient, *parameters), strict=True):
        assert mine.shape == expected.shape
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_bfloat16_sums_in_float32():
    """Kernels round hidden values, plain products also what comes before them; gradients of parameters are float32."""
    x, gradient, parameters = inputs(dtype=jnp.bfloat16)
    rounded = [p if p.ndim == 1 else p.astype(jnp.bfloat16).astype(jnp.float32) for p in parameters]
    exact = written_out(x, gradient, *rounded)
    kernels, plain = by_kernels(x, gradient, parameters), both(feed_forward, x, gradient, parameters)
    for mine, other, expected in zip(kernels, plain, exact, strict=True):
        assert mine.dtype == other.dtype
        errors = [np.abs(np.float64(a) - expected).max() / np.abs(expected).max() for a in (mine, other)]
        assert errors[0] < 0.01
        assert errors[0] <= 1.5 * errors[1] + 1e-6


def test_devices_have_their_own_rows():
    x, gradient, parameters = inputs()
    expected = both(feed_forward, x, gradient, parameters)
    mesh = make_mesh((("data", 2),))
    with batch_split_by(batch_sharding(mesh), len(x)):
        split = [jax.device_put(a, batch_sharding(mesh)) for a in (x, gradient)]
        found = jax.jit(functools.partial(both, feed_forward))(*split, parameters)
    assert found[0].sharding.spec[0] in ("data", ("data",))
    for mine, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, whole, rtol=1e-5, atol=1e-5)


def test_flops_are_those_of_the_products():
    """Two forward and five backward, since hidden values are made again; a kernel counts as often as it has blocks."""
    x, gradient, parameters = inputs(rows=1040)
    product = 2 * 2 * 1040 * 128 * 256
    forward = jax.make_jaxpr(feed_forward)(x, *parameters)
    assert count_flops(forward.jaxpr) == 2 * product
    again = jax.make_jaxpr(functools.partial(both, feed_forward))(x, gradient, parameters)
    assert count_flops(again.jaxpr) == 7 * product
    kernel = jax.make_jaxpr(lambda *a: module._by_rows(module._forward, a[0], a[1:]))(x, *parameters)
    assert count_flops(kernel.jaxpr) == 2 * product


@pytest.mark.parametrize(
    ("rows", "channels", "hidden", "suits"),
    [(48, 128, 256, True), (48, 96, 256, False), (39, 128, 256, False), (48, 128, 8192, False)],
)
def test_what_does_not_suit_the_kernels_is_plain(rows, channels, hidden, suits):
    x, _, parameters = inputs(rows, channels, hidden)
    assert ("pallas_call" in str(jax.make_jaxpr(feed_forward)(x, *parameters))) is suits
