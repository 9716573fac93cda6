"""Parts that are computed again in the backward pass: the same gradients, with dropout too, and less kept."""

import jax
import numpy as np
import pytest

from configs import debug
from configs.lavt_refcoco import use_lavt
from magnet_jax.errors import UserError
from magnet_jax.models.layers import REMAT_PARTS
from magnet_jax.network import build_model, build_network
from magnet_jax.total_loss import total_loss
from tests.stand_in import BATCH, KEY, MASK, VOCABULARY, random_params


def small(name, **model):
    config = debug.get_config()
    if name == "lavt":
        use_lavt(config)
    config.model.update(model)
    config.model.bert.vocab_size = VOCABULARY
    config.model.bert.dropout = config.model.swin.drop_path = 0.3
    config.loss.mask_id = MASK
    config.loss.grounding = config.loss.alignment = 0.0
    return config


def gradient_of(config):
    """Gradient of the loss, and what is recomputed, as the program says it."""
    network = build_network(config)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), BATCH))
    params = random_params(network, BATCH)
    stats = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes["batch_stats"])
    run = jax.jit(jax.grad(lambda p: total_loss(network, p, stats, BATCH, KEY, config.loss)[0]))
    return run(params), str(jax.make_jaxpr(run)(params)).count("remat")


@pytest.mark.parametrize(
    ("name", "policy"), [pytest.param("magnet", "nothing", marks=pytest.mark.slow), ("lavt", "dots")]
)
def test_gradients_do_not_change(name, policy):
    plain, none = gradient_of(small(name))
    again, some = gradient_of(small(name, remat=REMAT_PARTS, remat_policy=policy))
    assert some > none == 0
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), plain, again)


@pytest.mark.parametrize("part", REMAT_PARTS)
def test_every_part_alone_is_one_of_the_program(part):
    config = small("magnet", remat=(part,))
    network = build_network(config)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), BATCH))
    program = jax.make_jaxpr(jax.grad(lambda p: total_loss(network, p, {}, BATCH, KEY, config.loss)[0]))(
        shapes["params"]
    )
    assert "remat" in str(program)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"remat": ("stage_5",)}, "config.model.remat has stage_5; expected some of stage_1"),
        ({"remat_policy": "all"}, "config.model.remat_policy is 'all'; expected one of nothing, dots"),
    ],
)
def test_parts_that_are_none_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        build_model(small("magnet", **fields).model)
