"""The one record type that every data source yields, and the registry of sources."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np


class DataError(ValueError):
    """Data that cannot be used as it is; the message is one line that says what to do."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One (object, expression) pair: the unit of training and of every metric.

    `image` is a path or an encoded picture; `segmentation` is COCO's (a list of polygons or an RLE dict; an empty list
    where the sentence means nothing, `[[]]` for an object without a pixel); `type` is the kind of expression ('' where
    unknown).
    """

    image: str | bytes
    height: int
    width: int
    segmentation: list | dict
    text: str
    type: str
    image_id: int
    object_id: int
    sentence_id: int
    split: str


class Blobs(Sequence[bytes]):
    """Many byte strings in one buffer: one numpy array to save, no Python object per item.

    Args:
        buffer: uint8 [total].
        ends: int64 [n], where each string ends in the buffer.
    """

    def __init__(self, buffer: np.ndarray, ends: np.ndarray):
        self.buffer, self.ends = buffer, ends

    @classmethod
    def join(cls, items: Iterable[bytes]) -> Blobs:
        """Copies byte strings into one buffer."""
        items = list(items)
        ends = np.cumsum([len(item) for item in items], dtype=np.int64)
        return cls(np.frombuffer(b"".join(items), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        i = range(len(self))[i]
        start = self.ends[i - 1] if i else 0
        return self.buffer[start : self.ends[i]].tobytes()


class RleMasks(Sequence[dict]):
    """Compressed COCO RLEs of images of one size, stored as `Blobs`."""

    def __init__(self, counts: Blobs, height: int, width: int):
        self.counts, self.size = counts, (height, width)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, i: int) -> dict | list:
        counts = self.counts[i]
        return {"size": list(self.size), "counts": counts} if counts else []


@dataclasses.dataclass(frozen=True, eq=False)
class Records(Sequence[Record]):
    """An immutable sequence of `Record` in columns: expressions share the storage of their object and image.

    Shapes: I images, O objects, N expressions. A slice or `select` gives `Records` again, over the same
    images and objects.
    """

    split: str
    images: Sequence[str | bytes]  # [I]
    sizes: np.ndarray  # int32 [I, 2], height and width
    image_ids: np.ndarray  # int64 [I]
    segmentations: Sequence[list | dict]  # [O]
    object_images: np.ndarray  # int64 [O], row in images
    object_ids: np.ndarray  # int64 [O]
    texts: Sequence[str]  # [N]
    types: Sequence[str]  # [N]
    objects: np.ndarray  # int64 [N], row in segmentations
    sentence_ids: np.ndarray  # int64 [N]
    coco: bool = False  # Whether image_ids are COCO's, and so name the same picture in every source.

    def __post_init__(self):
        for names in (
            ("images", "sizes", "image_ids"),
            ("segmentations", "object_images", "object_ids"),
            ("texts", "types", "objects", "sentence_ids"),
        ):
            lengths = {name: len(getattr(self, name)) for name in names}
            if len(set(lengths.values())) > 1:
                raise DataError(f"columns of split {self.split!r} differ in length: {lengths}")

    @property
    def image_rows(self) -> np.ndarray:
        """Row in `images` of every expression, int64 [N]."""
        return self.object_images[self.objects]

    @property
    def has_absent(self) -> bool:
        """Whether any expression means nothing in its picture."""
        return any(means_nothing(self.segmentations, row) for row in np.unique(self.objects))

    def select(self, rows: Sequence[int] | np.ndarray) -> Records:
        """The expressions of the given rows, in that order."""
        rows = np.asarray(rows, np.int64)
        return dataclasses.replace(
            self,
            texts=[self.texts[i] for i in rows],
            types=[self.types[i] for i in rows],
            objects=self.objects[rows],
            sentence_ids=self.sentence_ids[rows],
        )

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> Records: ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.select(range(len(self))[i])
        i = range(len(self))[i]
        o = int(self.objects[i])
        m = int(self.object_images[o])
        return Record(
            image=self.images[m],
            height=int(self.sizes[m, 0]),
            width=int(self.sizes[m, 1]),
            segmentation=self.segmentations[o],
            text=self.texts[i],
            type=self.types[i],
            image_id=int(self.image_ids[m]),
            object_id=int(self.object_ids[o]),
            sentence_id=int(self.sentence_ids[i]),
            split=self.split,
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    @classmethod
    def from_list(cls, records: Iterable[Record], split: str | None = None) -> Records:
        """Puts records into columns; those of one image_id or object_id share the first one's."""
        images: dict[int, Record] = {}
        objects: dict[int, Record] = {}
        records = list(records)
        for record in records:
            images.setdefault(record.image_id, record)
            objects.setdefault(record.object_id, record)
        image_row = {key: row for row, key in enumerate(images)}
        object_row = {key: row for row, key in enumerate(objects)}
        if split is None:
            split = records[0].split if records else ""
        return cls(
            split=split,
            images=[r.image for r in images.values()],
            sizes=np.array([(r.height, r.width) for r in images.values()], np.int32).reshape(-1, 2),
            image_ids=np.array(list(images), np.int64),
            segmentations=[r.segmentation for r in objects.values()],
            object_images=np.array([image_row[r.image_id] for r in objects.values()], np.int64),
            object_ids=np.array(list(objects), np.int64),
            texts=[r.text for r in records],
            types=[r.type for r in records],
            objects=np.array([object_row[r.object_id] for r in records], np.int64),
            sentence_ids=np.array([r.sentence_id for r in records], np.int64),
        )


def means_nothing(segmentations: Sequence[list | dict], row: int) -> bool:
    """Whether a row stands for no object; sequences that would have to read a file for it say so themselves."""
    known = getattr(segmentations, "means_nothing", None)
    return known(row) if known else segmentations[row] == []


@dataclasses.dataclass(frozen=True)
class _Source:
    load: Callable[..., Records]
    splits: Callable[..., tuple[str, ...]]


_SOURCES: dict[str, _Source] = {}
# Modules of this package that register a source; imported when the registry is first asked.
_MODULES = ("grefcoco", "jsonl", "mixed", "refcoco_tfds", "refer", "shapes")


def source(name: str, splits: Callable[..., tuple[str, ...]]) -> Callable:
    """Decorator that registers `load(split, *, root, seed, **options) -> Records` and `splits(*, root, **options)`."""

    def register(load_split: Callable[..., Records]) -> Callable[..., Records]:
        _SOURCES[name] = _Source(load_split, splits)
        return load_split

    return register


def sources() -> tuple[str, ...]:
    """Names of the data sources."""
    for module in _MODULES:
        importlib.import_module(f"{__package__}.{module}")
    return tuple(sorted(_SOURCES))


def load_split(data: Any, split: str) -> Records:
    """Records of a split of the data that `config.data` describes; raises DataError as `load` does."""
    return load(data.source, split, root=data.root, seed=data.seed, **data.options.to_dict())


def _find(name: str) -> _Source:
    names = sources()
    if name not in names:
        raise DataError(f"unknown data source {name!r}; there are: {', '.join(names)}")
    return _SOURCES[name]


def splits(source: str, root: str = "", **options) -> tuple[str, ...]:
    """Names of the splits of a source, training split first; raises DataError for an unknown source."""
    return _find(source).splits(root=root, **options)


def load(source: str, split: str, *, root: str = "", seed: int = 0, **options) -> Records:
    """Records of one split of a source.

    Args: root: where a source that is read has its files; seed: of a source that is made.
    Raises DataError for an unknown source, split or option, and for data that is not what it should be.
    """
    found = _find(source)
    try:
        inspect.signature(found.load).bind(split, root=root, seed=seed, **options)
    except TypeError as error:
        raise DataError(
            f"data source {source!r}: config.data.options has {error}; --config.data.options={{}} clears what is of another "
            "source"
        ) from None
    names = found.splits(root=root, **options)
    if split not in names:
        raise DataError(f"data source {source!r} has no split {split!r}; it has: {', '.join(names)}")
    return found.load(split, root=root, seed=seed, **options)
