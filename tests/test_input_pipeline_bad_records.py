"""Records that cannot be used: left out, counted, said once, and too many of them end the run."""

import numpy as np
import pytest
from PIL import Image

from input_pipeline import loader as loading
from input_pipeline import masks, ops
from input_pipeline.records import DataError, Record, Records, load
from tests.test_input_pipeline_loader import make, take

TRIANGLE = [[0, 0, 4, 0, 4, 4]]


def write_pictures(folder):
    """Ten pictures of 8x6, all but the first three wrong in some way, and what is said about each of these."""
    for i in range(3):
        Image.new("RGB", (8, 6), (20 * i, 0, 0)).save(folder / f"{i}.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    noise.save(folder / "whole.jpg")
    (folder / "3.png").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    (folder / "whole.jpg").unlink()
    (folder / "5.png").write_text("no picture")
    Image.new("RGB", (6, 8)).save(folder / "6.png")
    for i in (7, 8, 9):
        Image.new("RGB", (8, 6), (20 * i, 0, 0)).save(folder / f"{i}.png")
    reasons = {3: "3.png: not a readable image (image file is truncated", 4: "4.png: no such file"}
    reasons |= {
        5: "5.png: not a readable image",
        6: "6.png: 8x6 pixels (height x width), but its annotations are for 6x8",
    }
    reasons |= {
        7: "7.png, object 7: the mask is empty",
        8: "8.png, object 8: segmentation: the runs of an RLE",
    }
    return reasons | {9: r"9.png: the sentence '\u200b' has no words"}


def damaged(folder):
    shapes = {7: [[]], 8: {"size": [6, 8], "counts": [3]}}
    sizes = {3: (64, 64)}
    rows = [
        Record(
            str(folder / f"{i}.png"),
            *sizes.get(i, (6, 8)),
            shapes.get(i, TRIANGLE),
            "\u200b" if i == 9 else f"red ring {i}",
            *("", i, i, i, "train"),
        )
        for i in range(10)
    ]
    return Records.from_list(rows)


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_bad_records_are_left_out_counted_and_logged_once(tmp_path, monkeypatch, cache_bytes):
    said = []
    monkeypatch.setattr(loading.logging, "warning", lambda text, *values: said.append(text % values))
    reasons = write_pictures(tmp_path)
    loader = make(
        damaged(tmp_path), train=True, cache_bytes=cache_bytes, max_bad_share=0.7, image_size=(6, 8)
    )
    for batch in take(loader, 10):  # Four epochs.
        for k, row in enumerate(batch["index"]):
            assert batch["valid"][k] == (row not in reasons)
            if not batch["valid"][k] and row not in (7, 8, 9):
                assert not batch["image"][k].any()
                assert not batch["mask"][k].any()
            if batch["valid"][k]:
                assert (batch["image"][k] == (20 * row, 0, 0)).all()
                assert batch["mask"][k].sum() == masks.decode(TRIANGLE, 6, 8).sum() > 0
    assert set(loader.bad) == set(reasons)
    assert len(said) == len(reasons)
    for row, reason in reasons.items():
        assert reason in loader.bad[row]
        assert sum(reason in line for line in said) == 1


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_of_a_bad_picture_with_many_sentences_all_are_counted_and_one_line_is_said(
    tmp_path, monkeypatch, cache_bytes
):
    said = []
    monkeypatch.setattr(loading.logging, "warning", lambda text, *values: said.append(text % values))
    rows = [
        Record(str(tmp_path / "none.png"), 6, 8, TRIANGLE, f"red ring {i}", "", 0, 0, i, "train")
        for i in range(5)
    ]
    loader = make(Records.from_list(rows), cache_bytes=cache_bytes, max_bad_share=1.0)
    assert not any(batch["valid"].any() for batch in loader)
    assert len(loader.bad) == 5
    assert len(said) == 1


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_too_many_bad_records_end_the_run(tmp_path, cache_bytes):
    write_pictures(tmp_path)
    options = dict(train=True, cache_bytes=cache_bytes, image_size=(6, 8), batch_size=10)
    with pytest.raises(
        DataError, match=r"split 'train': 7 of 10 examples cannot be used, more than config.data.max_"
    ):
        take(make(damaged(tmp_path), max_bad_share=0.69, **options), 1)
    take(make(damaged(tmp_path), max_bad_share=0.7, **options), 1)
    with pytest.raises(DataError, match=r"the first: .*\.png"):
        take(make(damaged(tmp_path), **options), 1)


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_evaluation_leaves_out_only_what_cannot_be_read(tmp_path, cache_bytes):
    """An empty mask and an empty sentence count, as in the published evaluations."""
    write_pictures(tmp_path)
    loader = make(
        damaged(tmp_path), cache_bytes=cache_bytes, max_bad_share=0.5, image_size=(6, 8), batch_size=10
    )
    (batch,) = loader
    assert batch["index"][batch["valid"]].tolist() == [0, 1, 2, 7, 9]
    assert not batch["mask"][7].any()
    assert set(loader.bad) == {3, 4, 5, 6, 8}


def test_a_sentence_without_an_object_is_no_mistake(tmp_path):
    write_pictures(tmp_path)
    nothing = Record(str(tmp_path / "0.png"), 6, 8, [], "red ring", "", 0, 0, 0, "train")
    (batch,) = take(make(Records.from_list([nothing]), train=True, batch_size=1, image_size=(6, 8)), 1)
    assert batch["valid"].all()
    assert not batch["mask"].any()


def test_a_fault_of_the_program_is_no_bad_record(monkeypatch):
    records = load("shapes", "val", scenes=2, image_size=48)
    monkeypatch.setattr(ops, "resize_image", lambda *_: 1 / 0)
    for cache_bytes in (0, 2**30):
        with pytest.raises(ZeroDivisionError):
            take(make(records, cache_bytes=cache_bytes), 1)
