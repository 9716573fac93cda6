"""Starting a network from imported weights: `config.init` names directories that `magnet_jax.pretrained` wrote."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from magnet_jax.errors import UserError
from magnet_jax.weight_names import flat_variables, nested_variables

_WHOLE = ("magnet", "lavt")
# Of `config.model`: what training and use may choose, whatever the weights were trained with.
_FREE = ("name", "dtype", "fusion_dropout", "swin.drop_path", "bert.dropout")
_FREE += ("swin.attention", "layers", "pixel_decoder.sampling", "remat", "remat_policy")
# And of an encoder: what is resampled, seen in the shapes, or only says where a network interrupts it.
_FREE_OF_ENCODERS = (*_FREE, "swin.window", "swin.position", "bert.vocab_size", "bert.splits")
_TABLE = "relative_position_bias"


def chosen_sources(config: ConfigDict) -> dict[str, str]:
    """Directories of `config.init` by kind; a whole network leaves no need of encoders.

    Raises UserError for two whole networks, and for one of another kind than `config.model`.
    """
    chosen = {kind: path for kind, path in config.init.items() if path}
    whole = [kind for kind in _WHOLE if kind in chosen]
    if len(whole) > 1:
        raise UserError("config.init has both a magnet and a lavt; leave one empty")
    if whole and whole[0] != config.model.name:
        raise UserError(f"config.init.{whole[0]} does not fit config.model.name '{config.model.name}'")
    return {kind: chosen[kind] for kind in whole} or chosen


def whole_network(config: ConfigDict) -> str | None:
    """'magnet' or 'lavt' where `config.init` has one, else None."""
    return next((kind for kind in chosen_sources(config) if kind in _WHOLE), None)


def read_fields(path: str | Path, kind: str) -> dict[str, Any]:
    """Fields of the network whose weights are in a directory; raises UserError for any other directory."""
    with _imported(path, kind):
        about = json.loads((Path(path) / "config.json").read_text())
        found, fields = about["kind"], dict(about["model"])
    if found != kind:
        raise UserError(f"config.init.{kind} is '{path}', which holds weights of kind '{found}'")
    return fields


def read_arrays(path: str | Path, kind: str) -> dict[str, np.ndarray]:
    """The arrays there by our name."""
    read_fields(path, kind)
    with _imported(path, kind):
        return safetensors.numpy.load_file(Path(path) / "weights.safetensors")


@contextlib.contextmanager
def _imported(path: str | Path, kind: str):
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"config.init.{kind} is '{path}', which `python -m magnet_jax.pretrained` did not write ({error}); "
            "convert weights with it first"
        ) from error


def with_imported_sizes(config: ConfigDict, own: ConfigDict | None = None) -> tuple[ConfigDict, list[str]]:
    """A copy whose network is that of `config.init.magnet` or `.lavt`; and a line for every field that it changes.

    own: the configuration of a run that started there, which then has the fields, so that the directory need not exist.
    """
    config, kind, changes = config.copy_and_resolve_references(), whole_network(config), []
    if kind is None:
        return config, changes
    path = config.init[kind]
    remembered = own is not None and own.init.get(kind) == path
    fields = own.model.to_dict() if remembered else read_fields(path, kind)
    for name, value in flatten_dict(fields, sep=".").items():
        section, _, field = f"model.{name}".rpartition(".")
        target = config
        for part in section.split("."):
            target = target[part]
        value = tuple(value) if isinstance(value, list) else value
        if name not in _FREE and field in target and target[field] != value:
            changes.append(f"config.model.{name} is {value}, as in '{path}'")
            target[field] = value
    return config, changes


def load_initial(shapes: Mapping[str, Any], config: ConfigDict) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays by our name for the variables that `config.init` fills; and lines that say what it does.

    shapes: variables as `Network.init` returns them, or their shapes. Bias tables of another window are resampled.
    Raises UserError where an array has another shape, or an encoder other fields than `config.model`.
    """
    flat, filled, lines = flat_variables(_of_model(shapes)), {}, []
    for kind, path in chosen_sources(config).items():
        if kind not in _WHOLE:
            _check_fields(kind, path, config)
        arrays = read_arrays(path, kind)
        problems, resampled = [], 0
        for name, array in arrays.items():
            expected = flat[name].shape if name in flat else None
            if (
                expected
                and name.endswith(_TABLE)
                and array.shape != expected
                and array.shape[1:] == expected[1:]
            ):
                array, resampled = resample_table(array, expected[0]), resampled + 1
            if array.shape != expected:
                problems.append(f"{name}: {array.shape} there, {expected or 'absent'} here")
            filled[name] = array
        if problems:
            raise UserError(
                f"config.init.{kind} is '{path}', which does not fit config.model: {len(problems)} arrays differ: "
                f"{'; '.join(problems[:8])}{' ...' if len(problems) > 8 else ''}"
            )
        more = f", {resampled} bias tables resampled to another window" if resampled else ""
        lines.append(f"{kind}: {len(arrays)} arrays from '{path}'{more}")
    missing = sorted({name.split("/")[0] for name in flat if name not in filled})
    missing += [name for name in shapes["params"] if name != "model"]
    if lines:
        lines.append(f"newly initialised, in whole or in part: {', '.join(missing) or 'nothing'}")
    return filled, lines


def fill(variables: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Variables with some of the model's arrays, by our name, replaced; each keeps its place on the devices.

    variables: arrays, or `jax.ShapeDtypeStruct`s with a sharding.
    """

    def placed(leaf, array):
        return jax.make_array_from_callback(
            array.shape, leaf.sharding, lambda index: array[index].astype(leaf.dtype)
        )

    flat = flat_variables(_of_model(variables))
    model = nested_variables(flat | {name: placed(flat[name], array) for name, array in arrays.items()})
    params = variables["params"] | {"model": model["params"]}
    return {"params": params, "batch_stats": model["batch_stats"]}


def resample_table(table: np.ndarray, rows: int) -> np.ndarray:
    """A relative position bias table `[(2w - 1)^2, heads]` for another window: `[rows, heads]`, bicubic."""
    old, new = round(len(table) ** 0.5), round(rows**0.5)
    grid = table.reshape(old, old, -1)
    resized = jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic", antialias=False)
    return np.asarray(resized).reshape(rows, -1)


def _of_model(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": variables["params"]["model"], "batch_stats": variables["batch_stats"]}


def _check_fields(kind: str, path: str, config: ConfigDict) -> None:
    """Shapes do not tell everything, the heads for example."""
    ours, different = flatten_dict(config.model.to_dict(), sep="."), []
    for name, value in flatten_dict(read_fields(path, kind), sep=".").items():
        value = tuple(value) if isinstance(value, list) else value
        if name not in _FREE_OF_ENCODERS and ours.get(name, value) != value:
            different.append(f"config.model.{name} is {ours[name]} here and {value} there")
    if different:
        raise UserError(f"config.init.{kind} is '{path}', which does not fit: {'; '.join(different)}")
