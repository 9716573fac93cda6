"""Two networks side by side: who is in which group, the pictures, and what cannot be compared."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from magnet_jax import compare as module
from magnet_jax.compare import compare, groups
from magnet_jax.train import train
from magnet_jax.visualize import panel
from tests.tiny import tiny_config, tiny_network


def test_groups():
    ious = np.array(
        [[0.5, 0.1, 0.9, 0.0, 0.8, np.nan, 0.49, 0.2], [0.9, 0.7, 0.3, 0.1, 0.5, 0.9, 0.499, 0.5]]
    )
    found = groups(ious, ["A", "B"])
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "A wrong, B right": [1, 7],  # The least IoU of A first.
        "A right, B wrong": [2],
        "both wrong": [3, 6],
        "both right": [4, 0],
    }


def test_panel_has_a_picture_for_every_network():
    image = np.full((20, 30, 3), 100, np.uint8)
    left, right = np.zeros((2, 20, 30), bool)
    left[:, :10], right[:, 20:] = True, True
    one = panel(image, "x", left, {"a": left}, side=40)
    two = panel(image, "x", left, {"a": left, "b": right}, side=40)
    assert one.shape[0] == two.shape[0]
    width = two.shape[1] - one.shape[1]
    assert width >= 60
    np.testing.assert_array_equal(two[34:74, : 3 * width], one[34:74, : 3 * width])
    third, fourth = (two[34:74, start : start + 60] for start in (4 + 2 * width, 4 + 3 * width))
    np.testing.assert_array_equal(fourth[:, ::-1], third)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small trainings."""
    found = []
    for seed in (0, 1):
        config = tiny_config()
        config.seed, config.train.steps, config.eval.protocols = seed, 4, ("squash",)
        config.eval.examples = 0
        found.append(str(tmp_path_factory.mktemp("run") / str(seed)))
        with tiny_network():
            train(config, found[-1])
    return found


def test_of_two_runs(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "RIGHT", 0.05)  # Which such networks reach now and then.
    with tiny_network():
        counts = compare(runs, ["A", "B"], "val", 2, str(tmp_path / "x.png"))
    said = capsys.readouterr().out
    ious = []
    for run in runs:
        (file,) = (module.Path(run) / "compared").glob("*.csv")
        rows = list(csv.DictReader(io.StringIO(file.read_text())))
        ious.append([float(row["squash IoU"]) for row in rows])
        results = json.loads((module.Path(run) / "results.json").read_text())
        assert np.mean(ious[-1]) * 100 == pytest.approx(results["val"]["squash"]["mIoU"], abs=1e-4)
    a, b = np.array(ious) >= 0.05
    assert counts == {
        "A wrong, B right": (~a & b).sum(),
        "A right, B wrong": (a & ~b).sum(),
        "both wrong": (~a & ~b).sum(),
        "both right": (a & b).sum(),
    }
    assert sum(count > 0 for count in counts.values()) > 1
    assert f"both wrong: {counts['both wrong']} expressions of val" in said
    assert Image.open(tmp_path / "x.png").size[0] > 4 * 160


def test_what_cannot_be_compared_is_one_line(runs, tmp_path, capsys):
    def fails(*arguments):
        assert module.main(list(arguments)) == 1
        return capsys.readouterr().err

    both = f"--runs={','.join(runs)}"
    assert "--runs has 1 run directories; give two" in fails(
        f"--runs={runs[0]}", f"--output={tmp_path}/x.png"
    )
    assert "--labels is 'A'; give a name of its own" in fails(both, "--labels=A")
    assert "expected a name that ends in .png" in fails(both, "--output=x.gif")
    assert "--count is 0; expected 1 or more" in fails(both, "--count=0")
    assert "nothing.png" not in fails(f"--runs={runs[0]},{tmp_path}/none", f"--output={tmp_path}/x.png")
    file = module.Path(runs[1]) / "config.json"
    config = json.loads(file.read_text())
    config["data"]["options"]["flavour"] = "refcoco"
    other = tmp_path / "other"
    other.mkdir()
    for each in module.Path(runs[1]).iterdir():
        (other / each.name).symlink_to(each)
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps(config))
    with tiny_network():
        found = fails(f"--runs={runs[0]},{other}", f"--output={tmp_path}/x.png")
    assert "differ in config.data.options" in found
    config = json.loads(file.read_text())
    config["data"]["seed"] += 1
    (other / "config.json").write_text(json.dumps(config))
    with tiny_network():
        assert "differ in config.data.seed" in fails(
            f"--runs={runs[0]},{other}", f"--output={tmp_path}/x.png"
        )
    config["data"]["seed"] -= 1
    config["data"]["options"]["cache_dir"] = str(tmp_path)
    (other / "config.json").write_text(json.dumps(config))
    with tiny_network():
        module.load_both([runs[0], str(other)])  # Where data are kept makes no difference.
    assert not (tmp_path / "x.png").exists()
