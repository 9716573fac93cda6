"""The import table is strict in both directions and reads sizes off the shapes."""

import json
from pathlib import Path

import numpy as np
import pytest

from magnet_jax import pretrained
from magnet_jax.errors import UserError
from magnet_jax.pretrained import MAGNET, convert, find, magnet_sizes

DATA = Path(__file__).parent / "data"
ATTENTION = "classifier.predictor.transformer_self_attention_layers.3.self_attn."
OURS = ("predictor", "layer_3", "self_attn")


def nested(path, leaf):
    for name in reversed(path):
        leaf = {name: leaf}
    return leaf


def packed_attention(width=4):
    """A packed attention as published, and what it is with us."""
    rng = np.random.default_rng(0)
    arrays = {
        ATTENTION + "in_proj_weight": rng.normal(size=(3 * width, width)),
        ATTENTION + "in_proj_bias": rng.normal(size=3 * width),
        ATTENTION + "out_proj.weight": rng.normal(size=(width, width)),
        ATTENTION + "out_proj.bias": rng.normal(size=width),
    }
    linear = {"kernel": np.zeros((width, width)), "bias": np.zeros(width)}
    return arrays, nested(OURS, dict.fromkeys(("query", "key", "value", "output"), linear))


def test_packed_projections_are_split_in_the_order_query_key_value():
    source, expected = packed_attention()
    result = convert(MAGNET, source, expected)["predictor"]["layer_3"]["self_attn"]
    weight, bias = source[ATTENTION + "in_proj_weight"], source[ATTENTION + "in_proj_bias"]
    for i, name in enumerate(("query", "key", "value")):
        rows = slice(4 * i, 4 * i + 4)
        np.testing.assert_allclose(result[name]["kernel"], weight[rows].T, rtol=1e-6)
        np.testing.assert_allclose(result[name]["bias"], bias[rows], rtol=1e-6)
    np.testing.assert_allclose(result["output"]["kernel"], source[ATTENTION + "out_proj.weight"].T, rtol=1e-6)
    assert result["query"]["kernel"].dtype == np.float32


def test_everything_that_does_not_fit_is_in_one_error():
    source, expected = packed_attention()
    source[ATTENTION + "in_proj_bias"] = np.zeros(15)  # Three of 5, expected three of 4.
    del source[ATTENTION + "out_proj.weight"]
    source["backbone.stem.weight"] = np.zeros(3)
    source["classifier.predictor.decoder_norm.weight"] = np.zeros(4)
    with pytest.raises(UserError) as error:
        convert(MAGNET, source, expected)
    message = str(error.value)
    name = "/".join(OURS)
    for line in (
        "backbone.stem.weight: not a name of this layout",
        "classifier.predictor.decoder_norm.weight: the configured network has no predictor/norm/scale",
        f"{ATTENTION}in_proj_bias: shape (5,), but {name}/query/bias has (4,)",
        f"{ATTENTION}in_proj_bias: shape (5,), but {name}/value/bias has (4,)",
        f"{name}/output/kernel: nothing in the file fills it",
    ):
        assert f"\n  {line}" in message, line
    assert "6 mismatches" in message
    assert len(message.splitlines()) == 7


@pytest.mark.parametrize("problem", ["missing", "left over", "shape"])
def test_each_mismatch_alone_is_an_error(problem):
    source, expected = packed_attention()
    if problem == "missing":
        del source[ATTENTION + "out_proj.bias"]
    elif problem == "left over":
        source[ATTENTION + "surplus"] = np.zeros(4)
    else:
        source[ATTENTION + "out_proj.weight"] = np.zeros((4, 5))
    with pytest.raises(UserError, match="1 mismatches"):
        convert(MAGNET, source, expected)


def test_index_buffers_are_ignored():
    source, expected = packed_attention()
    source["language_model.embeddings.position_ids"] = np.arange(512)[None]
    source["image_model.layers.0.blocks.1.attn.relative_position_index"] = np.zeros((4, 4), int)
    convert(MAGNET, source, expected)


def test_axes_of_convolutions():
    rng = np.random.default_rng(0)
    names = {
        "image_model.patch_embed.proj.weight": ((5, 3, 4, 2), "image/patch_embed/proj/kernel"),
        "image_model.layers.2.fusion.vis_project.0.weight": ((5, 3, 1), "image_fusion_2/pwam/visual/kernel"),
        "image_model.layers.1.pyramids.3.1.weight": ((5, 3, 1, 1), "image_fusion_1/pyramid_3/fc1/kernel"),
        "lang_proj.weight": ((5, 3), "lang_proj/kernel"),
    }
    for name, (shape, target) in names.items():
        array = rng.normal(size=shape).astype(np.float32)
        axes = {4: (2, 3, 1, 0), 3: (1, 0, 2), 2: (1, 0)}[len(shape)]
        value = array.transpose(axes)
        if shape[2:] and set(shape[2:]) == {1}:
            value = array.reshape(5, 3).T
        result = convert(MAGNET, {name: array}, nested(target.split("/"), value))
        for part in target.split("/"):
            result = result[part]
        np.testing.assert_array_equal(result, value)


@pytest.mark.parametrize("name", ["magnet_micro", "magnet_odd"])
def test_every_published_name_has_one_place_and_a_way_back(name):
    manifest = json.loads((DATA / f"{name}.json").read_text())
    places = []
    for source, shape in manifest["state_dict"].items():
        rows = [row for row in MAGNET if find([row], source)]
        if source not in manifest["generated"]:
            assert not rows, source
            continue
        assert len(rows) == 1, source
        match, targets, transform = find(MAGNET, source)
        places += [target.format(*match.groups()) for target in targets]
        small = np.zeros([min(n, 3) for n in shape])
        small = np.arange(small.size).reshape(small.shape)
        np.testing.assert_array_equal(transform.backward(transform.forward(small)), small)
    assert len(places) == len(set(places))


@pytest.mark.parametrize("name", ["magnet_micro", "magnet_odd"])
def test_sizes_are_read_off_the_shapes(name):
    manifest = json.loads((DATA / f"{name}.json").read_text())
    sizes = magnet_sizes({name: tuple(shape) for name, shape in manifest["state_dict"].items()})
    config = manifest["config"]
    assert sizes["swin"] == {
        "embed_dim": config["embed_dim"],
        "patch": 4,
        "depths": tuple(config["depths"]),
        "heads": tuple(config["num_heads"]),
        "window": config["window"],
    }
    assert sizes["bert"] == {
        "vocab_size": config["vocab"],
        "hidden": config["bert_hidden"],
        "heads": config["bert_heads"],
        "intermediate": config["bert_intermediate"],
        "splits": tuple(config["bert_split"]),
        "max_positions": 512,
    }
    assert sizes["pixel_decoder"] == {
        "channels": 256,
        "layers": 4,
        "heads": 8,
        "points": 4,
        "feedforward": 1024,
    }
    assert sizes["mask_predictor"] == {"layers": 9, "heads": 8, "feedforward": 2048}
    assert sizes["language_fusion"] == sizes["gate_init"] == "released"
    assert pretrained.LINEAR.forward(np.zeros((2, 3))).shape == (3, 2)
