"""Published names to ours and back: one readable table a layout, strict in both directions.

Ours are the names of parameters ('image/stage_0/...') and, after 'batch_stats/', those of running statistics.
"""

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


def _pwam(source: str, target: str, query: Transform) -> list[tuple]:
    """Rows of a pixel-word attention, without its norms; `query` is the form of its query and output projections."""
    attention = source + r"\.image_lang_att"
    return [
        *_pair(source + r"\.vis_project\.0", target + "/visual", POINT1D),
        *_pair(source + r"\.project_mm\.0", target + "/mixed", POINT1D),
        *_pair(attention + r"\.f_query\.0", target + "/query", query),
        *_pair(attention + r"\.f_key\.0", target + "/key", POINT1D),
        *_pair(attention + r"\.f_value\.0", target + "/value", POINT1D),
        *_pair(attention + r"\.W\.0", target + "/output", query),
    ]


def _pwam_norms(source: str, target: str) -> list[tuple]:
    """Rows of the LayerNorms of a pixel-word attention; LAVT's norms have no parameters."""
    attention = source + r"\.image_lang_att"
    return [
        *_norm(attention + r"\.f_query\.1", target + "/query_norm"),
        *_norm(attention + r"\.W\.1", target + "/output_norm"),
    ]


def _gate(source: str, target: str) -> list[tuple]:
    """Rows of the two linears of a gate."""
    return [(source + rf"\.{i}\.weight", f"{target}/fc{j}/kernel", LINEAR) for i, j in ((0, 1), (2, 2))]


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


def _conv_norm(source: int, target: int) -> list[tuple]:
    """Rows of the two convolutions with BatchNorm at one level of LAVT's decoder."""
    rows = []
    for i in (1, 2):
        norm, ours = rf"classifier\.bn{i}_{source}\.", f"decoder/norm{i}_{target}/"
        rows += [
            (rf"classifier\.conv{i}_{source}\.weight", f"decoder/conv{i}_{target}/kernel", CONV),
            *_norm(norm[:-2], ours[:-1]),
            (norm + "running_mean", f"batch_stats/{ours}mean", SAME),
            (norm + "running_var", f"batch_stats/{ours}var", SAME),
        ]
    return rows


_STAGE = r"image_model\.layers\.(\d)\."
_PYRAMID = _STAGE + r"pyramids\.(\d)\."
_TEXT = r"language_model\."
_ENCODER = r"classifier\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\."
_PREDICTOR = r"classifier\.predictor\."

# (regular expression of a source name, our name or the names that its first axis is split over, transform).
MAGNET = [
    *_swin(r"image_model\.", "image/"),
    *_norm(r"image_model\.norm(\d)", "image_norm_{0}"),
    *_pwam(_STAGE + "fusion", "image_fusion_{0}/pwam", LINEAR),
    *_pwam_norms(_STAGE + "fusion", "image_fusion_{0}/pwam"),
    (_PYRAMID + r"1\.weight", "image_fusion_{0}/pyramid_{1}/fc1/kernel", POINT2D),
    *_norm(_PYRAMID + "2", "image_fusion_{0}/pyramid_{1}/norm"),
    (_PYRAMID + r"3\.weight", "image_fusion_{0}/pyramid_{1}/fc2/kernel", POINT2D),
    (_PYRAMID + r"5\.weight", "image_fusion_{0}/pyramid_{1}/fc3/kernel", POINT2D),
    *_pwam(_STAGE + r"fusions\.(\d)", "image_fusion_{0}/pyramid_{1}/pwam", LINEAR),
    *_pwam_norms(_STAGE + r"fusions\.(\d)", "image_fusion_{0}/pyramid_{1}/pwam"),
    *_pair(_STAGE + r"mixer\.0", "image_fusion_{0}/mixer1"),
    *_norm(_STAGE + r"mixer\.1", "image_fusion_{0}/mixer_norm"),
    *_pair(_STAGE + r"mixer\.2", "image_fusion_{0}/mixer2"),
    *_gate(_STAGE + "res_gate", "image_gate_{0}"),
    *_bert(_TEXT, "text/"),
    *_pair(_TEXT + r"pwams\.(\d)\.vis_project\.0", "text_fusion_{0}/visual"),
    *_pair(_TEXT + r"pwams\.(\d)\.project_mm\.0", "text_fusion_{0}/mixed", POINT1D),
    *_pair(_TEXT + r"pwams\.(\d)\.image_lang_att\.f_query\.0", "text_fusion_{0}/query", POINT1D),
    *_pair(_TEXT + r"pwams\.(\d)\.image_lang_att\.f_key\.0", "text_fusion_{0}/key", POINT1D),
    *_pair(_TEXT + r"pwams\.(\d)\.image_lang_att\.f_value\.0", "text_fusion_{0}/value", POINT1D),
    *_pair(_TEXT + r"pwams\.(\d)\.image_lang_att\.W\.0", "text_fusion_{0}/output", POINT1D),
    *_gate(_TEXT + r"res_gates\.(\d)", "text_gate_{0}"),
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

_BACKBONE = r"backbone\.layers\.(\d)\."

# BERT has the names of the variant that keeps it inside.
LAVT = [
    *_swin(r"backbone\.", "image/"),
    *_norm(r"backbone\.norm(\d)", "image_norm_{0}"),
    *_pwam(_BACKBONE + "fusion", "image_fusion_{0}", POINT1D),
    *_gate(_BACKBONE + "res_gate", "image_gate_{0}"),
    *_bert(r"text_encoder\.", "text/"),
    *(row for theirs, ours in ((2, 0), (3, 1), (4, 2)) for row in _conv_norm(theirs, ours)),
    *_pair(r"classifier\.conv1_1", "decoder/classes", POINT2D),
]

SWIN = _swin("", "image/")
BERT = _bert("", "text/")

# What files hold beside the parameters of the network: tables that follow from the sizes, heads of other tasks.
UNUSED = {
    "magnet": r".*\.(relative_position_index|attn_mask|position_ids)|language_model\.pooler\..*",
    "lavt": r".*\.(relative_position_index|attn_mask|position_ids|num_batches_tracked)|text_encoder\.pooler\..*",
    "swin": r".*\.(relative_position_index|attn_mask)|norm\..*|head\..*",
    "bert": r".*\.position_ids|pooler\..*|cls\..*",
}
TABLES = {"magnet": MAGNET, "lavt": LAVT, "swin": SWIN, "bert": BERT}


def find(table: list[tuple], name: str) -> tuple[re.Match, tuple[str, ...], Transform] | None:
    """The row of the table for a source name: (match, our names still to be formatted with its groups, transform)."""
    for pattern, targets, transform in table:
        if match := re.fullmatch(pattern, name):
            return match, (targets,) if isinstance(targets, str) else targets, transform
    return None


def to_ours(kind: str, source: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arrays by published name -> float32 arrays by our name.

    kind: a key of `TABLES`; source is asked for one array at a time; expected: shapes by our name. Raises `UserError`
    that lists everything that is missing, left over, of another shape or not finite.
    """
    result, problems = {}, []
    for name in source:
        if re.fullmatch(UNUSED[kind], name):
            continue
        row = find(TABLES[kind], name)
        if row is None:
            problems.append(f"{name}: not a name of this layout")
            continue
        match, targets, transform = row
        array, targets = np.asarray(source[name]), [target.format(*match.groups()) for target in targets]
        if not array.ndim or array.shape[0] % len(targets):
            problems.append(f"{name}: shape {array.shape} cannot be cut into {len(targets)} equal parts")
            result |= dict.fromkeys(targets)
            continue
        for target, part in zip(targets, np.split(array, len(targets)), strict=True):
            if target not in expected:
                problems.append(f"{name}: the configured network has no {target}")
                continue
            try:
                value = np.ascontiguousarray(transform.forward(part), dtype=np.float32)
            except (IndexError, ValueError):
                problems.append(f"{name}: shape {array.shape} has another number of axes than this layout")
                result[target] = None
                continue
            if value.shape != expected[target]:
                problems.append(f"{name}: shape {value.shape}, but {target} has {expected[target]}")
            elif not np.isfinite(value).all():
                problems.append(f"{name}: has values that are not finite")
            result[target] = value
    problems += [f"{target}: nothing in the file fills it" for target in sorted(set(expected) - set(result))]
    if problems:
        raise UserError(
            f"the weights do not fit the network, {len(problems)} mismatches:\n  " + "\n  ".join(problems)
        )
    return result


def to_published(kind: str, ours: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The way back: arrays by our name -> arrays by published name, without the tables that follow from the sizes.

    Raises `UserError` that lists the names that the layout has no place for.
    """
    result, left = {}, set(ours)
    for pattern, targets, transform in TABLES[kind]:
        targets = (targets,) if isinstance(targets, str) else targets
        first = re.sub(r"\{\d\}", r"(\\d+)", targets[0])
        for name in ours:
            if not (match := re.fullmatch(first, name)):
                continue
            names = [target.format(*match.groups()) for target in targets]
            published = pattern.replace("\\.", ".")
            for group in match.groups():
                published = re.sub(r"\(\\d\+?\)", group, published, count=1)
            result[published] = np.concatenate([transform.backward(np.asarray(ours[part])) for part in names])
            left.difference_update(names)
    if left:
        raise UserError(
            f"the published layout of '{kind}' has no place for {len(left)} arrays: {', '.join(sorted(left))}; "
            "export a network of the published form"
        )
    return result


def flat_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """`{'params': ..., 'batch_stats': ...}` of a model as leaves by our name."""
    flat = flatten_dict(variables["params"], sep="/")
    return flat | flatten_dict({"batch_stats": variables.get("batch_stats", {})}, sep="/")


def nested_variables(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The way back from `flat_variables`."""
    params = unflatten_dict(flat, sep="/")
    return {"batch_stats": params.pop("batch_stats", {}), "params": params}
