"""Decoding, resizing and normalising as the published systems do it (data spec section 3): TensorFlow graph
functions for the loader, and a NumPy and Pillow version for one image.

TensorFlow is imported at the first use: prediction and the makers of shapes need not wait seconds for it.
"""

from __future__ import annotations

import functools
import io
import os
import warnings
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from input_pipeline.records import DataError

if TYPE_CHECKING:
    import tensorflow as tf

MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)


@functools.cache
def tensorflow():
    """The TensorFlow module, with accelerators hidden from it: it would take their memory away from JAX."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf


def decode_image(encoded: tf.Tensor) -> tf.Tensor:
    """PNG or JPEG bytes to uint8 [H, W, 3] RGB; EXIF orientation is ignored, as the masks want it."""
    tf = tensorflow()
    # JPEG as Pillow decodes it: exact inverse transform, smooth chroma.
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )


def resize_image(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """uint8 [H, W, 3] squashed to [h, w, 3] as by Pillow's antialiased bilinear filter, within 1/255."""
    tf = tensorflow()
    shape = tf.shape(image)

    def squash() -> tf.Tensor:
        result = image
        # Pillow rounds between its two passes; rounding once is off by one level at every sixth value.
        for height, width in ((shape[0], size[1]), size):
            result = tf.image.resize(result, (height, width), method="bilinear", antialias=True)
            result = tf.floor(result + 0.5)
        return tf.cast(result, tf.uint8)

    resized = tf.cond(tf.reduce_all(shape[:2] == size), lambda: tf.cast(image, tf.uint8), squash)
    return tf.ensure_shape(resized, (*size, 3))


def normalise(images: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] to float32: / 255, minus the ImageNet mean, over its standard deviation."""
    result = np.true_divide(images, 255, dtype=np.float32)
    result -= MEAN
    result /= STD
    return result


def open_image(image: Image.Image | str | os.PathLike | bytes) -> Image.Image:
    """One image in RGB, whole in memory; EXIF orientation is ignored.

    Raises:
        DataError: if the file is missing or is not a readable image; the message names it.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    name = f"{len(image)} bytes" if isinstance(image, bytes) else os.fspath(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return opened.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; give the path of a PNG or JPEG image") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        reason = "no image format known here" if "cannot identify" in str(error) else error
        raise DataError(f"{name}: not a readable image ({reason})") from error


def prepare_image(image: Image.Image | str | os.PathLike | bytes, size: tuple[int, int]) -> np.ndarray:
    """One image squashed to (h, w) and normalised, float32 [h, w, 3]; errors as of `open_image`."""
    return normalise(np.asarray(open_image(image).resize(size[::-1], Image.Resampling.BILINEAR)))
