"""A segmentation network together with the training heads that its losses need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from magnet_jax.errors import UserError
from magnet_jax.models import MagNet, MaskGrounding

MODELS = {"magnet": MagNet}


@dataclass(frozen=True)
class Network:
    """`model` segments; `grounding` predicts masked words during training, None when its loss is switched off.

    `grounding_stage` (1 to 4) is the stage whose features it reads. Parameters are `{'model': ..., 'grounding': ...}`.
    """

    model: nn.Module
    grounding: MaskGrounding | None = None
    grounding_stage: int = 4

    def init(self, key: jax.Array, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Initial parameters for batches shaped like `batch` (arrays or shapes; only the first example is looked at)."""
        image, ids = (
            jnp.zeros((1, *batch[name].shape[1:]), batch[name].dtype) for name in ("image", "text_ids")
        )
        model_key, grounding_key = jax.random.split(key)
        output, variables = self.model.init_with_output(model_key, image, ids, jnp.ones_like(ids))
        params = {"model": variables["params"]}
        if self.grounding is not None:
            mask = jnp.zeros(image.shape[:3])
            params["grounding"] = self.grounding.init(
                grounding_key,
                output.word_features,
                jnp.ones_like(ids),
                output.stage_features[self.grounding_stage - 1],
                mask,
                output.word_embedding,
            )["params"]
        return params


def build_model(config: ConfigDict) -> nn.Module:
    """The network that `config.model` describes. Raises `UserError` for an unknown name, field or dtype."""
    fields = config.to_dict()
    name, dtype = fields.pop("name"), fields.pop("dtype")
    if name not in MODELS:
        raise UserError(f"config.model.name is '{name}'; expected one of {', '.join(MODELS)}")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"config.model.dtype is '{dtype}'; expected 'float32' or 'bfloat16'")
    return MODELS[name](**_tuples(fields), dtype=jnp.dtype(dtype))


def build_network(config: ConfigDict) -> Network:
    """The model of a whole configuration and, where the grounding loss has a weight, its head.

    Raises `UserError` for what `build_model` refuses and for a grounding stage that does not exist.
    """
    model = build_model(config.model)
    if not config.loss.grounding:
        return Network(model)
    fields = config.grounding_head.to_dict()
    stage = fields.pop("stage")
    if stage not in (1, 2, 3, 4):
        raise UserError(f"config.grounding_head.stage is {stage}; expected 1 (fine) to 4 (coarse)")
    return Network(model, MaskGrounding(**fields, dtype=jnp.dtype(config.model.dtype)), stage)


def _tuples(value):
    """Lists become tuples, since the fields of a module have to be hashable."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
