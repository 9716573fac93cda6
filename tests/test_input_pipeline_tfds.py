"""TFDS's own builder makes `ref_coco` of what is written here, and it holds what the REFER tree holds."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from input_pipeline import DataError, masks, tfds_manual, writers
from input_pipeline.__main__ import main
from tests.test_input_pipeline_refer import MASK, SQUARE, TWO, ref, sentence, write_tree

SPLITS = ("train", "val", "testA", "testB")


def rows(records):
    """What a set of records says, in an order that does not depend on the source."""
    found = {}
    for r in records:
        key = r.image_id, r.object_id, r.sentence_id
        found[key] = r.text, r.height, r.width, masks.decode(r.segmentation, r.height, r.width).tolist()
    assert len(found) == len(records)
    return found


def picture(record):
    return record.image if isinstance(record.image, bytes) else Path(record.image).read_bytes()


def test_the_built_in_set_through_the_real_builder(tmp_path, capsys):
    flags = ["--image_size=48", "--scenes=3"]
    for form in ("refer", "tfds"):
        assert main(["shapes", f"--out={tmp_path / form}", f"--format={form}", *flags]) == 0
    assert sorted(p.name for p in (tmp_path / "tfds").iterdir()) == ["coco_train2014", "refcoco.json"]
    data = tmp_path / "data"
    build = ["build_tfds", f"--manual={tmp_path / 'tfds'}", f"--root={data}", "--dataset=refcoco"]
    assert main([*build, "--partition=unc"]) == 0
    assert f"refcoco (unc) is in '{data}/ref_coco/refcoco_unc/1.1.0'" in capsys.readouterr().out
    for split in SPLITS:
        expected = input_pipeline.load("refer", split, root=str(tmp_path / "refer"))
        found = input_pipeline.load("tfds", split, root=str(data))
        assert len(expected) > 10
        assert rows(found) == rows(expected)
        pictures = {r.image_id: picture(r) for r in expected}
        assert {r.image_id: picture(r) for r in found} == pictures
    assert main(["prepare", "--source=tfds", f"--root={data}", "--deep"]) == 0
    total = sum(len(input_pipeline.load("tfds", split, root=str(data))) for split in SPLITS)
    assert f"12 pictures, 65 masks, {total} sentences, 0 problems" in capsys.readouterr().out


def test_a_set_that_cannot_be_written_leaves_nothing(tmp_path, capsys):
    flags = [f"--out={tmp_path / 'out'}", "--format=tfds", "--scenes=2", "--image_size=48", "--generalised"]
    assert main(["shapes", *flags]) == 1
    assert "which a REFER tree cannot say" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# --- every form of a mask, and annotations that are not quite right --------------------------------------------------


def rle(mask):
    found = masks.encode(mask)
    return {"size": list(map(int, found["size"])), "counts": found["counts"].decode()}


def runs(mask):
    pixels, counts, value = mask.ravel(order="F").tolist(), [], 0
    while pixels:
        run = next((i for i, pixel in enumerate(pixels) if pixel != value), len(pixels))
        counts.append(run)
        pixels, value = pixels[run:], 1 - value
    return {"size": list(mask.shape), "counts": counts}


CORNER = np.zeros((40, 60), np.uint8)
CORNER[:7, :9] = 1  # Begins with foreground.
SHAPES = {
    1: SQUARE,
    2: TWO,  # Two polygons that overlap: their union.
    3: rle(MASK),
    4: runs(MASK),
    5: runs(CORNER),
    6: [[1.0, 2.0, 3.0, 4.0], *SQUARE, [5.0, 5.0]],  # What is shorter than three points covers nothing.
    7: [[2.0, 2.0, 20.0, 30.0]],  # TFDS would take it for a box.
    8: [],
    9: [rle(CORNER), runs(MASK)],
    10: [[50.0, 30.0, 70.0, 30.0, 70.0, 45.0, 50.0, 45.0]],  # Out of the picture.
}
BOXES = {
    1: [10.0, 10.0, 20.0, 10.0],
    10: [50.0, 30.0, 20.0, 15.0],
    4: [-3.0, 5, 30, 4.5],
    5: [59.1, 0.1, 0.9000000000000001, 12],
}


def odd_tree(root, year="train2014"):
    """Objects of every form in the test split of two images, one of them a crowd, and an object that nobody means."""
    annotations = [
        {"id": i, "image_id": 100 + i % 2, "category_id": i, "segmentation": shape, "iscrowd": int(i == 4)}
        | ({"bbox": BOXES[i], "area": 100.5} if i in BOXES else {})
        | ({"bbox": [1, 2, 3, 4]} if i == 2 else {})
        for i, shape in SHAPES.items()
    ]
    annotations.append({"id": 99, "image_id": 101, "category_id": 5, "segmentation": SQUARE})
    images = [
        {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": 40, "width": 60, "license": 3}
        for i in (100, 101)
    ]
    refs = [
        ref(
            i,
            100 + i % 2,
            split,
            sentence(1000 * n + 10 * i, f"Caf\xe9 {i}"),
            sentence(1000 * n + 10 * i + 1, "it"),
        )
        for n, split in enumerate(SPLITS)
        for i in SHAPES
    ]
    for number, entry in enumerate(refs):
        entry["ref_id"] = number
    write_tree(root, refs=refs, content={"images": images, "annotations": annotations}, year=year)
    return root


def prepared(tmp_path):
    root, manual = odd_tree(tmp_path / "tree"), tmp_path / "manual"
    assert main(["prepare", f"--root={root}", f"--tfds={manual}"]) == 0
    return root, manual


def test_every_form_of_a_mask_goes_through_the_real_builder(tmp_path):
    root, manual = prepared(tmp_path)
    assert main(["build_tfds", f"--manual={manual}", f"--root={tmp_path / 'data'}"]) == 0
    for split in ("train", "testB"):
        found = input_pipeline.load("tfds", split, root=str(tmp_path / "data"))
        assert rows(found) == rows(input_pipeline.load("refer", split, root=str(root)))
        truth = {r.object_id: masks.decode(r.segmentation, 40, 60) for r in found}
        np.testing.assert_array_equal(truth[4], MASK)
        np.testing.assert_array_equal(truth[9], MASK | CORNER)
        assert {i for i in truth if not truth[i].any()} == {7, 8}


def test_what_the_index_says(tmp_path, capsys):
    root, manual = prepared(tmp_path)
    out = capsys.readouterr().out.splitlines()
    command = f"python -m input_pipeline build_tfds --manual={manual} --root=TFDS_DATA_DIR"
    assert out[-1].strip() == f"{command} --dataset=refcoco --partition=unc"
    assert f"{4 * len(SHAPES)} references in '{manual}'" in out[-2]
    index = json.loads((manual / "refcoco.json").read_text())
    assert set(index) == {"ref", "coco_anns"}
    assert {(r["dataset"], r["dataset_partition"]) for r in index["ref"]} == {("refcoco", "unc")}
    assert set(index["coco_anns"]) == {"100", "101"}
    image = index["coco_anns"]["101"]
    assert image["info"] == {
        **{"id": 101, "file_name": "COCO_train2014_000000000101.jpg", "height": 40, "width": 60, "license": 3}
    }
    assert sorted(a["id"] for a in image["anns"]) == [1, 3, 5, 7, 9, 99]
    objects = {r["ann"]["id"]: r["ann"] for r in index["ref"]}
    assert objects[4]["iscrowd"] == 1
    # Given ones are kept but for what leaves the picture, others are those of the mask.
    assert objects[1]["bbox"] == [10, 10, 20, 10]
    assert objects[10]["bbox"] == [50, 30, 10, 10]
    assert objects[4]["bbox"] == [0, 5, 27, 4.5]
    assert (objects[2]["bbox"], objects[2]["area"]) == ([1, 2, 3, 4], masks.decode(TWO, 40, 60).sum())
    assert objects[3]["bbox"] == [20, 5, 30, 4]
    assert (objects[3]["area"], objects[4]["area"]) == (MASK.sum(), 100.5)
    assert (objects[8]["bbox"], objects[8]["area"]) == ([0, 0, 0, 0], 0)
    for entry in (*objects.values(), *(a for i in index["coco_anns"].values() for a in i["anns"])):
        x, y, width, height = entry["bbox"]
        assert 0 <= x <= x + width <= 60
        assert 0 <= y <= y + height <= 40


def test_all_data_sets_and_partitions_go_in(tmp_path):
    root = odd_tree(tmp_path / "tree")
    plain = (root / "refcoco" / "refs(unc).p").read_bytes()
    content = json.loads((root / "refcoco" / "instances.json").read_text())
    google = [
        ref | {"split": ref["split"].replace("testA", "test").replace("testB", "test")}
        for ref in pickle.loads(plain)
    ]
    (root / "refcoco" / "refs(google).p").write_bytes(pickle.dumps(google))
    (root / "refcoco+").mkdir()
    (root / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps(pickle.loads(plain)[:3]))
    content["annotations"].append(content["annotations"][0] | {"id": 500, "image_id": 100})
    (root / "refcoco+" / "instances.json").write_text(json.dumps(content))
    assert main(["prepare", f"--root={root}", f"--tfds={tmp_path / 'm'}"]) == 0
    index = json.loads((tmp_path / "m" / "refcoco.json").read_text())
    count = {}
    for entry in index["ref"]:
        key = entry["dataset"], entry["dataset_partition"]
        count[key] = count.get(key, 0) + 1
    assert count == {("refcoco", "unc"): 40, ("refcoco", "google"): 40, ("refcoco+", "unc"): 3}
    found = [a["id"] for a in index["coco_anns"]["100"]["anns"]]
    assert sorted(found) == [2, 4, 6, 8, 10, 500]  # Of all instances.json, each once.
    content["images"][0]["width"] = 61
    (root / "refcoco+" / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="image 100 is .* of 40x61, but .* of 40x60 in another data set"):
        tfds_manual.write(root, tmp_path / "m2", {"refcoco": ("unc",), "refcoco+": ("unc",)})


@pytest.mark.parametrize("named", [2014, 2017])
@pytest.mark.parametrize("year", ["train2014", "train2017"])
def test_pictures_are_linked_under_the_names_of_2014(tmp_path, year, named):
    root, manual = odd_tree(tmp_path / "tree", year), tmp_path / "manual"
    if named == 2017:
        path = root / "refcoco" / "instances.json"
        path.write_text(path.read_text().replace("COCO_train2014_", ""))
    assert main(["prepare", f"--root={root}", f"--tfds={manual}"]) == 0
    names = ["COCO_train2014_000000000100.jpg", "COCO_train2014_000000000101.jpg"]
    assert sorted(p.name for p in (manual / "coco_train2014").iterdir()) == names
    index = json.loads((manual / "refcoco.json").read_text())
    assert [entry["info"]["file_name"] for entry in index["coco_anns"].values()] == names
    for record in input_pipeline.load("refer", "val", root=str(root)):
        target = manual / "coco_train2014" / f"COCO_train2014_{record.image_id:012d}.jpg"
        assert os.path.samefile(target, record.image)
        assert not target.is_symlink()


def test_pictures_are_copied_where_links_are_not_to_be_had(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    root, manual = prepared(tmp_path)
    source = root / "images/mscoco/images/train2014"
    for path in source.iterdir():
        copy = manual / "coco_train2014" / path.name
        assert copy.read_bytes() == path.read_bytes()
        assert not os.path.samefile(copy, path)
    assert len(list((manual / "coco_train2014").iterdir())) == 2


def test_symbolic_links_of_the_tree_become_pictures(tmp_path):
    root = odd_tree(tmp_path / "tree")
    images = root / "images/mscoco/images/train2014"
    for path in list(images.iterdir()):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert main(["prepare", f"--root={root}", f"--tfds={tmp_path / 'm'}"]) == 0
    for path in (tmp_path / "m" / "coco_train2014").iterdir():
        assert not path.is_symlink()
        with Image.open(path) as opened:
            assert opened.size == (60, 40)


def test_a_killed_run_is_repeated(tmp_path):
    root, manual = prepared(tmp_path)
    expected = (manual / "refcoco.json").read_bytes()
    first, second = sorted((manual / "coco_train2014").iterdir())
    (manual / "refcoco.json").unlink()
    (manual / ".refcoco.json.partial").write_text('{"ref": [')
    second.unlink()
    second.write_bytes(b"cut off")  # By another program; ours puts pictures there whole.
    first.unlink()
    (manual / "coco_train2014" / f".{first.name}.partial").write_bytes(b"cut")
    assert main(["prepare", f"--root={root}", f"--tfds={manual}"]) == 0
    assert (manual / "refcoco.json").read_bytes() == expected
    assert sorted(p.name for p in manual.iterdir()) == ["coco_train2014", "refcoco.json"]
    assert sorted((manual / "coco_train2014").iterdir()) == [first, second]
    for path in (first, second):
        assert os.path.samefile(path, root / "images/mscoco/images/train2014" / path.name)
    before = first.stat().st_ctime_ns, second.stat().st_ctime_ns
    assert main(["prepare", f"--root={root}", f"--tfds={manual}"]) == 0
    assert (first.stat().st_ctime_ns, second.stat().st_ctime_ns) == before  # Not touched.


def change(root, **fields):
    path = root / "refcoco" / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"][0] |= fields
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bbox": [1, 2, 3]}, r"object 1 has bbox \[1, 2, 3\] and area 100.5; expected four numbers"),
        ({"area": float("nan")}, r"object 1 has bbox .* and area nan; expected four numbers"),
        ({"category_id": None}, "an entry has category_id is None"),
        ({"segmentation": {"size": [60, 40], "counts": [2400]}}, "object 1: segmentation: RLE of size 60x40"),
    ],
)
def test_what_the_builder_would_stumble_over_is_refused_and_the_index_stays(
    tmp_path, capsys, fields, message
):
    root, manual = prepared(tmp_path)
    expected = (manual / "refcoco.json").read_bytes()
    change(root, **fields)
    assert main(["prepare", f"--root={root}", f"--tfds={manual}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(DataError, match=message):
        tfds_manual.write(root, tmp_path / "again", {"refcoco": ("unc",)})
    assert error.startswith(f"error: {root}/refcoco/")
    assert (manual / "refcoco.json").read_bytes() == expected


def test_half_a_character_is_refused(tmp_path):
    root = odd_tree(tmp_path / "tree")
    refs = pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())
    refs[0]["sentences"][0]["raw"] = "half \ud83d"
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs))
    with pytest.raises(DataError, match=r"sentence 10 is 'half \\ud83d', with half a character"):
        tfds_manual.write(root, tmp_path / "m", {"refcoco": ("unc",)})
    assert not (tmp_path / "m" / "refcoco.json").exists()


def test_what_cannot_be_built_says_why(tmp_path, capsys):
    flags = [f"--manual={tmp_path / 'm'}", f"--root={tmp_path / 'data'}"]
    assert main(["build_tfds", *flags]) == 1
    assert "m/refcoco.json: no such file or folder" in capsys.readouterr().err
    assert main(["build_tfds", *flags, "--partition=umd"]) == 1
    assert "'refcoco' has no partition 'umd'" in capsys.readouterr().err
    records = {"train": input_pipeline.load("shapes", "train", image_size=48, scenes=1)}
    writers.write_tfds(records, tmp_path / "m")
    assert main(["build_tfds", *flags]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'm'}/refcoco.json: TFDS refuses refcoco (unc): ")
    assert error.endswith("It needs an object in each of train, val, testA, testB")


def test_gref_coco_is_not_part_of_it(tmp_path, capsys):
    root = odd_tree(tmp_path / "tree")
    (root / "refcoco").rename(root / "grefcoco")
    refs = [{"ref_id": 1, "ann_id": [1], "image_id": 101, "split": "val", "sentences": [sentence(1, "it")]}]
    (root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(refs))
    assert main(["prepare", f"--root={root}", f"--tfds={tmp_path / 'm'}"]) == 1
    assert "has none of its data sets" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "m").exists()
