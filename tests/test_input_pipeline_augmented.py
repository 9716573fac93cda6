"""Random changes as the loader makes them: functions of seed, epoch and position, of picture, mask and words together."""

import numpy as np
import pytest
from PIL import Image

from input_pipeline import masks, ops
from input_pipeline.augment import Augmentation
from input_pipeline.records import Record, Records, load
from tests.test_input_pipeline_bad_records import TRIANGLE
from tests.test_input_pipeline_loader import TOKENIZER, assert_same, make, take


@pytest.fixture(scope="module")
def records():
    return load("shapes", "val", scenes=4, image_size=48)


ALL = Augmentation(flip=0.5, jitter=0.3, crop=0.5)


def test_augmented_examples_are_a_function_of_seed_and_position(records):
    options = dict(train=True, augmentation=ALL, sentences="all")
    stream = take(make(records, **options), 20)
    assert_same(stream[13:], take(make(records, start_step=13, **options), 7))
    assert_same(stream, take(make(records, workers=1, prefetch=0, **options), 20))
    halves = [take(make(records, share=share, **options), 20) for share in ((0, 1), (2, 3))]
    glued = [
        {k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*halves, strict=True)
    ]
    assert_same(stream, glued)
    other = take(make(records, **options | dict(seed=4)), 20)
    assert any(not np.array_equal(a["image"], b["image"]) for a, b in zip(stream, other, strict=True))
    plain = take(make(records, train=True, sentences="all"), 20)
    for changed, unchanged in zip(stream, plain, strict=True):
        assert np.array_equal(changed["index"], unchanged["index"])
        assert not np.array_equal(changed["image"], unchanged["image"])


def test_draws_are_those_of_seed_epoch_and_position(records):
    """Written out: position p of epoch e, whatever the batches."""
    loader = make(records, train=True, augmentation=ALL, batch_size=4, share=(2, 3))
    size = loader.epoch_size
    for step in (0, 3, size // 4, size):
        expected = [ALL.draw(3, p // size, p % size) for p in (4 * step + 2, 4 * step + 3)]
        assert loader.draws(step) == expected
    assert size % 4  # An epoch ends within a batch.


def test_a_sentence_that_cannot_be_mirrored_keeps_its_picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for text, turned in (("left ring", True), ("ring right next to the left circle", False)):
        record = Record(str(tmp_path / "a.png"), 6, 8, TRIANGLE, text, "", 0, 0, 0, "train")
        loader = make(
            Records.from_list([record]),
            train=True,
            batch_size=1,
            image_size=(6, 8),
            augmentation=Augmentation(flip=1.0),
        )
        (batch,) = take(loader, 1)
        assert np.array_equal(batch["image"][0], pixels[:, ::-1] if turned else pixels)
        expected = "right ring" if turned else text
        assert np.array_equal(batch["text_ids"], TOKENIZER.encode([expected])[0])


def test_augmentation_changes_anew_in_every_epoch(records):
    one = records[:1]
    images = [b["image"].tobytes() for b in take(make(one, train=True, batch_size=1, augmentation=ALL), 6)]
    assert len(set(images)) == 6


def test_mirrored_examples_have_the_other_words(records):
    loader = make(
        records, train=True, sentences="all", image_size=(48, 48), augmentation=Augmentation(flip=1.0)
    )
    seen = 0
    for batch in take(loader, 20):
        for k, row in enumerate(batch["index"]):
            record = records[int(row)]
            image = np.asarray(ops.open_image(record.image))
            truth = masks.decode(record.segmentation, 48, 48)
            assert np.array_equal(batch["image"][k], image[:, ::-1])
            assert np.array_equal(batch["mask"][k], truth[:, ::-1])
            expected = record.text.replace("left", "RIGHT").replace("right", "left").replace("RIGHT", "right")
            assert np.array_equal(batch["text_ids"][k], TOKENIZER.encode([expected])[0][0])
            seen += expected != record.text
    assert seen > 5


def test_evaluation_is_never_augmented(records):
    assert_same(list(make(records, augmentation=ALL)), list(make(records)))
