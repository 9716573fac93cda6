"""Composition of the losses: which terms there are, what each is, what a padded example does."""

from unittest import mock

import jax
import numpy as np
import pytest

from configs import debug
from magnet_jax import losses
from magnet_jax.errors import UserError
from magnet_jax.network import build_network
from magnet_jax.total_loss import maskable_words, total_loss
from tests.stand_in import (
    BATCH,
    KEY,
    MASK,
    SIDE,
    VOCABULARY,
    assert_same,
    evaluate,
    loss_config,
    make_batch,
    output_of,
    random_params,
    stand_in,
)

TERMS = {  # By weight: terms and the functions of `losses` that compute them.
    "bce": {"bce": "binary_cross_entropy"},
    "dice": {"dice": "dice"},
    "class_": {"class": "class_cross_entropy"},
    "grounding": {"grounding": "masked_words"},
    "alignment": {"pixel_to_pixel": "pixel_to_pixel", "pixel_to_text": "pixel_to_text"},
}


@pytest.fixture(scope="module")
def params():
    return random_params(stand_in(), BATCH)


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
            return jax.grad(total_loss, 1, has_aux=True)(stand_in(), params, {}, BATCH, KEY, config)

        lowered = jax.jit(step).lower(params)
        return lowered.cost_analysis()["flops"], set(lowered.out_info[1][0])

    forbidden = {
        name: mock.Mock(side_effect=AssertionError(f"{name} is computed")) for name in TERMS[switch].values()
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
        jax.eval_shape(lambda p: total_loss(stand_in(), p, {}, BATCH, KEY, config), params)


def test_grounding_has_parameters_only_where_its_loss_has_a_weight():
    config = debug.get_config()
    config.model.bert.vocab_size = VOCABULARY
    for weight in (1.0, 0.0):
        config.loss.grounding = weight
        network = build_network(config)
        assert (network.grounding is None) == (weight == 0)
    config.loss.grounding, config.grounding_head.stage = 1.0, 0
    with pytest.raises(UserError, match="config.grounding_head.stage is 0; expected 1"):
        build_network(config)
    shapes = jax.eval_shape(lambda: stand_in(grounding=False).init(jax.random.key(0), BATCH))
    assert set(shapes["params"]) == {"model"}


def reduced(mask, cell):
    return mask.reshape(len(mask), SIDE // cell, cell, SIDE // cell, cell).mean((2, 4))


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


@pytest.mark.parametrize("stage", [1, 2])
def test_grounding_term_written_out(params, stage):
    """All words masked, none kept: nothing is random. The head gets the words that were masked and its stage's map."""
    # A head with larger values, so that what it sees of the image decides its answers.
    params = params | {"grounding": jax.tree.map(lambda x: 10 * x, params["grounding"])}
    config = loss_config(mask_ratio=1.0, mask_keep=0.0, grounding=3.0)
    metrics, gradient = evaluate(params, config, network=stand_in(stage=stage))
    other, _ = evaluate(params, config, network=stand_in(stage=3 - stage))
    # By ten times what is allowed below.
    assert metrics["loss/grounding"] != pytest.approx(other["loss/grounding"], rel=1e-3)
    words = np.asarray(maskable_words(BATCH["text_mask"]))
    masked = np.where(words, MASK, BATCH["text_ids"])
    output = output_of(params, masked)
    logits = stand_in().grounding.apply(
        {"params": params["grounding"]},
        output.word_features,
        BATCH["text_mask"],
        output.stage_features[stage - 1],
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
