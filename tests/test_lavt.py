"""LAVT: its decoder's statistics, its loss, and everything that works for MagNet working for it too."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import debug
from configs.lavt_refcoco import use_lavt
from magnet_jax import losses
from magnet_jax.errors import UserError
from magnet_jax.models.lavt import ConvDecoder
from magnet_jax.network import build_network
from magnet_jax.sharding import batch_sharding, make_mesh, path_name, replicated
from magnet_jax.train_step import init_state, make_eval_step, make_train_step
from tests.stand_in import BATCH as SMALL
from tests.stand_in import MASK, VOCABULARY, assert_same

# Twice the size: an instance norm leaves nothing of a map of one pixel.
BATCH = SMALL | {name: SMALL[name].repeat(2, 1).repeat(2, 2) for name in ("image", "mask")}


def lavt_config(**weights):
    config = debug.get_config()
    use_lavt(config)
    config.model.bert.vocab_size, config.loss.mask_id = VOCABULARY, MASK
    config.model.swin.drop_path = config.model.bert.dropout = config.grounding_head.dropout = 0.0
    config.loss.update(weights)
    return config


# --- decoder -----------------------------------------------------------------------------------------------------------


def decoder_inputs():
    rng = np.random.default_rng(0)
    sizes = ((6, 5), (3, 3), (2, 2), (1, 1))
    return [rng.normal(2, 3, size=(3, *size, 2 * 2**k)).astype(np.float32) for k, size in enumerate(sizes)]


def test_decoder_normalises_by_the_batch_in_training_and_remembers():
    maps, decoder = decoder_inputs(), ConvDecoder()
    variables = decoder.init(jax.random.key(0), maps)
    (_, _), updates = decoder.apply(variables, maps, train=True, mutable=["batch_stats"])
    # The first convolution by hand: the coarsest map has one pixel, so that it is constant after its resize.
    kernel = np.asarray(variables["params"]["conv1_2"]["kernel"], np.float64)  # [3, 3, in, out]
    joined = np.concatenate([np.broadcast_to(maps[3], (3, 2, 2, 16)), maps[2]], -1)
    padded = np.pad(joined, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = sum(padded[:, i : i + 2, j : j + 2] @ kernel[i, j] for i in range(3) for j in range(3))
    new = updates["batch_stats"]["norm1_2"]
    np.testing.assert_allclose(new["mean"], 0.1 * y.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * y.var((0, 1, 2)), rtol=1e-4)


def test_decoder_without_training_uses_what_it_remembers():
    maps, decoder = decoder_inputs(), ConvDecoder()
    variables = decoder.init(jax.random.key(0), maps)
    whole = decoder.apply(variables, maps)
    alone = decoder.apply(variables, [x[:1] for x in maps])
    np.testing.assert_allclose(whole[1][:1], alone[1], atol=1e-5)
    assert whole[0].shape == (3, 6, 5, 8)
    assert whole[1].shape == (3, 6, 5, 2)
    stats = jax.tree.map(lambda x: x + 1.0, variables["batch_stats"])
    other = decoder.apply({"params": variables["params"], "batch_stats": stats}, maps)
    assert np.abs(np.asarray(other[1] - whole[1])).max() > 1e-3


# --- loss --------------------------------------------------------------------------------------------------------------


def test_weighted_cross_entropy_written_out():
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(3, 4, 5, 2))  # Logits of background and object.
    target = rng.integers(0, 2, (3, 4, 5))
    weight = np.array([1.0, 0.0, 1.0], np.float32)
    log_p = pair - np.log(np.exp(pair).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, target[..., None], -1)[..., 0]
    pixel = np.where(target, 1.1, 0.9) * weight[:, None, None]
    expected = -(chosen * pixel).sum() / pixel.sum()
    logits = (pair[..., 1] - pair[..., 0]).astype(np.float32)
    found = losses.weighted_cross_entropy(logits, target, weight, (0.9, 1.1))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(losses.weighted_cross_entropy(logits, target, 0 * weight, (0.9, 1.1))) == 0


# --- the train step ----------------------------------------------------------------------------------------------------

# Leaves that have no gradient in exact arithmetic either.
IDLE = "|".join(
    [
        r"image_gate_3/|token_type",  # Nothing reads the last gate; no second type.
        r"key/bias$",  # A constant is lost before a softmax;
        r"image_fusion_\d/(query|output)/bias$",  # so it is before an instance norm.
    ]
)


def after_one_step(devices):
    """State before, state and metrics after a step with every loss that LAVT can have."""
    config = lavt_config(grounding=1.0, alignment=1.0, bce=1.0, dice=1.0)
    config.model.gate_init = "released"  # So that both linears of a gate have a gradient at once.
    network, tx = build_network(config), optax.trace(0.0)  # Its state is the gradient.
    state = jax.device_get(jax.jit(lambda: init_state(network, tx, 0, BATCH))())
    mesh = make_mesh((("data", -1),), devices)
    step = jax.jit(
        make_train_step(network, tx, config.loss),
        in_shardings=(replicated(mesh), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
    return state, *jax.device_get(step(state, BATCH))


@pytest.fixture(scope="module")
def stepped():
    return after_one_step(jax.devices()[:1])


def test_every_loss_works_and_reaches_what_can_learn(stepped):
    state, new, metrics = stepped
    terms = ("cross_entropy", "bce", "dice", "grounding", "pixel_to_pixel", "pixel_to_text")
    assert {f"loss/{name}" for name in terms} == {name for name in metrics if name.startswith("loss/")}
    assert metrics["left_out"] == 0
    assert all(np.isfinite(value) and value > 0 for name, value in metrics.items() if name != "left_out")
    assert set(new.params) == {"model", "grounding", "text_projection"}
    leaves = jax.tree_util.tree_leaves_with_path(new.opt_state.trace)
    idle = [path_name(path) for path, leaf in leaves if not np.abs(leaf).max() > 1e-12]
    assert [name for name in idle if not re.search(IDLE, name)] == []


@pytest.mark.slow
def test_two_devices_equal_one_in_statistics_too(stepped):
    _, one, metrics = stepped
    _, two, split_metrics = after_one_step(jax.devices())
    assert jax.tree.map(float, split_metrics) == pytest.approx(jax.tree.map(float, metrics), rel=1e-4)
    assert_same(one.batch_stats, two.batch_stats, 1e-5)
    assert_same(one.opt_state.trace, two.opt_state.trace, 1e-4 * metrics["grad_norm"])


def test_statistics_move_only_in_training(stepped):
    state, new, _ = stepped
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.batch_stats, new.batch_stats)
    assert all(jax.tree.leaves(moved))
    network = build_network(lavt_config())
    outputs = jax.jit(make_eval_step(network))(state.variables, BATCH)
    assert not np.any(outputs["class_logits"])  # It never says that nothing matches.
    half = {name: array[:2] for name, array in BATCH.items()}
    again = jax.jit(make_eval_step(network))(state.variables, half)
    np.testing.assert_allclose(outputs["mask_logits"][:2], again["mask_logits"], atol=1e-5)


def test_what_lavt_has_not_is_refused():
    with pytest.raises(
        UserError, match=r"config.loss.class_ is 2.0, but 'lavt' has no class logits; set it to 0"
    ):
        build_network(lavt_config(class_=2.0))
    config = lavt_config()
    config.model.pyramids = (1, 2)
    with pytest.raises(UserError, match="config.model has fields that 'lavt' has not: pyramids"):
        build_network(config)


def test_bfloat16_stays_near_float32(stepped):
    state = stepped[0]
    config = lavt_config()
    exact = jax.jit(build_network(config).apply)(state.variables, BATCH)
    config.model.dtype = "bfloat16"
    rough = jax.jit(build_network(config).apply)(state.variables, BATCH)
    assert rough.mask_logits.dtype == jnp.float32
    pixels = np.asarray(exact.pixel_logits)  # Background, object: tests/test_parity.py knows the order.
    np.testing.assert_allclose(exact.mask_logits, pixels[..., 1] - pixels[..., 0], atol=1e-6)
    assert rough.mask_features.dtype == jnp.bfloat16
    a, b = np.asarray(exact.mask_features), np.asarray(rough.mask_features, np.float32)
    assert np.abs(a - b).mean() < 0.05 * np.abs(a).max()
