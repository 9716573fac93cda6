"""Files of one's own that are not quite right: every wrong line is named, and nothing is a traceback."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from input_pipeline import DataError, Loader, Tokenizer, masks
from input_pipeline.__main__ import main
from magnet_jax.errors import UserError
from magnet_jax.train import train
from tests.test_input_pipeline_formats import LINE, load, write_lines
from tests.tiny import tiny_config, tiny_network


def test_every_wrong_line_is_listed(tmp_path, capsys):
    path = write_lines(tmp_path, LINE, "{", LINE | {"image": "../a.png"}, "[" * 100_000, LINE)
    assert main(["prepare", "--source=jsonl", f"--root={path}"]) == 1
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.split(": ")[0].rpartition(" ")[2] for line in lines] == ["2", "3", "4"]
    assert "3 wrong lines, listed above" in shown.err.splitlines()[-1]
    with pytest.raises(
        DataError, match=r"line 2: not JSON .*\(and 2 more wrong lines: `prepare --source=jsonl` lists"
    ):
        load(path)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = write_lines(tmp_path, LINE)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [record.text for record in load(path)] == [LINE["text"]]


def test_an_empty_file_is_said(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n \n")
    assert main(["prepare", "--source=jsonl", f"--root={path}"]) == 1
    assert "mine.jsonl: empty; a line for each object is needed" in capsys.readouterr().err
    assert main(["prepare", f"--root={path}"]) == 1
    assert "for this file give --source=jsonl" in capsys.readouterr().err


def test_jpeg_is_no_form_for_masks(tmp_path):
    path = write_lines(tmp_path, LINE | {"mask": "mask.jpg"})
    Image.fromarray(np.full((20, 30), 255, np.uint8)).save(tmp_path / "mask.jpg")
    with pytest.raises(
        DataError, match=r"mask.jpg: not a readable mask \(JPEG blurs the borders of masks; write PNG\)"
    ):
        _ = load(path)[0].segmentation


def test_a_missing_picture_is_one_problem(tmp_path, capsys):
    path = write_lines(tmp_path, LINE, LINE | {"image": "none.png"})
    assert main(["prepare", "--source=jsonl", f"--root={path}", "--deep"]) == 1
    shown = capsys.readouterr()
    assert sum("none.png" in line for line in shown.out.splitlines()) == 1
    assert "1 problems" in shown.err.splitlines()[-1]


def test_splits_that_are_not_there_show_at_the_start(tmp_path):
    path = write_lines(tmp_path, LINE)
    config = tiny_config()
    config.data.source, config.data.root = "jsonl", str(path)
    with pytest.raises(DataError, match=r"--config.data.options=\{\} clears what is of another source"):
        input_pipeline.load_split(config.data, "train")
    config.data.options = type(config)()
    with (
        tiny_network(),
        pytest.raises(UserError, match=r"config.data.eval_splits has 'val'; the data have train"),
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert json.loads(path.read_text().splitlines()[0]) == LINE


def test_lines_that_mean_nothing_are_seen_without_opening_masks(tmp_path):
    """Of a list, and of a mixture that it is a part of."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "mask": "never_written.png", "text": "the cup"},
        {"image": "a.png", "polygons": [], "text": "the horse", "split": "train"},
    ]
    for count, expected in ((1, False), (2, True)):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines[:count]))
        assert load(path).has_absent is expected
        parts = {"mine": {"source": "jsonl", "root": str(path)}, "own": {"source": "shapes", "scenes": 2}}
        assert input_pipeline.load("mixed", "train", parts=parts).has_absent is expected


def test_a_vocabulary_from_the_command_line(tmp_path, capsys):
    path = write_lines(tmp_path, LINE)
    out = tmp_path / "new" / "vocab.txt"
    assert main(["vocabulary", f"--root={path}", f"--out={out}"]) == 0
    assert f"--config.data.vocab={out}" in capsys.readouterr().out
    assert not input_pipeline.Tokenizer(str(out)).unknown_words(LINE["text"])
    assert main(["vocabulary", f"--root={tmp_path / 'none.jsonl'}", f"--out={out}"]) == 1
    assert "none.jsonl" in capsys.readouterr().err


def test_paths_that_are_none_and_files_that_are_bombs_are_wrong_lines(tmp_path, capsys):
    bomb = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    (tmp_path / "bomb.png").write_bytes(
        bomb + zlib.crc32(bomb[12:]).to_bytes(4, "big") + b"\x00\x00\x00\x00IDAT"
    )
    path = write_lines(tmp_path, LINE, LINE | {"image": "a\x00.png"}, LINE | {"image": "a\ud800.png"})
    assert main(["prepare", "--source=jsonl", f"--root={path}"]) == 1
    assert [line.split(": ")[0][-1] for line in capsys.readouterr().out.splitlines()] == ["2", "3"]
    path = write_lines(tmp_path, LINE | {"image": "bomb.png"}, LINE | {"mask": "bomb.png"})
    assert load(path)[0].height == 0
    with pytest.raises(DataError, match="bomb.png: not a readable mask"):
        _ = load(path)[1].segmentation


def test_every_colour_but_black_is_of_the_object(tmp_path):
    path = write_lines(tmp_path, LINE)
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[2:5, 3:7], pixels[8, 9] = (1, 0, 0), (0, 0, 4)
    for picture in (Image.fromarray(pixels), Image.fromarray(pixels).quantize(4)):
        picture.save(tmp_path / "mask.png")
        found = masks.decode(load(path)[0].segmentation, 20, 30)
        np.testing.assert_array_equal(found, pixels.any(-1))


@pytest.mark.parametrize("train", [True, False])
def test_a_missing_picture_in_which_nothing_is_meant_is_left_out(tmp_path, train):
    nothing = {"image": "gone.png", "polygons": [], "text": "the cup"}
    path = write_lines(tmp_path, LINE, nothing)
    tokenizer = Tokenizer("shapes", 8)
    loader = Loader(
        load(path), tokenizer, batch_size=2, image_size=(16, 16), seed=0, train=train, max_bad_share=0.5
    )
    batch = next(iter(loader))
    assert sorted(zip(batch["index"].tolist(), batch["valid"].tolist(), strict=True)) == [
        (0, True),
        (1, False),
    ]
