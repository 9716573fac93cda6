"""Meshes and placement of arrays."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from magnet_jax.errors import UserError
from magnet_jax.sharding import batch_parts, batch_sharding, make_mesh, path_name, state_sharding


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


def test_mesh_fills_in_the_rest():
    assert dict(make_mesh((("data", -1),)).shape) == {"data": 2}
    assert dict(make_mesh((("data", -1), ("model", 2))).shape) == {"data": 1, "model": 2}


@pytest.mark.parametrize("axes", [(("data", 3),), (("data", -1), ("model", 3)), (("data", 1),)])
def test_mesh_that_does_not_fit(axes):
    with pytest.raises(UserError, match="does not fit the 2 devices"):
        make_mesh(axes)


def test_fsdp_splits_the_largest_divisible_axis_of_large_arrays():
    mesh = make_mesh((("data", -1),))
    shapes = {
        "odd": shape(1025, 1024),
        "large": shape(512, 4096),
        "small": shape(512, 256),
        "none": shape(1025, 1025),
    }
    placed = state_sharding(shapes, mesh, ((".*", "fsdp"),))
    assert placed["odd"].spec == PartitionSpec(None, "data")
    assert placed["large"].spec == PartitionSpec(None, "data")
    assert placed["small"].spec == placed["none"].spec == PartitionSpec()


def test_first_rule_wins_and_none_is_an_error():
    mesh = make_mesh((("data", -1),))
    shapes = {"a": {"kernel": shape(2048, 1024)}, "b": shape(2048, 1024)}
    placed = state_sharding(shapes, mesh, (("^a/kernel$", "replicate"), (".*", "fsdp")))
    assert placed["a"]["kernel"].spec == PartitionSpec()
    assert placed["b"].spec == PartitionSpec("data", None)
    with pytest.raises(UserError, match="no rule for 'b'"):
        state_sharding(shapes, mesh, (("^a", "fsdp"),))


@pytest.mark.parametrize(
    ("axes", "rows"),
    [
        ((("data", -1),), 2),
        ((("fsdp", -1),), 2),
        ((("data", 1), ("fsdp", -1)), 2),
        ((("model", -1),), 4),
        ((("data", 1), ("model", -1)), 4),
    ],
)
def test_batches_are_split_over_data_and_fsdp(axes, rows):
    mesh = make_mesh(axes)
    array = jax.device_put(np.zeros((4, 3)), batch_sharding(mesh))
    assert {shard.data.shape for shard in array.addressable_shards} == {(rows, 3)}
    assert batch_parts(mesh) == 4 // rows


def test_a_tactic_is_an_axis():
    mesh = make_mesh((("data", 1), ("fsdp", 1), ("model", -1)))
    leaf = {"a": shape(1024, 4096)}
    assert state_sharding(leaf, mesh, ((".*", "fsdp"),))["a"].spec == PartitionSpec(None, "fsdp")
    assert state_sharding(leaf, mesh, ((".*", "model"),))["a"].spec == PartitionSpec(None, "model")
    with pytest.raises(
        UserError, match=r"tactic 'expert'; expected 'replicate', 'fsdp' or an axis of config.mesh \(data,"
    ):
        state_sharding(leaf, mesh, ((".*", "expert"),))


def test_names_join_keys_and_fields():
    tree = {"a": [np.zeros(1), {"b": np.zeros(1)}]}
    assert [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)] == ["a/0", "a/1/b"]


def test_expressions_and_sizes_that_are_none():
    mesh = make_mesh((("data", -1),))
    with pytest.raises(UserError, match=r"config.sharding has '\*', which is no regular expression"):
        state_sharding({"a": shape(2)}, mesh, (("*", "fsdp"),))
    with pytest.raises(UserError, match="expected sizes of 1 or more"):
        make_mesh((("data", 0), ("fsdp", -1)))
