"""A network that compiles in a second and learns a little, for tests of what is around the network."""

import contextlib
from unittest import mock

import flax.linen as nn

from configs import debug
from magnet_jax import train, trained
from magnet_jax.models import Output
from magnet_jax.models.layers import Dropout
from magnet_jax.network import Network


class TinyModel(nn.Module):
    """Three convolutions steered by the mean word; dropout, so that randomness matters."""

    channels: int = 16

    @nn.compact
    def __call__(self, image, text_ids, text_mask, train: bool = False, pairs=None) -> Output:
        if pairs is not None:
            image, text_ids, text_mask = image[pairs[0]], text_ids[pairs[1]], text_mask[pairs[1]]
        words = nn.Embed(256, self.channels)(text_ids) * text_mask[..., None]
        sentence = words.sum(1) / text_mask.sum(1, keepdims=True)  # [B, C]
        x = nn.Conv(self.channels, (4, 4), (4, 4), name="patch")(image)
        for _ in range(2):
            steered = nn.LayerNorm()(x) * nn.Dense(self.channels)(sentence)[:, None, None]
            x = x + nn.relu(nn.Conv(self.channels, (3, 3))(steered))
        x = Dropout(0.1)(x, train=train)
        masks, classes = nn.Dense(1)(x)[..., 0], nn.Dense(2)(sentence)
        fields = dict.fromkeys(Output.__dataclass_fields__)
        fields |= dict(mask_logits=masks, class_logits=classes)
        fields |= dict(aux_mask_logits=masks[None], aux_class_logits=classes[None], mask_features=x)
        return Output(**fields)


def tiny_config():
    """The debug configuration with the losses that the tiny network has."""
    config = debug.get_config()
    config.loss.grounding = 0.0
    config.loss.alignment = 0.0
    return config


@contextlib.contextmanager
def tiny_network(channels: int = 16):
    """Everything that builds a network builds the tiny one."""

    def build(config):
        return Network(TinyModel(channels))

    with mock.patch.object(train, "build_network", build), mock.patch.object(trained, "build_network", build):
        yield
