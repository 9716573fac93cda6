"""REFER trees: what is written is what is read, and files that are not what they should be say so."""

import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from input_pipeline import DataError, Loader, Tokenizer, masks

SQUARE = [[10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0]]
TWO = [*SQUARE, [20.0, 12.0, 44.0, 12.0, 44.0, 30.0, 20.0, 30.0]]  # Overlapping.


def sentence(number, raw):
    return {"raw": raw, "sent": raw.lower(), "sent_id": number, "tokens": raw.lower().split()}


def ref(object_id, image_id, split, *sentences):
    name = f"COCO_train2014_{image_id:012d}_{object_id}.jpg"
    fields = dict(ref_id=object_id, ann_id=object_id, image_id=image_id, category_id=1, file_name=name)
    return fields | dict(split=split, sent_ids=[s["sent_id"] for s in sentences], sentences=list(sentences))


REFS = [
    ref(7, 100, "val", sentence(70, "The red ring"), sentence(71, "left ring")),
    ref(8, 101, "train", sentence(80, "blue star")),
    ref(9, 100, "val", sentence(90, "Caf\xe9 circle")),
]
MASK = np.zeros((40, 60), np.uint8)
MASK[5:9, 20:50] = 1


def instances():
    rle = masks.encode(MASK)
    rle["counts"] = rle["counts"].decode()
    parts = {7: TWO, 8: SQUARE, 9: rle}
    return {
        "images": [
            {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": 40, "width": 60}
            for i in (100, 101)
        ],
        "annotations": [
            {"id": i, "image_id": 101 if i == 8 else 100, "category_id": 1, "segmentation": parts[i]}
            for i in parts
        ],
    }


def write_tree(root, refs=REFS, content=None, year="train2014", protocol=2):
    folder = root / "refcoco"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=protocol))
    (folder / "instances.json").write_text(json.dumps(content or instances()))
    images = root / "images" / "mscoco" / "images" / year
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in (100, 101):
        name = f"{number:012d}.jpg" if year == "train2017" else f"COCO_train2014_{number:012d}.jpg"
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(images / name)
    return root


def load(root, split="val", **options):
    return input_pipeline.load("refer", split, root=str(root), **options)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("year", ["train2014", "train2017"])
def test_every_expression_of_every_object_of_the_split(tmp_path, year, protocol):
    records = load(write_tree(tmp_path, year=year, protocol=protocol))
    found = [(r.text, r.sentence_id, r.object_id, r.image_id, r.height, r.width) for r in records]
    assert found == [
        ("The red ring", 70, 7, 100, 40, 60),
        ("left ring", 71, 7, 100, 40, 60),
        ("Caf\xe9 circle", 90, 9, 100, 40, 60),
    ]
    assert os.path.exists(records[0].image)
    assert year in records[0].image
    np.testing.assert_array_equal(masks.decode(records[2].segmentation, 40, 60), MASK)
    assert len(load(tmp_path, "train")) == 1


def test_pickles_of_python_2(tmp_path):
    """Its strings are bytes; the published files were written so."""
    write_tree(tmp_path)
    stream = pickle.dumps(REFS, protocol=2)
    # BINUNICODE of ASCII text, as Python 2 wrote a plain str: SHORT_BINSTRING.
    stream = stream.replace(b"X\x03\x00\x00\x00val", b"U\x03val").replace(
        b"X\x0c\x00\x00\x00The red ring", b"U\x0cThe red ring"
    )
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(stream)
    assert load(tmp_path)[0].text == "The red ring"


def test_batches(tmp_path):
    records = load(write_tree(tmp_path))
    loader = Loader(records, Tokenizer("shapes", 8), batch_size=2, image_size=(40, 60))
    batches = list(loader)
    assert [batch["valid"].tolist() for batch in batches] == [[True, True], [True, False]]
    # Where its two polygons overlap this object is background, as in the published loaders.
    truth = batches[0]["mask"][0]
    layers = [masks.decode([part], 40, 60).astype(int) for part in TWO]
    np.testing.assert_array_equal(truth, (sum(layers) == 1).astype(np.uint8))
    assert (layers[0] & layers[1]).any()


@pytest.mark.parametrize("split", ["test", "testa", ""])
def test_splits_that_a_partition_has_not(tmp_path, split):
    with pytest.raises(DataError, match=r"has no split .*; it has: train, val, testA, testB"):
        load(write_tree(tmp_path), split)


def test_unknown_data_sets_partitions_and_empty_splits(tmp_path):
    write_tree(tmp_path)
    with pytest.raises(
        DataError, match="refer: data set 'refcocos' is none of refcoco, refcoco\\+, refcocog"
    ):
        load(tmp_path, dataset="refcocos")
    with pytest.raises(DataError, match="refer: 'refcoco' has no partition 'umd'; it has unc, google"):
        load(tmp_path, partition="umd")
    assert len(load(tmp_path, "testB")) == 0
    with pytest.raises(DataError, match="split 'testB' has no examples"):
        Loader(load(tmp_path, "testB"), Tokenizer("shapes"), batch_size=1, image_size=(8, 8))


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_wants_to_run_code_does_not(tmp_path):
    write_tree(tmp_path)
    target = tmp_path / "made"
    for refs in ([Attack(target)], Attack(target), [dict(REFS[0], split=Attack(target))]):
        (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs))
        with pytest.raises(DataError, match=r"refs\(unc\).p: refused .*it asks for \w+.mkdir"):
            load(tmp_path)
    assert not target.exists()


def change(content, what, **fields):
    content[what][0].update(fields)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (change(instances(), "images", file_name="../../../etc/passwd"), "is not a plain name"),
        (change(instances(), "images", height="40"), "an entry has height is '40'"),
        (change(instances(), "images", id=999), "image_id 100 is not in .*instances.json"),
        (change(instances(), "annotations", id=999), "ann_id 7 is not in .*instances.json"),
        (change(instances(), "annotations", segmentation=3), "an entry has segmentation is 3"),
        ({"images": []}, "not a COCO annotation file"),
    ],
)
def test_instances_that_are_not_what_they_should_be(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as error:
        load(write_tree(tmp_path, content=content))
    assert "\n" not in str(error.value)


def test_refs_that_are_not_what_they_should_be(tmp_path):
    for refs, message in (
        ({"a": 1}, "expected a list of dictionaries, found {'a': 1}"),
        ([dict(REFS[0], sentences=[{"sent": "x"}])], "an entry has no raw"),
        ([dict(REFS[0], ann_id=None)], "an entry has ann_id is None"),
    ):
        with pytest.raises(DataError, match=message):
            load(write_tree(tmp_path, refs=refs))
    path = write_tree(tmp_path) / "refcoco" / "refs(unc).p"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a whole pickle"):
        load(tmp_path)


@pytest.mark.parametrize("missing", ["refcoco/refs(unc).p", "refcoco/instances.json", "images"])
def test_what_is_missing_is_named(tmp_path, missing):
    path = write_tree(tmp_path) / missing
    path.rename(tmp_path / "elsewhere")
    name = str(path).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(DataError, match=name):
        load(tmp_path)


def test_an_object_without_polygons_is_an_object_all_the_same(tmp_path):
    content = instances()
    content["annotations"][0]["segmentation"] = []
    record = load(write_tree(tmp_path, content=content))[0]
    assert record.segmentation == [[]]  # [] would say that the sentence means nothing.


def test_an_object_of_another_picture_is_refused(tmp_path):
    write_tree(tmp_path, refs=[*REFS, ref(8, 100, "val", sentence(81, "x"))])
    with pytest.raises(
        DataError, match=r"object 8 is said to be in image 100, but .*instances.json has it in image 101"
    ):
        load(tmp_path)


def test_a_split_is_one_of_those_there_are_and_writes_nowhere_else(tmp_path):
    for split in ("/x", "/../../../evil", "test\x00", "half \ud83d"):
        write_tree(tmp_path, refs=[*REFS, ref(8, 101, split, sentence(90, "a"))])
        with pytest.raises(
            DataError, match="a reference is of split .* expected one of train, val, testA, testB"
        ):
            load(tmp_path)
        assert not (tmp_path / "refcoco" / "parsed").exists()
