"""The programs of a configuration, counted and run without data or a run directory."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax import programs
from magnet_jax.network import Network
from magnet_jax.programs import STEPS, build_program, complete, count_flops, random_batch
from magnet_jax.sharding import make_mesh
from magnet_jax.total_loss import total_loss
from magnet_jax.train_step import step_key
from tests.tiny import TinyModel, tiny_config


def tiny_program(step, **fields):
    config = complete(tiny_config())[0]
    for name, value in fields.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    with mock.patch.object(programs, "build_network", return_value=Network(TinyModel())):
        return build_program(config, make_mesh(config.mesh), step), config


@pytest.mark.parametrize("step", STEPS)
def test_every_program_runs_on_what_it_asks_for(step):
    program, config = tiny_program(step)
    batch = random_batch(program, config)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in program.batch.items()
    }
    state = program.init()
    result = program.function(state, batch)
    if step == "train":
        assert int(result[0].step) == 1
        assert np.isfinite(result[1]["loss"])
    elif step == "eval":
        assert result["mask_logits"].shape[0] == program.size == config.eval.batch_size
    else:
        loss, gradient = result
        expected, slope = jax.value_and_grad(total_loss, argnums=1, has_aux=True)(
            Network(TinyModel()), state["params"], {}, batch, step_key(0, 0), config.loss
        )
        np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, slope)


def test_a_train_step_costs_thrice_a_forward_pass():
    """Backward products are two for each forward one, but for the first layer, whose input needs no gradient."""
    forward, backward = (
        tiny_program(step, data__batch_size=8, eval__batch_size=8)[0].flops() for step in ("eval", "gradient")
    )
    assert 2 * forward < backward < 3.2 * forward
    assert tiny_program("train", data__batch_size=8)[0].flops() == backward


def test_flops_of_products_convolutions_and_loops():
    def flops(function, *arrays):
        return count_flops(jax.make_jaxpr(function)(*arrays).jaxpr)

    a, b = np.ones((3, 5, 7), np.float32), np.ones((3, 7, 11), np.float32)
    assert flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7 * 11
    image, kernel = np.ones((2, 16, 12, 3), np.float32), np.ones((3, 3, 3, 8), np.float32)

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops(convolve, image, kernel) == 2 * (2 * 8 * 6 * 8) * (3 * 3 * 3)
    square = np.ones((4, 4), np.float32)
    assert (
        flops(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=9)[0], square)
        == 9 * 2 * 4**3
    )
    branches = [lambda x: x @ x @ x, lambda x: x @ x, lambda x: x @ x @ x @ x]
    assert flops(lambda x: jax.lax.switch(x[0, 0].astype(int), branches, x), square) == 2 * 4**3
    again = jax.checkpoint(lambda x: jnp.sin(x @ x))
    assert flops(jax.jit(lambda x: again(x) + x @ x), square) == 2 * 2 * 4**3


def test_a_vocabulary_that_is_not_here_is_said():
    config = tiny_config()
    config.data.vocab = "nowhere"
    found, notes = complete(config)
    assert found.model.bert.vocab_size == 30522
    assert found.loss.mask_id == 103
    assert notes == [notes[0]]
    assert "nowhere: no such vocabulary" in notes[0]
    assert notes[0].endswith("taken to have 30522 words")
