"""Deformable attention: all forms of sampling against loops and against each other, on one device and on two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from magnet_jax.hlo_text import cost
from magnet_jax.models import points
from magnet_jax.models.deformable import DeformableAttention, fan_bias
from magnet_jax.models.sampling import DENSE_PIXELS, FORMS, pixel_centres, sample
from magnet_jax.sharding import make_mesh

LEVELS = ((1, 1), (2, 3), (5, 4))
PIXELS, POINTS = 1 + 6 + 20, 2


def sampling_inputs(seed=0, spread=5.0):
    """Points around the maps, well inside, across the border and outside, and some on pixel centres."""
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(2, PIXELS, 2, 3))
    x, y = rng.uniform(-spread, 4 + spread, (2, 2, PIXELS, 2, len(LEVELS) * POINTS))
    x[:, ::3], y[:, 1::3] = np.round(x[:, ::3]), np.round(y[:, 1::3])
    weights = rng.normal(size=x.shape)
    return [jnp.asarray(a, jnp.float32) for a in (value, x, y, weights)]


@functools.cache
def value_and_gradients(form):
    """Compiled: (value, x, y, weights) -> samples, and the gradients of a sum of them with fixed weights."""

    @jax.jit
    def both(*arrays):
        result, pull = jax.vjp(lambda *a: sample(*a, LEVELS, form), *arrays)
        return result, pull(jnp.cos(jnp.arange(result.size, dtype=jnp.float32)).reshape(result.shape))

    return both


def sampled_by_loops(value, x, y, weights):
    value, x, y, weights = (np.asarray(a, np.float64) for a in (value, x, y, weights))
    out = np.zeros((*x.shape[:3], value.shape[-1]))
    starts = np.cumsum([0] + [h * w for h, w in LEVELS])
    for b, q, h, number in np.ndindex(*x.shape):
        level = number // POINTS
        height, width = LEVELS[level]
        px, py = x[b, q, h, number], y[b, q, h, number]
        for row in (int(np.floor(py)), int(np.floor(py)) + 1):
            for column in (int(np.floor(px)), int(np.floor(px)) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(py - row)) * (1 - abs(px - column)) * weights[b, q, h, number]
                    out[b, q, h] += share * value[b, starts[level] + row * width + column, h]
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_sampling_equals_loops(form, spread):
    inputs = sampling_inputs(1, spread)
    result = jax.jit(sample, static_argnums=(4, 5))(*inputs, LEVELS, form)
    np.testing.assert_allclose(result, sampled_by_loops(*inputs), atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_points_far_outside_see_nothing(form):
    value, x, y, weights = sampling_inputs(2)
    sign = jnp.where(jnp.arange(x.shape[-1]) % 2 == 0, 1.0, -1.0)
    for far_x, far_y in ((x + 1e6 * sign, y), (x, y + 1e6 * sign), (x - 3e9, y + 3e9)):
        result, gradients = value_and_gradients(form)(value, far_x, far_y, weights)
        assert (np.asarray(result) == 0).all()
        for gradient in gradients:
            assert (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("form", [form for form in FORMS if form != "gather"])
def test_every_form_has_the_gradients_of_gather(form):
    inputs = sampling_inputs(3, 2.0)
    pairs = zip(*(value_and_gradients(name)(*inputs)[1] for name in ("gather", form)), strict=True)
    for name, (gather, other) in zip(("value", "x", "y", "weights"), pairs, strict=True):
        assert np.abs(gather).max() > 0.1, name
        np.testing.assert_allclose(other, gather, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "gather"])
def test_nothing_is_kept_for_the_backward_pass(form):
    """What lies between forward and backward is the arguments."""
    arguments = sampling_inputs(8)
    kept = jax.eval_shape(lambda *a: jax.vjp(lambda *a: sample(*a, LEVELS, form), *a)[1], *arguments)
    assert sum(x.size for x in jax.tree.leaves(kept)) <= sum(x.size for x in arguments)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_slopes(form):
    """Against differences of the loops, along a random direction, away from pixel centres where there is a kink."""
    value, x, y, weights = sampling_inputs(5, 1.0)
    x, y = (np.floor(a) + 0.2 + 0.6 * (a - np.floor(a)) for a in (x, y))
    result, gradients = value_and_gradients(form)(value, x, y, weights)
    target = np.cos(np.arange(result.size)).reshape(result.shape)
    inputs = [np.asarray(a, np.float64) for a in (value, x, y, weights)]
    rng = np.random.default_rng(6)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[i] = moved[i] + sign * 1e-3 * direction
            ends.append((sampled_by_loops(*moved) * target).sum())
        slope = (ends[0] - ends[1]) / 2e-3
        assert (np.asarray(gradient) * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_two_devices_equal_one(form):
    inputs = sampling_inputs(7)
    split = jax.NamedSharding(make_mesh((("data", -1),)), PartitionSpec("data"))
    alone = value_and_gradients(form)(*inputs)
    both = value_and_gradients(form)(*jax.device_put(inputs, split))
    assert len(both[0].sharding.device_set) == 2
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(both), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_way_back_in_blocks_of_queries(devices, monkeypatch):
    """Of seven queries, the last of six; each device has the blocks of its own pictures."""
    monkeypatch.setattr(points, "BLOCK", 100)
    inputs = sampling_inputs(10, 2.0)
    _, expected = value_and_gradients("gather")(*inputs)
    split = jax.NamedSharding(make_mesh((("data", -1),), jax.devices()[:devices]), PartitionSpec("data"))
    lowered = value_and_gradients.__wrapped__("points").lower(*jax.device_put(inputs, split))
    assert "tensor<4x2x7x2x6xf32>" in lowered.as_text()
    compiled = lowered.compile()
    assert not cost(compiled.as_text()).counts
    _, found = compiled(*jax.device_put(inputs, split))
    for name, a, b in zip(("value", "x", "y", "weights"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_fan_of_initial_offsets():
    fan = fan_bias(8, 3, 4).reshape(8, 3, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(directions):
        for level in range(3):
            for point in range(4):
                expected = np.array(direction) * (point + 1)
                np.testing.assert_allclose(fan[head, level, point], expected, atol=1e-6)
    # Heads in between: the larger part is the number of the point.
    np.testing.assert_allclose(np.abs(fan_bias(5, 1, 3).reshape(5, 3, 2)).max(-1), [[1, 2, 3]] * 5, atol=1e-6)


def test_pixel_centres():
    x, y = pixel_centres(((1, 2), (2, 1)), 1)
    # In pixels of the first level, and of the second.
    np.testing.assert_allclose(x[:, 0], [[0, -0.25], [1, 0.25], [0.5, 0], [0.5, 0]], atol=1e-7)
    np.testing.assert_allclose(y[:, 0], [[0, 0.5], [0, 0.5], [-0.25, 0], [0.25, 1]], atol=1e-7)


def module_inputs(seed=0):
    rng = np.random.default_rng(seed)
    query, source = rng.normal(size=(2, 2, PIXELS, 4)).astype(np.float32)
    module = DeformableAttention(heads=2, points=POINTS, sampling="gather")
    params = jax.tree.map(
        lambda s: (0.7 * rng.normal(size=s.shape)).astype(np.float32),
        jax.eval_shape(lambda k: module.init(k, query, source, LEVELS), jax.random.key(0)),
    )
    return module, params, query, source


def test_attention_written_out():
    module, params, query, source = module_inputs()
    p = params["params"]

    def linear(x, name):
        return x @ p[name]["kernel"] + p[name]["bias"]

    value = linear(source, "value").reshape(2, PIXELS, 2, 2)
    offsets = linear(query, "offsets").reshape(2, PIXELS, 2, len(LEVELS), POINTS, 2)
    logits = linear(query, "weights").reshape(2, PIXELS, 2, len(LEVELS) * POINTS)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    x, y = np.zeros((2, 2, PIXELS, 2, len(LEVELS) * POINTS))
    centres = [
        ((column + 0.5) / width, (row + 0.5) / height)
        for height, width in LEVELS
        for row in range(height)
        for column in range(width)
    ]
    for b, q, h, level, point in np.ndindex(2, PIXELS, 2, len(LEVELS), POINTS):
        height, width = LEVELS[level]
        # As said in the spec: the offset divided by the level's size, in image coordinates, then to its pixels.
        image_x = centres[q][0] + offsets[b, q, h, level, point, 0] / width
        image_y = centres[q][1] + offsets[b, q, h, level, point, 1] / height
        x[b, q, h, level * POINTS + point] = image_x * width - 0.5
        y[b, q, h, level * POINTS + point] = image_y * height - 0.5
    sampled = sampled_by_loops(value, x, y, weights)
    expected = linear(sampled.reshape(2, PIXELS, 4), "output")
    for sampling in (*FORMS, "auto"):
        apply = jax.jit(module.clone(sampling=sampling).apply, static_argnums=3)
        result = apply(params, query, source, LEVELS)
        np.testing.assert_allclose(result, expected, atol=2e-5, err_msg=sampling)


def test_attention_starts_uniform_with_the_fan():
    module, _, query, source = module_inputs()
    params = module.init(jax.random.key(0), query, source, LEVELS)["params"]
    for name in ("offsets", "weights"):
        assert (np.asarray(params[name]["kernel"]) == 0).all()
    np.testing.assert_array_equal(params["offsets"]["bias"], fan_bias(2, len(LEVELS), POINTS))
    for name in ("weights", "value", "output"):
        assert (np.asarray(params[name]["bias"]) == 0).all()


def operations(pixels, form, platform):
    """How many of some operations the lowered program of a form has, forward and backward."""
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, pixels, 4, 32), *3 * [(1, pixels, 4, 1)])
    ]
    program = jax.jit(jax.grad(lambda *a: sample(*a, ((pixels, 1),), form).sum(), (0, 1, 2, 3)))
    text = program.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    names = ("gather", "scatter", "dot_general", "while")
    return *(text.count(f"stablehlo.{name}") for name in names), text.count("tpu_custom_call")


@pytest.mark.parametrize(("platform", "large"), [("cpu", "points"), ("tpu", "windows"), ("cuda", "rows")])
def test_automatic_choice_depends_on_pixels_and_platform(platform, large):
    counts = {form: operations(DENSE_PIXELS + 1, form, platform) for form in FORMS}
    anywhere = counts.pop("anywhere")  # As 'auto', without kernels.
    assert len(set(counts.values())) == len(counts)  # So that the count tells which it is.
    assert anywhere == counts["points" if platform == "cpu" else "rows"]
    assert operations(DENSE_PIXELS, "auto", platform) == counts["points" if platform == "cpu" else "dense"]
    assert operations(DENSE_PIXELS + 1, "auto", platform) == counts[large]
    assert (counts["windows"][-1] > 0) == (platform == "tpu")
