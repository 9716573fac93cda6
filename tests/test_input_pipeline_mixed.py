"""Several sources together: the rule that nothing evaluated is trained on, and columns that are joined rightly."""

import json

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from input_pipeline import DataError, Loader, Tokenizer, masks
from input_pipeline.mixed import identity
from tests.test_input_pipeline_refer import REFS, ref, sentence, write_tree

OWN = {"own": {"source": "shapes", "scenes": 3, "image_size": 40}}


def write_both(root):
    """Two REFER trees of the same two pictures: what one evaluates the other trains on."""
    write_tree(root)
    other = root / "refcocog"
    other.mkdir()
    refs = [
        ref(7, 100, "train", sentence(700, "a ring")),
        ref(8, 101, "train", sentence(800, "a star"), sentence(801, "the star")),
    ]
    import pickle

    (other / "refs(umd).p").write_bytes(
        pickle.dumps(refs + [ref(9, 100, "val", sentence(900, "b"))], protocol=2)
    )
    (other / "instances.json").write_text((root / "refcoco" / "instances.json").read_text())
    first = {"source": "refer", "root": str(root)}
    return {"coco": first, "g": first | {"dataset": "refcocog", "partition": "umd"}}


def load(split, parts, **options):
    return input_pipeline.load("mixed", split, parts=parts, **options)


def test_pictures_that_are_evaluated_are_not_trained_on(tmp_path):
    parts = write_both(tmp_path)
    # Picture 100 is in the val split of both, so that only picture 101 is left.
    assert [(r.image_id, r.text) for r in load("train", parts)] == [
        (101, "blue star"),
        (101, "a star"),
        (101, "the star"),
    ]
    assert [r.text for r in load("coco/val", parts)] == [
        s["raw"] for r in (REFS[0], REFS[2]) for s in r["sentences"]
    ]
    assert input_pipeline.splits("mixed", parts=parts)[:5] == (
        "train",
        "coco/val",
        "coco/testA",
        "coco/testB",
        "g/val",
    )


def test_every_picture_that_is_evaluated_counts(tmp_path):
    parts = write_both(tmp_path)
    refs = [*REFS, ref(8, 101, "val", sentence(802, "c"))]  # Both pictures in one split.
    write_tree(tmp_path, refs=refs)
    assert len(load("train", {"coco": parts["coco"]})) == 0


def test_the_same_picture_is_known_in_every_source(tmp_path):
    """By COCO's number in a JSON Lines file, with the names of 2014 and of 2017; by its path; by its bytes."""
    parts = {"coco": write_both(tmp_path)["coco"]}
    box = [[1, 1, 5, 1, 5, 5]]
    names = ["COCO_train2014_000000000100.jpg", "000000000101.jpg", "mine.jpg", "also.jpg"]
    for name in names:
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    lines = [{"image": name, "polygons": box, "text": f"thing {name}"} for name in names]
    lines.append({"image": "mine.jpg", "polygons": box, "text": "checked", "split": "val"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    parts["lines"] = {"source": "jsonl", "root": str(tmp_path)}
    assert [r.text for r in load("train", parts)] == ["blue star", "thing 000000000101.jpg", "thing also.jpg"]
    shapes = input_pipeline.load("shapes", "val", **{k: v for k, v in OWN["own"].items() if k != "source"})
    assert len({identity(shapes, row) for row in range(3)}) == 3
    assert identity(shapes, 0) == identity(shapes.select([1]), 0)


def test_every_example_of_the_parts_is_there_and_whole(tmp_path):
    parts = OWN | {"coco": write_both(tmp_path)["coco"]}
    joined = load("train", parts, seed=5)
    singles = [
        *input_pipeline.load("shapes", "train", seed=5, scenes=3, image_size=40),
        *input_pipeline.load("refer", "train", root=str(tmp_path)),
    ]
    assert list(joined) == singles
    batches = list(Loader(joined, Tokenizer("shapes"), batch_size=4, image_size=(32, 32)))
    for batch in batches:
        for k in np.flatnonzero(batch["valid"]):
            record = singles[batch["index"][k]]
            truth = masks.decode(record.segmentation, record.height, record.width, masks.EXACTLY_ONE)
            assert np.array_equal(batch["mask"][k], masks.resize_nearest(truth, (32, 32)))
    assert sum(batch["valid"].sum() for batch in batches) == len(singles)


def test_parts_share_a_root_unless_they_have_one(tmp_path):
    write_both(tmp_path)
    parts = {"coco": {"source": "refer"}, "g": {"source": "refer", "dataset": "refcocog", "partition": "umd"}}
    assert len(load("train", parts, root=str(tmp_path))) == 3


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (None, "config.data.options.parts is missing"),
        ({}, "config.data.options.parts is missing"),
        ({"a/b": {"source": "shapes"}}, "'a/b' is .*; expected a name without '/'"),
        ({"a": {}}, "'a' is {}; expected a name without '/' and the 'source'"),
        ({"a": {"source": "mixed"}}, "'a' is"),
        ({"a": {"source": "none"}}, "unknown data source 'none'"),
        ({"a": {"source": "shapes", "colour": 1}}, "has no option 'colour'"),
    ],
)
def test_parts_that_are_none(parts, message):
    with pytest.raises(DataError, match=message):
        load("train", parts)


def test_a_part_without_training_is_evaluated_and_kept_out(tmp_path):
    square = {"polygons": [[0, 0, 4, 0, 4, 4]]}
    for number in (0, 1):
        Image.new("RGB", (8, 6), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
    for name, lines in {
        "own": [{"image": "0.png", "text": "a"}, {"image": "1.png", "text": "b"}],
        "held": [{"image": "1.png", "text": "c", "split": "val"}],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(line | square) for line in lines))
    parts = {name: {"source": "jsonl", "root": str(tmp_path / f"{name}.jsonl")} for name in ("own", "held")}
    assert input_pipeline.splits("mixed", parts=parts) == ("train", "held/val")
    assert [record.text for record in load("train", parts)] == ["a"]
    assert [record.text for record in load("held/val", parts)] == ["c"]
    with pytest.raises(DataError, match="none of held has a split 'train'"):
        load("train", {"held": parts["held"]})


def test_parts_without_a_root_of_their_own_have_that_of_the_whole(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "0.png")
    line = {"image": "0.png", "text": "a", "polygons": [[0, 0, 4, 0, 4, 4]]}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    parts = {"own": {"source": "jsonl"}}
    assert input_pipeline.splits("mixed", root=str(tmp_path), parts=parts) == ("train",)
    assert [record.text for record in load("train", parts, root=str(tmp_path))] == ["a"]
