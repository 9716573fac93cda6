"""Decoding and resizing as the published systems do it: with Pillow (data spec section 3)."""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import Image, ImageOps

from input_pipeline.records import DataError


def open_image(
    image: Image.Image | str | os.PathLike | bytes, name: str = "", upright: bool = False
) -> Image.Image:
    """One image in RGB, whole in memory; EXIF orientation is ignored, as the annotations want it.

    Of 16-bit grey the upper eight bits are taken. Args: name: what errors call it; by default its path. upright: turn a
    photograph as its EXIF orientation says, for people to look at. Raises DataError where it is missing or is not a whole,
    readable image.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    name = name or (f"{len(image)} bytes" if isinstance(image, bytes) else os.fspath(image))
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            if opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{opened.width}x{opened.height} pixels are more than anyone's picture has")
            opened.load()
            return _to_rgb(ImageOps.exif_transpose(opened) if upright else opened)
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; give the path of a PNG or JPEG image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no image format known here" if "cannot identify" in str(error) else error
        raise DataError(f"{name}: not a readable image ({reason})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip sixteen bits at 255.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image squashed to (height, width) by the antialiased bilinear filter."""
    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def prepare_image(image: Image.Image | str | os.PathLike | bytes, size: tuple[int, int]) -> np.ndarray:
    """What a network sees of one image, uint8 [h, w, 3]; errors as of `open_image`."""
    return np.asarray(resize_image(open_image(image), size))
