"""Pairs of sentences that differ in one word."""

import collections

import numpy as np
import pytest

from input_pipeline import masks
from input_pipeline.records import DataError, load
from input_pipeline.shapes import Options, make_example
from input_pipeline.shapes_counterfactual import WORDS, exchanged
from input_pipeline.shapes_grammar import Article, Noun, Order, Place, Relation


def texts(expression, word):
    return {other.text() for name, other in exchanged(expression) if name == word}


def test_one_word_is_exchanged():
    ring = Noun("ring", "red", None, "small")
    assert "small blue ring" in texts(ring, "color")
    assert "small red ring" not in texts(ring, "color")
    assert texts(ring, "size") == {"little red ring", "large red ring", "big red ring"}
    assert not texts(ring, "texture")  # There is no such word.
    # 'top left' and 'left' differ in a word that is missing, not in one that is another.
    assert texts(Place(Noun("star"), "top left"), "place") == {"bottom left star", "top right star"}
    assert texts(Order(Noun("star"), 1, "left"), "direction") == {
        "rightmost star",
        "highest star",
        "lowest star",
    }
    assert texts(Order(Noun("star"), 2, "left"), "rank") == {
        "third star from the left",
        "fourth star from the left",
    }
    relation = Article(Relation(Noun("cross"), "left of", Article(Noun("ring", "red"))))
    assert texts(relation, "relation") == {"the cross right of the red ring"}
    assert "the cross left of the blue ring" in texts(relation, "color")
    assert "the star left of the red ring" in texts(relation, "shape")


@pytest.mark.parametrize("split", ["val", "rare"])
def test_pairs_mean_different_objects(split):
    """As a reader would see it: by the words, and by the masks."""
    seen = collections.Counter()
    for index in range(60):
        example = make_example(3, split, index, Options(image_size=48, counterfactual=True))
        assert example.expressions
        assert len(example.expressions) % 2 == 0
        for first, second in zip(example.expressions[::2], example.expressions[1::2], strict=True):
            assert first[1] == second[1]
            assert first[1] in WORDS
            assert len(first[0]) == len(second[0]) == 1
            assert first[0] != second[0]
            words = [text.split() for *_, text in (first, second)]
            assert sum(a != b for a, b in zip(*words, strict=True)) == 1
            seen[first[1]] += 1
    assert set(seen) == set(WORDS), seen


def test_records_keep_pairs_together():
    records = load("shapes", "val", scenes=30, image_size=48, counterfactual=True, flavour="refcoco")
    assert len(records) % 2 == 0
    for row in range(0, len(records), 2):
        first, second = records[row], records[row + 1]
        assert records.image_rows[row] == records.image_rows[row + 1]
        truths = [masks.decode(one.segmentation, one.height, one.width, "union") for one in (first, second)]
        assert not np.array_equal(*truths)


def test_not_with_generalised_expressions():
    with pytest.raises(DataError, match="exclude each other"):
        Options(generalised=True, counterfactual=True)
