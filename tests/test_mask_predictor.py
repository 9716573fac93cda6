"""Mask predictor: what the one query may look at, and the positions it looks from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.models.layers import resize_half_pixel, sine_position
from magnet_jax.models.mask_predictor import MaskPredictor

C = 8


@pytest.mark.parametrize(("height", "width", "channels"), [(3, 5, 8), (1, 2, 4), (4, 4, 12)])
def test_sine_position(height, width, channels):
    result = sine_position(height, width, channels).reshape(height, width, channels)
    half = channels // 2
    for y in range(height):
        for x in range(width):
            for i in range(channels):
                position, size = (y, height) if i < half else (x, width)
                angle = (position + 1) / (size + 1e-6) * 2 * np.pi
                angle /= 10000 ** (2 * ((i % half) // 2) / half)
                expected = np.sin(angle) if (i % half) % 2 == 0 else np.cos(angle)
                assert result[y, x, i] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("size", "new"), [((8, 6), (4, 3)), ((9, 7), (2, 3)), ((2, 3), (5, 5))])
def test_half_pixel_resize_has_no_antialiasing(size, new):
    x = np.random.default_rng(0).normal(size=(2, *size)).astype(np.float32)
    expected = np.zeros((2, *new))
    for i in range(new[0]):
        for j in range(new[1]):
            y = max((i + 0.5) * size[0] / new[0] - 0.5, 0)
            z = max((j + 0.5) * size[1] / new[1] - 0.5, 0)
            top, left = int(y), int(z)
            bottom, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
            upper = x[:, top, left] * (1 - z + left) + x[:, top, right] * (z - left)
            lower = x[:, bottom, left] * (1 - z + left) + x[:, bottom, right] * (z - left)
            expected[:, i, j] = upper * (1 - y + top) + lower * (y - top)
    np.testing.assert_allclose(resize_half_pixel(x, new), expected, atol=1e-5)


@pytest.fixture(scope="module")
def predictor():
    """A predictor of one layer, so that the second prediction depends on features only through the first's mask."""
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(1, n, n, C)).astype(np.float32) for n in (2, 4, 8)]
    mask_features = rng.normal(size=(1, 8, 8, C)).astype(np.float32)
    module = MaskPredictor(layers=1, heads=2, feedforward=16)
    shapes = jax.eval_shape(module.init, jax.random.key(0), features, mask_features)
    params = jax.tree.map(lambda s: (0.5 * rng.normal(size=s.shape)).astype(np.float32), shapes)
    return jax.jit(lambda f, m: module.apply(params, f, m)), features, mask_features


def toward_mask(apply, features, wanted):
    """Mask features whose first prediction has the signs of `wanted` [8, 8]: multiples of the mask embedding."""
    basis = np.eye(C, dtype=np.float32).reshape(1, 1, C, C)
    basis = np.concatenate([basis] + [np.zeros_like(basis)] * 7, 1)
    masks, _ = apply(features, basis)
    embedding = np.asarray(masks[0, 0, 0])  # Its product with every unit vector.
    result = wanted[None, :, :, None] * embedding
    masks, _ = apply(features, result.astype(np.float32))
    assert (np.sign(masks[0, 0]) == np.sign(wanted)).all()
    return result.astype(np.float32)


def classes(apply, features, mask_features):
    return np.asarray(apply(features, mask_features)[1])[-1, 0]


def test_blocked_pixels_have_no_influence_and_others_have(predictor):
    apply, features, _ = predictor
    wanted = -np.ones((8, 8))
    wanted[:4, 4:] = 1.0  # The upper right pixel of the 2x2 level is open, the others are blocked.
    mask_features = toward_mask(apply, features, wanted)
    before = classes(apply, features, mask_features)
    for y in range(2):
        for x in range(2):
            changed = features[0].copy()
            changed[0, y, x] += 1.0
            after = classes(apply, [changed, *features[1:]], mask_features)
            assert (np.abs(after - before).max() > 1e-4) == ((y, x) == (0, 1)), (y, x)


def test_zero_is_open(predictor):
    """Blocked is what is below 0.5 after the sigmoid, not at it."""
    apply, features, _ = predictor
    mask_features = np.zeros((1, 8, 8, C), np.float32)
    everything = classes(apply, features, mask_features)
    mask_features = toward_mask(apply, features, np.ones((8, 8)))
    np.testing.assert_allclose(classes(apply, features, mask_features), everything, atol=1e-6)
    half = np.where(np.arange(8) < 4, 0.0, -1.0) * np.ones((8, 1))
    embedding = mask_features  # Of a mask of ones.
    result = classes(apply, features, embedding * half[None, :, :, None].astype(np.float32))
    assert np.abs(result - everything).max() > 1e-4  # The right half is blocked, the left is not.
    changed = features[0].copy()
    changed[0, :, 0] += 1.0
    moved = classes(apply, [changed, *features[1:]], embedding * half[None, :, :, None].astype(np.float32))
    assert np.abs(moved - result).max() > 1e-4


def test_where_everything_is_blocked_nothing_is(predictor):
    apply, features, _ = predictor
    opened = classes(apply, features, toward_mask(apply, features, np.ones((8, 8))))
    blocked = classes(apply, features, toward_mask(apply, features, -np.ones((8, 8))))
    assert np.isfinite(blocked).all()
    np.testing.assert_allclose(blocked, opened, atol=1e-6)


def test_samples_are_blocked_one_by_one(predictor):
    apply, features, _ = predictor
    wanted = -np.ones((8, 8))
    wanted[:4, 4:] = 1.0
    some, none = toward_mask(apply, features, wanted), toward_mask(apply, features, -np.ones((8, 8)))
    both = apply([np.concatenate([f, f]) for f in features], np.concatenate([some, none]))[1][-1]
    np.testing.assert_allclose(both[0], classes(apply, features, some), atol=1e-6)
    np.testing.assert_allclose(both[1], classes(apply, features, none), atol=1e-6)


def test_no_gradient_through_the_blocking(predictor):
    apply, features, mask_features = predictor

    def class_sum(mask_features):
        return apply(features, mask_features)[1].sum()

    gradient = jax.grad(class_sum)(jnp.asarray(mask_features))
    assert (np.asarray(gradient) == 0).all()
    through_features = jax.grad(lambda f: apply([f, *features[1:]], mask_features)[1].sum())(features[0])
    assert np.isfinite(through_features).all()
    assert (np.asarray(through_features) != 0).any()


def test_layers_take_the_levels_in_turn():
    """Layer i reads level i mod 3; all predictions are returned, the last one last."""
    rng = np.random.default_rng(1)
    features = [rng.normal(size=(1, n, n, C)).astype(np.float32) for n in (1, 2, 4)]
    mask_features = rng.normal(size=(1, 4, 4, C)).astype(np.float32)
    module = MaskPredictor(layers=4, heads=2, feedforward=8)
    shapes = jax.eval_shape(module.init, jax.random.key(0), features, mask_features)
    params = jax.tree.map(lambda s: (0.5 * rng.normal(size=s.shape)).astype(np.float32), shapes)
    apply = jax.jit(module.apply)
    before = apply(params, features, mask_features)
    assert [x.shape for x in before] == [(5, 1, 4, 4), (5, 1, 2)]
    for level, first in ((0, 1), (1, 2), (2, 3)):
        changed = list(features)
        changed[level] = changed[level] + 1.0
        after = apply(params, changed, mask_features)
        same = [(np.asarray(a) == np.asarray(b)).all() for a, b in zip(before[1], after[1], strict=True)]
        assert same == [i < first for i in range(5)], level
