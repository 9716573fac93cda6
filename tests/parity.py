"""Compares this project's network with reference outputs: `python tests/parity.py MANIFEST.json OUTPUTS.npz`.

The manifest names every parameter of a network in the published layout with its shape; values follow from the names
(tests/data/README.md). They go through the ordinary importer. One line a tensor: its largest error relative to its
largest value. Exits with 1 when one is above the tolerance.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from magnet_jax import losses, weight_names
from magnet_jax.model_sizes import infer_sizes
from magnet_jax.models.layers import resize_align_corners
from magnet_jax.network import build_model
from magnet_jax.pretrained import expected_shapes


def generated_shapes(manifest: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """Every parameter that has a value: name in the published layout -> (name in its own dictionary, shape)."""
    if manifest["kind"] != "lavt":
        return {name: (name, manifest["state_dict"][name]) for name in manifest["generated"]}
    prefixes = {"model": "", "bert_model": "text_encoder."}  # LAVT has two dictionaries.
    return {
        prefixes[group] + name: (name, manifest["state_dict"][group][name])
        for group, names in manifest["generated"].items()
        for name in names
    }


def generated_state_dict(manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights of a manifest, by the recipe: name -> array in the published layout."""
    embedding = (
        r"relative_position_bias_table|embeddings|level_embed|query_feat\.weight$|query_embed\.weight$"
    )
    weights = {}
    for published, (name, shape) in generated_shapes(manifest).items():
        n = np.random.RandomState(zlib.crc32((manifest["salt"] + name).encode())).standard_normal(shape)
        n = n.astype(np.float32)
        last = name.rsplit(".", 1)[-1]
        if last in ("bias", "running_mean"):
            value = 0.1 * n
        elif len(shape) == 1:
            value = 1 + 0.1 * n
            if last == "running_var":
                value = np.abs(value) + 0.5
        elif re.search(embedding, name):
            value = 0.5 * n
        else:
            value = n / np.sqrt(np.prod(shape[1:]))
        for pattern, factor in manifest.get("scale", {}).items():
            if re.search(pattern, name):
                value = value * factor
        weights[published] = value.astype(np.float32)
    return weights


def input_image(manifest: dict[str, Any]) -> np.ndarray:
    """The normalised image of a manifest, channels last: `[B, H, W, 3]`."""
    seed = zlib.crc32((manifest["salt"] + "inputs").encode())
    image = np.random.RandomState(seed).standard_normal(manifest["image_shape_nchw"]).astype(np.float32)
    return image.transpose(0, 2, 3, 1)


def build(manifest: dict[str, Any], **fields: Any) -> tuple[Any, dict[str, Any]]:
    """The network of a manifest and its variables, imported strictly. Fields of the network may be changed."""
    kind, config = manifest["kind"], manifest["config"]
    if kind not in ("magnet", "lavt"):
        sys.exit(f"parity: manifest kind is '{kind}'; expected 'magnet' or 'lavt'")
    weights = generated_state_dict(manifest)
    sizes = infer_sizes(kind, {name: x.shape for name, x in weights.items()})
    sizes["swin"].update(
        depths=tuple(config["depths"]), heads=tuple(config["num_heads"]), window=config["window"]
    )
    sizes["swin"].update(drop_path=0.0)
    sizes["bert"].update(heads=config["bert_heads"], dropout=0.0)
    if "bert_split" in config:
        sizes["bert"].update(splits=tuple(config["bert_split"]))
    sizes["fusion_heads"] = tuple(config["fusion_heads"])
    model = build_model(ConfigDict({"name": kind, "dtype": "float32"} | sizes | fields))
    arrays = weight_names.to_ours(kind, weights, expected_shapes(kind, sizes))
    return model, weight_names.nested_variables(arrays)


def compared_outputs(output, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Our outputs under the names, channel choices and axis order of a reference file; `size` is the image's."""
    result = {f"s{k + 1}": x[..., ::4].transpose(0, 3, 1, 2) for k, x in enumerate(output.stage_features)}
    result["language_features"] = output.word_features[..., ::8]
    if output.pixel_logits is not None:
        result["logits"] = resize_align_corners(output.pixel_logits, size).transpose(0, 3, 1, 2)
    else:
        result["mask_features"] = output.mask_features[..., ::8].transpose(0, 3, 1, 2)
        result["pred_masks"], result["pred_logits"] = (
            output.mask_logits[:, None],
            output.class_logits[:, None],
        )
        result["aux_pred_masks"] = output.aux_mask_logits[:, :, None]
        result["aux_pred_logits"] = output.aux_class_logits[:, :, None]
    return {name: np.asarray(x) for name, x in result.items()}


def relative_errors(manifest: dict[str, Any], reference, **fields: Any) -> dict[str, float]:
    """Largest error of every tensor of `reference`, relative to the tensor's largest value."""
    model, variables = build(manifest, **fields)
    image = input_image(manifest)
    with jax.default_matmul_precision("highest"):
        output = jax.jit(model.apply)(variables, image, reference["input_ids"], reference["attention_mask"])
        outputs = compared_outputs(output, image.shape[1:3])
    names = [name for name in reference if name not in ("input_ids", "attention_mask")]
    if missing := sorted(set(names) - set(outputs)):
        sys.exit(f"parity: the reference has tensors that nothing here computes: {', '.join(missing)}")
    errors = {}
    for name in names:
        if outputs[name].shape != reference[name].shape:
            sys.exit(f"parity: {name} has shape {outputs[name].shape}, the reference {reference[name].shape}")
        errors[name] = float(np.abs(outputs[name] - reference[name]).max() / np.abs(reference[name]).max())
    return errors


def gradient_norms(manifest: dict[str, Any], reference, target: np.ndarray) -> tuple[float, dict[str, float]]:
    """Loss of the segmentation terms and the gradient norm of every parameter, by its published name."""
    model, variables = build(manifest)
    weight = jnp.ones(len(target))

    def loss(params):
        out = model.apply(
            {"params": params}, input_image(manifest), reference["input_ids"], reference["attention_mask"]
        )
        terms = [
            5 * losses.binary_cross_entropy(logits, target, weight) + 5 * losses.dice(logits, target, weight)
            for logits in [*out.aux_mask_logits, out.mask_logits]
        ]
        return sum(terms)

    with jax.default_matmul_precision("highest"):
        value, gradient = jax.jit(jax.value_and_grad(loss))(variables["params"])
    gradient = weight_names.flat_variables({"params": gradient})
    norms = {}
    for name in manifest["generated"]:
        match, targets, _ = weight_names.find(weight_names.MAGNET, name)
        parts = [np.asarray(gradient[target.format(*match.groups())], np.float64) for target in targets]
        norms[name] = float(np.sqrt(sum(np.square(part).sum() for part in parts)))
    return float(value), norms


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("outputs", type=Path)
    parser.add_argument("--tolerance", type=float, help="default: 2e-5, and 1e-4 for LAVT")
    parser.add_argument("--gradients", type=Path, help="also compare with this file of gradient norms")
    arguments = parser.parse_args(argv)
    manifest = json.loads(arguments.manifest.read_text())
    with np.load(arguments.outputs) as file:
        reference = dict(file)
    # LAVT's instance norms amplify rounding.
    tolerance = arguments.tolerance or {"magnet": 2e-5, "lavt": 1e-4}.get(manifest["kind"])
    failed = False
    for name, error in relative_errors(manifest, reference).items():
        failed |= not error <= tolerance
        print(f"{name:20s} {error:.2e} {'ok' if error <= tolerance else 'ABOVE ' + str(tolerance)}")
    if arguments.gradients:
        expected = json.loads(arguments.gradients.read_text())
        value, norms = gradient_norms(manifest, reference, np.asarray(expected["target"], np.float32))
        worst = gradient_errors(norms, expected["grad_norm"])
        loss_error = abs(value / expected["total"] - 1)
        failed |= not (loss_error <= 1e-3 and max(worst.values()) <= 1e-3)
        print(f"total loss {loss_error:.2e}; {len(worst)} gradient norms, worst {max(worst.values()):.2e}")
    return int(failed)


def gradient_errors(norms: dict[str, float], expected: dict[str, float | None]) -> dict[str, float]:
    """Relative error of every norm whose reference is above 1e-4; where the reference has no path, ours itself."""
    errors = {name: abs(norms[name] / norm - 1) for name, norm in expected.items() if norm and norm > 1e-4}
    return errors | {name: norms[name] for name, norm in expected.items() if norm is None}


if __name__ == "__main__":
    sys.exit(main())
