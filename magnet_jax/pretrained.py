"""Published weights in: converts them once, for `config.init.magnet|lavt|swin|bert = DIR` to start from.

python -m magnet_jax.pretrained --kind=KIND --source=FILE_OR_DIR --out=DIR [--config=configs/NAME.py]

KIND is magnet, lavt, lavt_one (LAVT with BERT inside), swin or bert. DIR gets `weights.safetensors`, float32 by our
names, `config.json`, the kind and the fields of the network, and the vocabulary that lies beside a BERT.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

from magnet_jax.errors import UserError
from magnet_jax.experiment import load_experiment
from magnet_jax.model_sizes import infer_sizes
from magnet_jax.network import build_model
from magnet_jax.weight_files import read_weights
from magnet_jax.weight_names import flat_variables, to_ours
from magnet_jax.workdir import write_json

KINDS = {"magnet": "magnet", "lavt": "lavt", "lavt_one": "lavt", "swin": "swin", "bert": "bert"}
_VOCABULARIES = ("vocab.txt", "tokenizer.json")


class Imported(NamedTuple):
    """What was written: the kind of network, its fields, and lines worth knowing."""

    kind: str
    fields: dict[str, Any]
    notes: list[str]


def import_weights(
    kind: str, source: str | Path, out: str | Path, config: ConfigDict | None = None
) -> Imported:
    """Converts published weights into the directory `out`.

    kind: a key of `KINDS`; config: an experiment whose network the weights must fit; without it sizes are read off the
    shapes. Raises UserError, and writes nothing, for a file that cannot be read and for one that does not fit.
    """
    kind, out, source = KINDS[kind], Path(out), Path(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' exists and is not an empty directory; give another --out")
    weights = read_weights(source, kind)
    fields, notes = _fields(kind, weights, source if source.is_dir() else source.parent, config)
    arrays = to_ours(kind, weights, expected_shapes(kind, fields))
    gates = [arrays[f"text_gate_{k}/fc2/kernel"] for k in range(4) if f"text_gate_{k}/fc2/kernel" in arrays]
    if gates and not any(np.any(gate) for gate in gates):
        notes.append("every language gate is exactly zero: its words do not depend on the image")

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        try:
            safetensors.numpy.save_file(arrays, temporary / "weights.safetensors")
        except safetensors.SafetensorError as error:  # What it makes of a full disk.
            raise OSError(f"could not write '{out}': {error}") from error
        write_json(temporary / "config.json", {"kind": kind, "model": fields})
        for name in _VOCABULARIES if kind == "bert" else ():
            if ((source if source.is_dir() else source.parent) / name).exists():
                shutil.copyfile((source if source.is_dir() else source.parent) / name, temporary / name)
        temporary.chmod(0o755)
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Imported(kind, fields, notes)


def expected_shapes(kind: str, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes, by our name, of the network with these fields; of its image or text encoder alone for 'swin' and 'bert'.

    Raises UserError for fields that make no network.
    """
    part, name, around = "", kind, {}
    if kind in ("swin", "bert"):
        # LAVT around it, as small as it gets, since an encoder is no network of its own.
        part, name = {"swin": "image/", "bert": "text/"}[kind], "lavt"
        around["swin"] = {"embed_dim": 4, "depths": (1, 1, 1, 1), "heads": (1, 1, 1, 1), "window": 2}
        around["bert"] = {"vocab_size": 4, "hidden": 4, "heads": 1, "intermediate": 4, "splits": (0, 0, 0, 1)}
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    words = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    try:
        model = build_model(ConfigDict(around | dict(fields) | {"name": name, "dtype": "float32"}))
        variables = jax.eval_shape(model.init, jax.random.key(0), image, words, words)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise UserError(
            f"a network of kind '{kind}' cannot have the sizes {dict(fields)} ({str(error).strip().splitlines()[0]}); "
            "give --config with the right ones"
        ) from error
    shapes = {name: tuple(leaf.shape) for name, leaf in flat_variables(variables).items()}
    return {name: shape for name, shape in shapes.items() if name.startswith(part)}


def _fields(kind: str, weights, folder: Path, config: ConfigDict | None) -> tuple[dict, list[str]]:
    """Fields of the network: as an export notes them, else read off the shapes; what no shape tells by other means."""
    if weights.fields and config is None:
        return weights.fields, []
    fields, notes = infer_sizes(kind, weights.shapes), []
    heads = _hugging_face_heads(folder) if kind == "bert" else None
    if config is not None:
        fields = _with_experiment(fields, kind, config)
        if heads not in (None, fields["bert"]["heads"] if kind == "bert" else None):
            raise UserError(
                f"--config has config.model.bert.heads {fields['bert']['heads']}, but '{folder / 'config.json'}' {heads}"
            )
    elif heads is not None:
        fields["bert"]["heads"] = heads
    elif "bert" in fields:
        notes.append(
            f"BERT's heads are in no shape: {fields['bert']['heads']} assumed; --config can say others"
        )
    return fields, notes


def _hugging_face_heads(folder: Path) -> int | None:
    """What the config.json beside Hugging Face weights says of BERT's heads; None where there is none."""
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        theirs = json.loads(path.read_text())
        found = theirs.get("hidden_act", "gelu"), float(theirs.get("layer_norm_eps", 1e-12))
        heads = int(theirs["num_attention_heads"]) if "num_attention_heads" in theirs else None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is not the configuration of a BERT ({error})") from error
    if found != ("gelu", 1e-12):
        raise UserError(
            f"'{path}' has hidden_act and layer_norm_eps {found}; expected ('gelu', 1e-12), this BERT's"
        )
    return heads


def _with_experiment(fields: dict, kind: str, config: ConfigDict) -> dict:
    """The fields of an experiment's network, except for those that the weights decide."""
    chosen = config.model.to_dict()
    name = chosen.pop("name")
    chosen.pop("dtype")
    if kind in ("swin", "bert"):
        chosen = {kind: chosen[kind]}
    elif name != kind:
        raise UserError(f"--config describes a network '{name}'; the weights are of kind '{kind}'")
    if "bert" in chosen and not chosen["bert"]["vocab_size"]:
        chosen["bert"]["vocab_size"] = fields["bert"]["vocab_size"]
    if kind == "swin":
        chosen["swin"]["window"] = fields["swin"]["window"]  # Resampled where a network starts from it.
    return chosen | {name: fields[name] for name in ("language_fusion",) if name in fields}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 1 and one error on stderr where it cannot."""
    parser = argparse.ArgumentParser(
        prog="python -m magnet_jax.pretrained", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--kind", required=True, choices=KINDS)
    parser.add_argument(
        "--source", required=True, help=".safetensors, .pth or .bin file, or a directory with one"
    )
    parser.add_argument("--out", required=True, help="directory to write; must not exist or be empty")
    parser.add_argument(
        "--config", help="experiment whose network the weights must fit, e.g. configs/refcoco.py"
    )
    arguments = parser.parse_args(argv)
    try:
        config = None if arguments.config is None else load_experiment(arguments.config).get_config()
        imported = import_weights(arguments.kind, arguments.source, arguments.out, config)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    kind = imported.kind
    for note in imported.notes:
        print(note)
    print(f"{kind} weights in '{arguments.out}'; use them with --config.init.{kind}={arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
