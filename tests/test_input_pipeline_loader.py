"""Order, shares, padding and contents of batches, against brute-force readings of the records."""

import itertools
import threading

import numpy as np
import pytest
from PIL import Image

from input_pipeline import loader as loading
from input_pipeline import masks, ops
from input_pipeline.loader import Loader
from input_pipeline.order import epoch_order
from input_pipeline.records import DataError, Record, Records, load
from input_pipeline.tokenizer import Tokenizer

TOKENIZER = Tokenizer("shapes")
SIZE = (24, 40)  # not square, and not the size of the pictures


@pytest.fixture(scope="module")
def records():
    return load("shapes", "val", scenes=4, image_size=48)


def make(records, **options):
    return Loader(records, TOKENIZER, **(dict(batch_size=4, image_size=SIZE, seed=3) | options))


def take(loader, n):
    return list(itertools.islice(iter(loader), n))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert all(np.array_equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_contents(records, cache_bytes):
    """Every array against its record, from memory and through tf.data."""
    for batch in make(records, cache_bytes=cache_bytes):
        assert batch["image"].dtype == np.uint8
        assert batch["image"].shape == (4, *SIZE, 3)
        assert batch["mask"].dtype == np.uint8
        assert batch["mask"].shape == (4, *SIZE)
        for k, row in enumerate(batch["index"]):
            if row < 0:
                continue
            record = records[int(row)]
            assert np.array_equal(batch["image"][k], ops.prepare_image(record.image, SIZE))
            truth = masks.decode(record.segmentation, record.height, record.width)
            expected = Image.fromarray(truth).resize(SIZE[::-1], Image.Resampling.NEAREST)
            assert np.array_equal(batch["mask"][k], expected)
            ids, mask, _ = TOKENIZER.encode([record.text])
            assert np.array_equal(batch["text_ids"][k], ids[0])
            assert np.array_equal(batch["text_mask"][k], mask[0])


def test_overlapping_polygons_become_background():
    picture = np.zeros((8, 8, 3), np.uint8)
    parts = [[0, 0, 6, 0, 6, 6, 0, 6], [3, 3, 8, 3, 8, 8, 3, 8]]
    path = Record(_png(picture), 8, 8, parts, "red ring", "", 0, 0, 0, "val")
    (batch,) = make(Records.from_list([path]), image_size=(8, 8))
    assert batch["mask"][0, 4, 4] == 0
    assert batch["mask"][0, 1, 1] == 1
    assert batch["mask"][0, 7, 7] == 1


def _png(pixels):
    from input_pipeline.shapes_render import encode_png

    return encode_png(pixels)


def test_evaluation_shows_everything_once_in_order(records):
    n = len(records)
    for batch_size in (4, n, n + 3, 1):
        batches = list(make(records, batch_size=batch_size))
        assert len(batches) == len(make(records, batch_size=batch_size)) == -(-n // batch_size)
        index = np.concatenate([b["index"] for b in batches])
        valid = np.concatenate([b["valid"] for b in batches])
        assert index.dtype == np.int32
        assert index[valid].tolist() == list(range(n))
        assert (index[~valid] == -1).all()
        assert len(valid) == len(batches) * batch_size


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
@pytest.mark.parametrize("train", [False, True])
def test_processes_show_the_slices_of_the_global_batch(records, train, cache_bytes):
    options = dict(train=train, batch_size=6, cache_bytes=cache_bytes)
    whole = take(make(records, **options), 5)
    parts = [take(make(records, share=range(2 * p, 2 * p + 2), **options), 5) for p in range(3)]
    glued = [
        {k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_same(whole, glued)


def test_epochs_follow_each_other_without_gap_or_repetition(records):
    n = len(records)
    loader = make(records, train=True, sentences="all", batch_size=5)
    shown = np.concatenate([loader.rows(step) for step in range(n)])  # 5 epochs
    for epoch in range(5):
        part = shown[epoch * n : (epoch + 1) * n]
        assert sorted(part) == list(range(n))
        assert np.array_equal(part, epoch_order(n, 3, epoch))
    assert len({tuple(shown[e * n : (e + 1) * n]) for e in range(5)}) == 5
    assert loader.steps_per_epoch == n / 5
    other = make(records, train=True, sentences="all", batch_size=5, seed=4)
    assert not np.array_equal(other.rows(0), loader.rows(0)) or not np.array_equal(
        other.rows(1), loader.rows(1)
    )


def test_one_sentence_per_object_and_epoch(records):
    objects = sorted(set(records.objects.tolist()))
    loader = make(records, train=True, batch_size=len(objects))
    epochs = [loader.rows(step) for step in range(40)]
    for rows in epochs:
        assert sorted(records.objects[rows]) == objects
    shown = np.bincount(np.concatenate(epochs), minlength=len(records))
    assert (shown > 0).all()  # every sentence comes up in the end
    for o in objects:
        rows = np.nonzero(records.objects == o)[0]
        assert shown[rows].sum() == 40
        assert len(rows) == 1 or shown[rows].max() < 38


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
@pytest.mark.parametrize("sentences", ["one", "all"])
def test_a_start_at_any_step_continues_the_same_stream(records, sentences, cache_bytes):
    options = dict(train=True, sentences=sentences, cache_bytes=cache_bytes)
    stream = take(make(records, **options), 30)
    assert_same(stream[17:], take(make(records, start_step=17, **options), 13))
    assert make(records, start_step=10**9, **options).rows(10**9).shape == (4,)


def test_memory_and_tf_data_agree_bit_by_bit(records):
    for train in (False, True):
        few, many = (take(make(records, train=train, cache_bytes=c), 9) for c in (0, 2**30))
        assert_same(few, many)
    assert_same(take(make(records, prefetch=0), 9), take(make(records, prefetch=3, workers=1), 9))


def test_a_selection_of_records_is_loaded_as_such(records):
    rows = [7, 2, 11]
    (batch,) = make(records.select(rows))
    whole = next(iter(make(records, batch_size=len(records))))
    for name in ("image", "mask", "text_ids"):
        assert np.array_equal(batch[name][:3], whole[name][rows])


def test_loaders_can_be_read_twice(records):
    loader = make(records)
    assert_same(list(loader), list(loader))


@pytest.mark.parametrize("sentences", ["one", "all"])
def test_another_number_of_processes_neither_repeats_nor_skips(records, sentences):
    """Stopped at step 7 on one process, at step 11 on three, then on two: the epochs are those of one long run."""
    options = dict(train=True, sentences=sentences, batch_size=6)
    shown = []
    for first, last, processes in ((0, 7, 1), (7, 11, 3), (11, 40, 2)):
        loaders = [
            make(records, share=share, start_step=first, **options)
            for share in np.split(np.arange(options["batch_size"]), processes)
        ]
        streams = [take(loader, last - first) for loader in loaders]
        for parts in zip(*streams, strict=True):
            shown += [int(row) for part in parts for row in part["index"]]
    epoch = make(records, **options).epoch_size
    assert len(shown) > 2 * epoch
    for start in range(0, len(shown) - epoch + 1, epoch):
        rows = shown[start : start + epoch]
        assert len(set(records.objects[rows].tolist() if sentences == "one" else rows)) == epoch
    assert shown == [int(row) for batch in take(make(records, **options), 40) for row in batch["index"]]


def test_threads_end_with_their_consumer(records):
    stream = iter(make(records, train=True))
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_long_sentences_are_reported_once(records, monkeypatch):
    said = []
    monkeypatch.setattr(loading.logging, "warning", lambda text, *values: said.append(text % values))
    make(records)
    assert not said
    Loader(records, Tokenizer("shapes", max_length=4), batch_size=2, image_size=SIZE)
    assert len(said) == 1
    assert "longer than 4 tokens" in said[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(batch_size=0), "batch_size is 0"),
        (dict(train=True, sentences="two"), "sentences 'two'"),
    ],
)
def test_impossible_arguments_are_named(records, options, words):
    with pytest.raises(DataError, match=words):
        make(records, **options)
    with pytest.raises(DataError, match=r"has no examples"):
        make(records[:0])


def test_epoch_order_is_a_function_of_seed_and_epoch():
    assert sorted(epoch_order(50, 0, 0)) == list(range(50))
    assert np.array_equal(epoch_order(50, 0, 1), epoch_order.__wrapped__(50, 0, 1))
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
