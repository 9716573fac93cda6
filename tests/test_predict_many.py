"""Many pictures: what is written is what one by one is predicted, and a run that is stopped goes on."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from input_pipeline import DataError
from magnet_jax import predict_many as module
from magnet_jax.errors import UserError
from magnet_jax.predict import Predictor
from magnet_jax.predict_many import predict_many, read_input
from tests.test_predict import TEXTS, pictures, trained


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A list of four pictures, one of which is damaged and one elsewhere, with six sentences."""
    predictor = Predictor(trained())
    monkeypatch.setattr(Predictor, "from_pretrained", lambda *_: predictor)
    (tmp_path / "more").mkdir()
    for number, picture in enumerate(pictures(4)):
        picture.save(tmp_path / ("more/0.png" if number == 3 else f"{number}.png"))
    (tmp_path / "2.png").write_bytes(b"not a picture")
    lines = [
        {"image": "0.png", "text": TEXTS[:2]},
        {"image": "2.png", "text": TEXTS[0]},
        {"image": "1.png", "text": TEXTS[2], "id": "left"},
        {"image": "more/0.png", "text": [TEXTS[1], TEXTS[0]], "id": 0, "mask": "mask.png"},
    ]
    file = tmp_path / "list.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file, predictor


def lines_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_each_line_is_what_is_predicted_alone(listed, tmp_path, capsys):
    file, predictor = listed
    assert predict_many("run", str(file), [], str(tmp_path / "out"), batch_size=4) == 1
    found = lines_of(tmp_path / "out")
    assert [line["number"] for line in found] == list(range(6))
    assert "not a readable image" in found[2]["error"]
    said = capsys.readouterr()
    assert "2.png" in said.err
    assert "compiling the network" in said.out  # Before a long silence, but not where nothing is left to do.
    predict_many("run", str(file), [], str(tmp_path / "out"), batch_size=4)
    assert "compiling" not in capsys.readouterr().out
    assert [line["image"] for line in found] == [*2 * ["0.png"], "2.png", "1.png", *2 * ["more/0.png"]]
    assert [line["text"] for line in found] == [*TEXTS[:2], TEXTS[0], TEXTS[2], TEXTS[1], TEXTS[0]]
    assert [line.get("id", "none") for line in found] == [*3 * ["none"], "left", 0, 0]
    for line in found:
        if "error" in line:
            continue
        expected = predictor.predict(tmp_path / line["image"], [line["text"]])[0]
        sure = np.abs(expected.logits) > 1e-5 * np.abs(expected.logits).max()
        mask = np.asarray(Image.open(tmp_path / "out" / line["mask"]))
        assert set(np.unique(mask)) <= {0, 255}
        np.testing.assert_array_equal((mask > 0)[sure], expected.mask[sure])
        np.testing.assert_array_equal(coco_mask.decode(line["rle"]), mask > 0)
        assert line["score"] == pytest.approx(expected.score, abs=1e-4)
        assert line["area"] == pytest.approx((mask > 0).mean())


def test_a_killed_run_goes_on(listed, tmp_path, monkeypatch, capsys):
    file, predictor = listed
    predict_many("run", str(file), [], str(tmp_path / "whole"), batch_size=2)
    out = tmp_path / "out"
    predict_many("run", str(file), [], str(out), batch_size=2)
    results = out / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # While the fourth line was being written.
    asked = []
    own = Predictor.predict_pairs
    monkeypatch.setattr(
        Predictor, "predict_pairs", lambda self, pairs, n: own(self, asked.extend(pairs) or pairs, n)
    )
    assert predict_many("run", str(file), [], str(out), batch_size=2) == 1  # Counted again, though long past.
    assert "3 of 6 are there already" in capsys.readouterr().out
    assert len(asked) == 3
    assert lines_of(out) == lines_of(tmp_path / "whole")


def test_a_folder_with_sentences(listed, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.PNG", "a.jpg"):
        pictures(1)[0].save(folder / name)
    (folder / "notes.txt").write_text("x")
    assert [(question.image, question.text, question.name) for question in read_input(folder, TEXTS[:2])] == [
        (folder / name, text, name) for name in ("a.jpg", "b.PNG") for text in TEXTS[:2]
    ]
    assert predict_many("run", str(folder), TEXTS[:2], str(tmp_path / "out")) == 0
    assert len(lines_of(tmp_path / "out")) == 4


def test_what_is_wrong_is_one_line(listed, tmp_path, monkeypatch):
    file, _ = listed
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="--text is missing"):
        predict_many("run", str(tmp_path), [], out)
    with pytest.raises(UserError, match="leave --text away"):
        predict_many("run", str(file), TEXTS, out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no picture"):
        predict_many("run", str(tmp_path / "empty"), TEXTS, out)
    with pytest.raises(DataError, match="no such file"):
        predict_many("run", str(tmp_path / "none.jsonl"), [], out)
    wrong = tmp_path / "wrong.jsonl"
    for line, said in (
        ("{", "line 1: not JSON"),
        ('{"image": "../x.png", "text": "a"}', "leads out of"),
        ('{"image": "0.png"}', "'text' must be a sentence"),
        ('{"image": "0.png", "text": "a", "id": [1]}', "'id' must be a word or a whole number"),
        ('{"image": "0.png", "text": "a", "id": true}', "'id' must be a word or a whole number"),
    ):
        wrong.write_text(line + "\n")
        with pytest.raises(DataError, match=said):
            predict_many("run", str(wrong), [], out)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="has other files"):
        predict_many("run", str(file), [], str(tmp_path))
    predict_many("run", str(file), [], out)
    with file.open("a") as more:
        more.write(json.dumps({"image": "0.png", "text": "x"}) + "\n")
    with pytest.raises(UserError, match="predictions of another list; give another --output"):
        predict_many("run", str(file), [], out)
    monkeypatch.setattr(module, "fingerprint", lambda _: "other")
    with pytest.raises(UserError, match="predictions of another network"):
        predict_many("run", str(file), [], out)


def test_a_sentence_without_words_costs_itself_alone(listed, tmp_path, capsys):
    file, _ = listed
    lines = [{"image": "0.png", "text": "\u200b"}, {"image": "1.png", "text": TEXTS[0]}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert predict_many("run", str(file), [], str(tmp_path / "out")) == 1
    first, second = lines_of(tmp_path / "out")
    assert "has no words" in first["error"]
    assert second["text"] == TEXTS[0]
    assert "rle" in second
