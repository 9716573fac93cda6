"""Checkpoints: exact, whole or absent, restored onto other placements, other shapes refused by name."""

import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from magnet_jax.checkpoint import Checkpointer
from magnet_jax.errors import UserError
from magnet_jax.sharding import make_mesh, state_sharding
from magnet_jax.train_step import TrainState

MESH = make_mesh((("data", -1),))
TX = optax.adamw(1e-3)


def init(width=1024):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"layer": {"kernel": jax.random.normal(keys[0], (2048, width)), "bias": jnp.zeros(width)}}
    params["half"] = jax.random.normal(keys[1], (3,), jnp.bfloat16)
    stats = {"norm": {"mean": jnp.arange(3.0)}}
    return TrainState(jnp.int32(7), params, stats, TX.init(params), jnp.uint32(5))


def placed(tactic):
    shapes = jax.eval_shape(init)
    return shapes, state_sharding(shapes, MESH, ((".*", tactic),))


@pytest.fixture
def saved(tmp_path):
    shapes, shardings = placed("replicate")
    state = jax.jit(init, out_shardings=shardings)()
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(7, state, {"examples_seen": 28})
    checkpointer.wait()
    checkpointer.close()
    return tmp_path, state


@pytest.mark.parametrize("tactic", ["replicate", "fsdp"])
def test_restores_every_bit_onto_any_placement(saved, tactic):
    workdir, state = saved
    shapes, shardings = placed(tactic)
    restored, meta = Checkpointer(workdir).restore(shapes, shardings)
    assert meta == {"examples_seen": 28}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    kernel = restored.params["layer"]["kernel"]
    assert kernel.sharding.spec == (PartitionSpec("data", None) if tactic == "fsdp" else PartitionSpec())


def test_variables_alone(saved):
    workdir, state = saved
    shapes, shardings = placed("replicate")
    found, step = Checkpointer(workdir, read_only=True).restore_variables(
        shapes.variables, shardings.variables
    )
    assert step == 7
    jax.tree.map(np.testing.assert_array_equal, found, state.variables)


def test_all_differing_arrays_are_listed_in_one_line(saved):
    workdir, _ = saved
    shapes = jax.eval_shape(lambda: init(width=8)).variables
    shapes["params"]["new"] = shapes["params"].pop("half")
    shardings = state_sharding(shapes, MESH, ((".*", "replicate"),))
    with pytest.raises(UserError) as error:
        Checkpointer(workdir, read_only=True).restore_variables(shapes, shardings)
    message = str(error.value)
    assert "\n" not in message
    assert "4 arrays" in message
    for part in (
        "layer/kernel (2048, 1024) instead of (2048, 8)",
        "layer/bias (1024,) instead of (8,)",
        "half (3,) instead of absent",
        "new absent instead of (3,)",
    ):
        assert part in message


def test_what_a_killed_save_left_is_not_a_checkpoint_and_not_in_the_way(saved):
    workdir, state = saved
    (workdir / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    assert Checkpointer(workdir, read_only=True).latest_step() == 7
    checkpointer = Checkpointer(workdir)
    assert checkpointer.latest_step() == 7
    checkpointer.save(9, state, {})
    checkpointer.wait()
    assert Checkpointer(workdir, read_only=True).latest_step() == 9


def test_full_disk_is_noticed_before_anything_is_written(saved):
    workdir, state = saved
    checkpointer = Checkpointer(workdir)
    usage = shutil.disk_usage(workdir)
    with (
        mock.patch.object(shutil, "disk_usage", return_value=usage._replace(free=10_000_000)),
        pytest.raises(
            OSError, match=r"No space left on device \(42.0 MB needed for a checkpoint, 10.0 MB free\)"
        ),
    ):
        checkpointer.save(9, state, {})
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["7"]


def test_no_checkpoint_is_one_line(tmp_path):
    shapes, shardings = placed("replicate")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint in"):
        Checkpointer(tmp_path, read_only=True).restore_variables(shapes.variables, shardings.variables)
    with pytest.raises(UserError, match=r"config.checkpoint.load is 'newest'"):
        Checkpointer(tmp_path, read_only=True).restore_variables(
            shapes.variables, shardings.variables, "newest"
        )


def test_best_is_loaded_on_demand(tmp_path):
    shapes, shardings = placed("replicate")
    state = jax.jit(init, out_shardings=shardings)()
    checkpointer = Checkpointer(tmp_path, keep=1)
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.7), (4, None)):
        changed = state.replace(params=jax.tree.map(lambda p: p * step, state.params))  # noqa: B023
        checkpointer.save(step, changed, {}, score)
    checkpointer.wait()
    for which, step in (("best", 2), ("latest", 4)):
        variables, found = Checkpointer(tmp_path, read_only=True).restore_variables(
            shapes.variables, shardings.variables, which
        )
        assert found == step
        np.testing.assert_array_equal(
            variables["params"]["layer"]["kernel"], state.params["layer"]["kernel"] * step
        )


def test_scores_of_something_else_are_none(tmp_path):
    shapes, shardings = placed("replicate")
    state = jax.jit(init, out_shardings=shardings)()
    for step, name, score in ((1, "oIoU", 0.9), (2, "mIoU", 0.5)):
        checkpointer = Checkpointer(tmp_path, score_of=name)
        assert checkpointer.best_score() == float("-inf")
        checkpointer.save(step, state, {}, score)
        checkpointer.wait()
        assert checkpointer.best_score() == score
        checkpointer.close()
    assert Checkpointer(tmp_path, read_only=True, score_of="mIoU")._manager.best_step() == 2


def test_best_where_nothing_was_evaluated_is_said(saved):
    workdir, _ = saved
    shapes, shardings = placed("replicate")
    with pytest.raises(UserError, match="nothing was evaluated during the training"):
        Checkpointer(workdir, read_only=True).restore_variables(shapes.variables, shardings.variables, "best")
