"""Files of published weights, read one array at a time and never trusted: safetensors, and PyTorch's with torch."""

from __future__ import annotations

import argparse
import functools
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from magnet_jax.errors import UserError

_IN_DIRECTORY = ("model.safetensors", "pytorch_model.bin")  # What Hugging Face calls them.
NOTE = "magnet_jax"  # Key of our own note in exported files.
_TORCH_SUFFIXES = (".pth", ".pt", ".bin")

_BLOCK = r"encoder\.layers\.(\d)\.blocks\.(\d+)\."
# Swin in Hugging Face's layout -> Microsoft's; query, key and value are joined apart.
_HUGGING_FACE_SWIN = [
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"embeddings\.norm\.(\w+)", r"patch_embed.norm.\1"),
    (_BLOCK + r"layernorm_before\.(\w+)", r"layers.\1.blocks.\2.norm1.\3"),
    (_BLOCK + r"attention\.self\.(relative_\w+)", r"layers.\1.blocks.\2.attn.\3"),
    (_BLOCK + r"attention\.output\.dense\.(\w+)", r"layers.\1.blocks.\2.attn.proj.\3"),
    (_BLOCK + r"layernorm_after\.(\w+)", r"layers.\1.blocks.\2.norm2.\3"),
    (_BLOCK + r"intermediate\.dense\.(\w+)", r"layers.\1.blocks.\2.mlp.fc1.\3"),
    (_BLOCK + r"output\.dense\.(\w+)", r"layers.\1.blocks.\2.mlp.fc2.\3"),
    (r"encoder\.layers\.(\d)\.downsample\.(.+)", r"layers.\1.downsample.\2"),
    (r"layernorm\.(\w+)", r"norm.\1"),
    (r"classifier\.(\w+)", r"head.\1"),
]
_QUERY = _BLOCK + r"attention\.self\.query\.(\w+)"


class Entry(NamedTuple):
    """One array of a file: its shape, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Weights(Mapping[str, np.ndarray]):
    """Arrays by name, each read when it is asked for; `shapes` without reading.

    `fields` are those of the network, which an export of ours names beside its arrays; else empty.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], fields: Mapping[str, Any]):
        self._path, self._entries, self.fields = path, dict(entries), dict(fields)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self._entries[name].read()
        except Exception as error:  # Forms of numbers and arrays that NumPy does not have.
            raise UserError(f"'{self._path}': {name} cannot be read ({_first_line(error)})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_weights(path: str | Path, kind: str) -> Weights:
    """The arrays of a published file, or of a Hugging Face directory, by the names of `weight_names.TABLES[kind]`.

    Prefixes 'module.' and 'bert.', the two-dictionary form of LAVT and Hugging Face's names of Swin are put right.
    Raises UserError for a file that is not there, damaged, not weights, or would run code; torch is needed for
    `.pth`, `.pt` and `.bin` only.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in _IN_DIRECTORY if (path / name).exists()]
        if not found:
            raise UserError(f"'{path}' has no {' or '.join(_IN_DIRECTORY)}; give the file itself")
        path = found[0]
    if not path.is_file():
        raise UserError(f"'{path}' is not there; give a file of weights")
    if path.suffix == ".safetensors":
        groups, about = _read_safetensors(path)
    elif path.suffix in _TORCH_SUFFIXES:
        groups, about = _read_torch(path)
    else:
        raise UserError(
            f"'{path}' ends in '{path.suffix}'; expected .safetensors or {', '.join(_TORCH_SUFFIXES)}"
        )
    return Weights(path, _usual_names(path, groups, kind), _fields(path, about, kind))


def _fields(path: Path, about: Any, kind: str) -> dict[str, Any]:
    """The fields in the note of an export of ours, JSON text `{"kind": ..., "model": {...}}`."""
    if not isinstance(about, str):
        return {}
    try:
        content = json.loads(about)
        found, fields = content["kind"], dict(content["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' has a damaged note '{NOTE}' ({error})") from error
    if found != kind:
        raise UserError(f"'{path}' is an export of kind '{found}'; give --kind={found}")
    return {name: value for name, value in fields.items() if name not in ("name", "dtype")}


def _usual_names(path: Path, groups: Mapping[str, Mapping[str, Entry]], kind: str) -> dict[str, Entry]:
    """The arrays of a kind under one naming; raises UserError where two would have one name."""

    def renamed(entries: Mapping[str, Entry], rename: Callable[[str], str]) -> dict[str, Entry]:
        result = {}
        for name, entry in entries.items():
            if (new := rename(name)) in result:
                raise UserError(f"'{path}' has two arrays that mean '{new}', one of them '{name}'")
            result[new] = entry
        return result

    def without(prefix: str) -> Callable[[str], str]:
        return lambda name: name.removeprefix(prefix)

    entries = renamed(groups["model"], without("module."))
    if kind == "lavt" and "bert_model" in groups:
        inside = renamed(groups["bert_model"], without("module."))
        both = {"": entries, "text_encoder.": inside}
        entries = {prefix + name: entry for prefix, part in both.items() for name, entry in part.items()}
    if kind == "bert":
        entries = renamed(entries, without("bert."))
    if kind == "swin":
        entries = renamed(entries, without("swin."))
        if any(name.startswith("encoder.layers.") for name in entries):
            entries = renamed(_joined(entries), _microsoft_name)
    # The names of files that TensorFlow wrote first.
    old = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
    return renamed(entries, lambda name: functools.reduce(lambda n, pair: n.replace(*pair), old, name))


def _microsoft_name(name: str) -> str:
    for pattern, target in _HUGGING_FACE_SWIN:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, target, name)
    return name


def _joined(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Query, key and value of Hugging Face's Swin as Microsoft's one array."""
    result = dict(entries)
    for name in entries:
        match = re.fullmatch(_QUERY, name)
        names = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if not match or not all(part in entries for part in names):
            continue
        parts = [result.pop(part) for part in names]
        stage, block, leaf = match.groups()
        shape = (sum(part.shape[0] if part.shape else 1 for part in parts), *parts[0].shape[1:])
        result[f"layers.{stage}.blocks.{block}.attn.qkv.{leaf}"] = Entry(
            shape, lambda parts=parts: np.concatenate([part.read() for part in parts])
        )
    return result


def _read_safetensors(path: Path) -> tuple[dict[str, dict[str, Entry]], Any]:
    """The arrays under 'model', and our note."""
    try:
        file = safetensors.safe_open(path, framework="numpy")
        entries = {
            name: Entry(tuple(file.get_slice(name).get_shape()), functools.partial(file.get_tensor, name))
            for name in file.keys()  # noqa: SIM118 (the file is no dictionary)
        }
        return {"model": entries}, (file.metadata() or {}).get(NOTE)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"'{path}' is not a whole safetensors file ({_first_line(error)}); fetch it again"
        ) from error


def _read_torch(path: Path) -> tuple[dict[str, dict[str, Entry]], Any]:
    """The dictionaries of arrays in a file of PyTorch's, 'model' and others where it has them, and our note."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"'{path}' is a file of PyTorch's; pip install -r requirements-torch.txt, or give a .safetensors file"
        ) from error
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # By which PyTorch knows it, too.
        if zipped:
            _check_archive(path)
        # Training programs save their arguments too; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"'{path}' is not a whole file of PyTorch weights, or holds more than data and is refused "
            f"({_first_line(error)})"
        ) from error

    def checked(name, x):
        # A view of a few stored numbers may claim to be of any size.
        if (
            x.layout != torch.strided
            or x.is_quantized
            or x.numel() > x.untyped_storage().nbytes() // x.element_size()
        ):
            raise UserError(
                f"'{path}': {name} is not a plain array that holds its {x.numel()} numbers, refused"
            )
        return x

    def arrays(group) -> dict[str, Entry]:
        tensors = {str(name): checked(name, x) for name, x in group.items() if isinstance(x, torch.Tensor)}
        return {
            name: Entry(
                tuple(x.shape), lambda x=x: (x if x.dtype == torch.float32 else x.float()).detach().numpy()
            )
            for name, x in tensors.items()
        }

    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds a {type(content).__name__}; expected a dictionary of arrays")
    groups = {name: arrays(group) for name, group in content.items() if isinstance(group, dict)}
    if "model" not in groups:
        groups["model"] = arrays(content)
    if not groups["model"]:
        raise UserError(f"'{path}' holds no arrays; expected a state dict, or one under 'model'")
    return groups, content.get(NOTE)


def _check_archive(path: Path) -> None:
    """PyTorch stores arrays as they are: an archive that is larger inside than outside is not its work."""
    with zipfile.ZipFile(path) as archive:
        inside = sum(info.file_size for info in archive.infolist())
        compressed = any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist())
    if compressed or inside > path.stat().st_size:
        raise UserError(
            f"'{path}' is {path.stat().st_size} bytes but would unpack to {inside}; PyTorch does not compress, refused"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
