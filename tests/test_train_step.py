"""The train step: what one does, what is random, and several devices.

Most of it on a stand-in; the whole of MagNet at the end.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import debug
from magnet_jax.network import build_network
from magnet_jax.optim import clip_by_global_norm
from magnet_jax.sharding import batch_sharding, make_mesh, path_name, replicated
from magnet_jax.total_loss import total_loss
from magnet_jax.train_step import TrainState, init_state, make_eval_step, make_train_step
from tests.stand_in import (
    BATCH,
    SIDE,
    VOCABULARY,
    assert_same,
    evaluate,
    loss_config,
    output_of,
    random_params,
    stand_in,
)


@pytest.fixture(scope="module")
def params():
    return random_params(stand_in(), BATCH)


# --- the step ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step(params):
    """A jitted step of plain descent on the stand-in with dropout, and its state at step 0."""
    network, tx = stand_in(dropout=0.3), optax.sgd(0.1)
    config = loss_config(grounding_shared_pass=False)
    jitted = jax.jit(make_train_step(network, tx, config, lambda step: 0.5 * step))
    return jitted, TrainState(jnp.int32(0), params, {}, tx.init(params), jnp.uint32(0))


def test_a_step_is_clipped_by_the_norm_of_its_gradient(params):
    """Which the optimizer is told: the parameters move by what is left of it."""
    tx = optax.chain(clip_by_global_norm(0.01), optax.sgd(1.0))
    step = jax.jit(make_train_step(stand_in(), tx, loss_config(grounding_shared_pass=False)))
    new, metrics = step(TrainState(jnp.int32(0), params, {}, tx.init(params), jnp.uint32(0)), BATCH)
    assert metrics["grad_norm"] > 0.1
    moved = optax.global_norm(jax.tree.map(jnp.subtract, new.params, params))
    assert float(moved) == pytest.approx(0.01, rel=1e-3)


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
    expected |= {"grad_norm": norm, "learning_rate": 3.5, "left_out": 0.0}
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
    run = jax.jit(lambda key: total_loss(stand_in(), params, {}, BATCH, key, config)[1][0]["loss/grounding"])
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
    variables = {"params": params, "batch_stats": {}}
    result = jax.jit(make_eval_step(stand_in()))(variables, BATCH | {"valid": valid})
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
    state = TrainState(jnp.int32(3), params, {}, tx.init(params), jnp.uint32(0))
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
    alone = jax.jit(lambda p, b: total_loss(network, p, {}, b, key, loss_config())[1][0])(params, batch)
    assert {name: metrics[name] for name in alone} == pytest.approx(jax.tree.map(float, alone), rel=1e-4)
