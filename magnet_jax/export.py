"""What is trained here as files for others: in the published layout for PyTorch, or as a folder for any program of JAX."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

from magnet_jax.errors import UserError
from magnet_jax.models.swin import relative_position_index
from magnet_jax.portable import write_portable
from magnet_jax.trained import load_trained
from magnet_jax.weight_files import NOTE
from magnet_jax.weight_names import flat_variables, to_published
from magnet_jax.workdir import replacing

FORMATS = ("released", "portable")
# What the published code fixes: (field of config.model, its value there).
_PUBLISHED = {
    "magnet": (
        ("language_fusion", "released"),
        ("alignment", True),
        ("pyramids", (1, 2, 3, 6)),
        ("swin.position", False),
        ("bert.heads", 12),
        ("pixel_decoder.heads", 8),
        ("pixel_decoder.groups", 32),
        ("mask_predictor.heads", 8),
    ),
    "lavt": (("swin.position", False), ("bert.heads", 12)),
}
_IMAGE = {"magnet": "image_model.", "lavt": "backbone."}


def export(workdir: str | Path, output: str | Path, form: str, config: ConfigDict | None = None) -> None:
    """Writes the network of a run, or of `config.init`, to `output`.

    'portable' is a folder, see `portable`; 'released' a .safetensors file, or .pth where torch is. A .pth file has the
    dictionaries of the published one, a .safetensors file LAVT's BERT inside. Warns where the published code computes
    something else. Raises UserError for another format or ending.
    """
    output = Path(output)
    if form not in FORMATS:
        raise UserError(f"--format is '{form}'; expected one of {', '.join(FORMATS)}")
    if form == "portable":
        write_portable(load_trained(workdir, config), output)
        print(f"parameters, program, words and load.py in '{output}'")
        return
    if output.suffix not in (".safetensors", ".pth"):
        raise UserError(f"--output is '{output}'; expected a name that ends in .safetensors or .pth")
    if output.suffix == ".pth":
        torch = _torch(output)
    trained = load_trained(workdir, config)
    model = trained.config.model
    variables = jax.device_get(trained.variables)
    ours = {"params": variables["params"]["model"], "batch_stats": variables["batch_stats"]}
    arrays = published_arrays(model.name, flat_variables(ours), model.swin.window)
    fields = {name: value for name, value in model.to_dict().items() if name not in ("name", "dtype")}
    note = json.dumps({"kind": model.name, "model": fields})

    with replacing(output) as temporary:
        if output.suffix == ".pth":
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            torch.save(_dictionaries(model.name, tensors) | {NOTE: note}, temporary)
        else:
            _save(arrays, temporary, note)
    for line in differences(model):
        print(f"warning: {line}", file=sys.stderr)
    print(f"{len(arrays)} arrays in '{output}'")


def _save(arrays: Mapping[str, np.ndarray], path: Path, note: str) -> None:
    try:
        safetensors.numpy.save_file(dict(arrays), path, {NOTE: note})
    except safetensors.SafetensorError as error:  # What it makes of a full disk.
        raise OSError(f"could not write '{path}': {error}") from error


def published_arrays(kind: str, ours: Mapping[str, Any], window: int) -> dict[str, np.ndarray]:
    """Arrays by published name, with the tables that PyTorch keeps beside the parameters."""
    arrays = {name: np.ascontiguousarray(array) for name, array in to_published(kind, ours).items()}
    index = relative_position_index(window).astype(np.int64)
    for name in list(arrays):
        if name.startswith(_IMAGE[kind]) and name.endswith(".relative_position_bias_table"):
            arrays[name.replace("_bias_table", "_index")] = index
        if name.endswith(".running_mean"):
            arrays[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    return arrays


def differences(model: ConfigDict) -> list[str]:
    """A line for every field in which the network is not what the published code would make of its parameters."""
    lines = []
    for name, published in _PUBLISHED[model.name]:
        value = model
        for part in name.split("."):
            value = value[part]
        if value != published:
            lines.append(
                f"config.model.{name} is {value!r}, the published code has {published!r}: it will give other results, "
                "or refuse the file"
            )
    return lines


def _dictionaries(kind: str, tensors: Mapping[str, Any]) -> dict[str, dict]:
    if kind != "lavt":
        return {"model": dict(tensors)}
    prefix = "text_encoder."
    return {
        "model": {name: x for name, x in tensors.items() if not name.startswith(prefix)},
        "bert_model": {
            name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)
        },
    }


def _torch(output: Path):
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"--output is '{output}', which needs torch; pip install -r requirements-torch.txt, or write .safetensors"
        ) from error
    return torch
