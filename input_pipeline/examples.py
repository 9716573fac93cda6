"""One picture, or the mask of one object, of records that may be wrong: whole and checked, or an error that says why."""

from __future__ import annotations

import numpy as np
from PIL import Image

from input_pipeline import masks, ops
from input_pipeline.records import DataError, Records


def name(records: Records, image_row: int, image: str | bytes | None = None) -> str:
    """What errors call an image: its path, or its number where it has none; `image` spares fetching it again."""
    image = records.images[image_row] if image is None else image
    return image if isinstance(image, str) else f"{records.split} image {records.image_ids[image_row]}"


def picture(records: Records, image_row: int) -> Image.Image:
    """An image in RGB; raises DataError where it is missing, damaged, or not of the size that its annotations are for."""
    image = records.images[image_row]
    called = name(records, image_row, image)
    found = ops.open_image(image, called)
    expected = tuple(map(int, records.sizes[image_row]))
    if (found.height, found.width) != expected:
        raise DataError(
            f"{called}: {found.height}x{found.width} pixels (height x width), but its annotations are for "
            f"{expected[0]}x{expected[1]}; it was turned or resized"
        )
    return found


def truth(records: Records, object_row: int, rule: str = masks.UNION, empty: bool = True) -> np.ndarray:
    """The mask of an object, uint8 [height, width] of 0 and 1 at the size of its image.

    Args: rule: as of `masks.decode`; empty: whether a mask without a pixel will do where an object is meant.
    Raises DataError, naming image and object, for a segmentation that is not one, and for an empty one.
    """
    image_row = int(records.object_images[object_row])
    height, width = map(int, records.sizes[image_row])
    try:
        segmentation = records.segmentations[object_row]
        if not height * width:
            raise DataError("the size of its picture is not known, since that cannot be read")
        mask = masks.decode(segmentation, height, width, rule)
        # Parts that cover one another leave nothing under 'exactly_one', and yet there is an object.
        visible = mask if mask.any() else masks.decode(segmentation, height, width)
        if not empty and segmentation != [] and not visible.any():
            raise DataError("the mask is empty")
    except DataError as error:
        where = f"{name(records, image_row)}, object {records.object_ids[object_row]}"
        raise DataError(f"{where}: {error}") from None
    return mask
