"""Guesses of hidden words: counted against a network that reads them off the object it is shown."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import input_pipeline
from input_pipeline import Loader, Tokenizer
from magnet_jax import hidden_words as module
from magnet_jax.evaluate import other_pairs
from magnet_jax.hidden_words import hidden_words, main
from magnet_jax.network import Network
from tests.tiny import tiny_config

SIDE, LENGTH = 64, 20
PLACES = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)


class Reader:
    """Knows every sentence by what is shown: the sum of its picture and of the places in its mask."""

    grounding = True

    def __init__(self, shown, masks, ids):
        known = [shown.sum((1, 2, 3)), (masks * PLACES).sum((1, 2)), np.ones(len(ids), int)]
        self.known = jnp.asarray(np.stack(known, 1))
        self.ids = jnp.asarray(ids)

    def apply(self, variables, batch):
        assert set(batch) == {"image", "mask", "text_ids", "text_mask"}
        hidden = (batch["text_ids"] == Tokenizer("shapes").mask_id).sum(1)  # One word, or it knows nothing.
        places = (batch["mask"] * PLACES).sum((1, 2))
        return jnp.stack([batch["image"].astype(int).sum((1, 2, 3)), places, hidden], 1)

    def word_logits(self, variables, seen, batch):
        same = (self.known[None] == seen[:, None]).all(-1)
        return jax.nn.one_hot(self.ids[same.argmax(1)], 100) * same.any(1)[:, None, None]


def test_with_its_own_picture_and_with_another():
    config = tiny_config()
    config.data.options.scenes, config.data.image_size, config.data.max_words = 12, SIDE, LENGTH
    tokenizer = Tokenizer("shapes", LENGTH)
    records = input_pipeline.load_split(config.data, "val")
    # A sentence an object, so that what is shown names the sentence.
    records = records.select(np.unique(records.objects, return_index=True)[1])
    (batch,) = Loader(
        records, tokenizer, batch_size=len(records), image_size=(SIDE, SIDE), seed=0, train=False
    )
    order = np.argsort(batch["index"])
    shown, masks, ids, words = (
        np.asarray(batch[name])[order].astype(int) for name in ("image", "mask", "text_ids", "text_mask")
    )
    reader = Reader(shown, masks, ids)
    assert len(np.unique(np.asarray(reader.known), axis=0)) == len(records)
    fake = SimpleNamespace(network=reader, tokenizer=tokenizer, config=config, variables={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_pipeline, "load_split", lambda *_: records)
        found = hidden_words(fake, "val", seed=3)
        assert found["count"] == len(records)
        assert found["own"] == 100
    by_word = found["words"]
    counts = [figures["count"] for figures in by_word.values()]
    assert len(by_word) > 5
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == len(records)
    assert all(figures["own"] == 100 for figures in by_word.values())
    right = sum(figures["count"] * figures["other"] for figures in by_word.values())
    assert right / len(records) == pytest.approx(found["other"])
    assert set(by_word) <= {token for row in ids for token in tokenizer.tokens(row)}
    partner = other_pairs(records.image_rows, 3)
    assert not (records.image_rows[partner] == records.image_rows).any()
    # Which word is hidden is drawn: in the place of one of each sentence's, the other's sentence has the same by chance.
    real = [np.flatnonzero(row)[1:-1] for row in words]
    chance = [
        np.mean([ids[i, place] == ids[partner[i], place] for place in real[i]]) for i in range(len(ids))
    ]
    assert 0 < found["other"] < 60
    assert found["other"] == pytest.approx(100 * np.mean(chance), abs=15)


def test_words_are_printed_the_most_frequent_first(monkeypatch, capsys):
    words = {
        "red": {"own": 75.0, "other": 20.0, "count": 5},
        "circle": {"own": 50.0, "other": 49.0, "count": 4},
    }
    found = {"own": 60.0, "other": 25.0, "count": 9, "words": words}
    monkeypatch.setattr(module, "load_trained", lambda _: None)
    monkeypatch.setattr(module, "hidden_words", lambda *_: found)
    assert main(["--run=x"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["--run=x", "--words=9"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(line[0], line[1], line[3], line[8]) for line in lines] == [
        ("red", "5", "75.0", "20.0"),
        ("circle", "4", "50.0", "49.0"),
    ]
    assert main(["--run=x", "--words=-1"]) == 1
    assert "--words is -1" in capsys.readouterr().err


def test_a_run_without_the_head_is_refused(monkeypatch, capsys):
    bare = SimpleNamespace(network=Network(None), tokenizer=None, config=None)
    monkeypatch.setattr(module, "load_trained", lambda _: bare)
    assert main(["--run=x"]) == 1
    assert "trained without Mask Grounding" in capsys.readouterr().err
