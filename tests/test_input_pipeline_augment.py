"""Random changes: words against the built-in grammar's own judgement, crops and draws against what they promise."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from input_pipeline import augment
from input_pipeline.augment import Augmentation, Draw, crop_box, mirrored
from input_pipeline.records import DataError
from input_pipeline.shapes import Options, make_example
from input_pipeline.shapes_describe import TYPES, describe_scene
from input_pipeline.shapes_scene import Dice


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the left cup", "the right cup"),
        ("Left guy, second from RIGHT", "Right guy, second from LEFT"),
        ("leftmost zebra to the right of the rightmost", "rightmost zebra to the left of the leftmost"),
        ("righty", "lefty"),
        ("left-hand side", "right-hand side"),
        ("lft man", "rgt man"),
        ("rt man", "left man"),
        ("guy on l", "guy on r"),
        ("man r side", "man l side"),
        ("bright upright kleft", "bright upright kleft"),
        ("it's the man's cup", "it's the man's cup"),
        ("blue circle", "blue circle"),
        ("alright guy", "alright guy"),
        ("right side of the bowl", "left side of the bowl"),
    ],
)
def test_left_and_right_are_exchanged(text, expected):
    assert mirrored(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "cup right above the plate",
        "leftover pizza",
        "the left overs",
        "at 3 o'clock",
        "right next to him",
    ]
    + ["the clock that says 10:15", "shirt with the word left", "person left behind", "letter R"],
)
def test_sentences_that_a_mirror_makes_wrong_are_left_alone(text):
    assert mirrored(text) is None


OTHER = {"left": "right", "top left": "top right", "bottom left": "bottom right"}
OTHER |= {"left of": "right of", "to the left of": "to the right of"}
OTHER |= {b: a for a, b in OTHER.items()}


def turned_over(node):
    """An expression of the grammar with every direction exchanged."""
    changes = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        changes[field.name] = (
            turned_over(value) if dataclasses.is_dataclass(value) else OTHER.get(value, value)
        )
    return type(node)(**changes)


def test_mirrored_sentences_are_true_of_mirrored_scenes():
    """The grammar, which knows what its sentences mean, says the same of the scene turned over."""
    checked = 0
    for index in range(40):
        scene = make_example(0, "val", index, Options(image_size=64)).scene
        things = tuple(dataclasses.replace(thing, x=1 - thing.x) for thing in scene.things)
        turned = dataclasses.replace(scene, things=things)
        for target, _, expression in describe_scene(
            scene, range(len(things)), "mixed", TYPES, 3, Dice(index)
        ):
            other = turned_over(expression)
            assert mirrored(expression.text()) == other.text()
            assert other.evaluate(turned) == {target}
            checked += other != expression
    assert checked > 100


def test_twice_is_nothing():
    for text in ("left cup right of Leftmost", "RIGHT l r", "lft"):
        assert mirrored(mirrored(text)) == text


def test_crops_hold_the_referent_and_reach_everywhere():
    rng = np.random.default_rng(0)
    mask = np.zeros((40, 60), np.uint8)
    mask[12:20, 30:33] = 1
    tops, sizes = set(), set()
    for _ in range(3000):
        draw = Draw(False, (1, 1, 1), (*rng.uniform(0.3, 1, 2), *rng.random(2)))
        top, bottom, left, right = crop_box(draw, mask)
        assert 0 <= top < bottom <= 40
        assert 0 <= left < right <= 60
        assert mask[top:bottom, left:right].sum() == mask.sum()
        assert bottom - top == max(round(draw.crop[0] * 40), 8)
        assert right - left == round(draw.crop[1] * 60)
        tops.add(top)
        sizes.add(bottom - top)
    assert tops == set(range(13))
    assert sizes == set(range(12, 41))


def test_crops_of_what_fills_the_image_and_of_nothing():
    for mask in (np.ones((9, 7), np.uint8), np.zeros((9, 7), np.uint8)):
        for corner in (0.0, 0.5, 0.999999):
            top, bottom, left, right = crop_box(Draw(False, (1, 1, 1), (0.3, 0.3, corner, corner)), mask)
            if mask.any():
                assert (top, bottom, left, right) == (0, 9, 0, 7)
            else:
                assert (bottom - top, right - left) == (3, 2)
                assert bottom <= 9
                assert right <= 7


def test_picture_and_mask_change_together():
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)
    mask = (pixels[..., 0] > 250).astype(np.uint8)
    for number in range(50):
        draw = Augmentation(flip=0.5, crop=0.4).draw(0, 0, number)
        image, truth = augment.apply(draw, Image.fromarray(pixels), mask)
        assert np.array_equal(np.asarray(image)[..., 0] > 250, truth)
        assert truth.sum() == mask.sum()


def test_jitter_changes_light_and_not_hue():
    grey = Image.fromarray(np.random.default_rng(0).integers(60, 190, (8, 8), np.uint8)).convert("RGB")
    image = Image.new("RGB", (8, 8), (180, 60, 60))
    brightness = []
    for number in range(60):
        draw = Augmentation(jitter=0.3).draw(1, 2, number)
        assert all(0.7 <= factor <= 1.3 for factor in draw.factors)
        red, green, blue = np.asarray(augment.jitter(draw, image)).reshape(-1, 3)[0].astype(int)
        assert red > green == blue
        changed = np.asarray(augment.jitter(draw, grey)).astype(int)
        assert np.ptp(changed, axis=-1).max() == 0
        brightness.append(changed.mean())
    assert max(brightness) - min(brightness) > 40
    assert augment.jitter(Draw(False, (1.0, 1.0, 1.0), None), image) is image


def test_draws():
    draws = [Augmentation(flip=0.3).draw(0, epoch, p) for epoch in range(2) for p in range(1000)]
    assert 0.25 < np.mean([draw.flip for draw in draws]) < 0.35
    assert all(draw.crop is None and draw.factors == (1, 1, 1) for draw in draws)
    both = Augmentation(flip=0.3, jitter=0.1)
    assert [both.draw(0, 0, p).flip for p in range(100)] == [draw.flip for draw in draws[:100]]
    assert len({ALL.draw(seed, epoch, p) for seed in (0, 1) for epoch in (0, 1) for p in (0, 1)}) == 8
    assert not Augmentation()
    assert ALL


ALL = Augmentation(flip=0.5, jitter=0.3, crop=0.5)


@pytest.mark.parametrize("field", ["flip", "jitter", "crop"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_impossible_values_are_named(field, value):
    with pytest.raises(DataError, match=f"config.data.augment.{field} is {value}; expected a number from"):
        Augmentation(**{field: value})


@pytest.mark.parametrize("text", ["L shaped couch", "the l-shaped desk", "right side up bowl"])
def test_shapes_named_by_letters_are_not_mirrored(text):
    assert mirrored(text) is None
