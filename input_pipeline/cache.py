"""Parsed annotations kept beside their sources: plain arrays, which load in a moment and cannot run code."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from input_pipeline.records import Blobs, DataError, Records

FOLDER = "parsed"
VERSION = 1  # Of what is stored; raise it with any change, and older files are no longer used.
_BLOBS = ("images", "texts", "types", "segmentations")
_ARRAYS = ("sizes", "image_ids", "object_images", "object_ids", "objects", "sentence_ids")


class JsonList(Sequence[list | dict]):
    """Values of JSON in one buffer, parsed when they are asked for."""

    def __init__(self, blobs: Blobs):
        self._blobs = blobs

    def __len__(self) -> int:
        return len(self._blobs)

    def __getitem__(self, i: int) -> list | dict:
        return json.loads(self._blobs[i])


def cached(
    folder: Path,
    name: str,
    split: str,
    sources: Sequence[Path],
    parse: Callable[[], dict[str, Records]],
    listed: Sequence[Path] = (),
) -> Records:
    """Records of a split, from `folder/parsed` where the sources are those that were parsed then, else from `parse()`.

    Args: name: of what is parsed, unique in the folder; sources: files whose contents decide, by their SHA-256; parse:
    gives every split, empty ones too; listed: files whose names, sizes and dates decide.
    Raises DataError for a source that is missing, and whatever `parse` raises.
    """
    key = _key(sources, listed)
    found = _read(_path(folder, name, split, key), split)
    if found is not None:
        return found
    parsed = parse()
    for other, records in parsed.items():
        try:
            _write(_path(folder, name, other, key), records)
        except OSError as error:
            logging.warning(
                "%s: parsed annotations cannot be kept there (%s), so they are parsed again at every start",
                *(folder / FOLDER, error.strerror),
            )
            break
    return parsed[split]


def _path(folder: Path, name: str, split: str, key: str) -> Path:
    if not re.fullmatch(r"\w+", split):  # It becomes a part of a file's name.
        raise DataError(f"{folder}: {split!r:.40} is no name of a split")
    return folder / FOLDER / f"{name}-{split}-{key}.npz"


def _key(sources: Sequence[Path], listed: Sequence[Path]) -> str:
    total = hashlib.sha256(str(VERSION).encode())
    for path in sources:
        try:
            state = path.stat()
        except FileNotFoundError:
            raise DataError(
                f"{path}: no such file; config.data.root must be the folder of the data set, see the README"
            ) from None
        total.update(_digest(path, state.st_size, state.st_mtime_ns))
    for path in listed:
        state = path.stat()
        total.update(json.dumps([path.name, state.st_size, state.st_mtime_ns]).encode())
    return total.hexdigest()[:16]


@functools.lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed: int) -> bytes:
    """SHA-256 of a file, once per process and state of the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _write(path: Path, records: Records) -> None:
    """Writes a file whole or not at all, in place of those of other sources."""
    path.parent.mkdir(exist_ok=True)
    columns = {name: getattr(records, name) for name in _ARRAYS}
    for name in _BLOBS:
        encode = json.dumps if name == "segmentations" else str
        # Half a surrogate pair, which JSON can hold, is kept as it is: what to do with it is the loader's business.
        blobs = Blobs.join(encode(item).encode("utf-8", "surrogatepass") for item in getattr(records, name))
        columns[name], columns[f"{name}_ends"] = blobs.buffer, blobs.ends
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            np.savez(file, **columns, coco=records.coco)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files private.
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    stem = path.name.rpartition("-")[0]
    for old in path.parent.glob("*.npz"):
        if old.name.rpartition("-")[0] == stem and old != path:
            old.unlink(missing_ok=True)


def _read(path: Path, split: str) -> Records | None:
    """What was written; None where nothing was, or where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            columns = dict(stored)
        blobs = {name: Blobs(columns.pop(name), columns.pop(f"{name}_ends")) for name in _BLOBS}
        coco = bool(columns.pop("coco"))
        words = {
            name: [item.decode("utf-8", "surrogatepass") for item in blobs[name]]
            for name in ("images", "texts", "types")
        }
        return Records(
            split=split, **columns, **words, segmentations=JsonList(blobs["segmentations"]), coco=coco
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (EOFError, IndexError, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        logging.warning("%s: damaged (%s), so the annotations are parsed again", path, error)
        return None
