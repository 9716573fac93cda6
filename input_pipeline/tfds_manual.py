"""The folder from which TFDS's `ref_coco` is built, made of a REFER tree (data spec section 2).

FOLDER/refcoco.json has every reference with its object, and every annotation of their images; FOLDER/coco_train2014 has
the pictures. Neither `refer` nor `cocoapi` is needed for it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from pycocotools import mask as coco_mask

from input_pipeline import masks, refer
from input_pipeline.records import DataError
from input_pipeline.refcoco_tfds import MANUAL_FILE, MANUAL_IMAGES

_PARTIAL = f".{MANUAL_FILE}.partial"
_INDEX_FIELDS = ("area", "bbox", "category_id", "id", "image_id", "iscrowd")


def write(
    root: str | Path,
    folder: str | Path,
    partitions: Mapping[str, Sequence[str]],
    progress: Callable[[Sequence, str], Iterable] = lambda items, what: items,
) -> int:
    """Writes the folder; pictures are hard links where the disk is the same, and those that are there are left.

    An index that is there is replaced when all else has worked, so that a killed call is simply repeated.

    Args:
        root: of the REFER tree.
        partitions: data set -> its partitions, all of which go in.
        progress: wraps what is gone through, with a word on what it is.
    Returns:
        How many references were written.
    Raises:
        DataError: for files that are missing or contradict each other, and text that TFDS cannot hold.
    """
    root, folder = Path(root), Path(folder)
    (folder / MANUAL_IMAGES).mkdir(parents=True, exist_ok=True)
    index = _Index()
    with open(folder / _PARTIAL, "w", encoding="utf-8") as file:
        file.write('{"ref": [')
        for dataset, names in partitions.items():
            source = _Source(root, dataset)
            index.add(source)
            for partition in names:
                path = refer.data_folder(root, dataset) / f"refs({partition}).p"
                for ref in progress(refer.read_refs(path), f"{dataset} ({partition})"):
                    _append(file, index.references, source.reference(ref, partition, path))
                    index.references += 1
                    index.used.add(ref["image_id"])
        file.write('], "coco_anns": {')
        for number, image_id in enumerate(sorted(index.used)):
            key = f"{json.dumps(str(image_id))}: "
            _append(file, number, {"info": index.images[image_id], "anns": index.objects[image_id]}, key)
        file.write("}}\n")
    _link(root, folder / MANUAL_IMAGES, [index.images[i]["file_name"] for i in sorted(index.used)], progress)
    os.replace(folder / _PARTIAL, folder / MANUAL_FILE)
    return index.references


def bounds(mask: np.ndarray) -> dict[str, Any]:
    """COCO's `bbox` (left, top, width, height) and `area` of a 0/1 mask [H, W]."""
    rle = masks.encode(mask)
    return {"bbox": coco_mask.toBbox(rle).tolist(), "area": int(coco_mask.area(rle))}


class _Index:
    """What the file says of all images: those of every data set together."""

    def __init__(self):
        self.references = 0
        self.used: set[int] = set()
        self.images: dict[int, dict] = {}
        self.objects: dict[int, list[dict]] = {}
        self._known: set[int] = set()  # Objects.

    def add(self, source: _Source) -> None:
        """Adds the images and annotations of a data set; those of two data sets are COCO's, and so the same."""
        for image_id in source.annotations.images:
            info = source.info(image_id)
            kept = self.images.setdefault(image_id, info)
            same = all(kept[key] == info[key] for key in ("file_name", "height", "width"))
            if not same:
                raise DataError(
                    f"{source.path}: image {image_id} is {info['file_name']} of {info['height']}x{info['width']}, but "
                    f"{kept['file_name']} of {kept['height']}x{kept['width']} in another data set; write each to a folder "
                    "of its own with --dataset"
                )
            self.objects.setdefault(image_id, [])
        for number, annotation in source.annotations.objects.items():
            image_id = refer.get(annotation, "image_id", int, source.path)
            if number not in self._known and image_id in source.annotations.images:
                self._known.add(number)
                # The builder reads no segmentation here, and they would double the file.
                entry = source.bounded(annotation)
                self.objects[image_id].append({key: entry[key] for key in _INDEX_FIELDS if key in entry})


class _Source:
    """The annotations of one data set, as the builder wants them."""

    def __init__(self, root: Path, dataset: str):
        self.dataset = dataset
        self.path = refer.data_folder(root, dataset) / refer.INSTANCES
        self.annotations = refer.Annotations(self.path)
        self._objects: dict[int, dict] = {}

    def info(self, image_id: int) -> dict:
        """COCO's entry of an image, by the name of 2014."""
        name, height, width = self.annotations.image(image_id, self.path)
        name = refer.PREFIX + name.removeprefix(refer.PREFIX)
        return {**self.annotations.images[image_id], "file_name": name, "height": height, "width": width}

    def reference(self, ref: dict, partition: str, path: Path) -> dict:
        """An entry of the list of references."""
        refer.get(ref, "ref_id", int, path)
        image_id = refer.get(ref, "image_id", int, path)
        object_id = refer.get(ref, "ann_id", int, path)
        refer.get(ref, "split", str, path)
        self.annotations.image(image_id, path)
        for sentence in refer.get(ref, "sentences", list, path):
            sentence_id = refer.get(sentence, "sent_id", int, path)
            try:
                refer.get(sentence, "raw", str, path).encode()
            except UnicodeEncodeError:
                raise DataError(
                    f"{path}: sentence {sentence_id} is {sentence['raw']!a}, with half a character, which TFDS cannot hold; "
                    "mend or remove it"
                ) from None
        segmentation = self.annotations.segmentation(object_id, image_id, path)
        if object_id not in self._objects:
            self._objects[object_id] = self._object(object_id, segmentation)
        return {
            **ref,
            "ann": self._objects[object_id],
            "dataset": self.dataset,
            "dataset_partition": partition,
        }

    def _object(self, number: int, segmentation: list | dict) -> dict:
        annotation = self.annotations.objects[number]
        mask = self._mask(annotation, segmentation)
        return {**self.bounded(annotation), "segmentation": _accepted(segmentation, mask)}

    def _mask(self, annotation: dict, segmentation: list | dict) -> np.ndarray:
        _, height, width = self.annotations.image(
            refer.get(annotation, "image_id", int, self.path), self.path
        )
        try:
            return masks.decode(segmentation, height, width)
        except DataError as error:
            raise DataError(f"{self.path}: object {annotation['id']}: {error}") from None

    def bounded(self, annotation: dict) -> dict:
        """An annotation with an area, and with a box that does not leave its image."""
        refer.get(annotation, "category_id", int, self.path)
        _, height, width = self.annotations.image(annotation["image_id"], self.path)
        found = {key: annotation[key] for key in ("bbox", "area") if annotation.get(key) is not None}
        if len(found) < 2:
            segmentation = refer.get(annotation, "segmentation", (list, dict), self.path)
            found = bounds(self._mask(annotation, segmentation)) | found
        box, area = found["bbox"], found["area"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, (*box, area))):
            raise DataError(
                f"{self.path}: object {annotation['id']} has bbox {box!r:.60} and area {area!r:.20}; expected four numbers "
                "and one"
            )
        left, across = _clip(box[0], box[2], width)
        top, down = _clip(box[1], box[3], height)
        return {**annotation, "bbox": [left, top, across, down], "area": area}


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _clip(start: float, length: float, size: int) -> tuple[float, float]:
    """The part of an interval within 0 and size, as start and length."""
    end = min(max(start + length, 0), size)
    start = min(max(start, 0), end)
    return start, end - start


def _accepted(segmentation: list | dict, mask: np.ndarray) -> list:
    """The same shape in the forms that the builder takes: polygons of three points and more, or one plain RLE."""
    parts = [] if isinstance(segmentation, dict) else segmentation
    polygons = [part for part in parts if isinstance(part, list) and len(part) >= 6]
    if polygons and all(isinstance(part, list) for part in parts):
        return polygons
    pixels = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff([0, *ends, pixels.size]).tolist()
    if pixels[0]:  # The first run is of background.
        runs.insert(0, 0)
    return [{"size": list(mask.shape), "counts": runs}]


def _append(file: TextIO, number: int, entry: dict, key: str = "") -> None:
    file.write(f"{',' if number else ''}\n{key}{json.dumps(entry)}")


def _link(root: Path, folder: Path, names: list[str], progress: Callable[[Sequence, str], Iterable]) -> None:
    pictures = refer.pictures(names, root)
    missing = [path for path in pictures if not os.path.exists(path)]
    if missing:
        raise DataError(
            f"{missing[0]}: no such picture; {len(missing)} of {len(pictures)} are missing, and "
            "`python -m input_pipeline prepare` lists them"
        )
    for name, path in zip(names, progress(pictures, "pictures"), strict=True):
        target = folder / name
        if target.exists() and target.stat().st_size == os.path.getsize(path):
            continue
        partial = folder / f".{name}.partial"
        partial.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(path), partial)  # Of the picture, where the tree has a symbolic link.
        except OSError:  # Another disk, or one without links.
            shutil.copyfile(path, partial)
        os.replace(partial, target)
