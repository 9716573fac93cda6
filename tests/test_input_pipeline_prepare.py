"""`python -m input_pipeline prepare`: what is missing is named, counts are compared, and a deep look finds what is wrong."""

import json

import numpy as np
import pytest

import input_pipeline
from input_pipeline import masks, prepare
from input_pipeline.__main__ import main
from input_pipeline.writers import write_refer
from tests.test_input_pipeline_refer import REFS, instances, ref, sentence, write_tree

PICTURES = "images/mscoco/images/train2014"


def run(capsys, *flags):
    """Exit code, lines of the report, last line of the errors."""
    code = main(["prepare", *map(str, flags)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()[-1] if err.strip() else ""


def picture(root, number):
    return root / PICTURES / f"COCO_train2014_{number:012d}.jpg"


@pytest.mark.parametrize("exists", [False, True])
def test_an_empty_folder_gets_the_whole_recipe(tmp_path, capsys, exists):
    root = tmp_path / "data"
    if exists:
        (root / "images").mkdir(parents=True)
    code, lines, error = run(capsys, f"--root={root}")
    text = "\n".join(lines)
    assert code == 1
    assert error == f"error: '{root}': no data set there; the steps above tell how to get one"
    for part in (
        f"{root}/refcoco/{{refs(unc).p, refs(google).p, instances.json}}",
        f"{root}/refcocog/{{refs(umd).p, refs(google).p, instances.json}}",
        f"{root}/grefcoco/{{grefs(unc).json, instances.json}}",
        f"{root}/{PICTURES}/",
        "licheng/referit/data/refcoco+.zip",
        "http://images.cocodataset.org/zips/train2014.zip",
        "train2017",
        "Nothing is downloaded",
        f"unzip refcoco.zip -d {root}",
        f"unzip train2014.zip -d {root}/images/mscoco/images",
        f"python -m input_pipeline prepare --root={root}",
        "python main.py --config=configs/refcoco.py",
    ):
        assert part in text
    assert sorted(p.name for p in tmp_path.rglob("*")) == (["data", "images"] if exists else [])


@pytest.mark.parametrize("year", ["train2014", "train2017"])
def test_a_whole_tree_is_ready_and_its_annotations_are_parsed(tmp_path, capsys, year):
    write_tree(tmp_path, year=year)
    code, lines, _ = run(capsys, f"--root={tmp_path}")
    assert code == 0
    rows = [line.split() for line in lines]
    assert ["val", "2", "1", "3", "3811", "/", "1500", "/", "10834"] in rows
    assert ["train", "1", "1", "1", "42404", "/", "16994", "/", "120624"] in rows
    assert ["testA", "0", "0", "0", "1975", "/", "750", "/", "5657"] in rows  # An own tree may lack a split.
    differs = (
        "val differs from the published counts: 2 objects (3811), 1 images (1500), 3 expressions (10834)"
    )
    assert f"  {differs}" in lines
    assert f"{tmp_path}/refcoco/refs(google).p: not there, which only partition 'google' needs" in lines
    names = sorted(p.name.rpartition("-")[0] for p in (tmp_path / "refcoco" / "parsed").iterdir())
    assert names == ["unc-testA", "unc-testB", "unc-train", "unc-val"]
    assert lines[-1].endswith(f"--config.data.root={tmp_path} --workdir=runs/refcoco")


def test_counts_as_published_are_no_difference(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path)
    known = {"train": (1, None, 1), "val": (2, 1, 4), "testA": (0, 0, 0), "testB": (0, 0, 0)}
    monkeypatch.setitem(prepare.KNOWN, ("refcoco", "unc"), known)
    _, lines, _ = run(capsys, f"--root={tmp_path}")
    assert [line for line in lines if "differs" in line] == [
        "  val differs from the published counts: 3 expressions (4)"
    ]
    assert ["train", "1", "1", "1", "1", "/", "-", "/", "1"] in [line.split() for line in lines]


def test_published_counts_are_those_of_the_partitions():
    totals = {
        (dataset, partition): tuple(sum(numbers) for numbers in zip(*splits.values(), strict=True))
        for (dataset, partition), splits in prepare.KNOWN.items()
        if partition != "google"
    }
    assert totals == {  # As the papers give them.
        ("refcoco", "unc"): (50000, 19994, 142210),
        ("refcoco+", "unc"): (49856, 19992, 141564),
        ("refcocog", "umd"): (49822, 25799, 95010),
    }
    for (dataset, partition), splits in prepare.KNOWN.items():
        assert tuple(splits) == input_pipeline.splits("refer", dataset=dataset, partition=partition)


@pytest.mark.parametrize(
    ("gone", "origin"),
    [
        ("refcoco/instances.json", "refcoco.zip"),
        ("refcoco/refs(unc).p", "refcoco.zip"),
        ("images", "unzip train2014.zip -d"),
    ],
)
def test_a_missing_piece_is_named_with_its_origin_and_nothing_else_is(tmp_path, capsys, gone, origin):
    write_tree(tmp_path)
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    code, lines, error = run(capsys, f"--root={tmp_path}")
    assert code == 1
    missing = [line for line in lines if ": missing; " in line]
    assert all(line.startswith(f"{tmp_path}/{gone}") or "google" in line for line in missing)
    assert f"{tmp_path}/{gone}" in missing[0]
    assert origin in missing[0]
    assert not any("refcocog" in line or "python" in line for line in lines)  # No recipe.
    assert error.endswith(f"{len(missing)} problems, listed above; mend them and run this again")


def test_data_sets_that_are_asked_for(tmp_path, capsys):
    write_tree(tmp_path)
    code, lines, _ = run(capsys, f"--root={tmp_path}", "--dataset=refcoco+", "--dataset=refcoco")
    assert code == 1
    assert sum("refcoco+/" in line and ": missing; " in line for line in lines) == 2
    assert "refcoco (unc)" in lines
    code, _, error = run(capsys, f"--root={tmp_path}", "--partition=umd")
    assert (code, error.partition(";")[0]) == (1, "error: no partition 'umd' in refcoco")


def test_missing_pictures_are_counted_and_the_first_five_named(tmp_path, capsys):
    content = instances()
    refs = []
    for number in range(200, 207):
        content["images"].append(
            content["images"][0] | {"id": number, "file_name": f"COCO_train2014_{number:012d}.jpg"}
        )
        content["annotations"].append(content["annotations"][1] | {"id": number, "image_id": number})
        refs.append(ref(number, number, "train", sentence(number, "it")))
    write_tree(tmp_path, refs=REFS + refs, content=content)
    code, lines, _ = run(capsys, f"--root={tmp_path}")
    assert code == 1
    names = ", ".join(picture(tmp_path, number).name for number in range(200, 205))
    start = f"{tmp_path}/{PICTURES}: 7 of the 9 pictures of refcoco (unc) are missing: {names}, ...; "
    assert [line for line in lines if line.startswith(start)]


def test_damaged_annotations_do_not_hide_the_rest(tmp_path, capsys):
    write_tree(tmp_path)
    (tmp_path / "refcoco" / "refs(google).p").write_bytes(b"nonsense")
    code, lines, _ = run(capsys, f"--root={tmp_path}")
    assert code == 1
    assert any(
        line.startswith(f"{tmp_path}/refcoco/refs(google).p: refused or not a whole") for line in lines
    )
    assert "refcoco (unc)" in lines


def test_flags_that_do_not_go_together(tmp_path, capsys):
    for flags, message in (
        (["--source=jsonl", "--dataset=refcoco"], "--dataset is of --source=refer and tfds"),
        (["--source=jsonl", "--partition=unc"], "--partition is not of --source=jsonl"),
        (["--source=jsonl", f"--tfds={tmp_path / 'out'}"], "--tfds is made of a REFER tree"),
        (["--source=tfds", "--dataset=refcoco", "--dataset=refcoco+"], "one --dataset at a time"),
    ):
        code, _, error = run(capsys, f"--root={tmp_path}", *flags)
        assert (code, message in error) == (1, True)
    assert not (tmp_path / "out").exists()


def test_json_lines_have_every_split(tmp_path):
    flags = [f"--out={tmp_path / 'out'}", "--format=jsonl", "--scenes=1", "--image_size=40"]
    assert main(["shapes", *flags]) == 0
    found = input_pipeline.splits("jsonl", root=str(tmp_path / "out"))
    assert found == ("train", "val", "testA", "testB", "rare")


def test_written_annotations_have_the_box_and_area_of_their_masks(tmp_path):
    write_refer({"val": input_pipeline.load("shapes", "val", image_size=40, scenes=3)}, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "refcoco" / "instances.json").read_text())
    assert content["annotations"]
    for annotation in content["annotations"]:
        mask = masks.decode(annotation["segmentation"], 40, 40)
        y, x = np.nonzero(mask)
        box = [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
        assert (annotation["bbox"], annotation["area"]) == (box, len(x))
