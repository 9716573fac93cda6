"""One split of the built-in set through every form that data have: the same pictures, and the same figures."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from input_pipeline import Augmentation, Tokenizer, load, load_split, masks, ops, splits
from input_pipeline.__main__ import main
from input_pipeline.mixed import identity
from magnet_jax.evaluate import evaluate
from magnet_jax.train import train
from tests.tiny import tiny_config, tiny_network

SCENES, SIDE = 12, 32
FORMS = ("shapes", "jsonl", "refer", "tfds")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The set on disk, written and, for TFDS, built by the commands that users have."""
    folder = tmp_path_factory.mktemp("forms")
    found = {"shapes": ""}
    for form in FORMS[1:]:
        found[form] = str(folder / form)
        flags = [
            "shapes",
            f"--out={found[form]}",
            f"--format={form}",
            f"--scenes={SCENES}",
            f"--image_size={SIDE}",
        ]
        assert main(flags) == 0
    assert main(["build_tfds", f"--manual={found['tfds']}", f"--root={folder / 'built'}"]) == 0
    return found | {"tfds": str(folder / "built")}


def config_of(form, roots):
    config = tiny_config()
    config.data.source, config.data.root = form, roots[form]
    if form != "shapes":
        config.data.options = ConfigDict()
    else:
        config.data.options.scenes = SCENES
    config.eval.examples = 0
    return config


def pairs(records):
    """Every example whatever its order: sentence and mask, with the picture."""
    tokenizer = Tokenizer("shapes", 16)
    found = {}
    for record in records:
        mask = masks.decode(record.segmentation, record.height, record.width)
        ids = tokenizer.encode([record.text])[0]
        key = record.text, mask.tobytes(), ids.tobytes()
        assert key not in found
        found[key] = np.asarray(ops.open_image(record.image)).astype(int)
    return found


def test_tfds_and_the_tree_know_each_others_pictures(roots):
    """By COCO's numbers, since TFDS has no names."""
    tree, tfds = (load_split(config_of(form, roots).data, "val") for form in ("refer", "tfds"))
    known = [{identity(records, row) for row in range(len(records.images))} for records in (tree, tfds)]
    assert known[0] == known[1]
    assert len(known[0]) == SCENES
    parts = {form: {"source": form, "root": roots[form]} for form in ("refer", "tfds")}
    trained = load("mixed", "train", parts=parts)
    assert len(trained) == 2 * len(load_split(config_of("refer", roots).data, "train"))


@pytest.mark.parametrize("split", ["train", "val", "testA"])
def test_the_same_pictures_masks_and_sentences(roots, split):
    direct, lines, tree, tfds = (pairs(load_split(config_of(form, roots).data, split)) for form in FORMS)
    assert direct.keys() == lines.keys() == tree.keys() == tfds.keys()
    assert len(direct) > 50
    for key in direct:
        np.testing.assert_array_equal(lines[key], direct[key])
        np.testing.assert_array_equal(tfds[key], tree[key])
        assert np.abs(tree[key] - direct[key]).mean() < 4  # JPEG.


def test_the_same_figures_of_the_same_weights_which_tfds_trained(roots, tmp_path):
    config = config_of("tfds", roots)
    config.train.steps, config.train.eval_every, config.checkpoint.every_steps = 30, 0, 30
    with tiny_network():
        trained = train(config, str(tmp_path))["val"]
        results = {form: evaluate(str(tmp_path), config_of(form, roots))["val"] for form in FORMS}
    for protocol in ("squash", "original", "gres"):
        figures = {
            form: {name: value for name, value in result[protocol].items() if name != "types"}
            for form, result in results.items()
        }
        assert figures["tfds"]["count"] == len(load_split(config.data, "val"))
        assert figures["tfds"] == pytest.approx({k: v for k, v in trained[protocol].items() if k != "types"})
        assert figures["tfds"] == pytest.approx(figures["refer"])
        assert figures["shapes"] == pytest.approx(figures["jsonl"])
        main_figure = "oIoU" if protocol != "gres" else "cIoU"
        assert 0 < figures["shapes"][main_figure] < 100
        assert figures["shapes"][main_figure] == pytest.approx(
            figures["refer"][main_figure], abs=1.0
        )  # JPEG.


def test_a_mixture_trains_and_is_evaluated_part_by_part(roots, tmp_path):
    config = tiny_config()
    config.data.source, config.data.options = "mixed", ConfigDict()
    config.data.options.parts = {
        "tree": {"source": "refer", "root": roots["refer"]},
        "lines": {"source": "jsonl", "root": roots["jsonl"]},
    }
    config.data.monitor_split, config.data.eval_splits = "tree/val", ("tree/val", "lines/testB")
    config.train.steps, config.train.eval_every, config.checkpoint.every_steps = 6, 3, 3
    config.eval.per_expression = True
    with tiny_network():
        results = train(config, tmp_path)
    assert list(results) == ["tree/val", "lines/testB"]
    for split in results:
        assert (tmp_path / "expressions" / f"{split}.csv").exists()
        assert (tmp_path / "panels" / "step_6" / f"{split}.png").exists()
    assert (tmp_path / "curves.png").exists()
    alone = load_split(config_of("jsonl", roots).data, "testB")
    assert results["lines/testB"]["squash"]["count"] == min(len(alone), config.eval.examples or len(alone))


@pytest.mark.parametrize(
    "name",
    [
        path.stem
        for path in (Path(__file__).parent.parent / "configs").glob("*.py")
        if path.stem not in ("__init__", "ablation")  # The latter changes others.
    ],
)
def test_every_configuration_names_data_that_exist(name):
    """Sources and splits; the files themselves are the user's."""
    config = importlib.import_module(f"configs.{name}").get_config()
    data = config.data
    Augmentation(**data.augment.to_dict())
    if data.source == "jsonl":
        return  # Its splits are in the file.
    names = splits(data.source, root=data.root, **data.options.to_dict())
    assert {data.split, data.monitor_split, *data.eval_splits} <= set(names)
