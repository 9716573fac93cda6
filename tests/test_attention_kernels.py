"""Kernels of window attention against the same written out, and the choice of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from magnet_jax.models import attention_kernels
from magnet_jax.models.attention import WindowMask, attend_by_lanes, attend_in_windows
from magnet_jax.models.layers import batch_split_by
from magnet_jax.sharding import make_mesh

BATCH, WINDOWS, PIXELS, CHANNELS, HEADS, SCALE = 2, 3, 16, 256, 8, 0.3


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    qkv = rng.normal(size=(BATCH, WINDOWS, PIXELS, 3 * CHANNELS))
    bias = rng.normal(size=(HEADS, PIXELS, PIXELS))
    gradient = rng.normal(size=(BATCH, WINDOWS, PIXELS, CHANNELS))
    return jnp.asarray(qkv, dtype), jnp.asarray(bias, jnp.float32), jnp.asarray(gradient, dtype)


def mask_of(masked):
    """Two windows of one kind and one of another, or none."""
    regions = np.random.default_rng(1).integers(0, 2, (WINDOWS, PIXELS))
    regions[2] = regions[0]
    return WindowMask.of(regions) if masked else None


def by_lanes(qkv, bias, mask):
    added = None if mask is None else mask.masks[mask.kinds]
    return attend_by_lanes(*jnp.split(qkv, 3, -1), bias, scale=SCALE, mask=added)


@pytest.mark.parametrize("masked", [False, True])
def test_kernels_equal_attention_written_out(masked):
    qkv, bias, gradient = inputs()
    mask = mask_of(masked)
    expected, pull = jax.vjp(lambda *a: by_lanes(*a, mask), qkv, bias)
    arguments = None if mask is None else (mask.kinds, mask.masks)
    found = attention_kernels.forward(qkv, bias, arguments, SCALE, interpret=True)
    gradients = attention_kernels.backward(qkv, bias, gradient, arguments, SCALE, interpret=True)
    for a, b in zip((found, *gradients), (expected, *pull(gradient)), strict=True):
        assert np.abs(b).max() > 1
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16_is_as_near_as_without_kernels():
    qkv, bias, gradient = inputs()
    exact = [by_lanes(qkv, bias, None), *jax.vjp(lambda *a: by_lanes(*a, None), qkv, bias)[1](gradient)]
    qkv, bias, gradient = inputs(jnp.bfloat16)
    plain, pull = jax.vjp(lambda *a: by_lanes(*a, None), qkv, bias)
    kernels = [
        attention_kernels.forward(qkv, bias, None, SCALE, interpret=True),
        *attention_kernels.backward(qkv, bias, gradient, None, SCALE, interpret=True),
    ]
    for a, b, c in zip(exact, kernels, (plain, *pull(gradient)), strict=True):
        far, near = (np.abs(np.asarray(x, np.float32) - a).mean() for x in (b, c))
        assert 0 < far < 1.5 * near


def test_few_kinds_of_windows():
    mask = mask_of(True)
    assert mask.masks.shape == (2, PIXELS, PIXELS)
    assert mask.kinds[0] == mask.kinds[2] != mask.kinds[1]
    assert set(mask.masks.ravel()) == {0, -100}


@pytest.mark.parametrize("devices", [1, 2])
def test_gradients_are_those_written_out_on_any_number_of_devices(devices):
    qkv, bias, gradient = inputs()
    mask = mask_of(True)
    expected = jax.tree.leaves(jax.vjp(lambda *a: by_lanes(*a, mask), qkv, bias)[1](gradient))
    sharding = jax.NamedSharding(make_mesh((("data", -1),), jax.devices()[:devices]), PartitionSpec("data"))

    @jax.jit
    def gradients(qkv, bias, gradient):
        with batch_split_by(sharding, BATCH):
            return jax.vjp(lambda *a: attend_in_windows(*a, mask, SCALE), qkv, bias)[1](gradient)

    qkv, gradient = jax.device_put((qkv, gradient), sharding)
    for a, b in zip(gradients(qkv, bias, gradient), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("platform", "heads", "kernels"),
    [("tpu", HEADS, True), ("cpu", HEADS, False), ("tpu", 16, True), ("tpu", 6, False)],
)
def test_a_tpu_has_kernels_where_heads_fill_its_lanes(platform, heads, kernels):
    channels = CHANNELS if CHANNELS % heads == 0 else 32 * heads
    shapes = ((1, 2, PIXELS, 3 * channels), (heads, PIXELS, PIXELS))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(jax.grad(lambda *a: attend_in_windows(*a, None, SCALE).sum(), (0, 1)))
    text = program.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    assert ("tpu_custom_call" in text) is kernels
