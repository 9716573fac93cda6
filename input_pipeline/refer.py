"""REFER trees: RefCOCO, RefCOCO+ and G-Ref as their authors published them (data spec section 1).

ROOT/<dataset>/refs(<partition>).p and instances.json; ROOT/images/mscoco/images/train2014/*.jpg, or train2017.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.cache import cached
from input_pipeline.records import DataError, Records, source

PARTITIONS = {  # dataset -> partition -> splits
    "refcoco": {"unc": ("train", "val", "testA", "testB"), "google": ("train", "val", "test")},
    "refcoco+": {"unc": ("train", "val", "testA", "testB")},
    "refcocog": {"umd": ("train", "val", "test"), "google": ("train", "val")},
}
IMAGES = Path("images/mscoco/images")
INSTANCES = "instances.json"
PREFIX = "COCO_train2014_"  # Of the names of 2014, which those of 2017 lack.


def splits(*, dataset: str = "refcoco", partition: str = "unc", **_: Any) -> tuple[str, ...]:
    """Splits of a partition; raises DataError for an unknown data set or partition."""
    if dataset not in PARTITIONS:
        raise DataError(f"refer: data set '{dataset}' is none of {', '.join(PARTITIONS)}")
    if partition not in PARTITIONS[dataset]:
        raise DataError(
            f"refer: '{dataset}' has no partition '{partition}'; it has {', '.join(PARTITIONS[dataset])}"
        )
    return PARTITIONS[dataset][partition]


@source("refer", splits)
def load(
    split: str, *, root: str = "", seed: int = 0, dataset: str = "refcoco", partition: str = "unc"
) -> Records:
    """Every expression of every object of a split, in the order of the file.

    Args: root: the folder with the data set's folder and `images`; seed is not used.
    Raises DataError for files that are missing, are not what they should be, or contradict each other.
    """
    del seed
    folder = data_folder(root, dataset)
    refs_file, instances = folder / f"refs({partition}).p", folder / INSTANCES

    def parse() -> dict[str, Records]:
        columns = Columns(Annotations(instances), refs_file, splits(dataset=dataset, partition=partition))
        for ref in read_refs(refs_file):
            object_id = get(ref, "ann_id", int, refs_file)
            image_id = get(ref, "image_id", int, refs_file)
            columns.add(ref, object_id, columns.annotations.segmentation(object_id, image_id, refs_file))
        return columns.records()

    return with_pictures(cached(folder, partition, split, (refs_file, instances), parse), Path(root))


def data_folder(root: str, dataset: str) -> Path:
    """The folder of a data set; raises DataError where no root is given."""
    if not root:
        raise DataError("config.data.root is missing; give the folder with the data set and 'images'")
    return Path(root) / dataset


def with_pictures(records: Records, root: Path) -> Records:
    """Records whose images are names of COCO's train2014, with the paths of the pictures in their place."""
    return dataclasses.replace(records, images=pictures(records.images, root))


def pictures(names: Sequence[str], root: Path) -> list[str]:
    """Paths of the pictures of these names in COCO's train2014.

    They are those of the folder, train2014 or train2017, that has more of the first few. Raises DataError where there is
    neither, and for a name that is not plain.
    """
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise DataError(f"{root}: file_name '{name}' is not a plain name; it must not lead elsewhere")
    folders = [root / IMAGES / "train2014", root / IMAGES / "train2017"]
    present = [folder for folder in folders if folder.is_dir()]
    if not present:
        raise DataError(
            f"{folders[0]}: no such folder, nor {folders[1]}; put COCO's train2014 or train2017 there"
        )

    def paths(folder: Path) -> list[str]:
        prefix = PREFIX if folder.name == "train2014" else ""
        return [f"{folder}/{prefix}{name.removeprefix(PREFIX)}" for name in names]

    best = max(present, key=lambda folder: sum(map(os.path.exists, paths(folder)[:20])))
    return paths(best)


class Annotations:
    """The contents of an `instances.json`: images and objects by their ids.

    Raises DataError where the file is missing or is not what it should be, and, naming the file of references that asks,
    for an image or object that is not there, or an object of another image.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            content = json.loads(path.read_bytes())
            self.images, self.objects = (
                {entry["id"]: entry for entry in content[key]} for key in ("images", "annotations")
            )
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; config.data.root must be a REFER tree") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a COCO annotation file ({error!r})") from error

    def image(self, number: int, asking: Path) -> tuple[str, int, int]:
        """File name, height and width."""
        if number not in self.images:
            raise self._absent("image_id", number, asking)
        image = self.images[number]
        return (
            get(image, "file_name", str, self.path),
            get(image, "height", int, self.path),
            get(image, "width", int, self.path),
        )

    def segmentation(self, number: int, image_id: int, asking: Path) -> list | dict:
        """COCO segmentation of an object of an image, which is there even where it covers nothing."""
        if not isinstance(number, int) or number not in self.objects:
            raise self._absent("ann_id", number, asking)
        found = get(self.objects[number], "image_id", int, self.path)
        if found != image_id:
            raise DataError(
                f"{asking}: object {number} is said to be in image {image_id}, but {self.path} has it in image {found}; the "
                "two must come from one download"
            )
        return get(self.objects[number], "segmentation", (list, dict), self.path) or [[]]

    def _absent(self, key: str, number: int, asking: Path) -> DataError:
        return DataError(
            f"{asking}: {key} {number} is not in {self.path}; the two must come from one download"
        )


class Columns:
    """Collects references object by object, then gives `Records` of every split."""

    def __init__(self, annotations: Annotations, file: Path, splits: Sequence[str]):
        self.annotations, self._file = annotations, file
        self._entries: dict[str, list[tuple[dict, int, list | dict]]] = {split: [] for split in splits}

    def add(self, ref: dict, object_id: int, segmentation: list | dict) -> None:
        """Adds an object and every sentence of its reference; raises DataError for a split that there is not."""
        split = get(ref, "split", str, self._file)
        if split not in self._entries:
            raise DataError(
                f"{self._file}: a reference is of split {split!r:.40}; expected one of {', '.join(self._entries)}"
            )
        self._entries[split].append((ref, object_id, segmentation))

    def records(self) -> dict[str, Records]:
        """All that was added, by split; raises DataError for an entry that is not what it should be."""
        return {split: self._records(split, entries) for split, entries in self._entries.items()}

    def _records(self, split: str, entries: list[tuple[dict, int, list | dict]]) -> Records:
        rows: dict[int, int] = {}
        images, object_images, texts, types, objects, sentence_ids = [], [], [], [], [], []
        for number, (ref, _, _) in enumerate(entries):
            image_id = get(ref, "image_id", int, self._file)
            if image_id not in rows:
                rows[image_id] = len(images)
                images.append(self.annotations.image(image_id, self._file))
            object_images.append(rows[image_id])
            for sentence in get(ref, "sentences", list, self._file):
                texts.append(get(sentence, "raw", str, self._file))
                types.append(str(sentence.get("type", "")))  # Of trees that are written here.
                sentence_ids.append(get(sentence, "sent_id", int, self._file))
                objects.append(number)
        return Records(
            split=split,
            images=[name for name, _, _ in images],
            sizes=np.array([size for _, *size in images], np.int32).reshape(-1, 2),
            image_ids=np.array(list(rows), np.int64),
            segmentations=[segmentation for _, _, segmentation in entries],
            object_images=np.array(object_images, np.int64),
            object_ids=np.array([object_id for _, object_id, _ in entries], np.int64),
            texts=texts,
            types=types,
            objects=np.array(objects, np.int64),
            sentence_ids=np.array(sentence_ids, np.int64),
            coco=True,
        )


class _DataUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers; whatever would import or call something is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and data needs no code")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of the file")


def read_refs(path: Path) -> list[dict]:
    """The entries of a `refs(...).p` file; raises DataError for anything but plain data."""
    try:
        content = _DataUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; config.data.root must be a REFER tree") from None
    except OSError:
        raise
    except Exception as error:  # A damaged stream raises nearly anything.
        raise DataError(f"{path}: refused or not a whole pickle ({error})") from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise DataError(f"{path}: expected a list of dictionaries, found {str(content)[:40]}")
    return content


def get(entry: dict, key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    """A field of an entry; raises DataError where it is missing or of another kind."""
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        found = f"{key} is {entry[key]!r:.40}" if isinstance(entry, dict) and key in entry else f"no {key}"
        raise DataError(f"{file}: an entry has {found}; the file is not what REFER published")
    return entry[key]
