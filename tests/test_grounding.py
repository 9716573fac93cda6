"""Mask Grounding: which words are hidden, where the object is, and a head that fits any network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magnet_jax.losses import masked_words
from magnet_jax.models import MaskGrounding
from magnet_jax.models.grounding import fourier_position, mask_centre, mask_words, pixel_centres

MASK = 3


def sentences(count, lengths, longest=12):
    """[CLS] words [SEP] padding, `lengths` words each in turn."""
    words = np.resize(lengths, count)[:, None]
    position = np.arange(longest)
    ids = np.where(position <= words, 10 + (np.arange(count)[:, None] + position) % 40, 0)
    ids[:, 0] = 1
    ids[np.arange(count), words[:, 0] + 1] = 2
    return jnp.asarray(ids), jnp.asarray((position > 0) & (position <= words))


def test_only_words_are_masked_and_labels_are_what_was_there():
    ids, maskable = sentences(3000, [1, 3, 8])
    masked, labels = (np.asarray(x) for x in mask_words(jax.random.key(0), ids, maskable, MASK))
    ids, maskable = np.asarray(ids), np.asarray(maskable)
    selected = labels >= 0
    assert not (selected & ~maskable).any()
    assert (labels[selected] == ids[selected]).all()
    assert (labels[~selected] == -1).all()
    assert (masked[~selected] == ids[~selected]).all()
    assert ((masked == MASK) | (masked == ids)).all()
    assert selected.any(1).all()  # At least one of every sentence.
    # A sentence of one word has no choice; the fallback of a sentence of three takes each equally often.
    assert selected[::3, 1].all()
    shares = selected[1::3, 1:4].mean(0)
    assert np.abs(shares - shares.mean()).max() < 0.05


def test_shares_of_masking():
    ids, maskable = sentences(4000, [10])
    masked, labels = mask_words(jax.random.key(1), ids, maskable, MASK, at_least_one=False)
    selected = np.asarray(labels) >= 0
    words = selected[np.asarray(maskable)]
    assert words.mean() == pytest.approx(0.15, abs=0.006)
    assert (np.asarray(masked)[selected] == MASK).mean() == pytest.approx(0.9, abs=0.015)
    assert np.abs(selected[:, 1:11].mean(0) - 0.15).max() < 0.025  # No position is preferred.
    # With at least one: what the others have, plus one word of each sentence that would have none.
    _, labels = mask_words(jax.random.key(1), ids, maskable, MASK)
    more = np.asarray(labels) >= 0
    none = ~selected.any(1)
    assert (more[~none] == selected[~none]).all()
    assert (more[none].sum(1) == 1).all()
    assert none.mean() == pytest.approx(0.85**10, abs=0.03)


def test_options_of_masking():
    ids, maskable = sentences(200, [4])
    for keep, share in ((0.0, 1.0), (1.0, 0.0)):
        masked, labels = mask_words(jax.random.key(0), ids, maskable, MASK, ratio=1.0, keep=keep)
        assert ((np.asarray(labels) >= 0) == np.asarray(maskable)).all()
        assert (np.asarray(masked)[np.asarray(maskable)] == MASK).mean() == share
    masked, labels = mask_words(jax.random.key(0), ids, maskable, MASK, ratio=0.0, at_least_one=False)
    assert (np.asarray(labels) == -1).all()
    assert (masked == ids).all()
    # A share of the sentences takes part, whole; the others stay as they are.
    masked, labels = mask_words(jax.random.key(0), ids, maskable, MASK, ratio=1.0, sentences=0.25)
    takes_part = (np.asarray(labels) >= 0).any(1)
    assert ((np.asarray(labels) >= 0) == (np.asarray(maskable) & takes_part[:, None])).all()
    assert takes_part.mean() == pytest.approx(0.25, abs=0.08)
    assert (masked[~takes_part] == ids[~takes_part]).all()
    # A sentence without words, such as a padded example.
    nothing = jnp.zeros_like(maskable)
    masked, labels = mask_words(jax.random.key(0), ids, nothing, MASK)
    assert (np.asarray(labels) == -1).all()
    assert (masked == ids).all()


def test_masking_follows_its_key():
    ids, maskable = sentences(50, [6])
    a, b, c = (mask_words(jax.random.key(seed), ids, maskable, MASK) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (np.asarray(a[1]) != np.asarray(c[1])).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, bool])
def test_mask_centre(dtype):
    rng = np.random.default_rng(0)
    mask = rng.random((5, 6, 9)) < np.linspace(0, 0.8, 5)[:, None, None]
    mask[1] = False
    mask[1, 4, 7] = True
    assert not mask[0].any()
    result = np.asarray(mask_centre(jnp.asarray(mask.astype(dtype))))
    assert result.dtype == np.float32
    for centre, one in zip(result, mask, strict=True):
        inside = [((x + 0.5) / 9, (y + 0.5) / 6) for y in range(6) for x in range(9) if one[y, x]]
        np.testing.assert_allclose(centre, np.mean(inside, 0) if inside else [0.5, 0.5], atol=1e-6)


def test_object_and_pixel_of_one_place_have_one_code():
    height, width, channels = 5, 9, 24
    one_pixel = np.eye(height * width).reshape(-1, height, width)
    objects = np.asarray(fourier_position(mask_centre(jnp.asarray(one_pixel)), channels))
    pixels = np.asarray(fourier_position(pixel_centres(height, width), channels))
    np.testing.assert_allclose(objects, pixels, atol=1e-5)
    # Of all pixels an object's code is nearest to its own, by a margin that a head can use: neighbours differ by 1 and more.
    distance = np.linalg.norm(objects[:, None] - pixels, axis=-1)
    assert (distance + 10 * np.eye(len(pixels))).min() > 1


def test_fourier_position_entry_by_entry():
    x, y = 0.3, 0.85
    expected = []
    for wave in (np.sin, np.cos):
        expected.append([[wave(2 * np.pi * periods * p) for periods in (0.5, 1, 2, 4)] for p in (x, y)])
    expected = np.transpose(expected, (1, 0, 2)).ravel()
    np.testing.assert_allclose(fourier_position(jnp.array([[x, y]]), 16)[0], expected, atol=1e-5)
    np.testing.assert_allclose(fourier_position(jnp.array([[x, y]]), 13)[0], expected[:13], atol=1e-5)


def test_head_learns_to_say_what_is_where_the_object_is():
    """Colours drawn at random on a map, one of them where the object is: no word tells it, only the place.

    With the sine embedding of the decoder, or without a place on the mask token, these steps are not enough.
    """
    side, colours, examples, width = 3, 4, 32, 32
    module = MaskGrounding(layers=2, heads=2, intermediate=64, dropout=0.0)
    words, table = jax.random.normal(jax.random.key(0), (2, colours, width))
    looks = jax.random.normal(jax.random.key(1), (colours, 16))

    def draw(key):
        keys = jax.random.split(key)
        colour = jax.random.randint(keys[0], (examples, side * side), 0, colours)
        place = jax.random.randint(keys[1], (examples,), 0, side * side)
        mask = jax.nn.one_hot(place, side * side).reshape(-1, side, side)
        features = looks[colour].reshape(-1, side, side, 16)
        sentences, real = jnp.broadcast_to(words, (examples, *words.shape)), jnp.ones((examples, colours))
        return (sentences, real, features, mask, table), colour[jnp.arange(examples), place]

    def loss(params, key):
        inputs, answer = draw(key)
        logits = module.apply(params, *inputs)[:, 1]
        right = logits.argmax(-1) == answer
        return optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean(), right

    optimizer = optax.adam(3e-3)

    @jax.jit
    def train(params, key):
        def step(state, key):
            (_, right), gradient = jax.value_and_grad(loss, has_aux=True)(state[0], key)
            updates, moments = optimizer.update(gradient, state[1])
            return (optax.apply_updates(state[0], updates), moments), right.mean()

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 1800))[1]

    params = jax.jit(lambda: module.init(jax.random.key(2), *draw(jax.random.key(3))[0]))()
    shares = np.asarray(train(params, jax.random.key(4)))
    # Guessing one of the colours in the picture is right in 43 %; looking comes all at once, after 900 to 1400 steps.
    assert shares[:500].mean() < 0.5
    assert shares[-50:].mean() > 0.75


@pytest.fixture(scope="module")
def head():
    """The head on plain arrays: nothing of MagNet is around it."""
    rng = np.random.default_rng(0)
    arrays = {
        "words": rng.normal(size=(2, 6, 8)),
        "word_mask": np.array([[1] * 6, [1, 1, 1, 1, 0, 0]]),
        "image_features": rng.normal(size=(2, 2, 3, 5)),
        "mask": np.zeros((2, 12, 10)),
        "word_embedding": rng.normal(size=(20, 8)),
    }
    arrays["mask"][:, 2:5, 3:9] = 1
    arrays = {k: v.astype(np.int32 if k == "word_mask" else np.float32) for k, v in arrays.items()}
    module = MaskGrounding(layers=1, heads=2, intermediate=16)
    shapes = jax.eval_shape(lambda key: module.init(key, **arrays), jax.random.key(0))
    params = jax.tree.map(lambda s: (0.4 * rng.normal(size=s.shape)).astype(np.float32), shapes)
    apply = jax.jit(lambda arrays: module.apply(params, **arrays))
    return module, params, apply, arrays


def test_head_attaches_to_arrays_of_any_network(head):
    module, params, apply, arrays = head
    logits = apply(arrays)
    assert logits.shape == (2, 6, 20)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    # Other widths, sizes and vocabulary, as of another network.
    other = jax.eval_shape(
        lambda: module.init_with_output(
            jax.random.key(0), jnp.zeros((1, 4, 16)), jnp.ones((1, 4)), jnp.zeros((1, 3, 3, 7)),
            jnp.zeros((1, 9, 9)), jnp.zeros((11, 16)),
        )[0]
    )  # fmt: skip
    assert other.shape == (1, 4, 11)
    rough = jax.jit(lambda: module.clone(dtype=jnp.bfloat16).apply(params, **arrays))()
    assert rough.dtype == jnp.float32
    assert np.abs(rough - logits).max() < 0.1 * np.abs(logits).max()


def test_head_depends_on_centre_image_and_words(head):
    _, _, apply, arrays = head
    before = apply(arrays)

    def change(**fields):
        return np.abs(apply(arrays | fields) - before).max((1, 2))

    moved = np.roll(arrays["mask"], 4, 1)
    assert (change(mask=moved) > 1e-4).all()
    assert (change(image_features=arrays["image_features"] + np.eye(5, dtype=np.float32)[0]) > 1e-4).all()
    assert (change(image_features=arrays["image_features"][:, ::-1]) > 1e-4).all()  # Positions matter.
    assert (change(words=arrays["words"] + np.eye(8, dtype=np.float32)[0]) > 1e-4).all()
    assert (change(word_embedding=2 * arrays["word_embedding"]) > 1e-4).all()
    # Only the centre of a mask: a larger one around the same point is the same.
    larger = np.zeros_like(arrays["mask"])
    larger[:, 1:6, 2:10] = 1
    np.testing.assert_allclose(apply(arrays | {"mask": larger}), before, atol=1e-5)
    # Padding has no influence on real words.
    padding = np.where(arrays["word_mask"][..., None] > 0, arrays["words"], 7 * arrays["words"][:, ::-1])
    after = apply(arrays | {"words": padding})
    real = arrays["word_mask"] > 0
    np.testing.assert_allclose(after[real], before[real], atol=1e-5)


def test_vocabulary_projection_is_tied(head):
    """Two words of equal embedding and bias are equally likely."""
    _, params, apply, arrays = head
    table = arrays["word_embedding"].copy()
    table[7] = table[4]
    bias = params["params"]["vocabulary_bias"]
    logits = apply(arrays | {"word_embedding": table})
    np.testing.assert_allclose(logits[..., 7] - bias[7], logits[..., 4] - bias[4], atol=1e-5)


def test_loss_is_taken_at_masked_positions_only():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 6)).astype(np.float32)
    labels = np.array([[-1, 5, -1, -1], [-1, -1, 0, 2]])
    before, gradient = jax.value_and_grad(masked_words)(jnp.asarray(logits), labels, np.ones(2, np.float32))
    assert ((np.abs(gradient).max(-1) > 0) == (labels >= 0)).all()
    chosen = [logits[b, i] - np.log(np.exp(logits[b, i]).sum()) for b, i in ((0, 1), (1, 2), (1, 3))]
    assert float(before) == pytest.approx(-(chosen[0][5] + chosen[1][0] + chosen[2][2]) / 3, abs=1e-6)


def test_image_features_learn_from_masked_words(head):
    """Grounding trains the network through its words and its image features."""
    module, params, _, arrays = head
    labels = np.array([[-1, 4, -1, -1, -1, -1], [-1, -1, 9, -1, -1, -1]])

    def loss(words, image_features):
        logits = module.apply(params, **(arrays | {"words": words, "image_features": image_features}))
        return masked_words(logits, labels, jnp.ones(2))

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(arrays["words"], arrays["image_features"]):
        assert (np.abs(gradient).reshape(2, -1).max(-1) > 1e-6).all()
