"""Polygons and run-length encodings to masks, under both ground-truth rules (data spec section 4)."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask

from input_pipeline.records import DataError

UNION, EXACTLY_ONE = "union", "exactly_one"


def decode(segmentation: list | dict, height: int, width: int, rule: str = UNION) -> np.ndarray:
    """The mask of a COCO segmentation.

    Args:
        segmentation: list of polygons [x0, y0, x1, y1, ...] in pixels, an RLE dict (compressed or not) or a
            list of RLE dicts; an empty list is an empty mask.
        height, width: of the image.
        rule: 'union' of all parts, or 'exactly_one': pixels where parts overlap become background, as in the
            published loaders.
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
    for rle in rles:
        if tuple(rle["size"]) != (height, width):
            found, expected = "x".join(map(str, rle["size"])), f"{height}x{width}"
            raise DataError(f"segmentation: RLE of size {found} for an image of {expected} (height x width)")
    layers = coco_mask.decode(rles)  # [H, W, parts]
    if layers.shape[-1] == 1:
        return np.ascontiguousarray(layers[..., 0])
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
    if isinstance(part, dict) and set(part) >= {"size", "counts"}:
        return coco_mask.frPyObjects(part, height, width) if isinstance(part["counts"], list) else part
    if isinstance(part, (list, tuple)) and len(part) >= 6 and len(part) % 2 == 0:
        return coco_mask.frPyObjects([[float(v) for v in part]], height, width)[0]
    raise DataError(
        "segmentation: expected polygons of at least 3 points (x, y, x, y, ...) or an RLE with 'size' and"
        f" 'counts', found {str(part)[:60]}"
    )


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask [..., H, W] at another size (h, w); picks the same pixels as Pillow's nearest filter."""
    for axis, new in zip((-2, -1), size, strict=True):
        old = mask.shape[axis]
        if old != new:
            # Pillow adds the scale up step by step, and its rounding errors decide where a position is a
            # whole number.
            steps = np.full(new, old / new)
            steps[0] /= 2
            rows = np.minimum(np.add.accumulate(steps).astype(np.int64), old - 1)
            mask = np.take(mask, rows, axis)
    return mask
