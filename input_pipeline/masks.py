"""Polygons and run-length encodings to masks, under both ground-truth rules (data spec section 4)."""

from __future__ import annotations

import functools

import numpy as np
from pycocotools import mask as coco_mask

from input_pipeline.records import DataError

UNION, EXACTLY_ONE = "union", "exactly_one"
_FAR = 10  # Sides of the image beyond which a corner is no rounding error but a wrong number.


def decode(segmentation: list | dict, height: int, width: int, rule: str = UNION) -> np.ndarray:
    """The mask of a COCO segmentation.

    Args:
        segmentation: list of polygons [x0, y0, x1, y1, ...] in pixels, an RLE dict (compressed or not) or a
            list of RLE dicts; an empty list is an empty mask.
        height, width: of the image.
        rule: 'union' of all parts, or 'exactly_one': pixels where parts overlap become background, as in the
            published loaders. Polygons may leave the image, or be so thin that they cover nothing.
    Returns:
        uint8 [height, width] of 0 and 1.
    Raises:
        DataError: if the segmentation is none of these, or an RLE has another size than the image.
    """
    if rule not in (UNION, EXACTLY_ONE):
        raise DataError(f"mask rule {rule!r} is none of {UNION!r}, {EXACTLY_ONE!r}")
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not parts:
        return np.zeros((height, width), np.uint8)
    rles = [_to_rle(part, height, width) for part in parts]
    try:
        layers = coco_mask.decode(rles)  # [H, W, parts]
    except (ValueError, TypeError) as error:
        raise DataError(f"segmentation: damaged RLE ({error})") from error
    if layers.shape[-1] == 1:
        return layers[..., 0]
    covered = layers.sum(-1, dtype=np.int32)
    return (covered > 0 if rule == UNION else covered == 1).astype(np.uint8)


def encode(mask: np.ndarray) -> dict:
    """The compressed RLE of a 0/1 mask [H, W]."""
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def outline(mask: np.ndarray) -> list[list[float]] | None:
    """Polygons along the corners of a mask's pixels, from which `decode` makes the same mask.

    Args:
        mask: 0/1 [H, W].
    Returns:
        One polygon [x0, y0, x1, y1, ...] for each piece; None for a mask with holes or with pieces that touch at a
        corner only, which polygons cannot tell.
    """
    filled = np.pad(np.asarray(mask, bool), 1)
    inside = filled[1:-1, 1:-1]
    # Edges of foreground pixels that face background, walked with the foreground on the right: (start, end) corners.
    sides = (
        (filled[:-2, 1:-1], (0, 0), (1, 0)),  # above
        (filled[1:-1, 2:], (1, 0), (1, 1)),  # to the right
        (filled[2:, 1:-1], (1, 1), (0, 1)),  # below
        (filled[1:-1, :-2], (0, 1), (0, 0)),  # to the left
    )
    following: dict[tuple[int, int], tuple[int, int]] = {}
    for neighbour, start, end in sides:
        for y, x in zip(*np.nonzero(inside & ~neighbour), strict=True):
            corner = int(x) + start[0], int(y) + start[1]
            if corner in following:
                return None
            following[corner] = int(x) + end[0], int(y) + end[1]
    polygons = []
    while following:
        first = corner = next(iter(following))
        loop = []
        while corner in following:
            loop.append(corner)
            corner = following.pop(corner)
        assert corner == first
        x, y = np.array(loop).T
        if (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() < 0:  # Twice the area: negative around a hole.
            return None
        turns = [i for i, at in enumerate(loop) if not _straight(loop[i - 1], at, loop[(i + 1) % len(loop)])]
        polygons.append([float(value) for i in turns for value in loop[i]])
    return polygons


def _straight(before: tuple[int, int], at: tuple[int, int], after: tuple[int, int]) -> bool:
    return (at[0] - before[0], at[1] - before[1]) == (after[0] - at[0], after[1] - at[1])


def _to_rle(part: list | dict, height: int, width: int) -> dict:
    """A compressed RLE of the image's size; what pycocotools takes on trust is checked before."""
    if isinstance(part, dict) and set(part) >= {"size", "counts"}:
        return _checked_rle(part, height, width)
    numbers = isinstance(part, (list, tuple)) and all(isinstance(v, (int, float)) for v in part)
    if not numbers or len(part) % 2:
        raise DataError(
            "segmentation: expected polygons of points (x, y, x, y, ...) or an RLE with 'size' and 'counts', found "
            f"{str(part)[:60]}"
        )
    if len(part) < 6:  # Two points are a line; pycocotools would take them for a box.
        return coco_mask.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
    limit = _FAR * max(height, width)
    wrong = [v for v in part if not abs(v) <= limit]  # True of NaN, too.
    if wrong:
        raise DataError(f"segmentation: a polygon reaches to {wrong[0]}, in an image of {height}x{width}")
    return coco_mask.frPyObjects([[float(v) for v in part]], height, width)[0]


def _checked_rle(rle: dict, height: int, width: int) -> dict:
    counts = rle["counts"]
    size = rle["size"] if isinstance(rle["size"], (list, tuple)) else [rle["size"]]
    if list(size) != [height, width]:
        found, expected = "x".join(map(str, size)), f"{height}x{width}"
        raise DataError(f"segmentation: RLE of size {found} for an image of {expected} (height x width)")
    listed = isinstance(counts, (list, tuple))
    if listed:
        whole = all(isinstance(n, int) and n >= 0 for n in counts) and sum(counts) == height * width
    else:
        whole = isinstance(counts, (bytes, str)) and _runs(counts) == height * width
    if not whole:  # pycocotools would fill what is missing with whatever the memory holds.
        raise DataError(f"segmentation: the runs of an RLE do not fill the {height}x{width} image")
    return coco_mask.frPyObjects(rle, height, width) if listed else rle


def _runs(counts: bytes | str) -> int:
    """How many pixels the runs of a compressed RLE cover; -1 where it is none.

    COCO's format: a number is groups of five bits, the lowest first, each a character from '0' on whose sixth bit says
    that more follow; the highest bit is the sign; from the fourth number on it is the difference to the last but one.
    """
    runs, value, shift = [], 0, 0
    for code in counts if isinstance(counts, bytes) else counts.encode(errors="replace"):
        code -= 48
        if not 0 <= code < 64 or shift > 30:
            return -1
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            if runs[-1] < 0:
                return -1
            value = shift = 0
    return -1 if shift else sum(runs)


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask [..., H, W] at another size (h, w); picks the same pixels as Pillow's nearest filter."""
    rows, columns = (_nearest(old, new) for old, new in zip(mask.shape[-2:], size, strict=True))
    # Columns first and turned over, since pycocotools' masks lie in memory column by column.
    return mask.swapaxes(-1, -2)[..., columns, :].swapaxes(-1, -2)[..., rows, :]


@functools.lru_cache(maxsize=1024)
def _nearest(old: int, new: int) -> np.ndarray:
    """Which of `old` pixels in a row each of `new` ones shows."""
    # Pillow adds the scale up step by step, and its rounding errors decide where a position is a whole number.
    steps = np.full(new, old / new)
    steps[0] /= 2
    return np.minimum(np.add.accumulate(steps).astype(np.int64), old - 1)
