"""Evaluation: protocols, controls and resizing against independent forms; independence of batching."""

import csv

import numpy as np
import pytest
from ml_collections import ConfigDict

import input_pipeline
from input_pipeline import DataError, Tokenizer, masks
from magnet_jax.evaluate import Evaluator, other_pairs, upsample
from magnet_jax.sharding import make_mesh
from magnet_jax.table import table
from tests.test_input_pipeline_refer import TWO, instances, write_tree
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
    # Not the images' own size, so that the protocols differ.
    config = config_with(data__image_size=48, data__has_absent=True)
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


@pytest.mark.parametrize("fields", [{}, {"data__has_absent": True, "loss__class_": 0.0}])
def test_a_class_head_that_learnt_nothing_of_absence_is_not_asked(fields):
    def absent_step(params, batch):
        output = truth_step(params, batch)
        return output | {"class_logits": output["class_logits"][:, ::-1]}

    results, _ = Evaluator(absent_step, tokenizer(), config_with(**fields), MESH)(None, "val")
    assert results["gres"]["gIoU"] == results["gres"]["T-acc"] == 100.0


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


def test_a_line_for_every_expression(tmp_path):
    evaluator = Evaluator(text_step, tokenizer(), config_with(), MESH)
    results, _ = evaluator(None, "val", csv_file=tmp_path / "new" / "val.csv")
    with open(tmp_path / "new" / "val.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    records = input_pipeline.load("shapes", "val", seed=0, **config_with().data.options)
    assert [row["sentence"] for row in rows] == list(records.texts)
    assert [int(row["sentence_id"]) for row in rows] == records.sentence_ids.tolist()
    assert [int(row["object_id"]) for row in rows] == [record.object_id for record in records]
    assert [int(row["image_id"]) for row in rows] == [record.image_id for record in records]
    for protocol in ("squash", "original"):
        i, u = (np.array([int(row[f"{protocol} {figure}"]) for row in rows]) for figure in "IU")
        assert 100 * i.sum() / u.sum() == pytest.approx(results[protocol]["oIoU"])
        iou = [float(row[f"{protocol} IoU"]) for row in rows]
        assert 100 * np.mean(iou) == pytest.approx(results[protocol]["mIoU"], abs=1e-4)
    evaluator = Evaluator(text_step, tokenizer(), config_with(eval__protocols=("squash",)), MESH)
    evaluator(None, "val", csv_file=tmp_path / "squash.csv")
    assert "original" not in (tmp_path / "squash.csv").read_text().splitlines()[0]


def test_examples_that_cannot_be_read_are_left_out_and_counted(tmp_path):
    """The figures are those of the others alone."""
    config = config_with(eval__batch_size=2)
    config.data.source, config.data.options = "refer", ConfigDict()
    config.data.root, config.data.image_size = str(write_tree(tmp_path)), 40
    config.data.max_bad_share = 0.7
    whole, _ = Evaluator(text_step, tokenizer(), config, MESH)(None, "val")
    assert "left_out" not in whole
    content = instances()
    content["annotations"][0]["segmentation"] = {"size": [40, 60], "counts": [7]}
    write_tree(tmp_path, content=content)
    results, _ = Evaluator(text_step, tokenizer(), config, MESH)(None, "val", csv_file=tmp_path / "val.csv")
    assert results["left_out"] == {"count": 2}
    assert "left out  2 examples that cannot be read" in table({"val": results})
    for protocol in ("squash", "original", "gres"):
        assert results[protocol]["count"] == 1
    with open(tmp_path / "val.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["squash IoU"] == "" for row in rows] == [True, True, False]
    assert results["squash"]["mIoU"] == pytest.approx(100 * float(rows[2]["squash IoU"]), abs=1e-4)
    assert results["original"]["oIoU"] == pytest.approx(
        100 * int(rows[2]["original I"]) / int(rows[2]["original U"])
    )
    config.data.max_bad_share = 0.5
    with pytest.raises(DataError, match="split 'val': 2 of 3 examples cannot be used"):
        Evaluator(text_step, tokenizer(), config, MESH)(None, "val")


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_refer_tree_under_both_ground_truth_rules(tmp_path, batch_size):
    """Its first object has two polygons that overlap: background for 'squash', object for 'original'."""
    config = config_with(eval__batch_size=batch_size)
    config.data.source, config.data.options = "refer", ConfigDict()
    config.data.root = str(write_tree(tmp_path))
    config.data.image_size = 40
    results, _ = Evaluator(truth_step, tokenizer(), config, MESH)(None, "val", csv_file=tmp_path / "val.csv")
    assert results["squash"]["count"] == 3
    assert results["squash"]["oIoU"] == 100.0
    with open(tmp_path / "val.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["object_id"], row["sentence_id"]) for row in rows] == [("7", "70"), ("7", "71"), ("9", "90")]
    union = int(masks.decode(TWO, 40, 60, "union").sum())
    exactly_one = int(masks.decode(TWO, 40, 60, "exactly_one").sum())
    assert int(rows[0]["original U"]) >= union
    # The answer is upsampled from 40 x 40, so that its pixels are the rule's own only up to the border.
    assert float(rows[0]["original IoU"]) == pytest.approx(exactly_one / union, abs=0.1)
    assert float(rows[2]["original IoU"]) > 0.85
    assert results["original"]["oIoU"] < 95
