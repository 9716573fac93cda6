"""Schedules by their formulas, the chain against AdamW written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from configs import common, debug
from magnet_jax.errors import UserError
from magnet_jax.network import build_network
from magnet_jax.optim import (
    clip_by_global_norm,
    decay_mask,
    global_norm,
    make_optimizer,
    make_schedule,
    muon_labels,
)
from magnet_jax.sharding import FSDP_MIN_BYTES, make_mesh, path_name, state_sharding
from magnet_jax.trained import batch_shapes


def optimizer_config(**fields):
    config = common.get_config().optimizer
    config.update(fields)
    return config


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("polynomial", lambda done: (1 - done) ** 0.9),
        ("cosine", lambda done: (1 + np.cos(np.pi * done)) / 2),
        ("constant", lambda done: 1.0),
    ],
)
@pytest.mark.parametrize("warmup", [0, 20])
def test_schedules(schedule, formula, warmup):
    rate = make_schedule(optimizer_config(schedule=schedule, learning_rate=0.5, warmup_steps=warmup), 100)
    for step in range(101):
        expected = step / warmup if step < warmup else formula((step - warmup) / (100 - warmup))
        assert float(rate(step)) == pytest.approx(0.5 * expected, abs=1e-6), step


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="config.optimizer.name is 'sgd'; expected 'adamw' or 'muon'"):
        make_optimizer(optimizer_config(name="sgd"), 10)


def test_a_negative_norm_is_refused():
    with pytest.raises(
        UserError, match="config.optimizer.clip_norm is -1.0; expected a norm, or 0 for never"
    ):
        make_optimizer(optimizer_config(clip_norm=-1.0), 10)


@pytest.mark.parametrize("flatten", [False, True])
def test_three_steps_equal_adamw_written_out(flatten):
    config = optimizer_config(
        flatten=flatten,
        learning_rate=0.1,
        weight_decay=0.2,
        clip_norm=1.5,
        b1=0.8,
        b2=0.9,
        power=1.0,
        lr_multipliers=(("head", 3.0),),
    )
    tx, _ = make_optimizer(config, 10)
    rng = np.random.default_rng(0)
    params = {name: {"kernel": rng.normal(size=3), "bias": rng.normal(size=2)} for name in ("body", "head")}
    params = jax.tree.map(jnp.float32, params)
    expected = jax.tree.map(np.asarray, params)
    mean = jax.tree.map(np.zeros_like, expected)
    square = jax.tree.map(np.zeros_like, expected)
    state = tx.init(params)
    for step in range(3):
        gradient = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), expected)
        updates, state = tx.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)

        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
        gradient = jax.tree.map(lambda g: g * min(1, 1.5 / norm), gradient)  # noqa: B023
        mean = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, mean, gradient)
        square = jax.tree.map(lambda s, g: 0.9 * s + 0.1 * g**2, square, gradient)
        for name, factor in (("body", 1.0), ("head", 3.0)):
            for part, decay in (("kernel", 0.2), ("bias", 0.0)):
                direction = mean[name][part] / (1 - 0.8 ** (step + 1))
                direction = direction / (np.sqrt(square[name][part] / (1 - 0.9 ** (step + 1))) + 1e-8)
                direction = direction + decay * expected[name][part]
                expected[name][part] = expected[name][part] - 0.1 * (1 - step / 10) * factor * direction
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, expected)


@pytest.mark.parametrize("size", [0.0, 0.1, 10.0])
def test_clipping_is_that_of_optax(size):
    rng = np.random.default_rng(0)
    gradient = {name: jnp.float32(size * rng.normal(size=shape)) for name, shape in (("a", 7), ("b", (3, 5)))}
    ours, theirs = clip_by_global_norm(1.5), optax.clip_by_global_norm(1.5)
    state = ours.init(gradient)
    assert jax.tree.structure(state) == jax.tree.structure(theirs.init(gradient))
    found, expected = (tx.update(gradient, state)[0] for tx in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    given, _ = ours.update(gradient, state, norm=jnp.float32(6.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 4, rtol=1e-6), given, gradient)


def test_clipping_keeps_what_is_not_finite():
    """So that a step that went wrong is seen, and not taken."""
    tx = clip_by_global_norm(1.0)
    found, _ = tx.update({"a": jnp.array([1.0, np.nan]), "b": jnp.ones(2)}, tx.init({}))
    assert all(np.isnan(array).all() for array in found.values())


def test_joined_arrays_move_as_each_alone_would():
    """Of several kinds, beside a large one; each device keeps them whole, since each alone is too small to split."""
    config = optimizer_config(
        learning_rate=0.1, weight_decay=0.2, clip_norm=3.0, schedule="constant", lr_multipliers=(("^b", 3.0),)
    )
    rng = np.random.default_rng(0)
    shapes = {f"{side}{i}": {"kernel": (128, 128), "bias": (i,)} for side in "ab" for i in range(1, 18)}
    shapes["large"] = {"kernel": (512, 1024)}

    def draw():
        return jax.tree.map(
            lambda shape: jnp.float32(rng.normal(size=shape)), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )

    params = draw()
    plain = optax.chain(
        optax.clip_by_global_norm(3.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(
            0.2, mask={name: {part: part == "kernel" for part in array} for name, array in shapes.items()}
        ),
        optax.stateless(
            lambda updates, _: {
                n: optax.tree.scale(3.0 if n[0] == "b" else 1.0, u) for n, u in updates.items()
            }
        ),
        optax.scale_by_learning_rate(0.1),
    )
    tx, _ = make_optimizer(config, 10)
    state, plain_state = tx.init(params), plain.init(params)
    placed = state_sharding(state, make_mesh((("data", -1),)), ((".*", "fsdp"),))
    large = [
        (array.shape, where.is_fully_replicated)
        for array, where in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
        if array.nbytes >= FSDP_MIN_BYTES
    ]
    kernels = (17 * 128 * 128,)
    assert sorted(large) == sorted(2 * [((512, 1024), False), (kernels, True), (kernels, True)])
    update, update_plain = jax.jit(tx.update), jax.jit(plain.update)
    for _ in range(3):
        gradient = draw()
        assert float(global_norm(gradient)) == pytest.approx(float(optax.global_norm(gradient)), rel=1e-6)
        updates, state = update(gradient, state, params)
        expected, plain_state = update_plain(gradient, plain_state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updates, expected)


def test_muon_equals_optax_matrix_by_matrix():
    """Stacked by shape or not; momentum is carried, and a step is as large as one of Adam."""
    config = optimizer_config(
        name="muon", learning_rate=0.1, weight_decay=0.2, clip_norm=0.0, schedule="constant", muon_largest=8
    )
    tx, _ = make_optimizer(config, 10)
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 10), "b": (10, 6), "c": (6, 10), "large": (9, 12)}
    params = {name: {"kernel": rng.normal(size=shape)} for name, shape in shapes.items()}
    params["d"] = {"bias": rng.normal(size=6), "embedding": rng.normal(size=(5, 6))}
    params = jax.tree.map(jnp.float32, params)
    moved = {name: leaf for name, leaf in params.items() if name in "abc"}
    other = {name: leaf for name, leaf in params.items() if name not in moved}
    muon = optax.contrib.muon(0.1, weight_decay=0.2, consistent_rms=0.2)
    adam = optax.adamw(
        0.1, weight_decay=0.2, mask={"large": {"kernel": True}, "d": {"bias": False, "embedding": True}}
    )
    state, muon_state, adam_state = tx.init(params), muon.init(moved), adam.init(other)
    for _ in range(3):
        gradient = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)
        updates, state = tx.update(gradient, state, params)
        one, muon_state = muon.update({k: gradient[k] for k in moved}, muon_state, moved)
        two, adam_state = adam.update({k: gradient[k] for k in other}, adam_state, other)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updates, one | two)


def test_muon_moves_the_linear_layers_of_the_network():
    config = debug.get_config()
    config.model.bert.vocab_size, config.loss.mask_id = 40, 4
    shapes = jax.eval_shape(lambda: build_network(config).init(jax.random.key(0), batch_shapes(config)))[
        "params"
    ]
    labels = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(muon_labels(shapes, 0))}
    assert labels["model/text/layer_0/query/kernel"] == labels["grounding/head/kernel"] == "muon"
    adam = {name for name, label in labels.items() if label == "adam"}
    assert not [name for name in adam if name.endswith("kernel") and "patch_embed" not in name]
    assert {"model/predictor/query", "model/text/embeddings/word/embedding"} <= adam


def test_no_decay_on_norms_biases_and_position_biases_of_the_network():
    config = debug.get_config()
    config.model.bert.vocab_size, config.loss.mask_id = 40, 4
    shapes = jax.eval_shape(lambda: build_network(config).init(jax.random.key(0), batch_shapes(config)))[
        "params"
    ]
    mask = decay_mask(shapes, config.optimizer.no_decay)
    decayed, spared = set(), set()
    for path, value in jax.tree_util.tree_leaves_with_path(mask):
        (decayed if value else spared).add(path_name(path))
    assert any(name.endswith("kernel") for name in decayed)
    assert not [name for name in decayed if name.endswith(("/bias", "/scale"))]
    assert not [name for name in decayed if "relative_position_bias" in name]
    # A matrix that is spared would be an accident of an expression, position bias tables aside.
    assert not [name for name in spared if name.endswith("kernel")]
