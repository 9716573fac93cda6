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
from input_pipeline.cache import cached
from input_pipeline.records import DataError, Records, source

PARTITIONS = {"unc": ("train", "val", "testA", "testB")}


def splits(*, partition: str = "unc", **_: Any) -> tuple[str, ...]:
    """Splits of a partition; raises DataError for an unknown one."""
    if partition not in PARTITIONS:
        raise DataError(f"grefcoco: no partition '{partition}'; there is {', '.join(PARTITIONS)}")
    return PARTITIONS[partition]


@source("grefcoco", splits)
def load(split: str, *, root: str = "", seed: int = 0, partition: str = "unc") -> Records:
    """Every expression of a split, in the order of the file; the mask of several objects is their union.

    Args: root: the folder with `grefcoco` and `images`; seed is not used.
    Raises DataError for files that are missing, are not what they should be, or contradict each other.
    """
    del seed
    folder = refer.data_folder(root, "grefcoco")
    refs_file, instances = folder / f"grefs({partition}).json", folder / refer.INSTANCES

    def parse() -> dict[str, Records]:
        annotations = refer.Annotations(instances)
        columns = refer.Columns(annotations, refs_file, splits(partition=partition))
        for ref in _read(refs_file):
            members = refer.get(ref, "ann_id", (list, int), refs_file)
            members = [members] if isinstance(members, int) else members
            if ref.get("no_target") or members == [-1]:
                members = []
            image_id = refer.get(ref, "image_id", int, refs_file)
            parts = [annotations.segmentation(number, image_id, refs_file) for number in members]
            _, height, width = annotations.image(image_id, refs_file)
            # What it means has no number but that of the reference.
            columns.add(ref, refer.get(ref, "ref_id", int, refs_file), [parts, height, width])
        return columns.records()

    records = cached(folder, partition, split, (refs_file, instances), parse)
    records = dataclasses.replace(records, segmentations=_Unions(records.segmentations))
    return refer.with_pictures(records, Path(root))


class _Unions(Sequence[list | dict]):
    """Unions of COCO segmentations, made when they are asked for."""

    def __init__(self, shapes: Sequence[list]):
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
        raise DataError(f"{path}: no such file; config.data.root must have grefcoco/") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise DataError(f"{path}: expected a list of objects, found {str(content)[:40]}")
    return content
