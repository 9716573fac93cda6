"""A segmentation network together with the training heads that its losses need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from magnet_jax.errors import UserError
from magnet_jax.models import Lavt, MagNet, MaskGrounding, Output, TextProjection
from magnet_jax.models.layers import Remat
from magnet_jax.models.parameters import init_with_output
from magnet_jax.models.sampling import FORMS
from magnet_jax.models.swin import ATTENTION_FORMS

# Of ImageNet, RGB; what the published encoders were trained with (data spec section 3).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PMAP_AXIS = "batch"
MODELS = {"magnet": MagNet, "lavt": Lavt}


@dataclass(frozen=True)
class Network:
    """`model` segments; the heads serve training and are None where their losses are switched off.

    `grounding` predicts masked words from the features of stage `grounding_stage` (1 to 4); `text_projection` is for the
    alignment loss of a model that has no text embedding of its own. Variables are `{'params': {'model': ..., head:
    ...}, 'batch_stats': {...}}`, the latter empty for a model without BatchNorm.
    """

    model: nn.Module
    grounding: MaskGrounding | None = None
    grounding_stage: int = 4
    text_projection: TextProjection | None = None

    def init(self, key: jax.Array, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Initial variables for batches shaped like `batch` (arrays or shapes; only the first example is looked at)."""
        ids = jnp.zeros((1, *batch["text_ids"].shape[1:]), batch["text_ids"].dtype)
        image = jnp.zeros((1, *batch["image"].shape[1:]))
        words = jnp.ones_like(ids)
        model_key, grounding_key, projection_key = jax.random.split(key, 3)
        # Which is for a backward pass; within it, parameters would be drawn one by one.
        model = self.model.clone(remat=()) if getattr(self.model, "remat", ()) else self.model
        output, variables = init_with_output(model, model_key, image, ids, words)
        params = {"model": variables["params"]}
        if self.grounding is not None:
            _, grounding = init_with_output(
                self.grounding,
                grounding_key,
                output.word_features,
                words,
                output.stage_features[self.grounding_stage - 1],
                jnp.zeros(image.shape[:3]),
                output.word_embedding,
            )
            params["grounding"] = grounding["params"]
        if self.text_projection is not None:
            channels = output.mask_features.shape[-1]
            _, projection = init_with_output(
                self.text_projection, projection_key, output.word_features, words, channels
            )
            params["text_projection"] = projection["params"]
        return {"params": params, "batch_stats": variables.get("batch_stats", {})}

    def apply(self, variables: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> Output:
        """The model on a batch, as evaluation and prediction use it; which picture belongs to which sentence may be said in
        `batch['pairs']`."""
        of_model = {"params": variables["params"]["model"], "batch_stats": variables["batch_stats"]}
        pairs = {"pairs": batch["pairs"]} if "pairs" in batch else {}
        return self.model.apply(
            of_model, normalise(batch["image"]), batch["text_ids"], batch["text_mask"], **pairs
        )

    def word_logits(
        self, variables: Mapping[str, Any], output: Output, batch: Mapping[str, jax.Array]
    ) -> jax.Array:
        """What `grounding` reads in every word's place, `[B, L, V]`: from an output of the same batch, and its masks."""
        return self.grounding.apply(
            {"params": variables["params"]["grounding"]},
            output.word_features,
            batch["text_mask"],
            output.stage_features[self.grounding_stage - 1],
            batch["mask"].astype(jnp.float32),
            output.word_embedding,
        )

    def with_closed_gates(self, variables: Mapping[str, Any]) -> Network:
        """The same network, spared the language gates where these variables hold them at exactly zero."""
        if not getattr(self.model, "alignment", False):
            return self
        params = variables["params"]["model"]
        gates = [params[name] for name in params if name.startswith("text_gate_")]
        # Without biases, and with nothing but ReLU between, a gate is zero where either of its linear layers is.
        open_gates = [g for g in gates if jnp.any(g["fc1"]["kernel"]) and jnp.any(g["fc2"]["kernel"])]
        return dataclasses.replace(self, model=self.model.clone(closed_gates=not open_gates))


def normalise(image: jax.Array) -> jax.Array:
    """Bytes [..., 3], which are what is sent to the device, to float32: / 255, minus the mean, over the deviation.

    Images of floating-point numbers are taken for normalised ones.
    """
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image
    return (image.astype(jnp.float32) / 255 - jnp.asarray(MEAN)) / jnp.asarray(STD)


def build_model(config: ConfigDict, platform: str | None = None) -> nn.Module:
    """The network that `config.model` describes, in the forms that suit a platform ('cpu', 'tpu', ...; JAX's by default).

    Raises `UserError` for an unknown name, field, form or dtype, and for a dropout that is no share.
    """
    _check_dropout(config, "model", ("fusion_dropout", "swin.drop_path", "bert.dropout"))
    fields = config.to_dict()
    name, dtype = fields.pop("name"), fields.pop("dtype")
    if name not in MODELS:
        raise UserError(f"config.model.name is '{name}'; expected one of {', '.join(MODELS)}")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"config.model.dtype is '{dtype}'; expected 'float32' or 'bfloat16'")
    known = {field.name for field in dataclasses.fields(MODELS[name])} - {
        "parent",
        "name",
        "batch_axis",
        "closed_gates",
        "scan",
    }
    try:
        Remat(tuple(fields.get("remat", ())), fields.get("remat_policy", "nothing"))
    except ValueError as error:
        raise UserError(f"config.model.{error}") from None
    sampling = fields.get("pixel_decoder", {}).get("sampling", "auto")
    if sampling not in (*FORMS, "auto"):
        raise UserError(
            f"config.model.pixel_decoder.sampling is '{sampling}'; expected 'auto' or one of {', '.join(FORMS)}"
        )
    attention = fields.get("swin", {}).get("attention", "auto")
    if attention not in (*ATTENTION_FORMS, "auto"):
        raise UserError(
            f"config.model.swin.attention is '{attention}'; expected 'auto' or one of {', '.join(ATTENTION_FORMS)}"
        )
    layers = fields.pop("layers", "auto")
    if layers not in ("scan", "unroll", "auto"):
        raise UserError(f"config.model.layers is '{layers}'; expected 'auto', 'scan' or 'unroll'")
    platform = platform or jax.default_backend()
    if "pixel_decoder" in fields:
        fields["pixel_decoder"]["platform"] = platform
    if attention == "auto" and "swin" in fields:
        fields["swin"]["attention"] = "lanes" if platform == "tpu" else "heads"
    if foreign := sorted(set(fields) - known):
        raise UserError(
            f"config.model has fields that '{name}' has not: {', '.join(foreign)}; start from a configuration of its own"
        )
    scan = layers == "scan" or (layers == "auto" and platform == "cpu")
    return MODELS[name](**_tuples(fields), scan=scan, dtype=jnp.dtype(dtype))


def build_network(config: ConfigDict, platform: str | None = None) -> Network:
    """The model of a whole configuration and the heads of those losses that have a weight; `platform` as in `build_model`.

    Raises `UserError` for what `build_model` refuses, a grounding stage that does not exist and a loss that the model
    cannot have.
    """
    model, dtype = build_model(config.model, platform), jnp.dtype(config.model.dtype)
    if config.parallelism == "pmap" and hasattr(model, "batch_axis"):
        model = model.clone(batch_axis=PMAP_AXIS)
    if config.loss.class_ and not model.has_class_logits:
        raise UserError(
            f"config.loss.class_ is {config.loss.class_}, but '{config.model.name}' has no class logits; set it to 0"
        )
    network = Network(model)
    if config.loss.grounding:
        _check_dropout(config.grounding_head, "grounding_head", ("dropout",))
        fields = config.grounding_head.to_dict()
        stage = fields.pop("stage")
        if stage not in (1, 2, 3, 4):
            raise UserError(f"config.grounding_head.stage is {stage}; expected 1 (fine) to 4 (coarse)")
        head = MaskGrounding(**fields, dtype=dtype)
        network = dataclasses.replace(network, grounding=head, grounding_stage=stage)
    if config.loss.alignment and not model.has_text_embedding:
        network = dataclasses.replace(network, text_projection=TextProjection(dtype))
    return network


def _check_dropout(config: ConfigDict, section: str, names: tuple[str, ...]) -> None:
    values = traverse_util.flatten_dict(config.to_dict(), sep=".")
    for name in names:
        if not 0 <= (rate := values.get(name, 0)) < 1:
            raise UserError(f"config.{section}.{name} is {rate}; expected at least 0 and below 1")


def _tuples(value):
    """Lists become tuples, since the fields of a module have to be hashable."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
