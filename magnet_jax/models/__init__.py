"""The networks: each is a Flax module from (image, words) to `Output`, built from plain sizes."""

from magnet_jax.models.grounding import MaskGrounding
from magnet_jax.models.magnet import MagNet, Output

__all__ = ["MagNet", "MaskGrounding", "Output"]
