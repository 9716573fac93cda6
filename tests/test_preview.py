"""What `show` draws is what the network reads, and its command line."""

import types

import numpy as np
import pytest
from PIL import Image

from configs import debug
from input_pipeline import DataError, Loader, Tokenizer, load_split
from input_pipeline.__main__ import main
from magnet_jax import preview as module
from magnet_jax.network import Network
from magnet_jax.train_step import make_train_step, masked_sentences
from magnet_jax.trained import prepare


class SeenError(Exception):
    """Carries the words that reached the model."""


class Reader:
    def apply(self, variables, image, ids, *_, **__):
        raise SeenError(np.asarray(ids))


def read_by_train_step(config, step, batch):
    """The words that the model is given in a step."""
    state = types.SimpleNamespace(
        seed=config.seed, step=step, params={"model": np.ones(1, np.float32)}, batch_stats={}, opt_state=()
    )
    with pytest.raises(SeenError) as caught:
        make_train_step(Network(Reader()), None, config.loss)(state, batch)
    return caught.value.args[0]


def test_masked_sentences_are_those_of_the_train_step():
    config = prepare(debug.get_config())[0]
    config.loss.mask_ratio = 0.4
    records = load_split(config.data, "train")
    loader = Loader(records, Tokenizer("shapes", 16), batch_size=8, image_size=(32, 32), train=True)
    batches = iter(loader)
    for step in range(3):
        batch = next(batches)
        found = masked_sentences(config.seed, step, batch, config.loss)
        np.testing.assert_array_equal(found, read_by_train_step(config, step, batch))
        assert (np.asarray(found) != batch["text_ids"]).any()
    batches.close()
    config.loss.grounding = 0.0
    assert masked_sentences(0, 0, batch, config.loss) is batch["text_ids"]


@pytest.fixture
def drawn(monkeypatch):
    """Image, mask and lines of every picture that is drawn."""
    pictures = []
    own = module.visualize.captioned
    monkeypatch.setattr(module.visualize, "captioned", lambda *a: pictures.append(a) or own(*a))
    return pictures


def test_the_split_that_is_trained_on_is_shown_as_training_shows_it(drawn):
    config = debug.get_config()
    config.data.augment.flip = 0.5
    module.preview(config, "train", 10)
    config = prepare(config)[0]
    tokenizer = Tokenizer("shapes", config.data.max_words)
    loader = Loader(
        load_split(config.data, "train"),
        tokenizer,
        batch_size=config.data.batch_size,
        image_size=(32, 32),
        seed=config.seed,
        train=True,
        sentences=config.data.sentences,
        augmentation=module.Augmentation(flip=0.5),
    )
    batches = iter(loader)
    expected = []
    for step in range(3):
        batch = next(batches)
        ids = read_by_train_step(config, step, batch)
        for k in range(config.data.batch_size):
            expected.append((batch["image"][k], batch["mask"][k], " ".join(tokenizer.tokens(ids[k]))))
    batches.close()
    assert len(drawn) == 10
    for (image, mask, lines), (pixels, truth, words) in zip(drawn, expected, strict=False):
        np.testing.assert_array_equal(image, pixels)
        np.testing.assert_array_equal(mask, truth)
        assert lines[1] == words
    assert any("[MASK]" in lines[1] for _, _, lines in drawn)


def test_other_splits_are_shown_whole_and_from_end_to_end(drawn):
    config = debug.get_config()
    records = load_split(config.data, "val")
    module.preview(config, "val", 7)
    texts = [lines[0] for _, _, lines in drawn]
    assert len(texts) == 7
    assert texts[0] == records.texts[0]
    assert texts[-1] == records.texts[-1]
    assert not any("[MASK]" in lines[1] for _, _, lines in drawn)
    drawn.clear()
    _, shown = module.preview(config, "val", 10**6)
    assert shown == len(drawn) == len(records)


def test_show_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    flags = ["show", "--config=configs/debug.py", "--split=val", "--n=5", f"--out={out}"]
    assert main(flags) == 0
    with Image.open(out) as sheet:
        assert sheet.width > 4 * 240
        assert sheet.height > 2 * 240
    assert "5 examples of 'val'" in capsys.readouterr().out
    assert main([*flags, "--config.data.options.image_size=40"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["show"], "error: --config is missing; give configs/NAME.py"),
        (
            ["show", "--config=configs/none.py"],
            "error: --config: [Errno 2] No such file or directory: 'configs/none.py'",
        ),
        (
            ["show", "--config=configs/debug.py", "--config.data.colour=1"],
            "the configuration has no field 'colour'",
        ),
        (["show", "--config=configs/debug.py", "--colour=1"], "Unknown command line flag 'colour'"),
        (["show", "--config=configs/debug.py", "--split=none"], "has no split 'none'; it has: train, val"),
        (["show", "--config=configs/own.py"], "error: weights/bert: no such vocabulary"),
        (
            ["show", "--config=configs/debug.py", "--config.data.source=jsonl"],
            "clears what is of another source",
        ),
        (["shapes", "--out=x", "--colour=1"], "error: '--colour=1' is not a flag of this command"),
    ],
)
def test_wrong_flags_are_one_line(capsys, flags, message):
    assert main(flags) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--n=0", "--n=-3"])
def test_no_examples_are_no_number_of_examples(capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        main(["show", "--config=configs/debug.py", flag])
    name, value = flag.split("=")
    line = f"error: argument {name}: {value}; expected 1 or more"
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_nothing_to_show_says_why(tmp_path):
    config = debug.get_config()
    line = '{"image": "none.png", "polygons": [[1, 1, 5, 1, 5, 5]], "text": "red ring"}\n'
    (tmp_path / "data.jsonl").write_text(line)
    config.data.source, config.data.root = "jsonl", str(tmp_path)
    config.data.options = type(config)()
    with pytest.raises(DataError, match=r"none of 4 examples can be shown: .*none.png: no such file"):
        module.preview(config, "train", 4)


def test_captions_are_broken_at_words():
    image, mask = np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), bool)
    short = module.visualize.captioned(image, mask, ["a ring"], side=120)
    long = module.visualize.captioned(image, mask, ["a ring " * 12], side=120)
    assert short.shape[1] == long.shape[1]
    assert long.shape[0] >= short.shape[0] + 2 * 16
