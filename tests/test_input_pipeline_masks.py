"""Masks against masks drawn by hand, point-in-polygon arithmetic and Pillow."""

import numpy as np
import pytest
from PIL import Image

from input_pipeline import masks
from input_pipeline.records import DataError


def rectangle(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def test_polygons_are_x_then_y():
    mask = masks.decode([rectangle(2, 1, 7, 4)], height=6, width=9)
    expected = np.zeros((6, 9), np.uint8)
    expected[1:4, 2:7] = 1
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, expected)


def test_both_rules_where_parts_overlap():
    parts = [rectangle(0, 0, 4, 4), rectangle(2, 2, 6, 6)]
    a, b = (masks.decode([part], 8, 8) for part in parts)
    assert np.array_equal(masks.decode(parts, 8, 8, masks.UNION), a | b)
    assert np.array_equal(masks.decode(parts, 8, 8, masks.EXACTLY_ONE), a ^ b)
    # three on one pixel are not one
    three = masks.decode([*parts, rectangle(2, 2, 4, 4)], 8, 8, masks.EXACTLY_ONE)
    assert three[3, 3] == 0
    assert three[0, 0] == 1
    assert three[5, 5] == 1


def test_a_triangle_covers_what_is_inside():
    corners = np.array([(10.0, 5.0), (50.0, 20.0), (20.0, 44.0)])
    mask = masks.decode([corners.ravel().tolist()], 50, 60)
    y, x = np.mgrid[:50, :60] + 0.5
    distances = []
    for p, q in zip(corners, np.roll(corners, -1, 0), strict=True):
        along = (q - p) / np.linalg.norm(q - p)
        distances.append(along[0] * (y - p[1]) - along[1] * (x - p[0]))
    depth = np.min(distances, 0)
    assert mask[depth > 1].all()
    assert not mask[depth < -1].any()


@pytest.mark.parametrize("compressed", [True, False])
def test_run_lengths(compressed):
    expected = (np.random.RandomState(0).rand(7, 5) > 0.5).astype(np.uint8)
    if compressed:
        rle = masks.encode(expected)
    else:  # COCO counts down the columns, background first
        runs, value = [0], 0
        for pixel in expected.T.ravel():
            if pixel != value:
                runs.append(0)
                value = pixel
            runs[-1] += 1
        rle = {"size": [7, 5], "counts": runs}
    assert np.array_equal(masks.decode(rle, 7, 5), expected)
    assert np.array_equal(masks.decode([rle, rle], 7, 5, masks.EXACTLY_ONE), np.zeros((7, 5)))
    text = rle | {"counts": rle["counts"].decode()} if compressed else rle  # as it stands in a JSON file
    assert np.array_equal(masks.decode(text, 7, 5), expected)


def test_no_object_is_an_empty_mask():
    assert masks.decode([], 3, 4).shape == (3, 4)
    assert not masks.decode([], 3, 4).any()


@pytest.mark.parametrize("bad", [[[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [3], {"counts": "x"}, ["text"]])
def test_what_is_no_segmentation_is_refused(bad):
    with pytest.raises(DataError, match=r"segmentation: expected polygons"):
        masks.decode(bad, 9, 9)


def test_sizes_and_rules_are_checked():
    rle = masks.encode(np.ones((4, 6), np.uint8))
    with pytest.raises(DataError, match=r"RLE of size 4x6 for an image of 6x4"):
        masks.decode(rle, 6, 4)
    with pytest.raises(DataError, match=r"rule 'any'"):
        masks.decode(rle, 4, 6, "any")


def test_nearest_is_pillows_for_every_pair_of_sizes():
    for old in range(1, 90, 4):
        line = np.arange(old, dtype=np.uint8)[None]
        for new in [*range(1, 100, 3), 480]:
            expected = np.asarray(Image.fromarray(line).resize((new, 1), Image.Resampling.NEAREST))
            assert np.array_equal(masks.resize_nearest(line, (1, new)), expected), (old, new)
            assert np.array_equal(masks.resize_nearest(line.T, (new, 1)), expected.T)
    stack = np.random.RandomState(1).randint(0, 2, (3, 8, 6)).astype(np.uint8)
    assert np.array_equal(masks.resize_nearest(stack, (5, 9))[1], masks.resize_nearest(stack[1], (5, 9)))
