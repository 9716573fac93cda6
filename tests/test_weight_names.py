"""Import tables: strict in both directions, a way back for everything, sizes read off the shapes."""

import json
from pathlib import Path

import numpy as np
import pytest

from magnet_jax.errors import UserError
from magnet_jax.model_sizes import infer_sizes
from magnet_jax.weight_names import LAVT, MAGNET, find, to_ours, to_published
from tests.parity import generated_shapes

DATA = Path(__file__).parent / "data"
ATTENTION = "classifier.predictor.transformer_self_attention_layers.3.self_attn."
OURS = "predictor/layer_3/self_attn"


def packed_attention(width=4):
    """A packed attention as published, and what it is with us."""
    rng = np.random.default_rng(0)
    arrays = {
        ATTENTION + "in_proj_weight": rng.normal(size=(3 * width, width)),
        ATTENTION + "in_proj_bias": rng.normal(size=3 * width),
        ATTENTION + "out_proj.weight": rng.normal(size=(width, width)),
        ATTENTION + "out_proj.bias": rng.normal(size=width),
    }
    shapes = {"kernel": (width, width), "bias": (width,)}
    parts = ("query", "key", "value", "output")
    return arrays, {f"{OURS}/{part}/{leaf}": shape for part in parts for leaf, shape in shapes.items()}


def test_packed_projections_are_split_in_the_order_query_key_value():
    source, expected = packed_attention()
    result = to_ours("magnet", source, expected)
    weight, bias = source[ATTENTION + "in_proj_weight"], source[ATTENTION + "in_proj_bias"]
    for i, name in enumerate(("query", "key", "value")):
        rows = slice(4 * i, 4 * i + 4)
        np.testing.assert_allclose(result[f"{OURS}/{name}/kernel"], weight[rows].T, rtol=1e-6)
        np.testing.assert_allclose(result[f"{OURS}/{name}/bias"], bias[rows], rtol=1e-6)
    np.testing.assert_allclose(
        result[f"{OURS}/output/kernel"], source[ATTENTION + "out_proj.weight"].T, rtol=1e-6
    )
    assert result[f"{OURS}/query/kernel"].dtype == np.float32


def test_everything_that_does_not_fit_is_in_one_error():
    source, expected = packed_attention()
    source[ATTENTION + "in_proj_bias"] = np.zeros(15)  # Three of 5, expected three of 4.
    del source[ATTENTION + "out_proj.weight"]
    source["backbone.stem.weight"] = np.zeros(3)
    source["classifier.predictor.decoder_norm.weight"] = np.zeros(4)
    with pytest.raises(UserError) as error:
        to_ours("magnet", source, expected)
    message = str(error.value)
    name = OURS
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


@pytest.mark.parametrize("problem", ["missing", "left over", "shape", "axes", "scalar", "not finite"])
def test_each_mismatch_alone_is_an_error(problem):
    source, expected = packed_attention()
    if problem == "missing":
        del source[ATTENTION + "out_proj.bias"]
    elif problem == "left over":
        source[ATTENTION + "surplus"] = np.zeros(4)
    elif problem == "not finite":
        source[ATTENTION + "out_proj.weight"][1, 2] = np.nan
    else:
        shape = {"shape": (4, 5), "axes": (4, 4, 1), "scalar": ()}[problem]
        source[ATTENTION + "out_proj.weight"] = np.zeros(shape)
    with pytest.raises(UserError, match="1 mismatches"):
        to_ours("magnet", source, expected)


def test_index_buffers_are_ignored():
    source, expected = packed_attention()
    source["language_model.embeddings.position_ids"] = np.arange(512)[None]
    source["image_model.layers.0.blocks.1.attn.relative_position_index"] = np.zeros((4, 4), int)
    to_ours("magnet", source, expected)


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
        result = to_ours("magnet", {name: array}, {target: value.shape})
        np.testing.assert_array_equal(result[target], value)


def published_shapes(name):
    """Manifest, and shape of every parameter by its published name."""
    manifest = json.loads((DATA / f"{name}.json").read_text())
    return manifest, {published: shape for published, (_, shape) in generated_shapes(manifest).items()}


@pytest.mark.parametrize("name", ["magnet_micro", "magnet_odd", "lavt_micro"])
def test_every_published_name_has_one_place_and_a_way_back(name):
    manifest, shapes = published_shapes(name)
    table = {"magnet": MAGNET, "lavt": LAVT}[manifest["kind"]]
    places, source, ours = [], {}, {}
    for published, shape in shapes.items():
        assert len([row for row in table if find([row], published)]) == 1, published
        match, targets, transform = find(table, published)
        targets = [target.format(*match.groups()) for target in targets]
        places += targets
        small = [3 * min(n, 2) if axis == 0 else min(n, 2) for axis, n in enumerate(shape)]
        source[published] = np.arange(np.prod(small), dtype=np.float32).reshape(small)
        for target, part in zip(targets, np.split(source[published], len(targets)), strict=True):
            ours[target] = transform.forward(part)
    assert len(places) == len(set(places))
    back = to_published(manifest["kind"], ours)
    assert set(back) == set(source)
    for published, array in source.items():
        np.testing.assert_array_equal(back[published], array, err_msg=published)


def test_what_the_layout_has_no_place_for_is_named():
    with pytest.raises(UserError, match="no place for 1 arrays: predictor/extra"):
        to_published("magnet", {"predictor/query": np.zeros(3), "predictor/extra": np.zeros(3)})


@pytest.mark.parametrize("name", ["magnet_micro", "magnet_odd", "lavt_micro"])
def test_sizes_are_read_off_the_shapes(name):
    manifest, shapes = published_shapes(name)
    sizes, config = infer_sizes(manifest["kind"], shapes), manifest["config"]
    swin, bert = sizes.pop("swin"), sizes.pop("bert")
    assert swin == {
        "embed_dim": config["embed_dim"],
        "patch": 4,
        "depths": tuple(config["depths"]),
        "heads": tuple(config["num_heads"]),
        "window": config["window"],
        "position": False,
    }
    assert bert == {
        "vocab_size": config["vocab"],
        "hidden": config["bert_hidden"],
        "heads": config["bert_heads"],
        "intermediate": config["bert_intermediate"],
        "splits": tuple(config.get("bert_split", (1, 2, 3, 4))),
        "max_positions": 512,
    }
    if manifest["kind"] == "lavt":
        assert sizes == {"fusion_heads": (1, 1, 1, 1), "gate_init": "released"}
    else:
        assert sizes == {
            "pixel_decoder": {
                "channels": 256,
                "layers": 4,
                "heads": 8,
                "points": 4,
                "feedforward": 1024,
                "groups": 32,
            },
            "mask_predictor": {"layers": 9, "heads": 8, "feedforward": 2048},
            "alignment": True,
            "pyramids": (1, 2, 3, 6),
            "fusion_heads": (1, 1, 1, 1),
            "language_fusion": "released",
            "gate_init": "released",
        }


@pytest.mark.parametrize("kind", ["magnet", "lavt", "swin", "bert"])
def test_a_file_of_another_kind_is_told(kind):
    with pytest.raises(
        UserError, match=rf"not a file of kind '{kind}': .* is missing; it holds 1 arrays \(conv1"
    ):
        infer_sizes(kind, {"conv1.weight": (64, 3, 7, 7)})
