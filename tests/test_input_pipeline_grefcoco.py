"""gRefCOCO: sentences that mean one object, several, or none."""

import json

import numpy as np
import pytest

import input_pipeline
from input_pipeline import DataError, masks
from tests.test_input_pipeline_refer import MASK, SQUARE, TWO, instances, sentence, write_tree


def gref(number, members, *sentences, split="val", **fields):
    entry = {
        "ref_id": number,
        "ann_id": members,
        "image_id": 100,
        "split": split,
        "sentences": list(sentences),
    }
    return entry | fields


GREFS = [
    gref(1, [7], sentence(10, "the ring"), sentence(11, "ring")),
    gref(2, [8, 9], sentence(20, "both stars")),
    gref(3, [-1], sentence(30, "a horse")),
    gref(4, [7], sentence(40, "no such thing"), no_target=True),
    gref(5, 9, sentence(50, "the bar"), split="train"),
]


def write(root, grefs=GREFS):
    content = instances()
    for annotation in content["annotations"]:
        annotation["image_id"] = 100
    write_tree(root, content=content)
    (root / "refcoco").rename(root / "grefcoco")
    (root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(grefs))
    return root


def load(root, split="val", **options):
    return input_pipeline.load("grefcoco", split, root=str(root), **options)


def test_one_several_and_none(tmp_path):
    records = load(write(tmp_path))
    assert [r.text for r in records] == ["the ring", "ring", "both stars", "a horse", "no such thing"]
    found = [masks.decode(r.segmentation, 40, 60) for r in records]
    np.testing.assert_array_equal(found[0], masks.decode(TWO, 40, 60))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], MASK | masks.decode(SQUARE, 40, 60))
    assert not found[3].any()
    assert not found[4].any()
    assert records.has_absent
    assert not load(tmp_path, "train").has_absent
    np.testing.assert_array_equal(masks.decode(load(tmp_path, "train")[0].segmentation, 40, 60), MASK)


def test_objects_that_overlap_stay_whole_under_either_rule(tmp_path):
    """Only polygons of one object that overlap become background."""
    record = load(write(tmp_path, [gref(1, [7, 8], sentence(1, "all"))]))[0]
    union = masks.decode(TWO, 40, 60) | masks.decode(SQUARE, 40, 60)
    for rule in (masks.UNION, masks.EXACTLY_ONE):
        np.testing.assert_array_equal(masks.decode(record.segmentation, 40, 60, rule), union)


@pytest.mark.parametrize(
    ("grefs", "message"),
    [
        ({"a": 1}, "expected a list of objects, found {'a': 1}"),
        ([gref(1, "7", sentence(1, "x"))], "an entry has ann_id is '7'"),
        ([gref(1, [77], sentence(1, "x"))], "ann_id 77 is not in"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path, grefs, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, grefs))


def test_what_is_missing_is_named(tmp_path):
    (write(tmp_path) / "grefcoco" / "grefs(unc).json").unlink()
    with pytest.raises(DataError, match=r"grefs\(unc\).json: no such file"):
        load(tmp_path)
    with pytest.raises(DataError, match="grefcoco: no partition 'umd'; there is unc"):
        load(tmp_path, partition="umd")
    with pytest.raises(DataError, match="config.data.root is missing"):
        load("")
