"""Preprocessing against Pillow: the fixture's numbers, and Pillow itself on random sizes."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from input_pipeline import masks, ops
from input_pipeline.records import DataError

FIXTURE = np.load(pathlib.Path(__file__).parent / "data" / "preprocess.npz")


def off_by(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


@pytest.mark.parametrize("name", ["landscape", "portrait", "upscale"])
def test_fixture(name):
    image, mask = FIXTURE[f"{name}_image"], FIXTURE[f"{name}_mask"]
    assert off_by(ops.resize_image(image, (96, 96)), FIXTURE[f"{name}_image_96"]) <= 1
    assert np.array_equal(masks.resize_nearest(mask, (96, 96)), FIXTURE[f"{name}_mask_96"])
    expected = (FIXTURE[f"{name}_image_96"] / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    assert np.allclose(ops.prepare_image(Image.fromarray(image), (96, 96)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(37, 211, (64, 48)), (9, 5, (96, 32)), (64, 48, (64, 48)), (300, 48, (64, 48))],
)
def test_resize_is_pillows(height, width, size):
    image = np.random.RandomState(height).randint(0, 256, (height, width, 3)).astype(np.uint8)
    expected = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    resized = ops.resize_image(image, size).numpy()
    assert resized.dtype == np.uint8
    assert resized.shape == (*size, 3)
    assert off_by(resized, expected) <= ((height, width) != size)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


SMOOTH = Image.fromarray(np.random.RandomState(0).randint(0, 256, (6, 8, 3)).astype(np.uint8)).resize(
    (64, 48)
)


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_png_decodes_to_rgb(mode):
    image = SMOOTH.convert(mode)
    assert np.array_equal(ops.decode_image(encode(image, "PNG")), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_decodes_as_by_pillow(mode):
    data = encode(SMOOTH.convert(mode), "JPEG", quality=90)
    assert off_by(ops.decode_image(data), ops.open_image(data)) <= 2


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    data = encode(SMOOTH, "JPEG", exif=exif)
    assert ops.open_image(data).size == (64, 48)
    assert ops.decode_image(data).shape == (48, 64, 3)
    assert ops.prepare_image(data, (20, 30)).shape == (20, 30, 3)


def test_normalise():
    pixels = np.array([[0, 128, 255]], np.uint8)
    expected = [[-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]]
    found = ops.normalise(pixels)
    assert found.dtype == np.float32
    assert np.allclose(found, expected, atol=1e-6)


def test_unreadable_images_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent.png: no such file"):
        ops.open_image(tmp_path / "absent.png")
    text = tmp_path / "notes.png"
    text.write_text("no image")
    with pytest.raises(DataError, match=r"notes.png: not a readable image"):
        ops.prepare_image(str(text), (8, 8))
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(encode(SMOOTH, "JPEG")[:400])
    with pytest.raises(DataError, match=r"cut.jpg: not a readable image"):
        ops.open_image(cut)
    with pytest.raises(DataError, match=r"not a readable image"):
        ops.open_image(tmp_path)
    with pytest.raises(DataError, match=r"4 bytes: not a readable image"):
        ops.open_image(b"text")


def test_tensorflow_gets_no_accelerator():
    tf = ops.tensorflow()
    assert {device.device_type for device in tf.config.get_visible_devices()} == {"CPU"}
