"""Parsed annotations that are kept: the same records as parsing gives, and never those of other files."""

import json
import os
import pickle

import numpy as np
import pytest

import input_pipeline
from input_pipeline import DataError, refer
from input_pipeline import cache as caching
from tests.test_input_pipeline_refer import REFS, Attack, instances, load, ref, sentence, write_tree


@pytest.fixture
def parsings(monkeypatch):
    """Counts how often a tree is parsed."""
    counted = []
    own = refer.read_refs
    monkeypatch.setattr(refer, "read_refs", lambda path: counted.append(path) or own(path))
    return counted


def test_what_is_kept_is_what_was_parsed(tmp_path, parsings):
    odd = [
        *REFS,
        ref(
            8,
            101,
            "train",
            sentence(81, ""),
            sentence(82, "half \ud83d"),
            sentence(83, "a\nb\u2028\U0001f600"),
        ),
    ]
    write_tree(tmp_path, refs=odd)
    first = {split: list(load(tmp_path, split)) for split in ("train", "val")}
    assert len(parsings) == 1
    assert [r.text for r in first["train"]] == ["blue star", "", "half \ud83d", "a\nb\u2028\U0001f600"]
    second = {split: load(tmp_path, split) for split in ("train", "val")}
    assert len(parsings) == 1
    assert {split: list(records) for split, records in second.items()} == first
    assert second["val"].coco
    assert second["val"].image_ids.dtype == np.int64
    assert second["val"].sizes.dtype == np.int32


@pytest.mark.parametrize("name", ["refs(unc).p", "instances.json"])
def test_other_files_are_parsed_anew(tmp_path, parsings, name):
    write_tree(tmp_path)
    assert load(tmp_path)[0].text == "The red ring"
    if name == "instances.json":
        content = instances()
        content["images"][0]["width"] = 61
        changed = json.dumps(content).encode()
    else:
        changed = pickle.dumps(
            [REFS[0] | {"sentences": [sentence(70, "The tan ring")]}, *REFS[1:]], protocol=2
        )
    path = tmp_path / "refcoco" / name
    before = path.stat()
    path.write_bytes(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # The content decides, not the date.
    caching._digest.cache_clear()
    record = load(tmp_path)[0]
    assert len(parsings) == 2
    assert (record.text, record.width) == (
        ("The red ring", 61) if name == "instances.json" else ("The tan ring", 60)
    )
    kept = sorted(path.name for path in (tmp_path / "refcoco" / "parsed").iterdir())
    assert len(kept) == 4  # Of every split the last one alone.


def test_a_damaged_file_is_made_anew(tmp_path, parsings, monkeypatch):
    said = []
    monkeypatch.setattr(caching.logging, "warning", lambda text, *values: said.append(text % values))
    write_tree(tmp_path)
    expected = list(load(tmp_path))
    for path in (tmp_path / "refcoco" / "parsed").glob("unc-val-*.npz"):
        path.write_bytes(path.read_bytes()[:300])
    assert list(load(tmp_path)) == expected
    assert len(said) == 1
    assert "damaged" in said[0]
    assert list(load(tmp_path)) == expected
    assert len(parsings) == 2


def test_a_folder_that_cannot_be_written_is_said_and_no_obstacle(tmp_path, parsings, monkeypatch):
    said = []
    monkeypatch.setattr(caching.logging, "warning", lambda text, *values: said.append(text % values))
    write_tree(tmp_path)
    (tmp_path / "refcoco" / "parsed").write_text("a file where the folder would be")
    assert len(load(tmp_path)) == len(load(tmp_path)) == 3
    assert len(parsings) == 2
    assert all("parsed again at every start" in line for line in said)
    assert len(said) == 2


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    write_tree(tmp_path)
    monkeypatch.setattr(caching.np, "savez", lambda file, **_: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(tmp_path)
    assert list((tmp_path / "refcoco" / "parsed").iterdir()) == []


def test_kept_files_cannot_run_code_nor_lead_elsewhere(tmp_path):
    write_tree(tmp_path)
    load(tmp_path)
    (path,) = (tmp_path / "refcoco" / "parsed").glob("unc-val-*.npz")
    with np.load(path) as stored:
        columns = dict(stored)
    name = b"../../../../../../../etc/hosts"
    elsewhere = columns | {"images": np.frombuffer(name, np.uint8), "images_ends": np.array([len(name)])}
    np.savez(path, **elsewhere)
    with pytest.raises(DataError, match="is not a plain name; it must not lead elsewhere"):
        load(tmp_path)
    objects = np.empty(1, object)
    objects[0] = Attack(tmp_path / "ran")
    np.savez(path, **columns | {"sizes": objects}, allow_pickle=True)
    assert len(load(tmp_path)) == 3  # Refused, and parsed again.
    assert not (tmp_path / "ran").exists()


def test_generalised_masks_are_kept_too(tmp_path):
    from tests.test_input_pipeline_grefcoco import write

    root = write(tmp_path)
    first, second = (list(input_pipeline.load("grefcoco", "val", root=str(root))) for _ in range(2))
    assert first == second
    assert any(record.segmentation == [] for record in second)


def test_a_file_that_was_cut_to_nothing_is_parsed_again(tmp_path, parsings):
    write_tree(tmp_path)
    first = list(load(tmp_path))
    for file in (tmp_path / "refcoco" / "parsed").iterdir():
        file.write_bytes(b"")
    assert list(load(tmp_path)) == first
    assert len(parsings) == 2


def test_names_of_splits_lead_nowhere(tmp_path):
    with pytest.raises(DataError, match="is no name of a split"):
        caching.cached(tmp_path, "refs", "../x", [], dict)
