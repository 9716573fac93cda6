"""Sizes of a network, read off the shapes of its published weights (spec section 1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from magnet_jax.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
_DECODER_HEADS, _LEVELS = 8, 4


def infer_sizes(kind: str, shapes: Shapes) -> dict[str, Any]:
    """Fields of the network of a kind ('magnet', 'lavt'), or those of its Swin or BERT alone under 'swin' or 'bert'.

    What no shape tells has the usual value: 64 channels a head in BERT, 8 heads in the decoder, one head of fusion.
    Raises UserError where the file is of another kind.
    """
    try:
        return {"magnet": _magnet, "lavt": _lavt, "swin": _swin_alone, "bert": _bert_alone}[kind](shapes)
    except (LookupError, ValueError, ZeroDivisionError) as error:
        why = (
            f"{error.args[0]} is missing"
            if isinstance(error, KeyError)
            else f"its shapes do not fit ({error})"
        )
        some = ", ".join(list(shapes)[:3]) or "nothing"
        raise UserError(
            f"this is not a file of kind '{kind}': {why}; it holds {len(shapes)} arrays ({some}, ...); "
            "give another --kind or --source"
        ) from error


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers a pattern finds."""
    return len({match.group(1) for match in (re.match(pattern, name) for name in shapes) if match})


def _swin(shapes: Shapes, prefix: str) -> dict[str, Any]:
    tables = [
        shapes[f"{prefix}layers.{k}.blocks.0.attn.relative_position_bias_table"] for k in range(4)
    ]  # [(2 window - 1)^2, heads]
    depths = tuple(_count(shapes, rf"{re.escape(prefix)}layers\.{k}\.blocks\.(\d+)\.") for k in range(4))
    patch = shapes[f"{prefix}patch_embed.proj.weight"]
    return {
        "embed_dim": patch[0],
        "patch": patch[-1],
        "depths": depths,
        "heads": tuple(table[1] for table in tables),
        "window": (round(tables[0][0] ** 0.5) + 1) // 2,
        "position": False,
    }


def _bert(shapes: Shapes, prefix: str) -> dict[str, Any]:
    vocabulary, hidden = shapes[f"{prefix}embeddings.word_embeddings.weight"]
    layers = _count(shapes, rf"{re.escape(prefix)}encoder\.layer\.(\d+)\.")
    return {
        "vocab_size": vocabulary,
        "hidden": hidden,
        "heads": 1 if hidden % 64 else hidden // 64,
        "intermediate": shapes[f"{prefix}encoder.layer.0.intermediate.dense.weight"][0],
        "splits": tuple(layers * (k + 1) // 4 for k in range(4)),
        "max_positions": shapes[f"{prefix}embeddings.position_embeddings.weight"][0],
    }


def _magnet(shapes: Shapes) -> dict[str, Any]:
    encoder = "classifier.pixel_decoder.transformer.encoder.layers."
    predictor = "classifier.predictor.transformer_ffn_layers."
    samples = shapes[encoder + "0.self_attn.attention_weights.bias"][0]
    return {
        "swin": _swin(shapes, "image_model."),
        "bert": _bert(shapes, "language_model."),
        "pixel_decoder": {
            "channels": shapes["classifier.pixel_decoder.mask_features.weight"][0],
            "layers": _count(shapes, re.escape(encoder) + r"(\d+)\."),
            "heads": _DECODER_HEADS,
            "points": samples // (_DECODER_HEADS * _LEVELS),
            "feedforward": shapes[encoder + "0.linear1.bias"][0],
            "groups": 32,
        },
        "mask_predictor": {
            "layers": _count(shapes, re.escape(predictor) + r"(\d+)\."),
            "heads": _DECODER_HEADS,
            "feedforward": shapes[predictor + "0.linear1.bias"][0],
        },
        "alignment": True,
        "pyramids": (1, 2, 3, 6),
        "fusion_heads": (1, 1, 1, 1),
        "language_fusion": "released",
        "gate_init": "released",
    }


def _lavt(shapes: Shapes) -> dict[str, Any]:
    return {
        "swin": _swin(shapes, "backbone."),
        "bert": _bert(shapes, "text_encoder."),
        "fusion_heads": (1, 1, 1, 1),
        "gate_init": "released",
    }


def _swin_alone(shapes: Shapes) -> dict[str, Any]:
    return {"swin": _swin(shapes, "")}


def _bert_alone(shapes: Shapes) -> dict[str, Any]:
    return {"bert": _bert(shapes, "")}
