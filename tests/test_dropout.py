"""Dropout: what is kept, drawn for many layers at once, and which layer uses which of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug
from magnet_jax.errors import UserError
from magnet_jax.models import MaskGrounding
from magnet_jax.models.bert import Bert, BertLayer
from magnet_jax.models.layers import Dropout, batch_split_by, drop, kept_by_dropout
from magnet_jax.network import build_network
from magnet_jax.sharding import batch_sharding, make_mesh
from tests.test_alignment import random_params

SIZES = dict(vocab_size=9, hidden=8, heads=2, intermediate=12, splits=(1, 3), max_positions=6, dropout=0.25)


def test_kept_at_the_rate_and_for_each_example_alone():
    kept = np.asarray(kept_by_dropout(jax.random.key(0), 0.25, (40, 3, 5, 100)))
    assert kept.dtype == bool
    np.testing.assert_allclose(kept.mean((0, 2, 3)), 0.75, atol=0.02)  # 20000 draws each: deviation 0.003.
    sites = np.corrcoef(kept.transpose(1, 0, 2, 3).reshape(3, -1))
    examples = np.corrcoef(kept.reshape(40, -1))
    assert np.abs(sites - np.eye(3)).max() < 0.05
    assert np.abs(examples - np.eye(40)).max() < 0.15  # 1500 draws each.
    # An example's do not depend on the others.
    np.testing.assert_array_equal(kept_by_dropout(jax.random.key(0), 0.25, (7, 3, 5, 100)), kept[:7])


def test_each_device_draws_for_its_own_examples():
    sharding = batch_sharding(make_mesh((("data", 2),), jax.devices()[:2]))

    def dropped(x, key):
        with batch_split_by(sharding, 16):
            kept = kept_by_dropout(key, 0.1, (16, 5, 7, 32))
            return sum(jnp.sin(drop(x, kept[:, i], 0.1)) for i in range(5))

    x = jax.ShapeDtypeStruct((16, 7, 32), jnp.float32, sharding=sharding)
    program = jax.jit(dropped).lower(x, jax.random.key(0)).compile().as_text()
    assert "u32[8,5,7,32]" in program
    assert "[16,5,7,32]" not in program
    assert "all-gather" not in program


def test_the_rest_is_rescaled():
    x = jnp.arange(1.0, 7.0).reshape(2, 3)
    kept = jnp.array([[True, False, True], [False, False, True]])
    np.testing.assert_allclose(drop(x, kept, 0.25), np.where(kept, x / 0.75, 0))
    assert drop(x, None, 0.25) is x
    found = Dropout(0.25).apply({}, x, train=True, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_allclose(found, np.where(found != 0, x / 0.75, 0))


def test_a_layer_without_its_branches_is_its_norms():
    x = np.random.default_rng(0).normal(2, 3, size=(2, 4, 8)).astype(np.float32)
    layer = BertLayer(2, 12, 0.25)
    variables = layer.init(jax.random.key(0), x, 0.0)  # Norms start without effect of their own.
    normed = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    whole = np.ones((2, 2, 4, 8), bool)
    np.testing.assert_allclose(layer.apply(variables, x, 0.0, ~whole), normed, atol=1e-5)
    # The first is of attention: what it drops, the second never sees.
    one, other = whole.copy(), whole.copy()
    one[:, 0], other[:, 1] = False, False
    without_attention, without_mlp = (layer.apply(variables, x, 0.0, kept) for kept in (one, other))
    moved = np.delete(x, 3, axis=1)  # A word less changes the rest by attention alone.
    np.testing.assert_allclose(
        layer.apply(variables, moved, 0.0, one[:, :, :3]), without_attention[:, :3], atol=1e-5
    )
    changed = np.asarray(layer.apply(variables, moved, 0.0, other[:, :, :3])) - without_mlp[:, :3]
    assert np.abs(changed).max() > 1e-3


def test_each_layer_of_bert_has_its_own():
    ids = jnp.array([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    bert = Bert(**SIZES)

    def run(bert, kept):
        x = bert.embed(ids, kept)
        for part in range(2):
            x = bert.layers(part, x, 0.0, kept)
        return x

    variables = {"params": random_params(np.random.default_rng(0), Whole(SIZES), ids)["params"]["bert"]}
    kept = bert.apply(variables, ids, train=True, method="kept", rngs={"dropout": jax.random.key(0)})
    assert kept.shape == (2, 7, 6, 8)
    np.testing.assert_allclose(kept.mean(), 0.75, atol=0.07)  # 672 draws: deviation 0.017.
    outputs = [nn.apply(run, bert)(variables, kept.at[:, site].set(False)) for site in range(7)]
    outputs.append(nn.apply(run, bert)(variables, kept))
    outputs.append(nn.apply(run, bert)(variables, None))
    for i, one in enumerate(outputs):
        assert all(np.abs(one - other).max() > 1e-3 for other in outputs[:i])
    for settings in ({"train": False}, {"train": True, "dropout": 0.0}):
        net = bert.clone(dropout=settings.pop("dropout", 0.25))
        assert net.apply(variables, ids, **settings, method="kept") is None


class Whole(nn.Module):
    """BERT from ids to the last layer."""

    sizes: dict

    @nn.compact
    def __call__(self, ids):
        bert = Bert(**self.sizes, name="bert")
        x = bert.embed(ids)
        for part in range(2):
            x = bert.layers(part, x, 0.0)
        return x


@pytest.mark.parametrize(
    ("name", "rate"),
    [("model.bert", 1.0), ("model.swin", -0.1), ("model", 1.5), ("grounding_head", 1.0)],
)
def test_what_is_no_share_is_refused(name, rate):
    config = debug.get_config()
    field = {"model.swin": "drop_path", "model": "fusion_dropout"}.get(name, "dropout")
    config.update_from_flattened_dict({f"{name}.{field}": rate})
    with pytest.raises(UserError, match=f"config.{name}.{field} is {rate}; expected at least 0 and below 1"):
        build_network(config)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_each_layer_of_mask_grounding_has_its_own(dropout):
    rng = np.random.default_rng(0)
    words, image = rng.normal(size=(2, 4, 8)), rng.normal(size=(2, 3, 3, 5))
    inputs = (words, np.ones((2, 4), np.int32), image, np.ones((2, 6, 6)), rng.normal(size=(9, 8)))
    inputs = [jnp.asarray(a, a.dtype if a.dtype == np.int32 else jnp.float32) for a in inputs]
    head = MaskGrounding(layers=2, heads=2, intermediate=12, dropout=dropout)
    params = random_params(rng, head, *inputs)
    given = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, BertLayer):
            given.append(args[2])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        found = head.apply(params, *inputs, train=True, rngs={"dropout": jax.random.key(0)})
    plain = head.apply(params, *inputs)
    if not dropout:
        assert given == [None, None]
        np.testing.assert_array_equal(found, plain)
        return
    assert [kept.shape for kept in given] == [(2, 2, 4 + 9 + 1, 8)] * 2
    flat = np.stack([np.asarray(kept[:, i]).ravel() for kept in given for i in range(2)])
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 0.3  # 224 draws each: deviation 0.067.
    assert np.abs(found - plain).max() > 1e-3
