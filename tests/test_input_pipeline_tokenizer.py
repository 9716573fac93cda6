"""Tokens against transformers' BERT tokenizer, and what happens without a vocabulary."""

import json

import numpy as np
import pytest
from transformers import BertTokenizer

from input_pipeline import shapes
from input_pipeline.records import DataError
from input_pipeline.tokenizer import SPECIAL, Tokenizer, learn_vocabulary

# In the released file's order: padding first, the others far behind unused rows.
VOCAB = [
    "[PAD]",
    "[unused0]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "man",
    "left",
    "##most",
    "in",
    "cafe",
    "'",
    "s",
]
VOCAB += ["red", "-", "shirt", "un", "##want", "##ed", ",", "running", "[", "]", "mask", "日", "本"]


@pytest.fixture
def vocab_file(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return path


TEXTS = [
    "The LEFTMOST man",
    "man's  red-shirt, unwanted",
    "Café",
    "zebra man",
    "日本 man",
    "the\tman\n",
    "man " * 30,
]


def test_pieces_are_berts(vocab_file):
    ours = Tokenizer(str(vocab_file), max_length=12)
    theirs = BertTokenizer(vocab={piece: i for i, piece in enumerate(VOCAB)})
    assert theirs.vocab_size == len(VOCAB)
    ids, mask, truncated = ours.encode(TEXTS)
    assert ids.dtype == mask.dtype == np.int32
    assert ids.shape == mask.shape == (len(TEXTS), 12)
    for row, text in enumerate(TEXTS):
        expected = theirs.encode(text)
        assert ids[row].tolist() == (expected + [0] * 12)[:12]
        assert mask[row].tolist() == ([1] * len(expected) + [0] * 12)[:12]
        assert truncated[row] == (len(expected) > 12)
    assert ours.tokens(ids[0]) == ["[CLS]", "the", "left", "##most", "man", "[SEP]"]
    assert (ours.pad_id, ours.unk_id, ours.cls_id, ours.sep_id, ours.mask_id) == (0, 2, 3, 4, 5)


def test_the_cut_drops_the_last_mark_as_published(vocab_file):
    tokenizer = Tokenizer(str(vocab_file), max_length=4)
    ids, mask, truncated = tokenizer.encode(["man man", "man man man", "man"])
    assert [tokenizer.tokens(row) for row in ids] == [
        ["[CLS]", "man", "man", "[SEP]"],
        ["[CLS]", "man", "man", "man"],
        ["[CLS]", "man", "[SEP]"],
    ]
    assert truncated.tolist() == [False, True, False]
    assert mask.sum(1).tolist() == [4, 4, 3]


def test_special_words_in_a_sentence_stay_words(vocab_file):
    tokenizer = Tokenizer(str(vocab_file))
    assert tokenizer.tokens(tokenizer.encode(["[MASK] man"])[0][0])[1:5] == ["[", "mask", "]", "man"]


def test_shapes_vocabulary():
    tokenizer = Tokenizer("shapes")
    assert tokenizer.vocab_size == len(shapes.vocabulary()) + len(SPECIAL)
    assert tokenizer.pad_id == 0
    ids, _, _ = tokenizer.encode(["The small RED ring", "red elephant"])
    assert tokenizer.tokens(ids[0]) == ["[CLS]", "the", "small", "red", "ring", "[SEP]"]
    assert tokenizer.tokens(ids[1]) == ["[CLS]", "red", "[UNK]", "[SEP]"]
    assert tokenizer.unknown_words("a red Elephant") == ["a", "Elephant"]
    assert tokenizer.unknown_words("red ring") == []


def test_save_and_load(vocab_file, tmp_path):
    for vocab in ("shapes", str(vocab_file)):
        first = Tokenizer(vocab)
        first.save(str(tmp_path / "saved"))
        second = Tokenizer(str(tmp_path / "saved"))
        assert second.vocab == first.vocab
        assert np.array_equal(first.encode(["left red man"])[0], second.encode(["left red man"])[0])


def test_tokenizer_json(tmp_path):
    BertTokenizer(vocab={piece: i for i, piece in enumerate(VOCAB)}).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink(missing_ok=True)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "WordPiece"
    assert Tokenizer(str(tmp_path)).vocab == {piece: i for i, piece in enumerate(VOCAB)}
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer file"):
        Tokenizer(str(tmp_path))


def test_no_vocabulary(tmp_path):
    with pytest.raises(DataError, match=r"vocab.txt: no such vocabulary"):
        Tokenizer(str(tmp_path))
    words = tmp_path / "words.txt"
    words.write_text("red\nblue\n")
    with pytest.raises(DataError, match=r"words.txt: a vocabulary of 2 pieces that lacks \[PAD\]"):
        Tokenizer(str(words))
    words.write_text("\n".join(SPECIAL))
    with pytest.raises(DataError, match=r"5 pieces that has no words"):
        Tokenizer(str(words))
    words.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"not a text file"):
        Tokenizer(str(words))
    with pytest.raises(DataError, match=r"max_length 2"):
        Tokenizer("shapes", max_length=2)


def test_a_vocabulary_of_one_s_own_sentences(tmp_path):
    texts = ["The red cup", "red CUP on the table, left", "Café"]
    pieces = learn_vocabulary(texts, 200)
    assert tuple(pieces[:5]) == SPECIAL
    assert {"red", "cup", "the"} <= set(pieces)
    assert len(set(pieces)) == len(pieces) <= 200
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    tokenizer = Tokenizer(str(tmp_path / "vocab.txt"), 30)
    assert not any(tokenizer.unknown_words(text) for text in [*texts, "the cat"])  # Of letters that it has.
    assert tokenizer.unknown_words("the 7") == ["7"]
    joined = [
        "".join(t.removeprefix("##") for t in tokenizer.tokens(row)[1:-1])
        for row in tokenizer.encode(texts)[0]
    ]
    assert joined == ["theredcup", "redcuponthetable,left", "cafe"]
    few = learn_vocabulary(texts, 45)
    assert len(few) == 45 < len(pieces)
    assert tuple(few[:5]) == SPECIAL
    with pytest.raises(DataError, match=r"of 10 pieces is too small: letters alone are \d+"):
        learn_vocabulary(texts, 10)
    with pytest.raises(DataError, match="no words to make a vocabulary of"):
        learn_vocabulary(["", " "], 200)


@pytest.mark.parametrize("text", ["", "  \t\n", "\u200b"])
def test_a_sentence_needs_a_word(text):
    with pytest.raises(DataError, match="has no words"):
        Tokenizer("shapes").encode(["red", text])
