"""A stand-in with the outputs of a network, which compiles in no time, and batches, losses and parameters for it."""

import flax.linen as nn
import jax
import numpy as np

from configs import debug
from magnet_jax.models import MaskGrounding, Output
from magnet_jax.models.layers import Dropout
from magnet_jax.network import Network
from magnet_jax.total_loss import total_loss

MASK, VOCABULARY, SIDE, WORDS = 3, 24, 32, 8


class StandIn(nn.Module):
    """The outputs of a network that the losses read, from a convolution and an embedding."""

    width: int = 8
    dropout: float = 0.0

    @nn.compact
    def __call__(self, image, text_ids, text_mask, *, train=False):
        embed = nn.Embed(VOCABULARY, self.width)
        words = Dropout(self.dropout)(embed(text_ids), train=train)
        sentence = (words * text_mask[..., None]).sum(1) / text_mask.sum(1, keepdims=True)
        x = nn.Conv(self.width, (4, 4), (4, 4), name="patch")(image) * (1 + sentence[:, None, None])
        masks = nn.Dense(3, name="masks")(x).transpose(3, 0, 1, 2)
        classes = nn.Dense(6, name="classes")(sentence).reshape(-1, 3, 2).transpose(1, 0, 2)
        return Output(
            mask_logits=masks[-1],
            class_logits=classes[-1],
            aux_mask_logits=masks[:-1],
            aux_class_logits=classes[:-1],
            mask_features=nn.Dense(self.width, name="features")(x),
            word_features=words,
            text_embedding=nn.Dense(self.width, name="lang_proj")(sentence),
            stage_features=(x, -nn.avg_pool(x, (4, 4), (4, 4))),  # So that they cannot be mistaken.
            image_context=(),
            word_context=(),
            word_embedding=embed.embedding,
        )


def stand_in(dropout=0.0, grounding=True, stage=2):
    head = MaskGrounding(layers=1, heads=2, intermediate=8, dropout=dropout) if grounding else None
    return Network(StandIn(dropout=dropout), head, stage)


def make_batch(seed=0, size=4):
    """Rectangles and random words; the second example has no object."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((size, SIDE, SIDE), np.uint8)
    for one in mask:
        y, x = rng.integers(0, SIDE - 16, 2)
        one[y : y + 15, x : x + 13] = 1
    mask[1] = 0
    length = rng.integers(4, WORDS + 1, size)[:, None]
    position = np.arange(WORDS)
    ids = np.where(position < length, rng.integers(5, VOCABULARY, (size, WORDS)), 0)
    ids[:, 0] = 1
    np.put_along_axis(ids, length - 1, 2, 1)
    return {
        "image": rng.normal(size=(size, SIDE, SIDE, 3)).astype(np.float32),
        "mask": mask,
        "text_ids": ids.astype(np.int32),
        "text_mask": (position < length).astype(np.int32),
        "valid": np.ones(size, bool),
        "index": np.arange(size, dtype=np.int32),
    }


def loss_config(**fields):
    config = debug.get_config().loss
    config.mask_id = MASK
    config.update(fields)
    return config


def random_params(network, batch, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch))["params"]

    def values(shape):
        fan_in = np.prod(shape.shape[:-1]) if len(shape.shape) > 1 else 25
        return (rng.normal(size=shape.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(values, shapes)


BATCH = make_batch()
KEY = jax.random.key(5)


def evaluate(params, config, batch=BATCH, key=KEY, network=None):
    """Metrics and gradient of the stand-in."""
    network = network or stand_in()
    run = jax.jit(lambda p, b, k: jax.grad(total_loss, 1, has_aux=True)(network, p, {}, b, k, config))
    gradient, (metrics, _) = run(params, batch, key)
    return {name: float(value) for name, value in metrics.items()}, gradient


def output_of(params, ids=BATCH["text_ids"]):
    model = stand_in().model
    return jax.jit(model.apply)({"params": params["model"]}, BATCH["image"], ids, BATCH["text_mask"])


def assert_same(a, b, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)
