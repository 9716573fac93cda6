"""gRefCOCO: expressions that mean one object, several, or none (data spec section 1).

ROOT/grefcoco/grefs(unc).json and instances.json; images as in a REFER tree.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline import masks, refer
from input_pipeline.records import DataError, Records, source

PARTITIONS = {"unc": ("train", "val", "testA", "testB")}


def splits(*, partition: str = "unc", **_: Any) -> tuple[str, ...]:
    """Splits of a partition; raises DataError for an unknown one."""
    if partition not in PARTITIONS:
        raise DataError(f"grefcoco: no partition '{partition}'; there is {', '.join(PARTITIONS)}")
    return PARTITIONS[partition]


@source("grefcoco", splits)
def load(split: str, *, seed: int = 0, root: str = "", partition: str = "unc") -> Records:
    """Every expression of a split, in the order of the file; the mask of several objects is their union.

    Args: root: the folder with `grefcoco` and `images`; seed is not used.
    Raises DataError for files that are missing, are not what they should be, or contradict each other.
    """
    del seed
    tree = refer.Tree(root, "grefcoco")
    refs_file = tree.folder / f"grefs({partition}).json"
    columns = refer.Columns()
    for ref in _read(refs_file):
        if refer.get(ref, "split", str, refs_file) != split:
            continue
        image_id = refer.get(ref, "image_id", int, refs_file)
        members = refer.get(ref, "ann_id", (list, int), refs_file)
        members = [members] if isinstance(members, int) else members
        if ref.get("no_target") or members == [-1]:
            members = []
        parts = [tree.segmentation(number, refs_file) for number in members]
        size = tree.size(image_id, refs_file)
        object_id = refer.get(ref, "ref_id", int, refs_file)  # What it means has no other number.
        columns.add(
            tree.image(image_id, refs_file), size, image_id, (parts, *size), object_id, ref, refs_file
        )
    records = columns.records(split, refs_file)
    return dataclasses.replace(records, segmentations=_Unions(records.segmentations))


class _Unions(Sequence[list | dict]):
    """Unions of COCO segmentations, made when they are asked for."""

    def __init__(self, shapes: Sequence[tuple[list, int, int]]):
        self._shapes = shapes

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, i: int) -> list | dict:
        parts, height, width = self._shapes[i]
        if len(parts) < 2:
            return parts[0] if parts else []
        # Each object by itself: objects that overlap are not the overlapping polygons of one object.
        layers = [masks.decode(part, height, width) for part in parts]
        return masks.encode(np.maximum.reduce(layers))


def _read(path: Path) -> list[dict]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; config.data.options.root must have grefcoco/") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise DataError(f"{path}: expected a list of objects, found {str(content)[:40]}")
    return content
