"""Prediction of many sentences on many images: what is shared changes nothing, and is shared."""

import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from configs import debug
from magnet_jax.network import build_network
from magnet_jax.predict import Predictor, in_words
from magnet_jax.programs import count_flops
from magnet_jax.sharding import make_mesh
from magnet_jax.trained import Trained, batch_shapes, prepare

TEXTS = ["the red ring", "the ring on the left of the blue square", "the largest star"]


@functools.cache
def trained(name="magnet", gates="open"):
    """A network of random numbers: MagNet with every gate open, or its language gates closed, or LAVT."""
    config = debug.get_config()
    if name == "lavt":
        config.loss.class_ = config.loss.alignment = 0.0
        fields = {k: config.model[k] for k in ("swin", "bert", "fusion_heads", "dtype")}
        config.model = type(config.model)({"name": "lavt", **fields})
    config, tokenizer, _ = prepare(config)
    network = build_network(config)
    # Random ones, gates too; made in no time, as initialising has to be compiled.
    rng = np.random.default_rng(0)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.float32(
            rng.normal(1 if path[-1].key in ("scale", "var") else 0, 0.1, leaf.shape)
        ),
        jax.eval_shape(lambda: network.init(jax.random.key(0), batch_shapes(config))),
    )
    params = variables["params"]["model"]
    if gates != "open":  # 'first' or 'second': which linear layer is zero.
        for gate in [key for key in params if key.startswith("text_gate_")]:
            layer = params[gate]["fc1" if gates == "first" else "fc2"]
            layer["kernel"] = np.zeros_like(layer["kernel"])
    return Trained(
        config, network, variables, None, tokenizer, make_mesh((("data", 1),), jax.devices()[:1]), 0
    )


def pictures(count):
    rng = np.random.default_rng(0)
    sizes = [(40, 30), (64, 64), (33, 70), (50, 41), (20, 20)][:count]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3)).astype(np.uint8)) for w, h in sizes]


@pytest.mark.parametrize(("name", "gates"), [("magnet", "open"), ("magnet", "second"), ("lavt", "open")])
def test_pairs_equal_every_picture_with_every_sentence(name, gates):
    """Against the network as it is trained, a row for each pair: all outputs."""
    network, variables = trained(name, gates).network, trained(name, gates).variables
    rng = np.random.default_rng(1)
    side = trained(name).config.data.image_size
    image = rng.normal(size=(2, side, side, 3)).astype(np.float32)
    ids, words, _ = trained(name).tokenizer.encode(TEXTS)
    pairs = np.array([(0, 2), (1, 0), (1, 1), (0, 0), (1, 2)]).T
    batch = {"image": image, "text_ids": ids, "text_mask": words}
    rows = {"image": image[pairs[0]], "text_ids": ids[pairs[1]], "text_mask": words[pairs[1]]}
    shared = jax.jit(network.with_closed_gates(variables).apply)(variables, batch | {"pairs": pairs})
    alone = jax.jit(network.apply)(variables, rows)
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))
    assert np.abs(np.diff(alone.mask_logits, axis=0)).max() > 1e-3  # The pairs differ.


def test_gates_are_closed_where_they_are_zero():
    """And a network that would need them is not spared them."""
    assert (
        trained("magnet", "first")
        .network.with_closed_gates(trained("magnet", "first").variables)
        .model.closed_gates
    )
    for gates, closed in (("open", False), ("second", True)):
        found = trained("magnet", gates)
        assert found.network.with_closed_gates(found.variables).model.closed_gates is closed
    # One open gate of four is enough.
    found = trained("magnet", "second")
    params = dict(found.variables["params"]["model"])
    params["text_gate_2"] = trained().variables["params"]["model"]["text_gate_2"]
    variables = found.variables | {"params": {"model": params}}
    assert not found.network.with_closed_gates(variables).model.closed_gates
    lavt = trained("lavt").network
    assert lavt.with_closed_gates(trained("lavt").variables) is lavt


def flops(found, images, texts, pairs, closed):
    side = found.config.data.image_size
    network = found.network
    if closed:
        network = dataclasses.replace(network, model=network.model.clone(closed_gates=True))
    batch = {
        "image": np.zeros((images, side, side, 3), np.float32),
        "text_ids": np.ones((texts, 20), np.int32),
        "text_mask": np.ones((texts, 20), np.int32),
    }
    if pairs:
        batch["pairs"] = np.indices((images, texts)).reshape(2, -1)
    logits = jax.make_jaxpr(lambda v, b: network.apply(v, b).mask_logits)(found.variables, batch)
    return count_flops(logits.jaxpr)


def test_what_is_shared_is_computed_once():
    """By FLOPs: pictures cost as many passes through stage 1 as there are pictures, closed gates one BERT a sentence."""
    found = trained()
    each = flops(found, 1, 1, False, False)
    shared = flops(found, 1, 4, True, False)
    assert flops(found, 4, 4, False, False) == 4 * each
    # The patches and the first stage, 16 x 16 pixels of 8 channels or so, are missing thrice.
    assert 3.0 * each < shared < 4 * each
    sentences = flops(found, 4, 1, True, True)
    assert sentences < flops(found, 4, 1, True, False) < 4 * each


@pytest.mark.parametrize(("name", "texts"), [("magnet", TEXTS), ("magnet", TEXTS[:1]), ("lavt", TEXTS)])
def test_predictions_of_several_images_equal_those_of_each(name, texts):
    predictor, images = Predictor(trained(name)), pictures(5)
    together = list(predictor.predict_all(iter(images), texts, batch_size=4))
    assert [len(found) for found in together] == [len(texts)] * 5
    for image, found in zip(images, together, strict=True):
        for text, ours in zip(texts, found, strict=True):
            (single,) = predictor.predict(image, [text])
            assert (ours.text, ours.mask.shape) == (text, (image.height, image.width))
            np.testing.assert_allclose(ours.logits, single.logits, atol=1e-4)


def test_one_sentence_is_one_row():
    """Whatever the batch size: nothing is computed that nobody asked for."""
    predictor, (image, *_) = Predictor(trained()), pictures(1)
    with mock.patch.object(predictor, "_output", wraps=predictor._output) as output:
        predictor.predict(image, TEXTS[:1])
        batch = output.call_args.args[1]
    assert [len(batch[key]) for key in ("image", "text_ids")] == [1, 1]
    with pytest.raises(ValueError, match="texts is 'a ring'; give a list of sentences, even of one"):
        predictor.predict(image, "a ring")
    with pytest.raises(ValueError, match="texts is empty"):
        predictor.predict(image, [])


def test_more_sentences_than_a_batch():
    predictor, (image, *_) = Predictor(trained()), pictures(1)
    texts = [f"{text} {place}" for text in TEXTS for place in ("on the left", "on the right")]
    found = predictor.predict(image, texts[:5], batch_size=2)
    assert [prediction.text for prediction in found] == texts[:5]
    np.testing.assert_allclose(found[4].logits, predictor.predict(image, texts[4:5])[0].logits, atol=1e-4)
    assert np.abs(found[3].logits - found[4].logits).max() > 1e-4


def test_a_photograph_is_turned_as_its_exif_data_say(tmp_path):
    """So that the mask is that of the picture which people see."""
    (picture,), exif = pictures(1), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "x.png", exif=exif)
    predictor = Predictor(trained())
    found = predictor.predict(tmp_path / "x.png", TEXTS[:1])[0]
    assert found.mask.shape == (picture.width, picture.height)
    expected = predictor.predict(picture.transpose(Image.Transpose.ROTATE_270), TEXTS[:1])[0]
    np.testing.assert_array_equal(found.logits, expected.logits)


@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_a_network_that_knows_absence_says_so(shift):
    """Its class head is asked, whose second output is that something is there; another network's is not."""
    always = trained()
    config = always.config.copy_and_resolve_references()
    config.data.has_absent = True
    params = jax.tree.map(np.copy, always.variables)
    head = params["params"]["model"]["predictor"]["class"]
    head["bias"] = head["bias"] + np.array([0, shift], np.float32)
    knows = dataclasses.replace(always, config=config, variables=params)
    assert knows.knows_absence
    assert not always.knows_absence
    image = pictures(1)[0]
    found, plain = (Predictor(t).predict(image, TEXTS[:1])[0] for t in (knows, always))
    assert plain.present is None
    np.testing.assert_allclose(found.logits, plain.logits, atol=1e-5)
    assert found.present == pytest.approx(float(shift > 0), abs=1e-3)
    assert found.mask.any() == (shift > 0 and plain.mask.any())
    assert in_words(found).startswith("no such object") == (shift < 0)
    assert "no such object" not in in_words(plain)
