"""Losses: reference values, loops, the blockwise form, and samples that must not count."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax import losses
from tests.loss_values import loss_values

DATA = Path(__file__).parent / "data"
TAU = 0.3


@pytest.mark.parametrize("block", [None, 7])
def test_reference_values(block):
    expected = json.loads((DATA / "losses.json").read_text())
    tau = expected.pop("tau")
    with np.load(DATA / "losses.npz") as inputs:
        assert loss_values(inputs, tau, block) == pytest.approx(expected, rel=1e-5)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def masks(seed=0):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(3, 4, 5)).astype(np.float32)
    target = rng.random((3, 4, 5)).astype(np.float32)
    return logits, target, np.array([1.0, 0.0, 1.0], np.float32)


def test_binary_cross_entropy_by_loops():
    logits, target, weight = masks()
    total = 0.0
    for b in (0, 2):
        for y in range(4):
            for x in range(5):
                p = sigmoid(float(logits[b, y, x]))
                total -= target[b, y, x] * np.log(p) + (1 - target[b, y, x]) * np.log(1 - p)
    assert float(losses.binary_cross_entropy(logits, target, weight)) == pytest.approx(
        total / 2 / 20, rel=1e-5
    )


def test_binary_cross_entropy_of_large_logits_is_finite():
    value, gradient = jax.value_and_grad(losses.binary_cross_entropy)(
        jnp.array([[[1e4, -1e4]]]), jnp.array([[[0.0, 1.0]]]), jnp.ones(1)
    )
    assert float(value) == pytest.approx(1e4)
    np.testing.assert_allclose(gradient, [[[0.5, -0.5]]])


def test_dice_by_loops():
    logits, target, weight = masks(1)
    total = 0.0
    for b in (0, 2):
        overlap = area = 0.0
        for y in range(4):
            for x in range(5):
                p = sigmoid(float(logits[b, y, x]))
                overlap += p * target[b, y, x]
                area += p + target[b, y, x]
        total += 1 - (2 * overlap + 1) / (area + 1)
    assert float(losses.dice(logits, target, weight)) == pytest.approx(total / 2, rel=1e-5)


def test_class_cross_entropy_by_loops():
    logits = np.array([[0.5, -1.0], [2.0, 0.3], [0.0, 1.0]], np.float32)
    expected = [-np.log(np.exp(row[t]) / np.exp(row).sum()) for row, t in ((logits[0], 1), (logits[2], 0))]
    value = losses.class_cross_entropy(logits, np.array([1, 1, 0]), np.array([1.0, 0.0, 1.0]))
    assert float(value) == pytest.approx(np.mean(expected), rel=1e-5)


def test_masked_words_by_loops():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 6)).astype(np.float32)
    labels = np.array([[-1, 5, 0, -1], [1, 1, 1, 1], [-1, -1, -1, 2]])
    terms = []
    for b in (0, 2):  # The second is padding.
        for i in range(4):
            if labels[b, i] >= 0:
                terms.append(np.log(np.exp(logits[b, i]).sum()) - logits[b, i, labels[b, i]])
    value = losses.masked_words(logits, labels, np.array([1.0, 0.0, 1.0], np.float32))
    assert float(value) == pytest.approx(np.mean(terms), rel=1e-5)
    assert float(losses.masked_words(logits, np.full_like(labels, -1), np.ones(3, np.float32))) == 0


# --- contrast ----------------------------------------------------------------------------------------------------------


def contrast_inputs(seed=0, batch=4, pixels=11, channels=5):
    rng = np.random.default_rng(seed)
    features = 2 * rng.normal(size=(batch, pixels, channels)).astype(np.float32)
    text = 3 * rng.normal(size=(batch, channels)).astype(np.float32)
    foreground = rng.random((batch, pixels)) < 0.4
    foreground[:, :2], foreground[:, -1] = True, False
    return features, text, foreground


def pixel_to_pixel_by_loops(f, foreground):
    """One sample, as the formula stands: normalised features [N, C]."""
    f = f / np.linalg.norm(f, axis=-1, keepdims=True)
    terms = []
    for i in np.flatnonzero(foreground):
        same = sum(np.exp(f[i] @ f[j] / TAU) for j in np.flatnonzero(foreground) if j != i)
        other = sum(np.exp(f[i] @ f[k] / TAU) for k in np.flatnonzero(~foreground))
        terms.append(-np.log(same / (same + other)))
    return np.mean(terms)


def pixel_to_text_by_loops(f, t, foreground):
    f, t = f / np.linalg.norm(f, axis=-1, keepdims=True), t / np.linalg.norm(t)
    terms = []
    for i in np.flatnonzero(foreground):
        own = np.exp(f[i] @ t / TAU)
        other = sum(np.exp(f[k] @ t / TAU) for k in np.flatnonzero(~foreground))
        terms.append(-np.log(own / (own + other)))
    return np.mean(terms)


@pytest.mark.parametrize("block", [None, 4, 11, 64])
def test_pixel_to_pixel_by_loops(block):
    features, _, foreground = contrast_inputs()
    foreground[1] = False  # Nothing to contrast,
    foreground[1, 3] = True  # nor is one pixel enough.
    weight = np.array([1, 1, 0, 1], np.float32)
    expected = np.mean([pixel_to_pixel_by_loops(features[b], foreground[b]) for b in (0, 3)])
    value = losses.pixel_to_pixel(features, foreground, weight, tau=TAU, block=block)
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_pixel_to_text_by_loops():
    features, text, foreground = contrast_inputs()
    foreground[1] = True
    weight = np.array([1, 1, 0, 1], np.float32)
    expected = np.mean([pixel_to_text_by_loops(features[b], text[b], foreground[b]) for b in (0, 3)])
    value = losses.pixel_to_text(features, text, foreground, weight, tau=TAU)
    assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("block", [1, 4, 11, 64])
def test_blockwise_equals_dense(block):
    features, _, foreground = contrast_inputs(1)
    foreground[2] = True
    weight = np.array([1, 1, 1, 0], np.float32)

    def loss(features, block):
        return losses.pixel_to_pixel(features, foreground, weight, tau=TAU, block=block)

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    dense, dense_gradient = both(features, None)
    value, gradient = both(features, block)
    assert float(value) == pytest.approx(float(dense), rel=1e-6)
    assert np.abs(dense_gradient[:2]).max() > 0.01
    np.testing.assert_allclose(gradient, dense_gradient, atol=1e-6)


def test_blockwise_never_holds_the_whole_matrix():
    pixels = 96
    arguments = jnp.zeros((1, pixels, 4)), jnp.zeros((1, pixels), bool), jnp.ones(1)

    def square_arrays(block):
        loss = functools.partial(losses.pixel_to_pixel, tau=TAU, block=block)
        return str(jax.make_jaxpr(jax.grad(loss))(*arguments)).count(f"{pixels},{pixels}]")

    assert square_arrays(None) > 0
    assert square_arrays(8) == 0


DEGENERATE = {
    "no foreground": [],
    "one foreground pixel": [4],
    "no background": range(11),
    "zero features": [0, 1, 2],
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("term", ["pixel", "pixel blockwise", "text"])
def test_degenerate_samples_give_zero_and_finite_gradients(case, term):
    features, text, _ = contrast_inputs(2, batch=1)
    foreground = np.isin(np.arange(11), DEGENERATE[case])[None]
    if case == "zero features":
        features, text = np.zeros_like(features), np.zeros_like(text)

    def loss(features, text):
        if term == "text":
            return losses.pixel_to_text(features, text, foreground, jnp.ones(1), tau=0.01)
        block = 4 if term == "pixel blockwise" else None
        return losses.pixel_to_pixel(features, foreground, jnp.ones(1), tau=0.01, block=block)

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(features, text)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)
    if case != "zero features":
        assert float(value) == 0
        assert all((np.asarray(g) == 0).all() for g in gradients)


def test_degenerate_samples_leave_the_mean_of_the_others():
    features, text, foreground = contrast_inputs(3, batch=3)
    foreground[1], foreground[2, 1:] = False, False
    for function in (
        lambda f, m, w, t: losses.pixel_to_pixel(f, m, w, tau=TAU),
        lambda f, m, w, t: losses.pixel_to_text(f, t, m, w, tau=TAU),
    ):
        alone = function(features[:1], foreground[:1], np.ones(1), text[:1])
        assert float(function(features, foreground, np.ones(3), text)) == pytest.approx(
            float(alone), rel=1e-6
        )


# --- padded examples, reduced masks ------------------------------------------------------------------------------------


def test_padded_examples_have_no_effect():
    logits, target, _ = masks(2)
    features, text, foreground = contrast_inputs(4, batch=3)
    words = np.random.default_rng(5).normal(size=(3, 4, 6)).astype(np.float32)
    labels = np.array([[-1, 2, -1, 0], [1, -1, -1, -1], [3, 3, 3, 3]])
    terms = {
        "bce": lambda s, w: losses.binary_cross_entropy(logits[s], target[s], w),
        "dice": lambda s, w: losses.dice(logits[s], target[s], w),
        "class": lambda s, w: losses.class_cross_entropy(text[s, :2], np.array([0, 1, 1])[s], w),
        "words": lambda s, w: losses.masked_words(words[s], labels[s], w),
        "pixel": lambda s, w: losses.pixel_to_pixel(features[s], foreground[s], w),
        "text": lambda s, w: losses.pixel_to_text(features[s], text[s], foreground[s], w),
    }
    for name, term in terms.items():
        padded = float(term(slice(None), np.array([1.0, 1.0, 0.0], np.float32)))
        assert padded == pytest.approx(float(term(slice(0, 2), np.ones(2, np.float32))), rel=1e-6), name
        assert float(term(slice(None), np.zeros(3, np.float32))) == 0, name


@pytest.mark.parametrize(
    ("size", "new"),
    [((8, 12), (2, 3)), ((10, 7), (3, 2)), ((5, 5), (5, 5)), ((7, 9), (4, 9)), ((100, 76), (25, 19))],
)
def test_area_reduce(size, new):
    rng = np.random.default_rng(0)
    mask = (rng.random((2, *size)) < 0.5).astype(np.uint8)
    # Every pixel cut into so many that cells consist of whole ones.
    fine = mask.repeat(new[0], 1).repeat(new[1], 2).astype(np.float64)
    expected = fine.reshape(2, new[0], size[0], new[1], size[1]).mean((2, 4))
    result = losses.area_reduce(mask, new)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, atol=1e-5)
    np.testing.assert_allclose(losses.area_reduce(np.ones_like(mask), new), 1.0, atol=1e-5)
