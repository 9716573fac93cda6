"""`python -m input_pipeline prepare --deep`: every picture, mask and sentence that is wrong is listed, and named."""

import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from input_pipeline import DataError, Tokenizer, examples
from input_pipeline.inspect_records import text_problem
from input_pipeline.writers import write_jsonl
from tests.test_input_pipeline_grefcoco import write as write_grefcoco
from tests.test_input_pipeline_prepare import picture, run
from tests.test_input_pipeline_refer import REFS, SQUARE, instances, ref, sentence, write_tree


def broken_tree(root):
    """A tree with one thing wrong of each kind."""
    content, refs, rng = instances(), list(REFS), np.random.default_rng(0)
    shapes = {
        200: [[]],
        201: {"size": [60, 40], "counts": [2400]},
        202: {"size": [40, 60], "counts": [7, 3]},
        203: SQUARE,
        204: [[-9.0, -9.0, -5.0, -9.0, -5.0, -5.0]],
    }
    texts = {
        202: ["fine", " \t", "\u200b"],
        203: ["half \ud83d of it", "lost \ufffd", "bell\x07", "\ue000 own"],
    }
    for number in range(200, 206):
        content["images"].append(
            content["images"][0] | {"id": number, "file_name": f"COCO_train2014_{number:012d}.jpg"}
        )
        segmentation = shapes.get(number, SQUARE)
        content["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "segmentation": segmentation}
        )
        sentences = [sentence(10 * number + i, text) for i, text in enumerate(texts.get(number, ["it"]))]
        refs.append(ref(number, number, "train", *sentences))
    write_tree(root, refs=refs, content=content)
    for number in range(200, 205):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(picture(root, number))
    whole = picture(root, 203).read_bytes()
    picture(root, 203).write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (40, 60)).save(picture(root, 204))  # Turned.
    return root


def test_a_deep_look_lists_everything_that_is_wrong(tmp_path, capsys):
    code, lines, error = run(capsys, f"--root={broken_tree(tmp_path)}", "--deep")
    assert code == 1
    listed = lines[lines.index("looking at refcoco (unc)") + 1 :]
    p = {number: str(picture(tmp_path, number)) for number in range(200, 206)}
    expected = {
        f"{p[203]}: not a readable image (": 1,
        f"{p[204]}: 60x40 pixels (height x width), but its annotations are for 40x60": 1,
        f"{p[205]}: no such file": 1,
        f"{p[200]}, object 200: the mask is empty": 1,
        f"{p[201]}, object 201: segmentation: RLE of size 60x40": 1,
        f"{p[202]}, object 202: segmentation: the runs of an RLE": 1,
        f"{p[204]}, object 204: the mask is empty": 1,
        f"{p[202]}, object 202, sentence 2021: the sentence ' \\t' has no words": 1,
        f"{p[202]}, object 202, sentence 2022: the sentence '\\u200b' has no words": 1,
        f"{p[203]}, object 203, sentence 2030: the sentence 'half \\ud83d of it' has half a character": 1,
        f"{p[203]}, object 203, sentence 2031: the sentence 'lost \\ufffd' has the sign of": 1,
        f"{p[203]}, object 203, sentence 2032: the sentence 'bell\\x07' has a control character": 1,
        f"{p[203]}, object 203, sentence 2033: the sentence '\\ue000 own' has a character of private": 1,
    }
    found = {start: sum(line.startswith(start) for line in listed) for start in expected}
    assert found == expected
    assert listed[len(expected) :] == ["8 pictures, 9 masks, 15 sentences, 13 problems"]
    assert "14 problems" in error  # And the missing picture once more, in the count of those.


def counted(monkeypatch):
    decoded = []
    real = examples.picture

    def count(records, row):
        decoded.append(int(records.image_ids[row]))
        return real(records, row)

    monkeypatch.setattr(examples, "picture", count)
    return decoded


def test_pictures_are_decoded_once_until_they_or_their_sizes_change(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path)
    decoded = counted(monkeypatch)
    flags = f"--root={tmp_path}", "--deep"
    assert run(capsys, *flags)[0] == 0
    assert sorted(decoded) == [100, 101]

    decoded.clear()
    code, lines, _ = run(capsys, *flags)
    assert (code, decoded) == (0, [])
    assert "2 pictures (2 unchanged since the last check), 3 masks, 4 sentences, 0 problems" in lines

    content = picture(tmp_path, 101).read_bytes()
    picture(tmp_path, 101).write_bytes(content[:-300] + bytes(300))  # Of the same size.
    code, lines, _ = run(capsys, *flags)
    assert decoded == [101]

    decoded.clear()
    picture(tmp_path, 101).write_bytes(content)
    sizes = instances()
    sizes["images"][0] |= {"height": 60, "width": 40}
    (tmp_path / "refcoco" / "instances.json").write_text(json.dumps(sizes))
    code, lines, _ = run(capsys, *flags)
    assert (code, sorted(decoded)) == (1, [100, 101])
    assert any(
        "100.jpg: 40x60 pixels (height x width), but its annotations are for 60x40" in line for line in lines
    )


def test_bad_pictures_are_not_remembered(tmp_path, capsys):
    broken_tree(tmp_path)
    first = run(capsys, f"--root={tmp_path}", "--deep")[1]
    second = run(capsys, f"--root={tmp_path}", "--deep")[1]
    problems = [[line for line in lines if "COCO_train2014" in line] for lines in (first, second)]
    assert problems[0] == problems[1]


def test_a_picture_of_another_size_is_another_whatever_its_date(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path)
    run(capsys, f"--root={tmp_path}", "--deep")
    path = picture(tmp_path, 101)
    date = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(date, date))
    decoded = counted(monkeypatch)
    run(capsys, f"--root={tmp_path}", "--deep")
    assert decoded == [101]


def test_what_partitions_share_is_listed_once(tmp_path, capsys):
    broken_tree(tmp_path)
    once = run(capsys, f"--root={tmp_path}", "--deep", "--partition=unc")[1]
    refs = tmp_path / "refcoco" / "refs(unc).p"
    (tmp_path / "refcoco" / "refs(google).p").write_bytes(refs.read_bytes())
    twice = run(capsys, f"--root={tmp_path}", "--deep")[1]

    def problems(lines):
        start = next(i for i, line in enumerate(lines) if line.startswith("looking at"))
        return [line for line in lines[start:] if "COCO_train2014" in line]

    assert problems(twice) == problems(once) != []


def test_a_killed_check_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    """Its last line is cut off, and neither that nor the next line is lost for good."""
    write_tree(tmp_path)
    flags = f"--root={tmp_path}", "--deep"
    run(capsys, *flags)
    memory = tmp_path / "refcoco" / "parsed" / "checked.jsonl"
    lines = memory.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    memory.write_bytes(lines[0] + lines[1][:30])
    decoded = counted(monkeypatch)
    run(capsys, *flags)
    assert len(decoded) == 1
    run(capsys, *flags)
    assert len(decoded) == 1
    assert len(memory.read_bytes().splitlines()) == 3


def test_a_moved_tree_keeps_its_memory(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path / "a")
    run(capsys, f"--root={tmp_path / 'a'}", "--deep")
    (tmp_path / "a").rename(tmp_path / "b")
    decoded = counted(monkeypatch)
    assert run(capsys, f"--root={tmp_path / 'b'}", "--deep")[0] == 0
    assert decoded == []


def test_pictures_of_two_partitions_are_looked_at_once(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path)
    (tmp_path / "refcoco" / "refs(google).p").write_bytes(pickle.dumps(REFS))
    decoded = counted(monkeypatch)
    assert run(capsys, f"--root={tmp_path}", "--deep")[0] == 0
    assert sorted(decoded) == [100, 101]


def test_an_exif_orientation_is_a_notice(tmp_path, capsys):
    write_tree(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(picture(tmp_path, 101)) as opened:
        opened.save(picture(tmp_path, 101), exif=exif)
    for _ in range(2):  # Remembered, too.
        code, lines, _ = run(capsys, f"--root={tmp_path}", "--deep")
        assert code == 0
        notices = [line for line in lines if "EXIF" in line]
        assert len(notices) == 1
        assert notices[0].startswith("1 pictures have an EXIF orientation, which is ignored")
        assert notices[0].endswith(f"{picture(tmp_path, 101)} (orientation 6)")


def test_other_sources_are_looked_at_too(tmp_path, capsys):
    records = {
        name: input_pipeline.load("shapes", name, image_size=40, scenes=2) for name in ("train", "rare")
    }
    write_jsonl(records, tmp_path / "own")
    path = tmp_path / "own" / "data.jsonl"
    code, lines, _ = run(capsys, "--source=jsonl", f"--root={path}", "--deep")
    assert code == 0
    for name, found in records.items():
        counts = name, len(found.segmentations), 2, len(found)
        assert list(map(str, counts)) in [line.split() for line in lines]
    # Pictures of two splits may have the same number, and be others.
    count = sum(len(found.segmentations) for found in records.values())
    assert f"4 pictures, {count} masks, {sum(map(len, records.values()))} sentences, 0 problems" in lines
    first = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({"image": first["image"], "polygons": [[]], "text": "\ud800"}) + "\n")
    code, lines, _ = run(capsys, "--source=jsonl", f"--root={tmp_path / 'own'}", "--deep")
    assert code == 1
    where = f"{(tmp_path / 'own').resolve() / first['image']}, object 1"
    assert f"{where}: the mask is empty" in lines
    assert any(line.startswith(f"{where}, sentence 0: the sentence '\\ud800' has half") for line in lines)
    assert "1 pictures (1 unchanged since the last check), 1 masks, 1 sentences, 2 problems" in lines


@pytest.mark.parametrize("flags", [["--source=grefcoco"], []])
def test_sentences_that_mean_nothing_have_no_empty_mask(tmp_path, capsys, flags):
    write_grefcoco(tmp_path)
    code, lines, _ = run(capsys, f"--root={tmp_path}", "--deep", *flags)
    assert code == 0
    assert ["val", "4", "1", "5"] in [line.split() for line in lines]
    assert "1 pictures, 5 masks, 6 sentences, 0 problems" in lines


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\t\n",
        "\u0301",
        "\u200b\u200e",
        "!",
        "7",
        "caf\u00e9",
        "\u732b",
        "$",
        "\U0001f600",
        "a\nb",
        "\u0e31",
    ],
)
def test_sentences_have_words_where_the_tokenizer_finds_some(text):
    tokenizer = Tokenizer("shapes", 8)
    try:
        tokenizer.encode([text])
    except DataError:
        assert "has no words" in text_problem(text)
    else:
        assert text_problem(text) == ""


def test_whole_surrogate_pairs_are_characters():
    assert text_problem("a \ud83d\ude00") == ""
    assert "U+DE00" in text_problem("a \ude00\ud83d")
