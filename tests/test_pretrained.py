"""The import command: sizes inferred, everything strict, nothing written where something is wrong."""

import json
import math
import re

import numpy as np
import pytest
import safetensors.numpy

from configs import common, debug
from magnet_jax import pretrained
from magnet_jax.errors import UserError
from magnet_jax.initial import read_arrays, read_fields
from magnet_jax.pretrained import expected_shapes, import_weights
from magnet_jax.weight_names import to_published

SWIN = {
    "embed_dim": 8,
    "patch": 4,
    "depths": (1, 2, 1, 1),
    "heads": (1, 1, 2, 2),
    "window": 4,
    "position": False,
}
BERT = {
    "vocab_size": 20,
    "hidden": 64,
    "heads": 1,
    "intermediate": 12,
    "splits": (1, 2, 3, 4),
    "max_positions": 24,
}
RELEASED = {"language_fusion": "released", "gate_init": "released"}
MAGNET = {
    "swin": SWIN,
    "bert": BERT,
    "pixel_decoder": {"channels": 32, "layers": 1, "heads": 8, "points": 4, "feedforward": 16, "groups": 32},
    "mask_predictor": {"layers": 2, "heads": 8, "feedforward": 16},
    "alignment": True,
    "pyramids": (1, 2, 3, 6),
    "fusion_heads": (1, 1, 1, 1),
} | RELEASED
LAVT = {"swin": SWIN, "bert": BERT, "fusion_heads": (1, 1, 1, 1), "gate_init": "released"}
FIELDS = {"magnet": MAGNET, "lavt": LAVT, "swin": {"swin": SWIN}, "bert": {"bert": BERT}}


def arrays_of(kind, seed=0):
    """Random arrays by our name."""
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(kind, FIELDS[kind])
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def published(kind, path):
    """A published file with the arrays of `arrays_of`."""
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(x) for name, x in to_published(kind, arrays_of(kind)).items()}, path
    )
    return path


def as_json(fields):
    return json.loads(json.dumps(fields))


@pytest.mark.parametrize("kind", FIELDS)
def test_sizes_are_inferred_and_arrays_arrive(kind, tmp_path, capsys):
    source, out = published(kind, tmp_path / "x.safetensors"), tmp_path / "new" / "out"
    name = "lavt_one" if kind == "lavt" else kind
    assert pretrained.main([f"--kind={name}", f"--source={source}", f"--out={out}"]) == 0
    assert f"{kind} weights in '{out}'" in capsys.readouterr().out
    assert read_fields(out, kind) == as_json(FIELDS[kind])
    arrays, expected = read_arrays(out, kind), arrays_of(kind)
    assert set(arrays) == set(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(arrays[name], x)
        assert arrays[name].dtype == np.float32
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "weights.safetensors"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_every_mismatch_is_listed_and_nothing_written(tmp_path, capsys):
    arrays = {name: np.ascontiguousarray(x) for name, x in to_published("lavt", arrays_of("lavt")).items()}
    del arrays["backbone.norm2.weight"]
    arrays["backbone.surplus"] = np.zeros(3)
    arrays["classifier.bn1_3.running_var"][1] = np.inf
    arrays["text_encoder.encoder.layer.2.output.dense.bias"] = np.zeros(9, np.float32)
    source, out = tmp_path / "x.safetensors", tmp_path / "out"
    safetensors.numpy.save_file(arrays, source)
    assert pretrained.main(["--kind=lavt", f"--source={source}", f"--out={out}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the weights do not fit the network, 4 mismatches:")
    for line in (
        "image_norm_2/scale: nothing in the file fills it",
        "backbone.surplus: not a name of this layout",
        "classifier.bn1_3.running_var: has values that are not finite",
        "text_encoder.encoder.layer.2.output.dense.bias: shape (9,), but text/layer_2/fc2/bias has (64,)",
    ):
        assert f"\n  {line}" in error
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("kind", ["lavt", "swin", "bert"])
def test_a_file_of_another_kind_is_refused(kind, tmp_path, capsys):
    source = published("magnet", tmp_path / "x.safetensors")
    assert pretrained.main([f"--kind={kind}", f"--source={source}", f"--out={tmp_path / 'out'}"]) == 1
    assert re.fullmatch(rf"error: this is not a file of kind '{kind}'.*\n", capsys.readouterr().err)


def test_out_with_something_in_it_is_left_alone(tmp_path):
    source = published("swin", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is not an empty directory; give another --out"):
        import_weights("swin", source, tmp_path)


def test_hugging_faces_config_says_what_no_shape_tells(tmp_path):
    arrays = {
        "bert." + name: np.ascontiguousarray(x) for name, x in to_published("bert", arrays_of("bert")).items()
    }
    arrays["bert.pooler.dense.bias"] = np.zeros(64, np.float32)
    source = tmp_path / "bert"
    source.mkdir()
    safetensors.numpy.save_file(arrays, source / "model.safetensors")
    (source / "vocab.txt").write_text("[PAD]\n")
    config = {"num_attention_heads": 4, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    (source / "config.json").write_text(json.dumps(config))
    for name, out in (("", "out"), ("model.safetensors", "other")):  # The directory or the file.
        imported = import_weights("bert", source / name, tmp_path / out)
        assert imported.fields["bert"] == BERT | {"heads": 4}
        assert imported.notes == []
        assert (tmp_path / out / "vocab.txt").read_text() == "[PAD]\n"
    experiment = debug.get_config()
    experiment.model.bert.update(BERT | {"heads": 2})
    with pytest.raises(UserError, match=r"config.model.bert.heads 2, but '.*config.json' 4"):
        import_weights("bert", source, tmp_path / "more", experiment)
    (source / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match=r"hidden_act and layer_norm_eps \('relu', 1e-12\)"):
        import_weights("bert", source, tmp_path / "more")


EXPERIMENT = """
from configs import common, debug

def get_config():
    c = debug.get_config()
    c.model.swin.update(embed_dim=8, depths=(1, 2, 1, 1), heads=(1, 1, 2, 2), window=4)
    c.model.bert.update(hidden=64, heads=2, intermediate=12, max_positions=24, splits=(1, 2, 3, 4))
    c.model.pixel_decoder.update(channels=32, heads=4, points=8, feedforward=16)
    c.model.mask_predictor.update(heads=2, feedforward=16, layers=2)
    c.model.pyramids = (1, 2, 3, 6)
    return c
"""


def test_an_experiment_says_what_no_shape_tells(tmp_path):
    source, experiment = published("magnet", tmp_path / "x.safetensors"), tmp_path / "experiment.py"
    experiment.write_text(EXPERIMENT)
    config = pretrained.load_experiment(str(experiment)).get_config()
    fields = import_weights("magnet", source, tmp_path / "out", config).fields
    assert fields["pixel_decoder"]["heads"] == 4
    assert fields["bert"]["heads"] == 2
    assert fields["bert"]["vocab_size"] == 20  # Left open there.
    assert fields["language_fusion"] == "released"  # The weights depend on it.
    config.model.swin.window = 7
    with pytest.raises(UserError, match=r"shape \(49, 1\), but image/stage_0/block_0/attn/.* has \(169, 1\)"):
        import_weights("magnet", source, tmp_path / "more", config)
    with pytest.raises(UserError, match="--config is '.*nothing.py'; expected a Python file"):
        pretrained.load_experiment(str(tmp_path / "nothing.py"))


def test_a_bare_file_says_what_was_assumed(tmp_path, capsys):
    source = published("magnet", tmp_path / "x.safetensors")
    assert pretrained.main(["--kind=magnet", f"--source={source}", f"--out={tmp_path / 'a'}"]) == 0
    assert capsys.readouterr().out.startswith("BERT's heads are in no shape: 1 assumed;")
    arrays = safetensors.numpy.load_file(source)
    closed = {name: 0 * x if "language_model.res_gates" in name else x for name, x in arrays.items()}
    safetensors.numpy.save_file(closed, source)
    notes = import_weights("magnet", source, tmp_path / "b").notes
    assert "every language gate is exactly zero: its words do not depend on the image" in notes


def test_a_window_is_the_files_own(tmp_path):
    source, experiment = published("swin", tmp_path / "x.safetensors"), debug.get_config()
    experiment.model.swin.update(SWIN | {"window": 7})
    assert import_weights("swin", source, tmp_path / "out", experiment).fields["swin"]["window"] == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"bert": BERT},
        {"swin": SWIN, "bert": BERT | {"heads": 5}},
        {"swin": SWIN | {"heads": (0, 1, 2, 2)}, "bert": BERT},
    ],
)
def test_a_note_that_describes_no_network(tmp_path, fields):
    note = {"magnet_jax": json.dumps({"kind": "lavt", "model": fields})}
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "x.safetensors", note)
    with pytest.raises(UserError, match="a network of kind 'lavt' cannot have the sizes") as error:
        import_weights("lavt", tmp_path / "x.safetensors", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_released_size_has_the_published_number_of_parameters():
    """297.0 M by part (spec section 1), from the shapes alone."""
    fields = common.get_config().model.to_dict()
    fields["bert"]["vocab_size"] = 30522
    sizes = {name: math.prod(shape) for name, shape in expected_shapes("magnet", fields).items()}
    parts = {
        "image": r"image(_fusion|_gate|_norm)?(_\d)?/",
        "text": r"text(_fusion|_gate|_norm)?(_\d)?/",
        "decoder": "decoder/|predictor/",
        "projection": "lang_proj/",
    }
    counts = {
        part: sum(n for name, n in sizes.items() if re.match(pattern, name))
        for part, pattern in parts.items()
    }
    assert sum(counts.values()) == sum(sizes.values())
    assert {part: round(n / 1e6, 1) for part, n in counts.items()} == {
        "image": 152.8,
        "text": 126.0,
        "decoder": 18.0,
        "projection": 0.2,
    }
    assert round(sum(sizes.values()) / 1e6, 1) == 297.0
