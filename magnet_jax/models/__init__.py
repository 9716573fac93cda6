"""The networks: each is a Flax module from (image, words) to `Output`, built from plain sizes."""

from magnet_jax.models.grounding import MaskGrounding
from magnet_jax.models.magnet import MagNet, Output
from magnet_jax.models.network import Network, build_model, build_network

__all__ = ["MagNet", "MaskGrounding", "Network", "Output", "build_model", "build_network"]
