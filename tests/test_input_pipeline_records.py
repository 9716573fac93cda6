"""Records share storage, keep their order, and the registry names what exists."""

import dataclasses

import numpy as np
import pytest

from input_pipeline import records
from input_pipeline.records import Blobs, DataError, Record, Records, load, source, splits


def make(n=6):
    """Two images, three objects, n expressions."""
    found = []
    for i in range(n):
        o = i % 3
        found.append(
            Record(
                f"{o % 2}.jpg",
                10 + o % 2,
                20,
                [[o, 0, 5, 0, 5, 5]],
                f"text {i}",
                "",
                o % 2,
                100 + o,
                7 * i,
                "val",
            )
        )
    return found


def test_columns_give_back_the_records():
    singles = make()
    columns = Records.from_list(singles)
    assert list(columns) == singles
    assert len(columns) == 6
    assert len(columns.images) == 2
    assert len(columns.segmentations) == 3
    assert columns[-1] == singles[-1]
    assert columns.image_rows.tolist() == [0, 1, 0, 0, 1, 0]
    with pytest.raises(IndexError):
        columns[6]


def test_slices_and_selections_share_images_and_objects():
    singles = make()
    columns = Records.from_list(singles)
    assert list(columns[1:5:2]) == singles[1:5:2]
    chosen = columns.select([4, 0, 4])
    assert list(chosen) == [singles[4], singles[0], singles[4]]
    assert chosen.images is columns.images
    assert chosen.segmentations is columns.segmentations
    assert len(Records.from_list([])) == 0


def test_expressions_that_mean_nothing_are_seen():
    nothing = dataclasses.replace(make()[0], segmentation=[], object_id=999, sentence_id=999)
    hidden = dataclasses.replace(make()[0], segmentation=[[]], object_id=998)  # An object without a pixel.
    columns = Records.from_list([*make(), hidden, nothing])
    assert columns.has_absent
    assert not columns[:-1].has_absent  # Though the object is in the columns still.


def test_columns_of_different_length_are_refused():
    columns = Records.from_list(make())
    with pytest.raises(DataError, match=r"'texts': 5.*'types': 6"):
        dataclasses.replace(columns, texts=columns.texts[:5])


def test_blobs():
    items = [b"one", b"", b"three", b"4"]
    blobs = Blobs.join(items)
    assert list(blobs) == items
    assert blobs[-2] == b"three"
    assert len(blobs) == 4
    with pytest.raises(IndexError):
        blobs[4]
    assert list(Blobs.join([])) == []
    assert blobs.buffer.dtype == np.uint8


def test_registry(monkeypatch):
    records.sources()  # Modules register once, when they are first imported: not into a registry that will vanish.
    monkeypatch.setattr(records, "_SOURCES", dict(records._SOURCES))

    @source("mine", lambda **options: ("train", "holdout"))
    def load_mine(split, *, root, seed, size=1):
        return Records.from_list(make(size), split)

    assert splits("mine") == ("train", "holdout")
    assert len(load("mine", "holdout", seed=1, size=4)) == 4
    with pytest.raises(DataError, match=r"'mine' has no split 'val'; it has: train, holdout"):
        load("mine", "val")
    with pytest.raises(DataError, match=r"unknown data source 'coco'; there are: .*mine, .*shapes"):
        load("coco", "val")
    assert splits("shapes") == ("train", "val", "testA", "testB", "rare")
