"""A trained network as a folder that others can load: parameters, the program itself, and the words it knows.

params/  (orbax)   network.stablehlo  (of `jax.export`, for CPU, CUDA and TPU)   config.json   tokenizer/   load.py
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import jax
from jax import export
from ml_collections import ConfigDict

from magnet_jax import workdir as run_files
from magnet_jax.checkpoint import save_variables
from magnet_jax.errors import UserError
from magnet_jax.network import build_network
from magnet_jax.trained import Trained, batch_shapes

PLATFORMS = ("cpu", "cuda", "tpu")
_PROGRAM = "network.stablehlo"
_EXAMPLE = Path(__file__).parent / "portable_example.py"


def program_of(trained: Trained) -> export.Exported:
    """The network for any number of pairs, `(variables, image, text_ids, text_mask) -> {name: logits}`.

    image uint8 `[B, side, side, 3]`, text_ids and text_mask int32 `[B, L]`; mask_logits float32 `[B, h, w]` and, where the
    network has them, class_logits `[B, 2]`.
    """
    config = trained.config.copy_and_resolve_references()
    # Forms that every platform has, for a number of pairs that is not known yet; kernels would want it.
    config.model.swin.attention, config.model.layers = "heads", "scan"
    if "pixel_decoder" in config.model:
        config.model.pixel_decoder.sampling = "anywhere"
    network = build_network(config)

    def run(variables, image, text_ids, text_mask):
        output = network.apply(variables, {"image": image, "text_ids": text_ids, "text_mask": text_mask})
        found = {"mask_logits": output.mask_logits, "class_logits": output.class_logits}
        return {name: logits for name, logits in found.items() if logits is not None}

    (pairs,) = export.symbolic_shape("pairs")
    shapes = batch_shapes(config)
    inputs = [
        jax.ShapeDtypeStruct((pairs, *shapes[name].shape[1:]), shapes[name].dtype)
        for name in ("image", "text_ids", "text_mask")
    ]
    variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trained.variables)
    return export.export(jax.jit(run), platforms=PLATFORMS)(variables, *inputs)


def write_portable(trained: Trained, folder: str | Path) -> None:
    """Writes the folder, whole or not at all; raises UserError where there is one already."""
    folder = Path(folder).absolute()
    if folder.exists():
        raise UserError(f"--output is '{folder}', which is there already; give a name that is new")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        made = temporary / folder.name
        made.mkdir()
        (made / _PROGRAM).write_bytes(program_of(trained).serialize())
        save_variables(made, jax.device_get(trained.variables))
        run_files.save_config(made, _own_config(trained))
        trained.tokenizer.save(made / "tokenizer")
        shutil.copy(_EXAMPLE, made / "load.py")
        made.rename(folder)
    finally:
        shutil.rmtree(temporary)


def _own_config(trained: Trained) -> ConfigDict:
    """The configuration of what is in the folder: no weights to start from, no losses whose heads are not there, and no
    devices."""
    config, network = trained.config.copy_and_resolve_references(), trained.network
    for kind in config.init:
        config.init[kind] = ""
    if network.grounding is None:
        config.loss.grounding = 0.0
    if network.text_projection is None and not network.model.has_text_embedding:
        config.loss.alignment = 0.0
    config.mesh, config.sharding = (("data", -1),), ((".*", "replicate"),)
    config.parallelism, config.cpu_devices = "jit", 1
    return config
