"""TFDS's `ref_coco`, prepared by the builder that tensorflow-datasets has (data spec section 2).

Masks there are the union of an object's polygons, so that both ground-truth rules give the same.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from input_pipeline import masks, refer
from input_pipeline.cache import cached
from input_pipeline.parallel import tensorflow
from input_pipeline.records import DataError, Records, source

MANUAL_FILE, MANUAL_IMAGES = "refcoco.json", "coco_train2014"  # What the builder makes everything of.
_NAMES = {"refcoco": "refcoco", "refcoco+": "refcocoplus", "refcocog": "refcocog"}


@source("tfds", refer.splits)
def load(
    split: str, *, root: str = "", seed: int = 0, dataset: str = "refcoco", partition: str = "unc"
) -> Records:
    """Every expression of every object of a split, image by image.

    Args: root: TFDS's data_dir; seed is not used. Raises DataError where nothing was prepared there, or not for reading
    in random order.
    """
    del seed
    builder = _builder(root, dataset, partition)
    folder = Path(builder.data_path)
    shards = sorted(folder.glob("*array_record*"))  # Gigabytes, so that names, sizes and dates must do.

    def parse() -> dict[str, Records]:
        return {name: _parse(builder, name) for name in refer.splits(dataset=dataset, partition=partition)}

    records = cached(folder, "ref_coco", split, [folder / "dataset_info.json"], parse, listed=shards)
    return dataclasses.replace(records, images=_Pictures(builder.as_data_source(_theirs(split)).data_source))


def build(root: str, manual: str, dataset: str = "refcoco", partition: str = "unc") -> str:
    """Has the builder make `ref_coco` in `root` of the folder `manual`, which has refcoco.json and coco_train2014.

    Returns where it is. Raises DataError where something is missing.
    """
    refer.splits(dataset=dataset, partition=partition)
    for name in (MANUAL_FILE, MANUAL_IMAGES):
        if not (Path(manual) / name).exists():
            raise DataError(
                f"{Path(manual) / name}: no such file or folder; `python -m input_pipeline prepare --tfds` writes it"
            )
    tfds = _tfds()
    builder = tfds.builder(_config(dataset, partition), data_dir=root, file_format="array_record")
    settings = tfds.download.DownloadConfig(manual_dir=os.path.abspath(manual))
    try:
        builder.download_and_prepare(download_config=settings)
    except AssertionError as error:  # How TFDS says that a split is empty.
        raise DataError(
            f"{Path(manual) / MANUAL_FILE}: TFDS refuses {dataset} ({partition}): {error} It needs an object in each of "
            f"{', '.join(refer.splits(dataset=dataset, partition=partition))}"
        ) from error
    return str(builder.data_path)


def _tfds() -> Any:
    tensorflow()
    import tensorflow_datasets

    return tensorflow_datasets


def _config(dataset: str, partition: str) -> str:
    return f"ref_coco/{_NAMES[dataset]}_{partition}"


def _builder(root: str, dataset: str, partition: str) -> Any:
    if not root:
        raise DataError("config.data.root is missing; give the data_dir of TFDS")
    builder = _tfds().builder(_config(dataset, partition), data_dir=root)
    how = f"`python -m input_pipeline build_tfds --manual=DIR --root={root} --dataset={dataset} --partition={partition}`"
    if not builder.is_prepared():
        raise DataError(f"{builder.data_path}: not prepared; {how} makes it")
    if builder.info.file_format.value != "array_record":
        raise DataError(
            f"{builder.data_path}: prepared as {builder.info.file_format.value}, which cannot be read in random order; "
            f"{how} with another --root makes it as array_record"
        )
    return builder


def _theirs(split: str) -> str:
    return "validation" if split == "val" else split


def _parse(builder: Any, split: str) -> Records:
    """Everything but the pictures."""
    tfds = _tfds()
    skip = {"image": tfds.decode.SkipDecoding()}
    rows: dict[str, list] = {name: [] for name in ("sizes", "image_ids", "segmentations", "object_images")}
    rows |= {name: [] for name in ("object_ids", "texts", "objects", "sentence_ids")}
    examples = builder.as_data_source(_theirs(split), decoders=skip)
    for number in range(len(examples)):
        example = examples[number]
        with Image.open(io.BytesIO(example["image"])) as opened:
            rows["sizes"].append((opened.height, opened.width))
        rows["image_ids"].append(example["image/id"])
        for object_id, mask, texts, ids in _objects(example["objects"]):
            for text, sentence_id in zip(texts, ids, strict=True):
                rows["texts"].append(text.decode())
                rows["objects"].append(len(rows["segmentations"]))
                rows["sentence_ids"].append(sentence_id)
            rle = masks.encode((np.asarray(mask)[..., 0] > 0).astype(np.uint8))
            rows["segmentations"].append(
                {"size": list(map(int, rle["size"])), "counts": rle["counts"].decode()}
            )
            rows["object_images"].append(number)
            rows["object_ids"].append(object_id)
    texts, segmentations = rows.pop("texts"), rows.pop("segmentations")
    sizes = np.array(rows.pop("sizes"), np.int32).reshape(-1, 2)
    columns = {name: np.array(values, np.int64) for name, values in rows.items()}
    return Records(
        split=split,
        images=[""] * len(sizes),  # Read from the shards when they are asked for.
        sizes=sizes,
        segmentations=segmentations,
        texts=texts,
        types=[""] * len(texts),
        coco=True,
        **columns,
    )


def _objects(columns: dict[str, Any]) -> Iterator[tuple]:
    refexp = columns["refexp"]
    return zip(columns["id"], columns["mask"], refexp["raw"], refexp["refexp_id"], strict=True)


class _Pictures(Sequence[bytes]):
    """The encoded pictures of a split, by the number of their example."""

    def __init__(self, examples: Sequence[bytes]):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> bytes:
        # The features' own parser would decode every mask of the example along with it.
        example = tensorflow().train.Example.FromString(self._examples[i])
        return example.features.feature["image"].bytes_list.value[0]
