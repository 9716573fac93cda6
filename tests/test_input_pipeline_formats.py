"""The built-in set written as a REFER tree and as JSON Lines, and read back by the code that reads real data."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from input_pipeline import DataError, Loader, Records, Tokenizer, masks, ops
from input_pipeline.__main__ import main
from input_pipeline.writers import write_jsonl, write_refer

OPTIONS = dict(image_size=48, scenes=5)
SPLITS = ("train", "val", "testA")


def shapes(split, **options):
    return input_pipeline.load("shapes", split, seed=3, **(OPTIONS | options))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Records by split, and how to load them from each form."""
    folder = tmp_path_factory.mktemp("written")
    records = {split: shapes(split) for split in SPLITS}
    counts = {"refer": [], "jsonl": []}
    write_refer(records, folder / "refer", progress=counts["refer"].append)
    write_jsonl(records, folder / "jsonl", progress=counts["jsonl"].append)
    total = sum(map(len, records.values()))
    assert counts["refer"] == counts["jsonl"] == list(range(1, total + 1))
    sources = {
        "refer": {"root": str(folder / "refer")},
        "jsonl": {"root": str(folder / "jsonl")},
    }
    return records, sources


def pairs(records):
    """What a set of records shows, whatever its order: (image pixels, mask, sentence, type)."""
    found = []
    for record in records:
        mask = masks.decode(record.segmentation, record.height, record.width)
        found.append((np.asarray(ops.open_image(record.image)).astype(int), mask, record.text, record.type))
    return found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("form", ["refer", "jsonl"])
def test_every_form_holds_the_same(written, form, split):
    records, sources = written
    expected = pairs(records[split])
    found = pairs(input_pipeline.load(form, split, **sources[form]))
    # The forms list sentences by object.
    order = {row: i for i, row in enumerate(dict.fromkeys(r.object_id for r in records[split]))}
    by_object = sorted(range(len(expected)), key=lambda i: order[records[split][i].object_id])
    assert len(found) == len(expected)
    for i, (image, mask, text, kind) in zip(by_object, found, strict=True):
        theirs, truth, sentence, sort = expected[i]
        assert (text, kind) == (sentence, sort)
        np.testing.assert_array_equal(mask, truth)
        if form == "jsonl":
            np.testing.assert_array_equal(image, theirs)
        else:
            assert np.abs(image - theirs).mean() < 4  # JPEG.


def test_splits_of_the_files(written):
    _, sources = written
    assert input_pipeline.splits("jsonl", **sources["jsonl"]) == SPLITS
    assert input_pipeline.splits("refer", **sources["refer"]) == ("train", "val", "testA", "testB")


def test_both_kinds_of_segmentation_are_written(written):
    _, sources = written
    kinds = {type(r.segmentation) for r in input_pipeline.load("refer", "train", **sources["refer"])}
    assert kinds == {list, dict}  # Rings have a hole, which polygons cannot have.


def test_batches_are_the_same(written):
    records, sources = written

    def batches(found):
        loader = Loader(found, Tokenizer("shapes", 16), batch_size=4, image_size=(32, 32))
        return {
            (int(b["text_ids"][i].sum()), b["mask"][i].tobytes())
            for b in loader
            for i in range(4)
            if b["valid"][i]
        }

    assert batches(records["val"]) == batches(input_pipeline.load("jsonl", "val", **sources["jsonl"]))
    assert batches(records["val"]) == batches(input_pipeline.load("refer", "val", **sources["refer"]))


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "file").write_text("mine")
    for write in (write_refer, write_jsonl):
        with pytest.raises(DataError, match="exists and is not an empty directory"):
            write({"val": shapes("val")}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_refer_tree_cannot_say_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="has no split rare"):
        write_refer({"rare": shapes("val")}, tmp_path / "out")
    with pytest.raises(DataError, match="which a REFER tree cannot say; write JSON Lines"):
        write_refer({"val": shapes("val", generalised=True)}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    write_jsonl({"val": shapes("val", generalised=True)}, tmp_path / "out")
    found = input_pipeline.load("jsonl", "val", root=str(tmp_path / "out" / "data.jsonl"))
    assert any(not masks.decode(r.segmentation, 48, 48).any() for r in found)


def test_the_written_pickle_is_the_published_form(written, tmp_path):
    _, sources = written
    refs = pickle.loads((tmp_path / sources["refer"]["root"] / "refcoco" / "refs(unc).p").read_bytes())
    fields = {"ref_id", "ann_id", "image_id", "category_id", "file_name", "split", "sent_ids", "sentences"}
    assert all(set(ref) == fields for ref in refs)
    assert all([s["sent_id"] for s in ref["sentences"]] == ref["sent_ids"] for ref in refs)
    assert {"raw", "sent", "sent_id", "tokens"} <= set(refs[0]["sentences"][0])


# --- polygons ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_outlines_are_exact(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(6, 40, 2)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(1, 4)):
        top, left = rng.integers(0, height - 2), rng.integers(0, width - 2)
        mask[top : top + rng.integers(1, 12), left : left + rng.integers(1, 12)] = 1
    polygons = masks.outline(mask)
    if polygons is not None:
        for rule in (masks.UNION, masks.EXACTLY_ONE):
            np.testing.assert_array_equal(masks.decode(polygons, height, width, rule), mask)


def test_outlines_have_corners_only_and_no_holes():
    mask = np.zeros((8, 9), np.uint8)
    mask[2:5, 3:7] = 1
    assert sorted(zip(*[iter(masks.outline(mask)[0])] * 2, strict=True)) == [(3, 2), (3, 5), (7, 2), (7, 5)]
    assert masks.outline(np.zeros((4, 4))) == []
    mask[3, 4] = 0
    assert masks.outline(mask) is None  # A hole.
    corner = np.eye(2, dtype=np.uint8)
    assert masks.outline(corner) is None  # Two pixels that touch at a corner.
    whole = np.ones((3, 5), np.uint8)
    np.testing.assert_array_equal(masks.decode(masks.outline(whole), 3, 5), whole)


# --- JSON Lines of one's own ------------------------------------------------------------------------------------------


def write_lines(folder, *lines):
    Image.new("RGB", (30, 20), (200, 30, 30)).save(folder / "a.png")
    mask = np.zeros((20, 30), np.uint8)
    mask[5:9, 10:20] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    path = folder / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def load(path, split="train"):
    return input_pipeline.load("jsonl", split, root=str(path))


LINE = {"image": "a.png", "mask": "mask.png", "text": "the red thing"}


def test_lines_of_every_form(tmp_path):
    box = [[10, 5, 20, 5, 20, 9, 10, 9]]
    rle = {"size": [20, 30], "counts": [0, 600]}
    path = write_lines(
        tmp_path,
        LINE,
        "",
        {"image": "a.png", "polygons": box, "text": ["one", "two"], "id": "x"},
        {"image": "./a.png", "rle": rle, "text": "all of it", "split": "val"},
    )
    assert input_pipeline.splits("jsonl", root=str(path)) == ("train", "val")
    records = load(path)
    assert isinstance(records, Records)
    assert [r.text for r in records] == ["the red thing", "one", "two"]
    assert len(records.images) == 1
    for record in records:
        assert (record.height, record.width) == (20, 30)
        found = masks.decode(record.segmentation, 20, 30)
        assert found.sum() == 40
        assert found[5:9, 10:20].all()
    assert masks.decode(load(path, "val")[0].segmentation, 20, 30).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", r"line 2: expected an object \{...\}, found \[1\]"),
        ({"image": "a.png", "text": "x"}, "line 2: expected one of mask, polygons, rle, found none"),
        (LINE | {"rle": {}}, "line 2: expected one of .*, found mask, rle"),
        (LINE | {"text": 1}, "line 2: 'text' must be a sentence or a list of them"),
        (LINE | {"text": []}, "line 2: 'text' must be"),
        (LINE | {"text": [3]}, "line 2: 'text' must be"),
        (LINE | {"image": 3}, "line 2: 'image' must be a path"),
        (LINE | {"image": "../a.png"}, r"line 2: 'image' is '../a.png', which leads out of"),
        (LINE | {"image": "/etc/hosts"}, "line 2: 'image' is '/etc/hosts', which leads out of"),
        (LINE | {"mask": "../mask.png"}, "line 2: 'mask' is '../mask.png', which leads out of"),
        (LINE | {"mask": [1]}, r"line 2: 'mask' is \[1\]"),
        (LINE | {"split": 3}, "line 2: 'split' must be a word"),
        (LINE | {"type": ["a", "b"]}, "line 2: 'type' must be"),
    ],
)
def test_lines_that_are_not_what_they_should_be(tmp_path, line, message):
    with pytest.raises(DataError, match=message) as error:
        load(write_lines(tmp_path, LINE, line))
    assert "\n" not in str(error.value)


def test_a_link_does_not_lead_out_either(tmp_path):
    (tmp_path / "data").mkdir()
    path = write_lines(tmp_path / "data", LINE | {"image": "link.png"})
    (tmp_path / "data" / "a.png").rename(tmp_path / "secret.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="which leads out of"):
        load(path)


def test_masks_are_read_when_they_are_asked_for(tmp_path):
    path = write_lines(tmp_path, LINE)
    records = load(path)
    (tmp_path / "mask.png").unlink()
    with pytest.raises(DataError, match=r"mask.png: not a readable mask"):
        _ = records[0].segmentation
    with pytest.raises(DataError, match="no such file; a .jsonl file is needed"):
        load(tmp_path / "other.jsonl")
    with pytest.raises(DataError, match="config.data.root is missing"):
        input_pipeline.load("jsonl", "train")


# --- command line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["refer", "jsonl"])
def test_shapes_from_the_command_line(tmp_path, capsys, form):
    out = tmp_path / "new" / "out"
    flags = [
        "shapes",
        f"--out={out}",
        f"--format={form}",
        "--scenes=2",
        "--image_size=40",
        "--flavour=refcoco",
    ]
    assert main(flags) == 0
    options = {"refer": {"root": str(out)}, "jsonl": {"root": str(out / "data.jsonl")}}[form]
    expected = input_pipeline.load("shapes", "testB", scenes=2, image_size=40, flavour="refcoco")
    found = input_pipeline.load(form, "testB", **options)
    assert sorted(r.text for r in found) == sorted(expected.texts)
    assert "sentences of train, val, testA, testB" in capsys.readouterr().out
    assert main(flags) == 1
    assert "exists and is not an empty directory" in capsys.readouterr().err.splitlines()[-1]


def test_options_that_cannot_be(tmp_path, capsys):
    assert main(["shapes", f"--out={tmp_path / 'out'}", "--scenes=0"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: shapes: scenes of split 'train' is 0")
    assert not (tmp_path / "out").exists()
