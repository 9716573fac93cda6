"""The networks: each is a Flax module from (image, words) to `Output`, built from plain sizes."""

from magnet_jax.models.alignment import TextProjection
from magnet_jax.models.grounding import MaskGrounding
from magnet_jax.models.lavt import Lavt
from magnet_jax.models.magnet import MagNet
from magnet_jax.models.output import Output

__all__ = ["Lavt", "MagNet", "MaskGrounding", "Output", "TextProjection"]
