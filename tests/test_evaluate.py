"""Evaluation: protocols, controls and resizing against independent forms; independence of batching."""

import numpy as np
import pytest

import input_pipeline
from input_pipeline import Tokenizer, masks
from magnet_jax.evaluate import Evaluator, other_pairs, table, upsample
from magnet_jax.sharding import make_mesh
from tests.tiny import tiny_config

MESH = make_mesh((("data", -1),))


def config_with(**fields):
    config = tiny_config()
    config.eval.examples = 0
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def tokenizer():
    return Tokenizer("shapes", 16)


def truth_step(params, batch):
    """Answers with the true mask, at full resolution, whatever the sentence."""
    mask = np.asarray(batch["mask"])
    return {
        "mask_logits": np.where(mask, 4.0, -4.0).astype(np.float32),
        "class_logits": np.tile(np.float32([0, 1]), (len(mask), 1)),
        "intersection": mask.astype(np.int32).sum((1, 2)),
        "union": mask.astype(np.int32).sum((1, 2)),
    }


def text_step(params, batch):
    """Answers with a rectangle that depends on the image and on the words."""
    mask, ids = np.asarray(batch["mask"]) > 0, np.asarray(batch["text_ids"]).astype(np.int64)
    image = np.asarray(batch["image"])
    edge = (np.abs(image[:, 0, 0, 0]) * 100).astype(int) + ids.sum(1)
    columns = np.arange(mask.shape[2])
    prediction = (columns[None, None] < (edge % mask.shape[2])[:, None, None]) & np.ones_like(mask)
    return {
        "mask_logits": np.where(prediction, 1.0, -1.0).astype(np.float32),
        "class_logits": np.stack([edge % 3 == 0, edge % 3 != 0], 1).astype(np.float32),
        "intersection": (prediction & mask).sum((1, 2)),
        "union": (prediction | mask).sum((1, 2)),
    }


def test_the_truth_scores_100_and_words_do_not_matter_to_it():
    results, pictures = Evaluator(truth_step, tokenizer(), config_with(), MESH)(None, "val", panels=3)
    for figures in (results, results["shuffled_text"]):
        assert figures["squash"]["oIoU"] == figures["original"]["mIoU"] == figures["gres"]["gIoU"] == 100.0
        assert figures["squash"]["Pr@0.9"] == 100.0
    assert len(pictures) == 3
    for picture in pictures:
        np.testing.assert_array_equal(picture.truth, picture.prediction)


@pytest.mark.parametrize("batch_size", [2, 6, 64])
def test_figures_do_not_depend_on_the_batch_size(batch_size):
    expected, _ = Evaluator(text_step, tokenizer(), config_with(), MESH)(None, "val")
    config = config_with(eval__batch_size=batch_size)
    assert Evaluator(text_step, tokenizer(), config, MESH)(None, "val")[0] == expected
    assert 0 < expected["squash"]["oIoU"] < 100


def test_figures_equal_a_plain_loop():
    config = config_with(data__image_size=48)  # Not the images' own size, so that the protocols differ.
    results, _ = Evaluator(text_step, tokenizer(), config, MESH)(None, "val")
    records = input_pipeline.load("shapes", "val", seed=0, **config.data.options)
    loader = input_pipeline.Loader(records, tokenizer(), batch_size=1, image_size=(48, 48))
    squash, original, nothing = [], [], []
    for record, batch in zip(records, loader, strict=True):
        output = text_step(None, batch)
        squash.append((output["intersection"][0], output["union"][0]))
        # Columns of the upsampled logits are positive up to where the aligned grids cross zero.
        columns = np.interp(np.arange(32) * 47 / 31, np.arange(48), output["mask_logits"][0, 0]) > 0
        truth = masks.decode(record.segmentation, 32, 32, "union") > 0
        prediction = np.broadcast_to(columns, (32, 32))
        original.append(((prediction & truth).sum(), (prediction | truth).sum()))
        nothing.append(output["class_logits"][0, 0] > output["class_logits"][0, 1] or not prediction.any())
    for name, counts in (("squash", squash), ("original", original)):
        i, u = np.array(counts).T
        assert results[name]["oIoU"] == pytest.approx(100 * i.sum() / u.sum())
        assert results[name]["mIoU"] == pytest.approx(100 * np.mean(i / u))
        assert results[name]["count"] == len(records)
        for kind, figures in results[name]["types"].items():
            chosen = np.array([record.type == kind for record in records])
            assert figures["oIoU"] == pytest.approx(100 * i[chosen].sum() / u[chosen].sum())
    i, u = np.array(original).T
    assert results["gres"]["gIoU"] == pytest.approx(100 * np.mean(np.where(nothing, 0, i / u)))
    assert results["gres"]["T-acc"] == pytest.approx(100 * np.mean(~np.array(nothing)))


def test_shuffled_pass_gives_each_image_the_partners_sentence():
    calls = []

    def step(params, batch):
        calls.append({name: np.asarray(batch[name]) for name in ("image", "text_ids", "text_mask")})
        return text_step(params, batch)

    config = config_with()
    Evaluator(step, tokenizer(), config, MESH)(None, "val")
    records = input_pipeline.load("shapes", "val", seed=0, **config.data.options)
    ids, words, _ = tokenizer().encode(records.texts)
    partner = other_pairs(records.image_rows, config.seed)
    plain, shuffled = (
        {name: np.concatenate([call[name] for call in part])[: len(records)] for name in part[0]}
        for part in (calls[0::2], calls[1::2])
    )
    np.testing.assert_array_equal(plain["text_ids"], ids)
    np.testing.assert_array_equal(shuffled["text_ids"], ids[partner])
    np.testing.assert_array_equal(shuffled["text_mask"], words[partner])
    np.testing.assert_array_equal(shuffled["image"], plain["image"])


@pytest.mark.parametrize("seed", range(5))
def test_other_pairs_is_a_derangement_over_images(seed):
    rng = np.random.default_rng(seed)
    images = np.sort(rng.integers(0, 40, 200))
    partner = other_pairs(images, seed)
    assert sorted(partner) == list(range(200))
    assert (images[partner] != images).all()
    np.testing.assert_array_equal(partner, other_pairs(images, seed))
    assert (partner != other_pairs(images, seed + 1)).any()


@pytest.mark.parametrize("images", [[0, 0], [7, 7, 7], [1, 2], [0, 0, 0, 5]])
def test_other_pairs_never_keeps_a_sentence(images):
    partner = other_pairs(np.array(images), 0)
    assert sorted(partner) == list(range(len(images)))
    assert (partner != np.arange(len(images))).all()


def test_upsample_is_bilinear_with_aligned_corners():
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    large = upsample(logits, (13, 10))
    for y in range(13):
        for x in range(10):
            sy, sx = y * 4 / 12, x * 6 / 9
            y0, x0 = min(int(sy), 3), min(int(sx), 5)
            fy, fx = sy - y0, sx - x0
            top = logits[y0, x0] * (1 - fx) + logits[y0, x0 + 1] * fx
            bottom = logits[y0 + 1, x0] * (1 - fx) + logits[y0 + 1, x0 + 1] * fx
            assert large[y, x] == pytest.approx(top * (1 - fy) + bottom * fy, abs=1e-5)
    np.testing.assert_array_equal(upsample(logits, (5, 7)), logits)


def test_table_shows_every_figure():
    results, _ = Evaluator(text_step, tokenizer(), config_with(), MESH)(None, "val", examples=10)
    text = table({"val": results})
    for value in (results["squash"]["oIoU"], results["gres"]["gIoU"], results["constant_mask"]["oIoU"]):
        assert f"{value:.2f}" in text
    for kind, figures in results["shuffled_text"]["squash"]["types"].items():
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [kind]][:1]
        assert f"{figures['oIoU']:.2f}" in line
    assert results["squash"]["count"] == 10
