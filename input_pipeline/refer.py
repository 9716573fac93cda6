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
    if not root:
        raise DataError("config.data.options.root is missing; give the folder with 'refcoco' and 'images'")
    folder = Path(root) / dataset
    refs_file, instances_file = folder / f"refs({partition}).p", folder / "instances.json"
    refs = [ref for ref in read_refs(refs_file) if _get(ref, "split", str, refs_file) == split]
    if not refs:
        raise DataError(f"{refs_file}: no object of split '{split}'")
    images, annotations = _read_instances(instances_file)
    find_image = _image_finder(Path(root))

    image_rows: dict[int, int] = {}
    image_paths, sizes = [], []
    segmentations, object_images, object_ids = [], [], []
    texts, types, objects, sentence_ids = [], [], [], []
    for ref in refs:
        image_id, object_id = _get(ref, "image_id", int, refs_file), _get(ref, "ann_id", int, refs_file)
        if image_id not in images or object_id not in annotations:
            what = f"image_id {image_id}" if image_id not in images else f"ann_id {object_id}"
            raise DataError(
                f"{refs_file}: {what} is not in {instances_file}; the two must come from one download"
            )
        if image_id not in image_rows:
            image = images[image_id]
            image_rows[image_id] = len(image_paths)
            image_paths.append(find_image(_get(image, "file_name", str, instances_file), instances_file))
            size = [_get(image, key, int, instances_file) for key in ("height", "width")]
            sizes.append(size)
        for sentence in _get(ref, "sentences", list, refs_file):
            texts.append(_get(sentence, "raw", str, refs_file))
            types.append(str(sentence.get("type", "")))  # Of trees that are written here.
            sentence_ids.append(_get(sentence, "sent_id", int, refs_file))
            objects.append(len(segmentations))
        segmentations.append(_get(annotations[object_id], "segmentation", (list, dict), instances_file))
        object_images.append(image_rows[image_id])
        object_ids.append(object_id)
    return Records(
        split=split,
        images=image_paths,
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        image_ids=np.array(list(image_rows), np.int64),
        segmentations=segmentations,
        object_images=np.array(object_images, np.int64),
        object_ids=np.array(object_ids, np.int64),
        texts=texts,
        types=types,
        objects=np.array(objects, np.int64),
        sentence_ids=np.array(sentence_ids, np.int64),
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


def _image_finder(root: Path):
    """A function from a COCO file name to the path of the image, in the folder that has the first one."""
    folder: list[Path] = []

    def find(name: str, file: Path) -> str:
        if Path(name).name != name:
            raise DataError(f"{file}: file_name '{name}' is not a plain name; it must not lead elsewhere")
        short = name.removeprefix(_PREFIX)
        paths = [root / IMAGES / "train2014" / (_PREFIX + short), root / IMAGES / "train2017" / short]
        if not folder:
            folder.extend(path.parent for path in paths if path.exists())
        if not folder:
            raise DataError(
                f"{paths[0]}: no such file, nor {paths[1]}; put COCO's train2014 or train2017 there"
            )
        return str(next(path for path in paths if path.parent == folder[0]))

    return find


def _get(entry: dict, key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    """A field of an entry; raises DataError where it is missing or of another kind."""
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        found = f"{key} is {entry[key]!r:.40}" if isinstance(entry, dict) and key in entry else f"no {key}"
        raise DataError(f"{file}: an entry has {found}; the file is not what REFER published")
    return entry[key]
