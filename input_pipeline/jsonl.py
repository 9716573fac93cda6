"""One's own images: a JSON Lines file, a line per object (data spec section 1).

{"image": path, "mask": path | "polygons": [...] | "rle": {...}, "text": str | [str], "split": optional, "type": optional}
Paths are relative to the folder of the file, and stay inside it. What else a line has is left alone; the number of the line
is the object's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from input_pipeline import masks
from input_pipeline.records import DataError, Records, source

NAME = "data.jsonl"  # Of the file in a folder.
_SHAPES = ("mask", "polygons", "rle")


def splits(*, root: str = "", **_: Any) -> tuple[str, ...]:
    """The splits that the file names, 'train' first."""
    found = dict.fromkeys(line["split"] for line in _read(root))
    return tuple(sorted(found, key=lambda name: name != "train"))


@source("jsonl", splits)
def load(split: str, *, root: str = "", seed: int = 0) -> Records:
    """Every sentence of every line of a split; lines without one are of 'train'.

    Args: root: the file, or the folder of its `data.jsonl`; seed is not used.
    Raises DataError, with the number of the line, for anything that is not as described above.
    """
    del seed
    lines = [line for line in _read(root) if line["split"] == split]
    image_rows: dict[str, int] = {}
    image_sizes, segmentations, object_images = [], [], []
    texts, types, objects = [], [], []
    for line in lines:
        if line["image"] not in image_rows:
            image_rows[line["image"]] = len(image_rows)
            image_sizes.append(_size(line["image"]))
        for text, kind in zip(line["text"], line["type"], strict=True):
            texts.append(text)
            types.append(kind)
            objects.append(len(segmentations))
        segmentations.append(line["shape"])
        object_images.append(image_rows[line["image"]])
    return Records(
        split=split,
        images=list(image_rows),
        sizes=np.array(image_sizes, np.int32).reshape(-1, 2),
        image_ids=np.arange(len(image_rows)),
        segmentations=_Shapes(segmentations),
        object_images=np.array(object_images, np.int64),
        object_ids=np.array([line["number"] for line in lines], np.int64),
        texts=texts,
        types=types,
        objects=np.array(objects, np.int64),
        sentence_ids=np.arange(len(texts)),
    )


class _Shapes(Sequence[list | dict]):
    """COCO segmentations; those in image files are read when they are asked for."""

    def __init__(self, shapes: list[list | dict | Path]):
        self._shapes = shapes

    def __len__(self) -> int:
        return len(self._shapes)

    def means_nothing(self, i: int) -> bool:
        """Whether the line says so; a mask in a file is of something."""
        return self._shapes[i] == []

    def __getitem__(self, i: int) -> list | dict:
        shape = self._shapes[i]
        if not isinstance(shape, Path):
            return shape
        try:
            with Image.open(shape) as opened:
                if opened.format == "JPEG":
                    raise ValueError("JPEG blurs the borders of masks; write PNG")
                grey = opened.mode in ("1", "L", "I", "I;16")
                # Not by way of "L", which makes the darkest colours black.
                pixels = np.asarray(opened) > 0 if grey else np.asarray(opened.convert("RGB")).any(-1)
        except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{shape}: not a readable mask ({error})") from error
        return masks.encode(pixels.astype(np.uint8))


def wrong_lines(root: str) -> list[str]:
    """What is wrong with each line that cannot be used; raises DataError for a file that is not there or is empty."""
    return _parse(root)[1]


def _read(root: str) -> list[dict]:
    """The lines, checked and completed: absolute paths, lists of sentences and types, the line's number."""
    lines, wrong = _parse(root)
    if wrong:
        more = f" (and {len(wrong) - 1} more wrong lines: `prepare --source=jsonl` lists them)"
        raise DataError(wrong[0] + more * (len(wrong) > 1))
    return lines


def _parse(root: str) -> tuple[list[dict], list[str]]:
    if not root:
        raise DataError("config.data.root is missing; give the .jsonl file")
    path = Path(root) / NAME if Path(root).is_dir() else Path(root)
    numbered = _numbered(path)
    lines, wrong = [], []
    for number, text in numbered:
        try:
            lines.append(_line(path, number, text))
        except DataError as error:
            wrong.append(str(error))
    return lines, wrong


def _numbered(path: Path) -> list[tuple[int, str]]:
    """The lines that say something, with their numbers."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            numbered = [(number, text) for number, text in enumerate(file, 1) if text.strip()]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a .jsonl file is needed") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file in UTF-8 ({error.reason})") from error
    if not numbered:
        raise DataError(f"{path}: empty; a line for each object is needed")
    return numbered


class Question(NamedTuple):
    """A picture and a sentence about it; `name` is what the picture is called where the question was asked."""

    image: Path
    text: str
    name: str
    id: str | int | None = None  # Of the asker.


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file whose lines need no masks, in its order.

    A line is `{"image": path, "text": str | [str], "id": optional}`. Raises DataError, with the number of the line, for
    anything else.
    """
    path, found = Path(path), []
    for number, text in _numbered(path):
        where = f"{path}, line {number}"
        line = _object(text, where)
        image = _inside(path, line.get("image"), "image", where)
        own = line.get("id")
        if not isinstance(own, str | int | None) or isinstance(own, bool):
            raise DataError(f"{where}: 'id' must be a word or a whole number, found {own!r:.40}")
        found += [Question(image, sentence, line["image"], own) for sentence in _sentences(line, where)]
    return found


def _object(text: str, where: str) -> dict:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(line, dict):
        raise DataError(f"{where}: expected an object {{...}}, found {text.strip()[:40]}")
    return line


def _sentences(line: dict, where: str) -> list[str]:
    sentences = [line["text"]] if isinstance(line.get("text"), str) else line.get("text")
    if not isinstance(sentences, list) or not sentences or not all(isinstance(s, str) for s in sentences):
        raise DataError(
            f"{where}: 'text' must be a sentence or a list of them, found {line.get('text')!r:.40}"
        )
    return sentences


def _line(path: Path, number: int, text: str) -> dict:
    where = f"{path}, line {number}"
    line = _object(text, where)
    shapes = [name for name in _SHAPES if name in line]
    if len(shapes) != 1:
        raise DataError(f"{where}: expected one of {', '.join(_SHAPES)}, found {', '.join(shapes) or 'none'}")
    shape = line[shapes[0]]
    sentences = _sentences(line, where)
    kinds = line.get("type", "")
    kinds = [kinds] * len(sentences) if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or len(kinds) != len(sentences):
        raise DataError(f"{where}: 'type' must be a word, or a list as long as 'text'")
    if not isinstance(shape, {"mask": str, "polygons": list, "rle": dict}[shapes[0]]):
        raise DataError(f"{where}: '{shapes[0]}' is {shape!r:.40}")
    if not isinstance(line.get("split", ""), str):
        raise DataError(f"{where}: 'split' must be a word, found {line['split']!r:.40}")
    return {
        "image": str(_inside(path, line.get("image"), "image", where)),
        "shape": _inside(path, shape, "mask", where) if shapes[0] == "mask" else shape,
        "text": sentences,
        "type": [str(kind) for kind in kinds],
        "split": line.get("split") or "train",
        "number": number,
    }


def _inside(path: Path, name: Any, key: str, where: str) -> Path:
    """A path of a line as an absolute one, which must stay in the folder of the file."""
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: '{key}' must be a path, found {name!r:.40}")
    root = path.parent.resolve()
    try:
        found = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{where}: '{key}' is {name!r:.60}, which is no path ({error})") from error
    if not found.is_relative_to(root):
        raise DataError(f"{where}: '{key}' is '{name}', which leads out of {root}")
    return found


def _size(image: str) -> tuple[int, int]:
    """Height and width, from the head of the file; 0 and 0 where it is missing or damaged, which the loader deals with."""
    try:
        with Image.open(image) as opened:
            return opened.height, opened.width
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError):
        return 0, 0
