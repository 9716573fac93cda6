"""Reading published files: names put right, arrays as stored, and everything damaged or hostile refused in one line."""

import argparse
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from magnet_jax.errors import UserError
from magnet_jax.weight_files import read_weights

RNG = np.random.default_rng(0)


def array(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def write(path, arrays, **metadata):
    safetensors.numpy.save_file(arrays, path, metadata or None)
    return path


def assert_refused(path, *parts, kind="magnet"):
    with pytest.raises(UserError) as error:
        read_weights(path, kind)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    for part in parts:
        assert part in message


def test_arrays_and_shapes(tmp_path):
    arrays = {"module.a.weight": array(3, 4), "module.b": array(5)}
    weights = read_weights(write(tmp_path / "x.safetensors", arrays), "magnet")
    assert weights.shapes == {"a.weight": (3, 4), "b": (5,)}
    np.testing.assert_array_equal(weights["a.weight"], arrays["module.a.weight"])
    assert weights.fields == {}


def test_bert_with_prefix_and_old_names_of_norms(tmp_path):
    arrays = {"bert.embeddings.LayerNorm.gamma": array(4), "bert.embeddings.LayerNorm.beta": array(4)}
    arrays["cls.predictions.bias"] = array(7)
    write(tmp_path / "model.safetensors", arrays)
    weights = read_weights(tmp_path, "bert")  # The directory.
    assert set(weights) == {
        "embeddings.LayerNorm.weight",
        "embeddings.LayerNorm.bias",
        "cls.predictions.bias",
    }
    np.testing.assert_array_equal(
        weights["embeddings.LayerNorm.weight"], arrays["bert.embeddings.LayerNorm.gamma"]
    )


def test_hugging_face_swin_becomes_microsofts(tmp_path):
    block = "swin.encoder.layers.1.blocks.0."
    names = {
        "swin.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "swin.embeddings.norm.bias": "patch_embed.norm.bias",
        block + "layernorm_before.weight": "layers.1.blocks.0.norm1.weight",
        block
        + "attention.self.relative_position_bias_table": "layers.1.blocks.0.attn.relative_position_bias_table",
        block + "attention.output.dense.bias": "layers.1.blocks.0.attn.proj.bias",
        block + "layernorm_after.bias": "layers.1.blocks.0.norm2.bias",
        block + "intermediate.dense.weight": "layers.1.blocks.0.mlp.fc1.weight",
        block + "output.dense.weight": "layers.1.blocks.0.mlp.fc2.weight",
        "swin.encoder.layers.1.downsample.reduction.weight": "layers.1.downsample.reduction.weight",
        "swin.encoder.layers.1.downsample.norm.weight": "layers.1.downsample.norm.weight",
        "swin.layernorm.weight": "norm.weight",
        "classifier.weight": "head.weight",
    }
    arrays = {name: array(3, 2) for name in names}
    qkv = {part: array(4, 4) for part in ("value", "query", "key")}
    arrays |= {f"{block}attention.self.{part}.weight": x for part, x in qkv.items()}
    weights = read_weights(write(tmp_path / "x.safetensors", arrays), "swin")
    joined = "layers.1.blocks.0.attn.qkv.weight"
    assert set(weights) == {*names.values(), joined}
    for theirs, usual in names.items():
        np.testing.assert_array_equal(weights[usual], arrays[theirs])
    assert weights.shapes[joined] == (12, 4)
    np.testing.assert_array_equal(weights[joined], np.concatenate([qkv["query"], qkv["key"], qkv["value"]]))


def test_a_lone_query_is_left_for_the_table_to_refuse(tmp_path):
    name = "encoder.layers.0.blocks.0.attention.self.query.weight"
    weights = read_weights(write(tmp_path / "x.safetensors", {name: array(2, 2)}), "swin")
    assert set(weights) == {name}


def test_files_that_are_not_there_or_of_another_kind(tmp_path):
    assert_refused(tmp_path / "none.safetensors", "is not there")
    assert_refused(tmp_path, "has no model.safetensors or pytorch_model.bin")
    (tmp_path / "weights.ckpt").write_bytes(b"x")
    assert_refused(tmp_path / "weights.ckpt", "ends in '.ckpt'; expected .safetensors or .pth")


def test_damaged_safetensors(tmp_path):
    whole = write(tmp_path / "x.safetensors", {"a": array(100)}).read_bytes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    declared = struct.pack("<Q", len(header)) + header + bytes(64)
    huge_header = struct.pack("<Q", 2**62) + b"{}"
    for content in (whole[:-1], whole[:5], b"", declared, huge_header, b"\x80\x04 pickle"):
        (tmp_path / "x.safetensors").write_bytes(content)
        assert_refused(tmp_path / "x.safetensors", "not a whole safetensors file")


def test_two_arrays_that_mean_the_same(tmp_path):
    for kind, names in (
        ("magnet", ("module.a", "a")),
        ("bert", ("bert.x.LayerNorm.gamma", "x.LayerNorm.weight")),
    ):
        path = write(tmp_path / f"{kind}.safetensors", {name: array(2) for name in names})
        assert_refused(path, "has two arrays that mean", kind=kind)


def test_numbers_that_numpy_has_not(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    weights = read_weights(path, "magnet")
    with pytest.raises(UserError, match=r"x.safetensors': a cannot be read"):
        weights["a"]


def test_bfloat16(tmp_path):
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<HH", 0x3FC0, 0xC000))
    np.testing.assert_array_equal(read_weights(path, "magnet")["a"].astype(np.float32), [1.5, -2.0])


def test_damaged_note(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": array(1)}, magnet_jax="{")
    assert_refused(path, "damaged note")
    path = write(tmp_path / "x.safetensors", {"a": array(1)}, magnet_jax='{"kind": "lavt", "model": {}}')
    assert_refused(path, "is an export of kind 'lavt'; give --kind=lavt")


# --- files of PyTorch's, where it is installed -------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def tensors(torch, arrays):
    return {name: torch.from_numpy(x) for name, x in arrays.items()}


@pytest.mark.parametrize("zipped", [True, False])
def test_two_dictionaries_of_lavt(torch, tmp_path, zipped):
    arrays = {"module.backbone.norm0.weight": array(4)}, {"embeddings.LayerNorm.weight": array(6)}
    content = {"model": tensors(torch, arrays[0]), "bert_model": tensors(torch, arrays[1])}
    content |= {"epoch": 3, "args": argparse.Namespace(lr=1e-5), "lr_scheduler": {"last_epoch": 2}}
    path = tmp_path / "lavt.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    weights = read_weights(path, "lavt")
    assert set(weights) == {"backbone.norm0.weight", "text_encoder.embeddings.LayerNorm.weight"}
    np.testing.assert_array_equal(weights["backbone.norm0.weight"], arrays[0]["module.backbone.norm0.weight"])


def test_plain_state_dict_in_half_precision(torch, tmp_path):
    path = tmp_path / "bert.bin"
    torch.save({"bert.x": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, path)
    weights = read_weights(path, "bert")
    assert weights["x"].dtype == np.float32
    np.testing.assert_array_equal(weights["x"], [1.5, -2.0])


class Attack:
    """Makes a directory when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_wants_to_run_code_does_not(torch, tmp_path, zipped):
    path, target = tmp_path / "x.pth", tmp_path / "made"
    torch.save({"model": Attack(target)}, path, _use_new_zipfile_serialization=zipped)
    assert_refused(path, "holds more than data and is refused")
    path.write_bytes(pickle.dumps(Attack(target)))
    assert_refused(path, "holds more than data and is refused")
    assert not target.exists()


def test_damaged_files_of_torch(torch, tmp_path):
    path = tmp_path / "x.pth"
    for zipped in (True, False):
        torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], whole[:20], b"", b"no pickle"):
            path.write_bytes(content)
            assert_refused(path, "not a whole file of PyTorch weights")
    torch.save([1, 2], path)
    assert_refused(path, "holds a list; expected a dictionary of arrays")
    torch.save({"epoch": 3}, path)
    assert_refused(path, "holds no arrays")


def test_an_archive_that_unpacks_to_more_than_it_is(torch, tmp_path):
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for info in whole.infolist():
            bomb.writestr(info.filename, whole.read(info))
    assert_refused(tmp_path / "bomb.pth", "would unpack to 4000", "refused")


def test_an_archive_with_a_damaged_index(torch, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(10)}, path)
    content = bytearray(path.read_bytes())
    start = content.rindex(b"PK\x01\x02")
    content[start : start + 12] = b"\xff" * 12
    path.write_bytes(content)
    assert_refused(path, "not a whole file of PyTorch weights")


def test_an_array_that_claims_more_than_it_holds(torch, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(1).expand(10**9, 768)}, path)
    assert path.stat().st_size < 10_000
    assert_refused(path, "a is not a plain array that holds its 768000000000 numbers")
    torch.save({"a": torch.eye(3).to_sparse()}, path)
    assert_refused(path, "refused")
