"""REFER trees: RefCOCO, RefCOCO+ and G-Ref as their authors published them (data spec section 1).

ROOT/<dataset>/refs(<partition>).p and instances.json; ROOT/images/mscoco/images/train2014/*.jpg, or train2017.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.records import DataError, Records, source

PARTITIONS = {  # dataset -> partition -> splits
    "refcoco": {"unc": ("train", "val", "testA", "testB"), "google": ("train", "val", "test")},
    "refcoco+": {"unc": ("train", "val", "testA", "testB")},
    "refcocog": {"umd": ("train", "val", "test"), "google": ("train", "val")},
}
IMAGES = Path("images/mscoco/images")
_PREFIX = "COCO_train2014_"  # Of the names of 2014, which those of 2017 lack.


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
    split: str, *, seed: int = 0, root: str = "", dataset: str = "refcoco", partition: str = "unc"
) -> Records:
    """Every expression of every object of a split, in the order of the file.

    Args: root: the folder with the data set's folder and `images`; seed is not used.
    Raises DataError for files that are missing, are not what they should be, or contradict each other.
    """
    del seed
    tree = Tree(root, dataset)
    refs_file = tree.folder / f"refs({partition}).p"
    columns = Columns()
    for ref in read_refs(refs_file):
        if get(ref, "split", str, refs_file) != split:
            continue
        image_id, object_id = get(ref, "image_id", int, refs_file), get(ref, "ann_id", int, refs_file)
        image, size = tree.image(image_id, refs_file), tree.size(image_id, refs_file)
        columns.add(image, size, image_id, tree.segmentation(object_id, refs_file), object_id, ref, refs_file)
    return columns.records(split, refs_file)


class Tree:
    """The annotations and pictures of one data set of a REFER tree.

    Raises DataError where a file is missing or is not what it should be, and, naming the file of references that
    asks, for an image or object that is not there.
    """

    def __init__(self, root: str, dataset: str):
        if not root:
            raise DataError(
                "config.data.options.root is missing; give the folder with the data set and 'images'"
            )
        self.root, self.folder = Path(root), Path(root) / dataset
        self._file = self.folder / "instances.json"
        self._images, self._annotations = _read_instances(self._file)
        self._pictures: Path | None = None

    def image(self, number: int, asking: Path) -> str:
        """Path of an image, in the folder that has the first one that is asked for."""
        name = get(self._image(number, asking), "file_name", str, self._file)
        if Path(name).name != name:
            raise DataError(
                f"{self._file}: file_name '{name}' is not a plain name; it must not lead elsewhere"
            )
        short = name.removeprefix(_PREFIX)
        paths = [
            self.root / IMAGES / "train2014" / (_PREFIX + short),
            self.root / IMAGES / "train2017" / short,
        ]
        if self._pictures is None:
            self._pictures = next((path.parent for path in paths if path.exists()), None)
        if self._pictures is None:
            raise DataError(
                f"{paths[0]}: no such file, nor {paths[1]}; put COCO's train2014 or train2017 there"
            )
        return str(next(path for path in paths if path.parent == self._pictures))

    def size(self, number: int, asking: Path) -> tuple[int, int]:
        """Height and width of an image."""
        image = self._image(number, asking)
        return get(image, "height", int, self._file), get(image, "width", int, self._file)

    def segmentation(self, number: int, asking: Path) -> list | dict:
        """COCO segmentation of an object."""
        if number not in self._annotations:
            raise self._absent("ann_id", number, asking)
        return get(self._annotations[number], "segmentation", (list, dict), self._file)

    def _image(self, number: int, asking: Path) -> dict:
        if number not in self._images:
            raise self._absent("image_id", number, asking)
        return self._images[number]

    def _absent(self, key: str, number: int, asking: Path) -> DataError:
        return DataError(
            f"{asking}: {key} {number} is not in {self._file}; the two must come from one download"
        )


class Columns:
    """Collects references object by object, then gives `Records`."""

    def __init__(self):
        self._image_rows: dict[int, int] = {}
        self._images, self._sizes = [], []
        self._segmentations, self._object_images, self._object_ids = [], [], []
        self._texts, self._types, self._objects, self._sentence_ids = [], [], [], []

    def add(
        self,
        image: str,
        size: tuple[int, int],
        image_id: int,
        segmentation,
        object_id: int,
        ref: dict,
        file: Path,
    ) -> None:
        """Adds an object and every sentence of its reference."""
        if image_id not in self._image_rows:
            self._image_rows[image_id] = len(self._images)
            self._images.append(image)
            self._sizes.append(size)
        for sentence in get(ref, "sentences", list, file):
            self._texts.append(get(sentence, "raw", str, file))
            self._types.append(str(sentence.get("type", "")))  # Of trees that are written here.
            self._sentence_ids.append(get(sentence, "sent_id", int, file))
            self._objects.append(len(self._segmentations))
        self._segmentations.append(segmentation)
        self._object_images.append(self._image_rows[image_id])
        self._object_ids.append(object_id)

    def records(self, split: str, file: Path) -> Records:
        """All that was added; raises DataError where it is nothing."""
        if not self._segmentations:
            raise DataError(f"{file}: no object of split '{split}'")
        return Records(
            split=split,
            images=self._images,
            sizes=np.array(self._sizes, np.int32).reshape(-1, 2),
            image_ids=np.array(list(self._image_rows), np.int64),
            segmentations=self._segmentations,
            object_images=np.array(self._object_images, np.int64),
            object_ids=np.array(self._object_ids, np.int64),
            texts=self._texts,
            types=self._types,
            objects=np.array(self._objects, np.int64),
            sentence_ids=np.array(self._sentence_ids, np.int64),
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
        raise DataError(f"{path}: no such file; config.data.options.root must be a REFER tree") from None
    except OSError:
        raise
    except Exception as error:  # A damaged stream raises nearly anything.
        raise DataError(f"{path}: refused or not a whole pickle ({error})") from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise DataError(f"{path}: expected a list of dictionaries, found {str(content)[:40]}")
    return content


def _read_instances(path: Path) -> tuple[dict[int, dict], dict[int, dict]]:
    """Images and annotations by id."""
    try:
        content = json.loads(path.read_bytes())
        return tuple({entry["id"]: entry for entry in content[key]} for key in ("images", "annotations"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; config.data.options.root must be a REFER tree") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a COCO annotation file ({error!r})") from error


def get(entry: dict, key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    """A field of an entry; raises DataError where it is missing or of another kind."""
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        found = f"{key} is {entry[key]!r:.40}" if isinstance(entry, dict) and key in entry else f"no {key}"
        raise DataError(f"{file}: an entry has {found}; the file is not what REFER published")
    return entry[key]
