"""Files of one's own that are not quite right: every wrong line is named, and nothing is a traceback."""

import json

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from input_pipeline import DataError
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
