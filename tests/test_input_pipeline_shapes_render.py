"""Drawn shapes: area, orientation, what hides what."""

import math

import pytest

from input_pipeline.shapes_render import render
from input_pipeline.shapes_scene import SHAPES, Dice, Scene, Thing


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_shapes_have_the_right_area_and_orientation(shape):
    size = 256
    mask = render(Scene((Thing(shape, "red", "plain", 0.5, 0.5, 0.5, 0.0),)), size, Dice(1))[1][0]
    arm = 0.34
    areas = {
        "circle": math.pi,
        "ring": math.pi * (1 - 0.25),
        "square": 4 * 0.87**2,
        "triangle": 1.1 * 1.87,
        "cross": 8 * arm - 4 * arm**2,
        "star": 5 * 1.12 * 0.5 * math.sin(math.radians(36)),
    }
    assert mask.sum() / (size / 4) ** 2 == pytest.approx(areas[shape], rel=0.03)
    rows = mask.sum(1)
    if shape == "triangle":  # the tip is up
        assert rows[:128].sum() < rows[128:].sum()
    if shape == "star":
        assert mask[: 128 - 56, 128].any()
        assert not mask[128 + 56 :, 128].any()
    assert abs(mask.astype(int) - mask[:, ::-1]).sum() < 0.03 * mask.sum()  # upright shapes are symmetric


def test_visible_share_counts_what_is_hidden():
    below = Thing("square", "red", "plain", 0.4, 0.4, 0.5, 0.0)
    above = Thing("square", "blue", "plain", 0.4, 0.6, 0.5, 0.0)
    _, masks, visible = render(Scene((below, above)), 96, Dice(0))
    assert visible[1] == 1
    assert visible[0] == pytest.approx(0.2 / 0.348, abs=0.03)
    assert masks[0].any()
    assert not (masks[0] & masks[1]).any()
