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


@pytest.mark.parametrize(
    "bad", [[[1, 2, 3, 4, 5, 6, 7]], [3], {"counts": "x"}, ["text"], [["a"] * 6], [[[1, 2]] * 3]]
)
def test_what_is_no_segmentation_is_refused(bad):
    with pytest.raises(DataError, match=r"segmentation: expected polygons"):
        masks.decode(bad, 9, 9)


def test_polygons_without_area_cover_nothing():
    for empty in ([[]], [[1, 2]], [[1, 2, 6, 7]], [[2, 2, 7, 7, 2, 2]], [[-9, -9, -3, -9, -3, -3]]):
        assert masks.decode(empty, 9, 9).sum() == 0, empty
    square = rectangle(2, 2, 5, 5)
    for rule in (masks.UNION, masks.EXACTLY_ONE):
        assert masks.decode([square, [], [1, 1, 8, 8]], 9, 9, rule).sum() == 9


def test_polygons_may_leave_the_image():
    expected = np.zeros((6, 9), np.uint8)
    expected[:3, 5:] = 1
    assert np.array_equal(masks.decode([rectangle(5, -4, 20, 3)], 6, 9), expected)


@pytest.mark.parametrize("wrong", [1e9, -1e9, float("nan"), float("inf")])
def test_corners_that_cannot_be_are_refused(wrong):
    for place in range(6):
        corners = [1, 1, 5, 1, 5, 5]
        corners[place] = wrong
        with pytest.raises(DataError, match="segmentation: a polygon reaches to"):
            masks.decode([corners], 9, 9)


def test_run_lengths_that_do_not_fill_the_image_are_refused():
    """pycocotools would show whatever the memory holds."""
    mask = (np.random.RandomState(3).rand(9, 7) > 0.6).astype(np.uint8)
    whole = masks.encode(mask)["counts"]
    runs = [0, 3, 5, 55]
    assert sum(runs) == mask.size
    bad = [
        whole[:-1],
        whole + b"1",
        b"",
        b"zz",
        b"\xff\xff",
        whole[1:],
        runs[:-1],
        [*runs, 1],
        [-1, 64],
        [63.0],
        7,
    ]
    for counts in bad:
        with pytest.raises(DataError, match="the runs of an RLE do not fill the 9x7 image"):
            masks.decode({"size": [9, 7], "counts": counts}, 9, 7)
    assert masks.decode({"size": [9, 7], "counts": runs}, 9, 7).sum() == 58


def test_run_lengths_of_any_length_are_understood():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 0.97, 1.0):
        for _ in range(20):
            mask = (rng.random(rng.integers(1, 150, 2)) < share).astype(np.uint8)
            mask[: rng.integers(0, mask.shape[0] + 1)] = 1
            assert np.array_equal(masks.decode(masks.encode(mask), *mask.shape), mask)
    large = np.zeros((3000, 2500), np.uint8)
    large[2999, 2499] = 1
    assert np.array_equal(masks.decode(masks.encode(large), *large.shape), large)


def test_sizes_and_rules_are_checked():
    rle = masks.encode(np.ones((4, 6), np.uint8))
    with pytest.raises(DataError, match=r"RLE of size 4x6 for an image of 6x4"):
        masks.decode(rle, 6, 4)
    for size in (24, [4], [4, 6, 1], "46"):
        with pytest.raises(DataError, match="RLE of size .* for an image of 4x6"):
            masks.decode(rle | {"size": size}, 4, 6)
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
