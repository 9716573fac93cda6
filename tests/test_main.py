"""The command line as a user meets it: a whole run of the real network, and one clear line for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from configs import debug
from input_pipeline import ops

ROOT = Path(__file__).parents[1]
CONFIG = "--config=configs/debug.py"


def cli(*arguments, check=False):
    """Runs main.py; with `check` it must succeed."""
    command = [sys.executable, "main.py", *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert not check or ended.returncode == 0, ended.stderr
    return ended


def assert_one_line(ended, *parts):
    """Failed with exactly one line on stderr, which holds every part."""
    assert ended.returncode in (1, 2), ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory made by the command line, and what it printed."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, cli(CONFIG, f"--workdir={workdir}", check=True)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """An image file that is not square, larger than the model's input."""
    record = input_pipeline.load("shapes", "val", seed=0, **debug.get_config().data.options)[0]
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    ops.open_image(record.image).resize((70, 45)).save(path)
    return path


def test_training_prints_progress_and_writes_results(run):
    workdir, ended = run
    assert "Traceback" not in ended.stderr
    for term in ("bce", "dice", "class", "grounding", "pixel_to_pixel", "pixel_to_text", "grad norm", "lr"):
        assert f"{term} " in ended.stdout
    assert "steps/s" in ended.stdout
    assert "images/s" in ended.stdout
    assert "left" in ended.stdout
    results = json.loads((workdir / "results.json").read_text())
    assert set(results["val"]) == {"squash", "original", "gres", "shuffled_text", "constant_mask"}


def test_eval_needs_only_the_workdir_and_agrees_with_training(run):
    workdir, _ = run
    trained = json.loads((workdir / "results.json").read_text())
    (workdir / "results.json").unlink()
    ended = cli("--mode=eval", f"--workdir={workdir}", check=True)
    assert "val" in ended.stdout
    assert json.loads((workdir / "results.json").read_text()) == trained


def test_fields_of_a_run_are_changed_without_its_configuration(run):
    workdir, _ = run
    former = (workdir / "results.json").read_bytes()
    fields = (
        "--config.eval.protocols=('squash',)",
        "--config.eval.examples=2",
        "--config.checkpoint.load=best",
    )
    cli("--mode=eval", f"--workdir={workdir}", *fields, check=True)
    results = json.loads((workdir / "results.json").read_text())
    (workdir / "results.json").write_bytes(former)
    assert results["val"]["squash"]["count"] == 2
    assert "original" not in results["val"]


def test_predict_writes_overlay_and_mask_of_the_images_size(run, scene, tmp_path):
    output = tmp_path / "new" / "out.png"
    text = "--text=the red circle"
    ended = cli(
        "--mode=predict", f"--workdir={run[0]}", f"--image={scene}", text, f"--output={output}", check=True
    )
    assert "warning" not in ended.stderr
    assert Image.open(output).size == (70, 45)
    mask = Image.open(tmp_path / "new" / "out.mask.png")
    assert mask.size == (70, 45)
    assert mask.mode == "L"
    assert set(np.unique(np.asarray(mask))) <= {0, 255}
    assert sorted(os.listdir(output.parent)) == ["out.mask.png", "out.png"]


def test_predict_numbers_several_sentences_and_warns(run, scene, tmp_path):
    output = tmp_path / "out.png"
    long = " ".join(["red"] * 40)
    texts = ["--text=the red circle\nthe zebra", f"--text={long}"]
    ended = cli(
        "--mode=predict", f"--workdir={run[0]}", f"--image={scene}", *texts, f"--output={output}", check=True
    )
    names = [f"out.{i}{suffix}" for i in range(3) for suffix in (".mask.png", ".png")]
    assert sorted(os.listdir(tmp_path)) == names
    warnings = [line for line in ended.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "vocabulary lacks: zebra" in warnings[0]
    assert "longer than 16 tokens" in warnings[1]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([CONFIG, "--config.optimizer.learning_rat=1"], ["learning_rat", "learning_rate"]),
        ([CONFIG, "--config.train.steps=many"], ["steps", "many"]),
        ([CONFIG, "--mode=test"], ["mode", "test", "train"]),
        (["--config=configs/absent.py"], ["configs/absent.py"]),
        (["--config=configs/ablation_shapes.py:magic"], ["unknown variant 'magic'", "lavt_mg"]),
        ([CONFIG, "--wrkdir=x"], ["wrkdir"]),
        ([CONFIG, "eval"], ["'eval' is not a flag"]),
        ([], ["--config is missing"]),
        (["--config.seed=1"], ["--config is missing, and --workdir holds no run"]),
        (["--mode=eval"], ["no run in"]),
    ],
)
def test_wrong_flags(tmp_path, arguments, parts):
    workdir = tmp_path / "run"
    assert_one_line(cli(f"--workdir={workdir}", *arguments), *parts)
    assert not workdir.exists()


def test_workdir_is_needed():
    assert_one_line(cli(CONFIG), "--workdir is missing")


def test_workdir_of_another_configuration(run):
    before = sorted(run[0].rglob("*"))
    ended = cli(CONFIG, f"--workdir={run[0]}", "--config.data.batch_size=8")
    assert_one_line(ended, str(run[0]), "data.batch_size is 4 there and 8 here", "another --workdir")
    assert sorted(run[0].rglob("*")) == before


def test_checkpoint_of_other_shapes(run):
    ended = cli("--mode=eval", CONFIG, f"--workdir={run[0]}", "--config.model.mask_predictor.feedforward=48")
    assert_one_line(
        ended, "does not fit the configuration", "(32,) instead of (48,)", "(16, 32) instead of (16, 48)"
    )


@pytest.mark.parametrize(
    ("image", "text", "part"),
    [
        ("absent.png", "the circle", "absent.png"),
        ("notes.png", "the circle", "notes.png"),
        ("cut.png", "the circle", "cut.png"),
        ("scene.png", " ", "--text is empty"),
        ("scene.png", None, "--text is missing"),
    ],
)
def test_wrong_inputs_of_predict(run, scene, tmp_path, image, text, part):
    (tmp_path / "notes.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(scene.read_bytes()[:300])
    (tmp_path / "scene.png").write_bytes(scene.read_bytes())
    arguments = ["--mode=predict", f"--workdir={run[0]}", f"--image={tmp_path / image}"]
    arguments += [f"--output={tmp_path / 'out.png'}"] + ([] if text is None else [f"--text={text}"])
    assert_one_line(cli(*arguments), part)
    assert not list(tmp_path.glob("*out*"))


def test_output_that_cannot_be_written(run, scene, tmp_path):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "out.png"
    arguments = [f"--workdir={run[0]}", f"--image={scene}", "--text=the circle", f"--output={output}"]
    assert_one_line(cli("--mode=predict", *arguments), str(tmp_path / "file"))


@pytest.mark.parametrize("workdir", ["file", "file/run", "/proc/run"])
def test_workdir_that_cannot_be_written(tmp_path, workdir):
    (tmp_path / "file").write_text("kept")
    assert_one_line(cli(CONFIG, f"--workdir={tmp_path / workdir}"), workdir)
    assert (tmp_path / "file").read_text() == "kept"


def test_disk_that_refuses_to_take_more(tmp_path):
    program = """if True:
        import resource, sys
        import tests.conftest
        from tests.tiny import tiny_network
        sys.argv = ["main.py", "--config=configs/debug.py", *sys.argv[1:]]
        import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000))  # Longer files fail as on a full disk.
        with tiny_network():
            main.app.run(main.main, flags_parser=main.parse)
    """
    flags = ["--config.loss.grounding=0", "--config.loss.alignment=0", "--config.train.eval_every=0"]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    ended = subprocess.run(
        [sys.executable, "-c", program, f"--workdir={tmp_path}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"error: could not write a checkpoint to '{tmp_path}")
    assert not (tmp_path / "results.json").exists()
    assert not [path for path in (tmp_path / "checkpoints").glob("*") if path.name.isdigit()]


def test_out_of_memory_says_what_to_lower():
    program = """if True:
        import jax, main
        from absl import app
        def run(config):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\\nAnd more")
        main.run = run
        app.run(main.main, argv=["main.py"], flags_parser=main.parse)
    """
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert_one_line(ended, "out of memory", "config.train.accumulate", "config.data.batch_size", "99 bytes")
