"""Several sources trained on together, without pictures that any of them evaluates on (data spec section 1).

`config.data.options.parts` maps a name to {"source": ..., "root": ..., and the options of that source}. The training
split is 'train'; all others are called 'name/split'.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from input_pipeline import records as registry
from input_pipeline.records import DataError, Records, means_nothing, source

TRAIN = "train"
_COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})\.jpe?g")


def splits(
    *, root: str = "", parts: Mapping[str, Mapping[str, Any]] | None = None, **_: Any
) -> tuple[str, ...]:
    """'train', then every other split of every part, as 'name/split'."""
    return (TRAIN, *(f"{name}/{split}" for name, split in _held_out(parts, root)))


@source("mixed", splits)
def load(
    split: str, *, root: str = "", seed: int = 0, parts: Mapping[str, Mapping[str, Any]] | None = None
) -> Records:
    """The splits 'train' of all parts, less every picture of any other split of any of them; or one of those splits.

    A part without 'train' is evaluated on, and keeps its pictures out of the training.

    Args: root: of the parts that name none of their own. Pictures are the same where their COCO numbers are, else where
    their files are. Raises DataError for parts that are none, and whatever they raise.
    """
    if split != TRAIN:
        name, _, of_part = split.partition("/")
        return _load(parts, name, of_part, root, seed)
    held_out = set()
    for name, other in _held_out(parts, root):
        records = _load(parts, name, other, root, seed)
        held_out.update(identity(records, row) for row in np.unique(records.image_rows))
    chosen = []
    for name in parts:
        if TRAIN not in _splits(parts, name, root):
            continue
        records = _load(parts, name, TRAIN, root, seed)
        leaks = np.zeros(len(records.images), bool)
        for row in np.unique(records.image_rows):
            leaks[row] = identity(records, row) in held_out
        if leaks.any():
            kept = np.flatnonzero(~leaks[records.image_rows])
            logging.warning(
                "%s: %d of %d sentences are left out of the training, since a split that is evaluated shows their pictures",
                *(name, len(records) - len(kept), len(records)),
            )
            records = records.select(kept)
        chosen.append(records)
    if not chosen:
        raise DataError(f"config.data.options.parts: none of {', '.join(parts)} has a split '{TRAIN}'")
    return join(chosen, TRAIN)


def identity(records: Records, image_row: int) -> Hashable:
    """What tells pictures apart across sources: COCO's number, else the path, else what the picture is made of."""
    image = records.images[image_row]
    if records.coco:
        return int(records.image_ids[image_row])
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    number = _COCO_NAME.fullmatch(os.path.basename(image))
    return int(number[1]) if number else os.path.realpath(image)


def join(several: Sequence[Records], split: str) -> Records:
    """Records one after another, over the images and objects of all."""
    images, objects = (
        np.cumsum([0, *(len(getattr(records, name)) for records in several)])
        for name in ("images", "segmentations")
    )

    def shifted(name: str, starts: np.ndarray) -> np.ndarray:
        columns = [getattr(records, name) + start for records, start in zip(several, starts, strict=False)]
        return np.concatenate(columns)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(records, name) for records in several])

    return Records(
        split=split,
        images=_Chain([records.images for records in several]),
        sizes=joined("sizes"),
        image_ids=joined("image_ids"),
        segmentations=_Chain([records.segmentations for records in several]),
        object_images=shifted("object_images", images),
        object_ids=joined("object_ids"),
        texts=[text for records in several for text in records.texts],
        types=[kind for records in several for kind in records.types],
        objects=shifted("objects", objects),
        sentence_ids=joined("sentence_ids"),
    )


class _Chain(Sequence):
    """Sequences one after another, without a copy."""

    def __init__(self, parts: Sequence[Sequence]):
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, i: int) -> tuple[Sequence, int]:
        i = range(len(self))[i]
        part = int(np.searchsorted(self._starts, i, "right")) - 1
        return self._parts[part], i - int(self._starts[part])

    def __getitem__(self, i: int) -> Any:
        part, row = self._place(i)
        return part[row]

    def means_nothing(self, i: int) -> bool:
        """Of segmentations: as the part says."""
        return means_nothing(*self._place(i))


def _held_out(parts: Mapping[str, Mapping[str, Any]] | None, root: str) -> Iterator[tuple[str, str]]:
    if not isinstance(parts, Mapping) or not parts:
        raise DataError(
            "config.data.options.parts is missing; give {name: {'source': ..., 'root': ...}, ...}"
        )
    for name, part in parts.items():
        if "/" in name or not isinstance(part, Mapping) or "source" not in part or part["source"] == "mixed":
            raise DataError(
                f"config.data.options.parts: '{name}' is {part!r}; expected a name without '/' and the 'source' of a part"
            )
    for name in parts:
        for split in _splits(parts, name, root):
            if split != TRAIN:
                yield name, split


def _splits(parts: Mapping[str, Mapping[str, Any]], name: str, root: str) -> tuple[str, ...]:
    part = {"root": root} | dict(parts[name])
    return registry.splits(part.pop("source"), **part)


def _load(parts: Mapping[str, Mapping[str, Any]], name: str, split: str, root: str, seed: int) -> Records:
    part = {"root": root} | dict(parts[name])
    return registry.load(part.pop("source"), split, seed=seed, **part)
