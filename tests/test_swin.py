"""Swin: windows, shifts, padding and merging against loops over single pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug
from magnet_jax.errors import UserError
from magnet_jax.models.layers import Remat, path_scales, sine_position
from magnet_jax.models.patches import PatchEmbed, PatchMerging, PatchProjection
from magnet_jax.models.swin import (
    ATTENTION_FORMS,
    Swin,
    SwinBlock,
    SwinStage,
    WindowAttention,
    relative_position_index,
    shift_mask,
)
from magnet_jax.network import build_model


def random_params(rng, module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def layer_norm(x, params, epsilon=1e-5):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * params["scale"] + params["bias"]


@pytest.mark.parametrize("window", [2, 3, 4])
def test_relative_position_index(window):
    index = relative_position_index(window)
    assert index.shape == (window**2, window**2)
    for query in range(window**2):
        for key in range(window**2):
            dy, dx = query // window - key // window, query % window - key % window
            assert index[query, key] == (dy + window - 1) * (2 * window - 1) + dx + window - 1
    assert set(index.ravel()) == set(range((2 * window - 1) ** 2))


# (4, 4, 4): a single window, which is cut as well.
@pytest.mark.parametrize(("height", "width", "window"), [(8, 12, 4), (4, 4, 4), (6, 3, 3), (10, 5, 5)])
def test_shift_mask(height, width, window):
    shift = window // 2
    region, count = np.zeros((height, width), int), 0
    for rows in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
        for columns in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
            region[rows, columns] = count
            count += 1
    mask = shift_mask(height, width, window)
    assert mask.shape == (height // window * (width // window), window**2, window**2)
    for number, values in enumerate(mask):
        y, x = number // (width // window) * window, number % (width // window) * window
        for a in range(window**2):
            for b in range(window**2):
                same = region[y + a // window, x + a % window] == region[y + b // window, x + b % window]
                assert values[a, b] == (0 if same else -100)
    assert (mask[-1] == -100).any()


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (3, 4)])
def test_window_attention_pixel_by_pixel(form, shifted, size):
    """Padding takes part as a zero pixel; a pixel sees those of its window and, if shifted, of its region."""
    rng = np.random.default_rng(0)
    (height, width), window, heads, channels = size, 4, 2, 4
    x = rng.normal(size=(1, height, width, channels)).astype(np.float32)
    module = WindowAttention(heads, window, shifted, form=form)
    params = random_params(rng, module, x)
    p = params["params"]
    padded_height, padded_width = -(-height // window) * window, -(-width // window) * window
    shift = window // 2 if shifted else 0
    padded = np.zeros((padded_height, padded_width, channels))
    padded[:height, :width] = x[0]
    qkv = (padded @ p["qkv"]["kernel"] + p["qkv"]["bias"]).reshape(padded_height, padded_width, 3, heads, -1)
    expected = np.zeros((height, width, channels))

    def rolled(y, x):
        return (y - shift) % padded_height, (x - shift) % padded_width

    for y in range(height):
        for x_ in range(width):
            own_y, own_x = rolled(y, x_)
            logits, values = [], []
            for key_y in range(padded_height):
                for key_x in range(padded_width):
                    other_y, other_x = rolled(key_y, key_x)
                    if own_y // window != other_y // window or own_x // window != other_x // window:
                        continue
                    # Neighbours in a rolled window that are no neighbours in the map.
                    apart = (key_y - y, key_x - x_) != (other_y - own_y, other_x - own_x)
                    bias = p["relative_position_bias"].reshape(2 * window - 1, 2 * window - 1, heads)[
                        own_y - other_y + window - 1, own_x - other_x + window - 1
                    ]
                    scores = (qkv[y, x_, 0] * qkv[key_y, key_x, 1]).sum(-1) * (channels // heads) ** -0.5
                    logits.append(scores + bias - 100.0 * apart)
                    values.append(qkv[key_y, key_x, 2])
            weights = np.exp(np.array(logits) - np.max(logits, 0))
            weights /= weights.sum(0)
            mixed = (weights[..., None] * np.array(values)).sum(0).reshape(-1)
            expected[y, x_] = mixed @ p["proj"]["kernel"] + p["proj"]["bias"]
    np.testing.assert_allclose(jax.jit(module.apply)(params, x)[0], expected, atol=2e-5)


# Heads that fill the lanes once, several times, not at all, and are too wide or too odd to share them.
@pytest.mark.parametrize(("heads", "channels"), [(4, 128), (12, 384), (2, 8), (2, 320), (3, 120)])
def test_forms_of_attention_agree_in_value_and_gradient(heads, channels):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(2, 5, 6, channels)).astype(np.float32)
    forms = [WindowAttention(heads, 4, True, form=form) for form in ATTENTION_FORMS]
    shapes = jax.eval_shape(forms[0].init, jax.random.key(0), x)
    params = jax.tree.map(lambda s: 0.1 * rng.normal(size=s.shape).astype(np.float32), shapes)

    def loss(module, params, x):
        return (jnp.cos(jnp.arange(x.size).reshape(x.shape)) * module.apply(params, x)).sum()

    found = [jax.jit(jax.value_and_grad(loss, (1, 2)), static_argnums=0)(form, params, x) for form in forms]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize(
    ("platform", "form"), [("tpu", "lanes"), ("cpu", "heads"), ("gpu", "heads"), (None, "heads")]
)
def test_the_platform_chooses_the_form(platform, form):
    config = debug.get_config().model
    config.bert.vocab_size = 10
    assert build_model(config, platform).swin["attention"] == form
    config.swin.attention = "lanes"
    assert build_model(config, platform).swin["attention"] == "lanes"
    config.swin.attention = "rows"
    with pytest.raises(
        UserError, match="config.model.swin.attention is 'rows'; expected 'auto' or one of heads, lanes"
    ):
        build_model(config, platform)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
def test_patch_merging_order_and_padding(size, by_rows):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    params = random_params(rng, PatchMerging(), x)
    p = params["params"]
    padded = np.zeros((2, -(-size[0] // 2) * 2, -(-size[1] // 2) * 2, 3))
    padded[:, : size[0], : size[1]] = x
    quarters = [padded[:, dy::2, dx::2] for dy, dx in ((0, 0), (1, 0), (0, 1), (1, 1))]
    expected = layer_norm(np.concatenate(quarters, -1), p["norm"]) @ p["reduction"]["kernel"]
    np.testing.assert_allclose(PatchMerging(by_rows).apply(params, x), expected, atol=1e-5)


@pytest.mark.parametrize("by_planes", [False, True])
def test_patches_are_padded_right_and_bottom(by_planes):
    rng = np.random.default_rng(2)
    image = rng.normal(size=(1, 6, 9, 3)).astype(np.float32)
    module = PatchEmbed(5, by_planes=by_planes)
    params = random_params(rng, module, image)
    p = params["params"]
    padded = np.zeros((8, 12, 3))
    padded[:6, :9] = image[0]
    expected = np.zeros((2, 3, 5))
    for y in range(2):
        for x in range(3):
            patch = padded[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            expected[y, x] = np.einsum("hwc,hwcd->d", patch, p["proj"]["kernel"]) + p["proj"]["bias"]
    np.testing.assert_allclose(module.apply(params, image)[0], layer_norm(expected, p["norm"]), atol=1e-5)


def test_both_ways_of_projecting_patches_agree():
    """On pictures of more columns than a register has, in value and gradient."""
    rng = np.random.default_rng(6)
    image = rng.normal(size=(2, 8, 268, 3)).astype(np.float32)
    params = random_params(rng, PatchProjection(5, 4), image)

    def values(by_planes):
        module = PatchProjection(5, 4, by_planes)
        out, pull = jax.vjp(module.apply, params, image)
        return jax.tree.leaves(
            (out, pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)))
        )

    for a, b in zip(values(False), values(True), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_absolute_position_is_added_to_the_patches():
    rng = np.random.default_rng(5)
    image = rng.normal(size=(1, 8, 12, 3)).astype(np.float32)
    params = random_params(rng, PatchEmbed(8), image)
    plain = PatchEmbed(8).apply(params, image)
    placed = (
        Swin(embed_dim=8, position=True)
        .bind({"params": {"patch_embed": params["params"]}})
        .patch_embed(image)
    )
    np.testing.assert_allclose(placed[0] - plain[0], sine_position(2, 3, 8).reshape(2, 3, 8), atol=1e-5)


def test_every_second_block_is_shifted_and_drop_path_rises():
    swin = Swin(embed_dim=4, depths=(2, 1, 3, 1), heads=(1, 1, 1, 1), window=2, drop_path=0.3)
    bound = swin.bind({}, rngs={"dropout": jax.random.key(0)})
    scales = bound.scales(200, train=True)
    assert [scale.shape for scale in scales] == [(depth, 2, 200) for depth in (2, 1, 3, 1)]
    # What is kept is scaled by what keeps the mean.
    np.testing.assert_allclose(np.concatenate(scales).max((1, 2)), 1 / (1 - np.arange(7) * 0.05), rtol=1e-6)
    assert bound.scales(200, train=False) == bound.clone(drop_path=0.0).scales(200, train=True) == [None] * 4
    # Shifted blocks see across the border of windows, unshifted ones do not.
    x = np.random.default_rng(3).normal(size=(1, 4, 4, 4)).astype(np.float32)
    for blocks, expected in ((1, False), (2, True)):
        stage = (
            Swin(embed_dim=4, depths=(blocks, 1, 1, 1), heads=(1,) * 4, window=2).bind({}).stage[0].clone()
        )
        # Small ones, so that attention is not on one pixel alone.
        params = jax.tree.map(lambda p: 0.3 * p, random_params(np.random.default_rng(4), stage, x))
        # Other pixels on the right: not the same ones plus a constant, which normalisation would take away.
        other = np.where((np.arange(4) > 1)[:, None], x[..., ::-1], x)
        changed = np.asarray(stage.apply(params, x)) != np.asarray(stage.apply(params, other))
        assert changed[0, :, :2].any() == expected


def test_path_scales_drop_branches_of_examples_and_keep_the_mean():
    scales = np.asarray(path_scales(jax.random.key(0), [0.0, 0.25, 0.5], 4000))
    assert scales.shape == (3, 2, 4000)
    assert (scales[0] == 1).all()
    for rate, of_block in zip([0.25, 0.5], scales[1:], strict=True):
        np.testing.assert_allclose(np.unique(of_block), [0, 1 / (1 - rate)], rtol=1e-6)
        np.testing.assert_allclose(of_block.mean(1), 1, atol=0.05)
        assert abs(np.corrcoef(of_block)[0, 1]) < 0.1  # Each branch by itself,
    assert abs(np.corrcoef(scales[1:, 0])[0, 1]) < 0.1  # and each block.
    # An example's do not depend on the others.
    np.testing.assert_array_equal(path_scales(jax.random.key(0), [0.0, 0.25, 0.5], 7), scales[..., :7])


def test_a_block_is_its_two_branches_scaled():
    """One that both branches are dropped from leaves an example as it is; the second alone, against the block by hand."""
    x = jnp.asarray(np.random.default_rng(5).normal(size=(3, 4, 4, 8)), jnp.float32)
    block = SwinBlock(2, 2, True)
    params = random_params(np.random.default_rng(6), block, x)
    scales = jnp.array([[0.0, 0.0, 2.0], [0.0, 1.5, 0.0]])
    found = block.apply(params, x, scales)
    np.testing.assert_array_equal(found[0], x[0])
    # Linear in each scale while the other is zero.
    one = block.apply(params, x, jnp.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    np.testing.assert_allclose(found[1] - x[1], 1.5 * (one[1] - x[1]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2] - x[2], 2.0 * (one[2] - x[2]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(block.apply(params, x), block.apply(params, x, jnp.ones((2, 3))), rtol=1e-6)


@pytest.mark.parametrize(("depth", "form", "parts"), [(6, "heads", ()), (7, "lanes", ("stage_1",))])
def test_a_loop_over_blocks_changes_nothing(depth, form, parts):
    """Neither values nor gradients, with dropped branches, and what follows the last pair."""
    scales = path_scales(jax.random.key(1), np.linspace(0, 0.6, depth), 3)
    fields = dict(heads=2, window=2, depth=depth, remat=Remat(parts), attention=form)
    x = np.random.default_rng(5).normal(size=(3, 4, 6, 8)).astype(np.float32)
    unrolled, scanned = (SwinStage(**fields, scan=scan) for scan in (False, True))
    params = random_params(np.random.default_rng(6), unrolled, x)

    def run(stage, params, x):
        out = stage.apply(params, x, scales)
        return jnp.sum(jnp.sin(out)), out

    found = [
        jax.jit(jax.value_and_grad(lambda *a, s=s: run(s, *a), (0, 1), True))(params, x)
        for s in (unrolled, scanned)
    ]
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])

    def same(
        a, b
    ):  # By the tensor's largest value, as in parity.py: gradients of keys' biases are zero but for rounding.
        assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max()

    jax.tree.map(same, *found)
    programs = [str(jax.make_jaxpr(lambda p, s=s: run(s, p, x))(params)) for s in (unrolled, scanned)]
    assert ["scan" in program for program in programs] == [False, True]
    assert jax.tree.structure(scanned.init(jax.random.key(0), x)) == jax.tree.structure(dict(params))


def test_a_loop_keeps_two_hidden_arrays_of_a_block():
    """What GELU gives and its slope: the largest that a loop has to write."""
    stage, x = SwinStage(heads=2, window=2, depth=6, scan=True), jnp.ones((3, 4, 6, 8))
    params = random_params(np.random.default_rng(6), stage, x)
    kept = jax.eval_shape(lambda params, x: jax.vjp(stage.apply, params, x)[1], params, x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    assert shapes.count((3, 3, 4, 6, 32)) == 2 * 2
