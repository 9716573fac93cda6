"""The train step: which terms it has, what they are, what is random, and several devices.

Most of it on a stand-in with the outputs of a network, which compiles in no time; the whole of MagNet at the end.
"""

import re
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import debug
from magnet_jax import losses
from magnet_jax.models import MaskGrounding, Output
from magnet_jax.network import Network, build_network
from magnet_jax.sharding import batch_sharding, make_mesh, path_name, replicated
from magnet_jax.train_step import (
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    maskable_words,
    total_loss,
)

MASK, VOCABULARY, SIDE, WORDS = 3, 24, 32, 8
TERMS = {
    "bce": ["bce"],
    "dice": ["dice"],
    "class_": ["class"],
    "grounding": ["grounding"],
    "alignment": ["pixel_to_pixel", "pixel_to_text"],
}
FUNCTIONS = {
    "bce": ["binary_cross_entropy"],
    "dice": ["dice"],
    "class_": ["class_cross_entropy"],
    "grounding": ["masked_words"],
    "alignment": ["pixel_to_pixel", "pixel_to_text"],
}


class StandIn(nn.Module):
    """The outputs of a network that the losses read, from a convolution and an embedding."""

    width: int = 8
    dropout: float = 0.0

    @nn.compact
    def __call__(self, image, text_ids, text_mask, *, train=False):
        embed = nn.Embed(VOCABULARY, self.width)
        words = nn.Dropout(self.dropout)(embed(text_ids), deterministic=not train)
        sentence = (words * text_mask[..., None]).sum(1) / text_mask.sum(1, keepdims=True)
        x = nn.Conv(self.width, (4, 4), (4, 4), name="patch")(image) * (1 + sentence[:, None, None])
        masks = nn.Dense(3, name="masks")(x).transpose(3, 0, 1, 2)
        classes = nn.Dense(6, name="classes")(sentence).reshape(-1, 3, 2).transpose(1, 0, 2)
        return Output(
            mask_logits=masks[-1],
            class_logits=classes[-1],
            aux_mask_logits=masks[:-1],
            aux_class_logits=classes[:-1],
            mask_features=nn.Dense(self.width, name="features")(x),
            word_features=words,
            text_embedding=nn.Dense(self.width, name="lang_proj")(sentence),
            stage_features=(x, nn.avg_pool(x, (4, 4), (4, 4))),
            image_context=(),
            word_context=(),
            word_embedding=embed.embedding,
        )


def stand_in(dropout=0.0, grounding=True):
    head = MaskGrounding(layers=1, heads=2, intermediate=8, dropout=dropout) if grounding else None
    return Network(StandIn(dropout=dropout), head)


def make_batch(seed=0, size=4):
    """Rectangles and random words; the second example has no object."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((size, SIDE, SIDE), np.uint8)
    for one in mask:
        y, x = rng.integers(0, SIDE - 16, 2)
        one[y : y + 15, x : x + 13] = 1
    mask[1] = 0
    length = rng.integers(4, WORDS + 1, size)[:, None]
    position = np.arange(WORDS)
    ids = np.where(position < length, rng.integers(5, VOCABULARY, (size, WORDS)), 0)
    ids[:, 0] = 1
    np.put_along_axis(ids, length - 1, 2, 1)
    return {
        "image": rng.normal(size=(size, SIDE, SIDE, 3)).astype(np.float32),
        "mask": mask,
        "text_ids": ids.astype(np.int32),
        "text_mask": (position < length).astype(np.int32),
        "valid": np.ones(size, bool),
        "index": np.arange(size, dtype=np.int32),
    }


def loss_config(**fields):
    config = debug.get_config().loss
    config.mask_id = MASK
    config.update(fields)
    return config


def random_params(network, batch, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch))

    def values(shape):
        fan_in = np.prod(shape.shape[:-1]) if len(shape.shape) > 1 else 25
        return (rng.normal(size=shape.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(values, shapes)


BATCH = make_batch()
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def params():
    return random_params(stand_in(), BATCH)


def evaluate(params, config, batch=BATCH, key=KEY, network=None):
    """Metrics and gradient of the stand-in."""
    network = network or stand_in()
    run = jax.jit(lambda p, b, k: jax.grad(total_loss, 1, has_aux=True)(network, p, b, k, config))
    gradient, metrics = run(params, batch, key)
    return {name: float(value) for name, value in metrics.items()}, gradient


def assert_same(a, b, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


# --- terms -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(params):
    return evaluate(params, loss_config())


def test_loss_is_the_sum_of_its_terms(everything):
    metrics, _ = everything
    names = {name for names in TERMS.values() for name in names}
    assert set(metrics) == {"loss"} | {f"loss/{name}" for name in names}
    assert metrics["loss"] == pytest.approx(sum(metrics[f"loss/{name}"] for name in names), rel=1e-6)
    assert min(metrics.values()) > 0


@pytest.mark.parametrize("switch", TERMS)
def test_a_weight_of_zero_removes_the_term_and_its_computation(params, everything, switch):
    def lower(config):
        """The step before compilation, and the terms that it returns."""

        def step(params):
            return jax.grad(total_loss, 1, has_aux=True)(stand_in(), params, BATCH, KEY, config)

        lowered = jax.jit(step).lower(params)
        return lowered.cost_analysis()["flops"], set(lowered.out_info[1])

    forbidden = {
        name: mock.Mock(side_effect=AssertionError(f"{name} is computed")) for name in FUNCTIONS[switch]
    }
    with mock.patch.multiple(losses, **forbidden):
        flops, terms = lower(loss_config(**{switch: 0.0}))
    assert terms == set(everything[0]) - {f"loss/{name}" for name in TERMS[switch]}
    assert flops < lower(loss_config())[0]


def test_all_terms_may_be_off(params):
    config = loss_config(bce=0.0, dice=0.0, class_=0.0, grounding=0.0, alignment=0.0)
    metrics, gradient = evaluate(params, config)
    assert metrics == {"loss": 0.0}
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_terms_are_proportional_to_their_weights(params, everything):
    weights = {switch: 2.5 * loss_config()[switch] for switch in TERMS}
    metrics, _ = evaluate(params, loss_config(**weights))
    for name, value in everything[0].items():
        assert metrics[name] == pytest.approx(2.5 * value, rel=1e-5), name


def test_masks_are_not_reduced_where_no_term_needs_them(params):
    with mock.patch.object(losses, "area_reduce", side_effect=AssertionError):
        config = loss_config(bce=0.0, dice=0.0, alignment=0.0)
        jax.eval_shape(lambda p: total_loss(stand_in(), p, BATCH, KEY, config), params)


def test_grounding_has_parameters_only_where_its_loss_has_a_weight():
    config = debug.get_config()
    config.model.bert.vocab_size = VOCABULARY
    for weight in (1.0, 0.0):
        config.loss.grounding = weight
        network = build_network(config)
        assert (network.grounding is None) == (weight == 0)
    shapes = jax.eval_shape(lambda: stand_in(grounding=False).init(jax.random.key(0), BATCH))
    assert set(shapes) == {"model"}


def reduced(mask, cell):
    return mask.reshape(len(mask), SIDE // cell, cell, SIDE // cell, cell).mean((2, 4))


def output_of(params, ids=BATCH["text_ids"]):
    model = stand_in().model
    return jax.jit(model.apply)({"params": params["model"]}, BATCH["image"], ids, BATCH["text_mask"])


@pytest.mark.parametrize("full_resolution", [False, True])
def test_segmentation_terms_written_out(params, full_resolution):
    metrics, _ = evaluate(params, loss_config(grounding=0.0, alignment=0.0, full_resolution=full_resolution))
    output = output_of(params)
    logits = np.asarray([*output.aux_mask_logits, output.mask_logits], np.float64)  # [3, B, h, w]
    target = BATCH["mask"].astype(float) if full_resolution else reduced(BATCH["mask"], 4)
    if full_resolution:
        position = np.arange(SIDE) * 7 / (SIDE - 1)
        hat = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(8)))
        logits = np.einsum("yh,pbhw,xw->pbyx", hat, logits, hat)
    p = 1 / (1 + np.exp(-logits))
    bce = -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean((1, 2, 3)).sum()
    area = p.sum((2, 3)) + target.sum((1, 2))
    dice = 1 - (2 * (p * target).sum((2, 3)) + 1) / (area + 1)
    assert metrics["loss/bce"] == pytest.approx(5 * bce, rel=1e-4)
    # The second example has no object: no dice, class 0.
    assert metrics["loss/dice"] == pytest.approx(5 * dice[:, [0, 2, 3]].mean(1).sum(), rel=1e-4)
    classes = np.asarray(output.class_logits, np.float64)
    chosen = classes[np.arange(4), [1, 0, 1, 1]] - np.log(np.exp(classes).sum(1))
    assert metrics["loss/class"] == pytest.approx(-2 * chosen.mean(), rel=1e-4)


def cells(x, n):
    """Means over n x n cells, every pixel cut into n x n so that cells consist of whole ones."""
    x = x.repeat(n, 1).repeat(n, 2)
    side = x.shape[1] // n
    return x.reshape(x.shape[0], n, side, n, side, *x.shape[3:]).mean((2, 4))


@pytest.mark.parametrize(("stride", "block"), [(8, 0), (4, 0), (8, 5), (2, 0), (12, 0)])
def test_alignment_terms_written_out(params, stride, block):
    options = dict(alignment_stride=stride, alignment_block=block, tau_pixel=0.2, tau_text=0.3)
    metrics, _ = evaluate(params, loss_config(alignment=1.5, grounding=0.0, **options))
    output = output_of(params)
    n = SIDE // stride  # Cells a side, which cover the image whether or not the stride divides it.
    features = cells(np.asarray(output.mask_features), n).reshape(4, n * n, -1)
    foreground = cells(BATCH["mask"], n).reshape(4, -1) > 0.5
    weight = np.ones(4, np.float32)
    pixel = losses.pixel_to_pixel(features, foreground, weight, tau=0.2)
    text = losses.pixel_to_text(features, output.text_embedding, foreground, weight, tau=0.3)
    assert metrics["loss/pixel_to_pixel"] == pytest.approx(1.5 * float(pixel), rel=1e-4)
    assert metrics["loss/pixel_to_text"] == pytest.approx(1.5 * float(text), rel=1e-4)


def test_grounding_term_written_out(params):
    """All words masked, none kept: nothing is random. The head gets the words that were masked."""
    metrics, gradient = evaluate(params, loss_config(mask_ratio=1.0, mask_keep=0.0, grounding=3.0))
    words = np.asarray(maskable_words(BATCH["text_mask"]))
    masked = np.where(words, MASK, BATCH["text_ids"])
    output = output_of(params, masked)
    logits = stand_in().grounding.apply(
        {"params": params["grounding"]},
        output.word_features,
        BATCH["text_mask"],
        output.stage_features[-1],
        BATCH["mask"],
        output.word_embedding,
    )
    expected = losses.masked_words(logits, np.where(words, BATCH["text_ids"], -1), np.ones(4, np.float32))
    assert metrics["loss/grounding"] == pytest.approx(3 * float(expected), rel=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert (np.abs(gradient["model"]["patch"]["kernel"]) > 0).any()


def test_clean_pass_segments_from_the_whole_sentence(params, everything):
    options = dict(mask_ratio=1.0, mask_keep=0.0)
    shared, _ = evaluate(params, loss_config(**options))
    clean, _ = evaluate(params, loss_config(**options, grounding_shared_pass=False))
    none, _ = evaluate(params, loss_config(grounding=0.0))
    assert clean["loss/grounding"] == pytest.approx(shared["loss/grounding"], rel=1e-6)
    for name in ("bce", "dice", "class", "pixel_to_pixel", "pixel_to_text"):
        assert clean[f"loss/{name}"] == pytest.approx(none[f"loss/{name}"], rel=1e-6), name
    assert abs(shared["loss/bce"] - none["loss/bce"]) > 1e-3  # It segments from masked words.


def test_maskable_words():
    text_mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0], [0] * 6, [0] * 6]
    np.testing.assert_array_equal(maskable_words(text_mask), np.array(expected, bool))
    assert not np.asarray(maskable_words(np.zeros((1, 6), int))).any()


# --- padded examples ---------------------------------------------------------------------------------------------------


def test_padded_examples_have_no_effect(params):
    config = loss_config(mask_ratio=1.0, mask_keep=0.0)
    short = {name: array[:2] for name, array in BATCH.items()}
    expected = evaluate(params, config, short)
    padded = BATCH | {"valid": np.array([True, True, False, False])}
    result = evaluate(params, config, padded)
    assert result[0] == pytest.approx(expected[0], rel=1e-5)
    assert_same(result[1], expected[1])
    other = make_batch(9)
    other = {
        name: np.where(padded["valid"].reshape(-1, *[1] * (a.ndim - 1)), a, other[name])
        for name, a in padded.items()
    }
    assert_same(evaluate(params, config, other | {"valid": padded["valid"]}), result)


def test_a_batch_of_padding_has_no_gradient(params):
    nothing = BATCH | {"valid": np.zeros(4, bool)}
    metrics, gradient = evaluate(params, loss_config(), nothing)
    assert set(metrics.values()) == {0.0}
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


# --- the step ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step(params):
    """A jitted step of plain descent on the stand-in with dropout, and its state at step 0."""
    network, tx = stand_in(dropout=0.3), optax.sgd(0.1)
    config = loss_config(grounding_shared_pass=False)
    jitted = jax.jit(make_train_step(network, tx, config, lambda step: 0.5 * step))
    return jitted, TrainState(jnp.int32(0), params, tx.init(params), jnp.uint32(0))


def test_step_descends_along_the_gradient(step):
    jitted, state = step
    state = state.replace(step=jnp.int32(7), seed=jnp.uint32(3))
    new, metrics = jitted(state, BATCH)
    key = jax.random.fold_in(jax.random.key(3), 7)
    config = loss_config(grounding_shared_pass=False)
    expected, gradient = evaluate(state.params, config, key=key, network=stand_in(dropout=0.3))
    assert int(new.step) == 8
    assert int(new.seed) == 3
    assert_same(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient))
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    expected |= {"grad_norm": norm, "learning_rate": 3.5}
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected, rel=1e-4)


def test_randomness_follows_from_seed_and_step(step):
    jitted, state = step

    def run(seed, number):
        new, metrics = jitted(state.replace(seed=jnp.uint32(seed), step=jnp.int32(number)), BATCH)
        return new.params, {name: float(x) for name, x in metrics.items() if name.startswith("loss/")}

    params, metrics = run(1, 4)
    again = run(1, 4)
    assert all(
        (x == y).all() for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(again[0]), strict=True)
    )
    assert metrics == again[1]
    for seed, number in ((1, 5), (2, 4), (4, 1)):
        other = run(seed, number)[1]
        assert abs(other["loss/bce"] - metrics["loss/bce"]) > 1e-5  # Dropout.
        assert abs(other["loss/grounding"] - metrics["loss/grounding"]) > 1e-4


def test_masking_differs_between_steps(params):
    """Without dropout masking alone is random."""
    config = loss_config(alignment=0.0, mask_ratio=0.5)
    run = jax.jit(lambda key: total_loss(stand_in(), params, BATCH, key, config)[1]["loss/grounding"])
    values = [float(run(jax.random.fold_in(jax.random.key(0), step))) for step in range(4)]
    assert len({round(value, 4) for value in values}) == 4
    assert float(run(jax.random.fold_in(jax.random.key(0), 2))) == values[2]


def test_initial_state_follows_its_seed():
    tx = optax.adam(1.0)
    make = jax.jit(lambda seed: init_state(stand_in(), tx, seed, BATCH))
    a, b, c = make(0), make(0), make(1)
    assert (int(a.step), int(a.seed), int(c.seed)) == (0, 0, 1)
    assert set(a.params) == {"model", "grounding"}
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert (a.params["model"]["patch"]["kernel"] != c.params["model"]["patch"]["kernel"]).any()


def test_eval_step_counts_overlap(params):
    valid = np.array([True, True, True, False])
    result = jax.jit(make_eval_step(stand_in()))(params, BATCH | {"valid": valid})
    output = output_of(params)
    np.testing.assert_allclose(result["mask_logits"], output.mask_logits, atol=1e-5)
    np.testing.assert_allclose(result["class_logits"], output.class_logits, atol=1e-5)
    hat = np.maximum(0, 1 - np.abs((np.arange(SIDE) * 7 / (SIDE - 1))[:, None] - np.arange(8)))
    predicted = np.einsum("yh,bhw,xw->byx", hat, np.asarray(output.mask_logits, np.float64), hat) > 0
    truth = BATCH["mask"] > 0
    for b in range(4):
        assert int(result["intersection"][b]) == (predicted[b] & truth[b]).sum() * valid[b]
        assert int(result["union"][b]) == (predicted[b] | truth[b]).sum() * valid[b]


# --- devices -----------------------------------------------------------------------------------------------------------


def sharded_step(network, params, devices):
    """Gradient and metrics of a step whose examples are split over devices; the state is on all of them."""
    mesh = make_mesh((("data", -1),), devices)
    tx = optax.trace(0.0)  # Its state is the gradient.
    jitted = jax.jit(
        make_train_step(network, tx, loss_config()),
        in_shardings=(replicated(mesh), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
    state = TrainState(jnp.int32(3), params, tx.init(params), jnp.uint32(0))
    batch = BATCH | {"valid": np.array([True, True, True, False])}
    new, metrics = jitted(state, batch)
    assert len(metrics["loss"].sharding.device_set) == len(devices)
    return jax.tree.map(np.asarray, new.opt_state.trace), jax.tree.map(float, metrics)


def test_two_devices_equal_one(params):
    """Dropout and masking included: they are the same however the examples are split."""
    network = stand_in(dropout=0.3)
    gradient, metrics = sharded_step(network, params, jax.devices()[:1])
    split_gradient, split_metrics = sharded_step(network, params, jax.devices())
    assert split_metrics == pytest.approx(metrics, rel=1e-5)
    assert_same(gradient, split_gradient, 1e-6 * metrics["grad_norm"])


# --- MagNet ------------------------------------------------------------------------------------------------------------

# Leaves that have no gradient in exact arithmetic either.
IDLE = "|".join(
    [
        r"(image_norm_\d|text_norm_\d|image_gate_3)/",  # Nothing reads these.
        r"token_type|key/bias$",  # No second type; a constant is lost before a softmax.
        r"text_fusion_\d/(key|value|output)/bias$",  # So it is before an instance norm.
        # One query attends to itself; the coarsest map has one pixel here, whose instance norm is zero.
        r"predictor/(query_position$|layer_0/(self|cross)_attn/(query|key)/)",
        r"text_fusion_3/(query|key|value|output)/",
    ]
)


def test_magnet_trains_on_two_devices():
    """The whole network with everything on: its losses are those of one device, and all that can learn has a gradient."""
    config = debug.get_config()
    config.model.bert.vocab_size = VOCABULARY
    config.model.pyramids = (2,)
    config.model.mask_predictor.layers = 1
    network = build_network(config)
    params = random_params(network, BATCH)
    gradient, metrics = sharded_step(network, params, jax.devices())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    idle = [path_name(path) for path, leaf in leaves if not np.any(leaf)]
    assert [name for name in idle if not re.search(IDLE, name)] == []

    batch = BATCH | {"valid": np.array([True, True, True, False])}
    key = jax.random.fold_in(jax.random.key(0), 3)
    alone = jax.jit(lambda p, b: total_loss(network, p, b, key, loss_config())[1])(params, batch)
    assert {name: metrics[name] for name in alone} == pytest.approx(jax.tree.map(float, alone), rel=1e-4)
