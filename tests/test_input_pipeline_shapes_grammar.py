"""What expressions mean and how they are said, on scenes made by hand."""

import dataclasses

import pytest

from input_pipeline import shapes_grammar
from input_pipeline.shapes_grammar import Article, Nearest, Noun, Order, Place, Plural, Relation, Superlative
from input_pipeline.shapes_scene import Scene, Thing


def at(x, y, shape="star", colour="red", texture="plain", diameter=0.2):
    return Thing(shape, colour, texture, diameter, x, y, 0.0)


STAR = Noun(shape="star")
CASES = [
    # left and right, up and down
    (Place(STAR, "left"), [at(0.3, 0.5), at(0.7, 0.5)], {0}),
    (Place(STAR, "right"), [at(0.3, 0.5), at(0.7, 0.5)], {1}),
    (Place(STAR, "top"), [at(0.5, 0.3), at(0.5, 0.7)], {0}),
    (Place(STAR, "bottom"), [at(0.5, 0.3), at(0.5, 0.7)], {1}),
    (Place(STAR, "top right"), [at(0.7, 0.3), at(0.3, 0.3), at(0.7, 0.7)], {0}),
    (Place(STAR, "bottom left"), [at(0.7, 0.3), at(0.3, 0.3), at(0.3, 0.7)], {2}),
    (Place(STAR, "middle"), [at(0.5, 0.55), at(0.2, 0.5)], {0}),
    (Place(STAR, "left"), [at(0.3, 0.5), at(0.5, 0.5)], None),  # the second may be called left
    (Place(STAR, "left"), [at(0.3, 0.5), at(0.5, 0.5, "ring")], {0}),  # what is no star does not matter
    (Order(STAR, 1, "left"), [at(0.6, 0.5), at(0.2, 0.5), at(0.4, 0.5)], {1}),
    (Order(STAR, 2, "left"), [at(0.6, 0.5), at(0.2, 0.5), at(0.4, 0.5)], {2}),
    (Order(STAR, 1, "right"), [at(0.6, 0.5), at(0.2, 0.5), at(0.4, 0.5)], {0}),
    (Order(STAR, 1, "top"), [at(0.5, 0.6), at(0.5, 0.2), at(0.5, 0.4)], {1}),
    (Order(STAR, 2, "bottom"), [at(0.5, 0.7), at(0.5, 0.2), at(0.5, 0.4)], {2}),
    (Order(STAR, 1, "left"), [at(0.2, 0.5), at(0.25, 0.9)], None),
    (Order(STAR, 1, "left"), [at(0.2, 0.5), at(0.5, 0.9), at(0.52, 0.1)], {0}),
    (Order(STAR, 2, "left"), [at(0.2, 0.5), at(0.5, 0.9), at(0.52, 0.1)], None),
    (Order(STAR, 3, "left"), [at(0.2, 0.5), at(0.5, 0.9)], set()),
    (Superlative(STAR, "largest"), [at(0.2, 0.2), at(0.6, 0.6, diameter=0.4)], {1}),
    (Superlative(STAR, "smallest"), [at(0.2, 0.2), at(0.6, 0.6, diameter=0.4)], {0}),
    (Superlative(STAR, "largest"), [at(0.2, 0.2), at(0.6, 0.6, diameter=0.22)], None),
    (Relation(STAR, "left of", Noun("ring")), [at(0.2, 0.5), at(0.5, 0.5, "ring"), at(0.8, 0.5)], {0}),
    (Relation(STAR, "right of", Noun("ring")), [at(0.2, 0.5), at(0.5, 0.5, "ring"), at(0.8, 0.5)], {2}),
    (Relation(STAR, "above", Noun("ring")), [at(0.5, 0.2), at(0.5, 0.5, "ring"), at(0.5, 0.8)], {0}),
    (Relation(STAR, "below", Noun("ring")), [at(0.5, 0.2), at(0.5, 0.5, "ring"), at(0.5, 0.8)], {2}),
    (Relation(STAR, "left of", Noun("ring")), [at(0.2, 0.2), at(0.5, 0.5, "ring")], None),  # left and above
    (
        Relation(STAR, "left of", Noun("ring")),
        [at(0.2, 0.5), at(0.5, 0.5, "ring"), at(0.8, 0.5, "ring")],
        None,
    ),
    (Relation(STAR, "larger than", Noun("ring")), [at(0.2, 0.2, diameter=0.4), at(0.5, 0.5, "ring")], {0}),
    (Relation(STAR, "smaller than", Noun("ring")), [at(0.2, 0.2, diameter=0.4), at(0.5, 0.5, "ring")], set()),
    (Relation(STAR, "larger than", Noun("ring")), [at(0.2, 0.2), at(0.5, 0.5, "ring")], None),
    (
        Relation(STAR, "the same color as", Noun("ring")),
        [at(0.2, 0.2, colour="blue"), at(0.5, 0.5, "ring"), at(0.7, 0.1)],
        {2},
    ),
    (Nearest(STAR, "closest to", Noun("ring")), [at(0.2, 0.5), at(0.4, 0.5), at(0.6, 0.5, "ring")], {1}),
    (Nearest(STAR, "closest to", Noun("ring")), [at(0.35, 0.5), at(0.8, 0.5), at(0.6, 0.5, "ring")], None),
    # by centres the first, by borders the second
    (
        Nearest(STAR, "closest to", Noun("ring")),
        [at(0.4, 0.5), at(0.8, 0.78, diameter=0.4), at(0.6, 0.5, "ring")],
        None,
    ),
    (Article(Noun(colour="red", size="big")), [at(0.2, 0.2, diameter=0.4), at(0.7, 0.7)], {0}),
    (Plural(Noun(colour="red")), [at(0.2, 0.2), at(0.7, 0.7), at(0.5, 0.5, colour="blue")], {0, 1}),
    (Noun("star", "red", "dotted"), [at(0.2, 0.2, texture="dotted"), at(0.7, 0.7)], {0}),
    (Noun("ring"), [at(0.2, 0.2)], set()),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_meaning(case):
    expression, things, expected = CASES[case]
    found = expression.evaluate(Scene(tuple(things)))
    assert found == (None if expected is None else frozenset(expected)), expression.text()


def test_wording():
    ring = Article(Noun("ring", colour="yellow"))
    for expression, text in [
        (Noun("ring", "red", "striped", "small"), "small striped red ring"),
        (Noun(colour="red", any_shape="thing"), "red thing"),
        (Place(STAR, "top left"), "top left star"),
        (Place(STAR, "top left", " of the picture"), "star in the top left of the picture"),
        (Order(Noun("circle", "blue"), 2, "left"), "second blue circle from the left"),
        (Order(STAR, 1, "bottom"), "lowest star"),
        (Superlative(Noun("square", "green"), "largest"), "largest green square"),
        (Relation(Noun("cross"), "below", ring), "cross below the yellow ring"),
        (Plural(Noun("cross")), "all crosses"),
    ]:
        assert expression.text() == text


def test_grey_zones_are_wide_enough_to_see():
    """A few pixels at 96, or nobody could tell yes from no."""
    assert shapes_grammar.SIDE_NO - shapes_grammar.SIDE_YES >= 0.1
    assert shapes_grammar.ORDER_GAP >= 0.06
    assert dataclasses.replace(at(0, 0), diameter=0.25).size == "small"
    assert dataclasses.replace(at(0, 0), diameter=0.32).size == "large"
