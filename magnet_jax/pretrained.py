"""Published weights to our parameters: one table of names, strict in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from magnet_jax.errors import UserError


class Transform(NamedTuple):
    """How the axes of a source array become ours, and back."""

    forward: Callable[[np.ndarray], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.T, lambda x: x.T)  # [out, in] -> [in, out]
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW -> HWIO
POINT1D = Transform(lambda x: x[..., 0].T, lambda x: x.T[..., None])  # a convolution of width 1 is a linear
POINT2D = Transform(lambda x: x[..., 0, 0].T, lambda x: x.T[..., None, None])

_QKV = ("query", "key", "value")


def _pair(source: str, target: str, kernel: Transform = LINEAR) -> list[tuple]:
    """Rows for the kernel and the bias of a linear or convolution."""
    return [(source + r"\.weight", target + "/kernel", kernel), (source + r"\.bias", target + "/bias", SAME)]


def _norm(source: str, target: str) -> list[tuple]:
    return [(source + r"\.weight", target + "/scale", SAME), (source + r"\.bias", target + "/bias", SAME)]


def _packed(source: str, target: str) -> list[tuple]:
    """Rows for query, key and value stacked along the first axis of one array."""
    return [
        (source + r"\.in_proj_weight", tuple(f"{target}/{name}/kernel" for name in _QKV), LINEAR),
        (source + r"\.in_proj_bias", tuple(f"{target}/{name}/bias" for name in _QKV), SAME),
        *_pair(source + r"\.out_proj", target + "/output"),
    ]


def _pwam(source: str, target: str) -> list[tuple]:
    """Rows of a pixel-word attention with LayerNorms."""
    attention = source + r"\.image_lang_att"
    return [
        *_pair(source + r"\.vis_project\.0", target + "/visual", POINT1D),
        *_pair(source + r"\.project_mm\.0", target + "/mixed", POINT1D),
        *_pair(attention + r"\.f_query\.0", target + "/query"),
        *_norm(attention + r"\.f_query\.1", target + "/query_norm"),
        *_pair(attention + r"\.f_key\.0", target + "/key", POINT1D),
        *_pair(attention + r"\.f_value\.0", target + "/value", POINT1D),
        *_pair(attention + r"\.W\.0", target + "/output"),
        *_norm(attention + r"\.W\.1", target + "/output_norm"),
    ]


def _swin(source: str, target: str) -> list[tuple]:
    """Rows of a Swin Transformer in Microsoft's layout; `source` and `target` are prefixes."""
    block, ours = source + r"layers\.(\d)\.blocks\.(\d+)\.", target + "stage_{0}/block_{1}/"
    return [
        *_pair(source + r"patch_embed\.proj", target + "patch_embed/proj", CONV),
        *_norm(source + r"patch_embed\.norm", target + "patch_embed/norm"),
        *_norm(block + "norm1", ours + "norm1"),
        (block + r"attn\.relative_position_bias_table", ours + "attn/relative_position_bias", SAME),
        *_pair(block + r"attn\.qkv", ours + "attn/qkv"),
        *_pair(block + r"attn\.proj", ours + "attn/proj"),
        *_norm(block + "norm2", ours + "norm2"),
        *_pair(block + r"mlp\.fc1", ours + "fc1"),
        *_pair(block + r"mlp\.fc2", ours + "fc2"),
        *_norm(source + r"layers\.(\d)\.downsample\.norm", target + "merge_{0}/norm"),
        (
            source + r"layers\.(\d)\.downsample\.reduction\.weight",
            target + "merge_{0}/reduction/kernel",
            LINEAR,
        ),
    ]


def _bert(source: str, target: str) -> list[tuple]:
    """Rows of a BERT encoder in Hugging Face's layout."""
    layer, ours = source + r"encoder\.layer\.(\d+)\.", target + "layer_{0}/"
    embeddings = source + r"embeddings\."
    return [
        (embeddings + r"word_embeddings\.weight", target + "embeddings/word/embedding", SAME),
        (embeddings + r"position_embeddings\.weight", target + "embeddings/position/embedding", SAME),
        (embeddings + r"token_type_embeddings\.weight", target + "embeddings/token_type/embedding", SAME),
        *_norm(embeddings + "LayerNorm", target + "embeddings/norm"),
        *_pair(layer + r"attention\.self\.query", ours + "query"),
        *_pair(layer + r"attention\.self\.key", ours + "key"),
        *_pair(layer + r"attention\.self\.value", ours + "value"),
        *_pair(layer + r"attention\.output\.dense", ours + "output"),
        *_norm(layer + r"attention\.output\.LayerNorm", ours + "attention_norm"),
        *_pair(layer + r"intermediate\.dense", ours + "fc1"),
        *_pair(layer + r"output\.dense", ours + "fc2"),
        *_norm(layer + r"output\.LayerNorm", ours + "output_norm"),
    ]


_STAGE = r"image_model\.layers\.(\d)\."
_PYRAMID = _STAGE + r"pyramids\.(\d)\."
_TEXT = r"language_model\."
_ENCODER = r"classifier\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\."
_PREDICTOR = r"classifier\.predictor\."

# (regular expression of a source name, our name or the names that its first axis is split over, transform).
MAGNET = [
    *_swin(r"image_model\.", "image/"),
    *_norm(r"image_model\.norm(\d)", "image_norm_{0}"),
    *_pwam(_STAGE + "fusion", "image_fusion_{0}/pwam"),
    (_PYRAMID + r"1\.weight", "image_fusion_{0}/pyramid_{1}/fc1/kernel", POINT2D),
    *_norm(_PYRAMID + "2", "image_fusion_{0}/pyramid_{1}/norm"),
    (_PYRAMID + r"3\.weight", "image_fusion_{0}/pyramid_{1}/fc2/kernel", POINT2D),
    (_PYRAMID + r"5\.weight", "image_fusion_{0}/pyramid_{1}/fc3/kernel", POINT2D),
    *_pwam(_STAGE + r"fusions\.(\d)", "image_fusion_{0}/pyramid_{1}/pwam"),
    *_pair(_STAGE + r"mixer\.0", "image_fusion_{0}/mixer1"),
    *_norm(_STAGE + r"mixer\.1", "image_fusion_{0}/mixer_norm"),
    *_pair(_STAGE + r"mixer\.2", "image_fusion_{0}/mixer2"),
    (_STAGE + r"res_gate\.0\.weight", "image_gate_{0}/fc1/kernel", LINEAR),
    (_STAGE + r"res_gate\.2\.weight", "image_gate_{0}/fc2/kernel", LINEAR),
    *_bert(_TEXT, "text/"),
    *_pair(_TEXT + r"pwams\.(\d)\.vis_project\.0", "text_fusion_{0}/visual"),
    *_pair(_TEXT + r"pwams\.(\d)\.project_mm\.0", "text_fusion_{0}/mixed", POINT1D),
    *_pair(_TEXT + r"pwams\.(\d)\.image_lang_att\.f_query\.0", "text_fusion_{0}/query", POINT1D),
    *_pair(_TEXT + r"pwams\.(\d)\.image_lang_att\.f_key\.0", "text_fusion_{0}/key", POINT1D),
    *_pair(_TEXT + r"pwams\.(\d)\.image_lang_att\.f_value\.0", "text_fusion_{0}/value", POINT1D),
    *_pair(_TEXT + r"pwams\.(\d)\.image_lang_att\.W\.0", "text_fusion_{0}/output", POINT1D),
    (_TEXT + r"res_gates\.(\d)\.0\.weight", "text_gate_{0}/fc1/kernel", LINEAR),
    (_TEXT + r"res_gates\.(\d)\.2\.weight", "text_gate_{0}/fc2/kernel", LINEAR),
    *_norm(_TEXT + r"norms\.(\d)", "text_norm_{0}"),
    *_pair(r"classifier\.pixel_decoder\.input_proj\.(\d)\.0", "decoder/input_{0}", POINT2D),
    *_norm(r"classifier\.pixel_decoder\.input_proj\.(\d)\.1", "decoder/input_norm_{0}"),
    (r"classifier\.pixel_decoder\.transformer\.level_embed", "decoder/level_embedding", SAME),
    *_pair(_ENCODER + r"self_attn\.sampling_offsets", "decoder/layer_{0}/attn/offsets"),
    *_pair(_ENCODER + r"self_attn\.attention_weights", "decoder/layer_{0}/attn/weights"),
    *_pair(_ENCODER + r"self_attn\.value_proj", "decoder/layer_{0}/attn/value"),
    *_pair(_ENCODER + r"self_attn\.output_proj", "decoder/layer_{0}/attn/output"),
    *_norm(_ENCODER + "norm1", "decoder/layer_{0}/norm1"),
    *_pair(_ENCODER + "linear1", "decoder/layer_{0}/fc1"),
    *_pair(_ENCODER + "linear2", "decoder/layer_{0}/fc2"),
    *_norm(_ENCODER + "norm2", "decoder/layer_{0}/norm2"),
    *_pair(r"classifier\.pixel_decoder\.mask_features", "decoder/mask_features", POINT2D),
    *_packed(
        _PREDICTOR + r"transformer_cross_attention_layers\.(\d+)\.multihead_attn",
        "predictor/layer_{0}/cross_attn",
    ),
    *_norm(_PREDICTOR + r"transformer_cross_attention_layers\.(\d+)\.norm", "predictor/layer_{0}/cross_norm"),
    *_packed(
        _PREDICTOR + r"transformer_self_attention_layers\.(\d+)\.self_attn", "predictor/layer_{0}/self_attn"
    ),
    *_norm(_PREDICTOR + r"transformer_self_attention_layers\.(\d+)\.norm", "predictor/layer_{0}/self_norm"),
    *_pair(_PREDICTOR + r"transformer_ffn_layers\.(\d+)\.linear1", "predictor/layer_{0}/fc1"),
    *_pair(_PREDICTOR + r"transformer_ffn_layers\.(\d+)\.linear2", "predictor/layer_{0}/fc2"),
    *_norm(_PREDICTOR + r"transformer_ffn_layers\.(\d+)\.norm", "predictor/layer_{0}/mlp_norm"),
    *_norm(_PREDICTOR + "decoder_norm", "predictor/norm"),
    (_PREDICTOR + r"query_feat\.weight", "predictor/query", SAME),
    (_PREDICTOR + r"query_embed\.weight", "predictor/query_position", SAME),
    (_PREDICTOR + r"level_embed\.weight", "predictor/level_embedding", SAME),
    *_pair(_PREDICTOR + "class_embed", "predictor/class"),
    *_pair(_PREDICTOR + r"mask_embed\.layers\.(\d)", "predictor/mask_{0}"),
    *_pair("lang_proj", "lang_proj"),
]

# Index tables that follow from the sizes.
BUFFERS = r".*\.(relative_position_index|position_ids)"


def find(table: list[tuple], name: str) -> tuple[re.Match, tuple[str, ...], Transform] | None:
    """The row of the table for a source name: (match, our names still to be formatted with its groups, transform)."""
    for pattern, targets, transform in table:
        if match := re.fullmatch(pattern, name):
            return match, (targets,) if isinstance(targets, str) else targets, transform
    return None


def convert(table: list[tuple], source: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays named as published -> nested parameters as ours.

    source: name -> array; expected: our parameters or their shapes, nested. Raises `UserError` that lists everything
    that is missing, left over or of another shape.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten_dict(expected, sep="/").items()}
    result, problems = {}, []
    for name, array in source.items():
        if re.fullmatch(BUFFERS, name):
            continue
        row = find(table, name)
        if row is None:
            problems.append(f"{name}: not a name of this layout")
            continue
        match, targets, transform = row
        for target, part in zip(targets, np.split(np.asarray(array), len(targets)), strict=True):
            target = target.format(*match.groups())
            if target not in shapes:
                problems.append(f"{name}: the configured network has no {target}")
                continue
            value = np.ascontiguousarray(transform.forward(part), dtype=np.float32)
            if value.shape != shapes[target]:
                problems.append(f"{name}: shape {value.shape}, but {target} has {shapes[target]}")
            result[target] = value
    problems += [f"{target}: nothing in the file fills it" for target in sorted(set(shapes) - set(result))]
    if problems:
        raise UserError(
            f"the weights do not fit the network, {len(problems)} mismatches:\n  " + "\n  ".join(problems)
        )
    return unflatten_dict(result, sep="/")


def magnet_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Fields of `magnet_jax.models.MagNet` read off the shapes of a file in the released layout.

    What no shape tells has the released value: 64 channels a head in BERT, 8 heads in the decoder, one head of fusion.
    """

    def count(pattern):
        return len({match.group(1) for match in (re.match(pattern, name) for name in shapes) if match})

    depths = tuple(count(rf"image_model\.layers\.{k}\.blocks\.(\d+)\.") for k in range(4))
    tables = [shapes[f"image_model.layers.{k}.blocks.0.attn.relative_position_bias_table"] for k in range(4)]
    vocabulary, hidden = shapes["language_model.embeddings.word_embeddings.weight"]
    layers = count(r"language_model\.encoder\.layer\.(\d+)\.")
    decoder = "classifier.pixel_decoder.transformer.encoder.layers.0."
    heads, levels = 8, 4
    return {
        "swin": {
            "embed_dim": shapes["image_model.patch_embed.proj.weight"][0],
            "patch": shapes["image_model.patch_embed.proj.weight"][-1],
            "depths": depths,
            "heads": tuple(table[1] for table in tables),
            "window": (round(tables[0][0] ** 0.5) + 1) // 2,
        },
        "bert": {
            "vocab_size": vocabulary,
            "hidden": hidden,
            "heads": max(hidden // 64, 1),
            "intermediate": shapes["language_model.encoder.layer.0.intermediate.dense.weight"][0],
            "splits": tuple(layers * (k + 1) // 4 for k in range(4)),
            "max_positions": shapes["language_model.embeddings.position_embeddings.weight"][0],
        },
        "pixel_decoder": {
            "channels": shapes["classifier.pixel_decoder.mask_features.weight"][0],
            "layers": count(r"classifier\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\."),
            "heads": heads,
            "points": shapes[decoder + "self_attn.attention_weights.bias"][0] // (heads * levels),
            "feedforward": shapes[decoder + "linear1.bias"][0],
        },
        "mask_predictor": {
            "layers": count(r"classifier\.predictor\.transformer_ffn_layers\.(\d+)\."),
            "heads": heads,
            "feedforward": shapes["classifier.predictor.transformer_ffn_layers.0.linear1.bias"][0],
        },
        "language_fusion": "released",
        "gate_init": "released",
    }
