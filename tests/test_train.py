"""The training loop on a tiny network: files, exact resume, divergence, configurations."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from input_pipeline import Tokenizer
from magnet_jax import train as train_module
from magnet_jax.checkpoint import Checkpointer
from magnet_jax.errors import UserError
from magnet_jax.log import Log
from magnet_jax.network import build_network
from magnet_jax.train import check_same_words, train
from magnet_jax.trained import load_trained
from magnet_jax.workdir import History, load_config
from tests.tiny import tiny_config, tiny_network

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _tiny():
    with tiny_network():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never stopped."""
    workdir = tmp_path_factory.mktemp("finished")
    with tiny_network():
        results = train(tiny_config(), workdir)
    return workdir, results


def final_state(workdir, step=12):
    """All arrays of the last checkpoint, as saved."""
    checkpointer = Checkpointer(workdir, read_only=True)
    assert checkpointer.latest_step() == step
    saved = checkpointer._manager.item_metadata(step)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # The run may have had other devices.
    target = {
        item: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved[item].tree
        )
        for item in ("variables", "rest")
    }
    restores = {item: ocp.args.StandardRestore(tree) for item, tree in target.items()}
    found = checkpointer._manager.restore(step, args=ocp.args.Composite(**restores))
    checkpointer.close()
    return jax.tree.map(np.asarray, {item: found[item] for item in target})


def assert_same_run(workdir, other, step=12):
    """Same parameters and optimizer state bit for bit, same history."""
    a, b = final_state(workdir, step), final_state(other, step)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()
    # Every step has a loss line here; later ones of a stopped run must have been forgotten.
    assert losses(workdir) == losses(other)


def losses(workdir):
    return [(row["step"], row["train/loss"]) for row in History(workdir).read() if "train/loss" in row]


def every_step(config):
    config.train.log_every = 1
    return config


def stop_at(step, how):
    """Does `how()` when the log line of a step is written."""
    original = Log.train

    def line(self, at, metrics):
        original(self, at, metrics)
        if at == step:
            how()

    return mock.patch.object(Log, "train", line)


def test_run_leaves_everything(finished):
    workdir, results = finished
    for name in ("config.json", "tokenizer/vocab.txt", "results.json", "curves.png", "metrics.jsonl"):
        assert (workdir / name).stat().st_size > 0, name
    assert len(list(workdir.glob("panels/step_12/val_*.png"))) == 2
    assert list(workdir.glob("events.out.tfevents.*"))
    assert json.loads((workdir / "results.json").read_text()) == results
    val = results["val"]
    for protocol, figure in (("squash", "oIoU"), ("original", "mIoU"), ("gres", "gIoU")):
        assert 0 <= val[protocol][figure] <= 100
        assert val[protocol]["count"] == 20
        counts = [figures["count"] for figures in val[protocol]["types"].values()]
        assert sum(counts) == 20
        assert val["shuffled_text"][protocol]["types"].keys() == val[protocol]["types"].keys()
    assert 0 < val["constant_mask"]["oIoU"] < 100
    assert load_config(workdir).data.has_absent is False  # Looked for in the training split.


def test_history_has_losses_speed_and_figures(finished):
    rows = History(finished[0]).read()
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 4, 8, 12]
    line = rows[1]
    assert {"train/loss/bce", "train/loss/dice", "train/grad_norm", "train/learning_rate"} <= line.keys()
    assert "train/images_per_second" in line
    assert [row["step"] for row in rows if "val/squash/oIoU" in row] == [6, 12]


def test_a_finished_run_is_only_evaluated_again(finished):
    workdir, results = finished
    before, rows = final_state(workdir), History(workdir).read()
    assert train(tiny_config(), workdir) == results
    jax.tree.map(np.testing.assert_array_equal, before, final_state(workdir))
    assert History(workdir).read() == rows


def test_run_killed_again_and_again_ends_the_same(tmp_path, finished_every_step):
    program = """if True:
        import os, signal, sys
        import tests.conftest
        from tests.test_train import every_step, stop_at, tiny_config, tiny_network, train
        with tiny_network(), stop_at(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)):
            train(every_step(tiny_config()), sys.argv[1])
    """
    for step in (2, 5, 9):  # Before the first checkpoint; while that of step 4 may be half-written; later.
        ended = subprocess.run([sys.executable, "-c", program, tmp_path, str(step)], cwd=ROOT)
        assert ended.returncode == -signal.SIGKILL
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "train/lo')  # A torn line.
    train(every_step(tiny_config()), tmp_path)
    assert_same_run(tmp_path, finished_every_step)


def test_sigterm_saves_at_the_step_boundary(tmp_path, finished_every_step, capsys):
    config = every_step(tiny_config())
    with stop_at(7, lambda: signal.raise_signal(signal.SIGTERM)):
        assert train(config, tmp_path) == {}
    assert "stopped at step 7" in capsys.readouterr().out
    assert Checkpointer(tmp_path, read_only=True).latest_step() == 7
    assert not (tmp_path / "results.json").exists()
    train(config, tmp_path)
    assert_same_run(tmp_path, finished_every_step)


def test_a_run_that_goes_on_tells_of_the_same_steps(tmp_path, finished):
    """Not of its own first one, which would stand among means of many as an outlier."""
    original, steps = Checkpointer.save, []

    def save(self, step, *rest):
        original(self, step, *rest)
        steps.append(step)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(Checkpointer, "save", save):
        assert train(tiny_config(), tmp_path) == {}
    assert steps[-1] == 5
    train(tiny_config(), tmp_path)
    assert (
        [step for step, _ in losses(tmp_path)] == [step for step, _ in losses(finished[0])] == [1, 4, 8, 12]
    )


@pytest.fixture(scope="module")
def finished_every_step(tmp_path_factory):
    """A run that was never stopped, with a log line for every step."""
    workdir = tmp_path_factory.mktemp("every_step")
    with tiny_network():
        train(every_step(tiny_config()), workdir)
    return workdir


def test_log_interval_leaves_parameters_alone(finished, finished_every_step):
    jax.tree.map(np.testing.assert_array_equal, final_state(finished[0]), final_state(finished_every_step))


def test_seed_matters(tmp_path, finished_every_step):
    config = every_step(tiny_config())
    config.seed = 1
    train(config, tmp_path)
    assert losses(tmp_path) != losses(finished_every_step)


def test_divergence_names_step_term_and_last_good_checkpoint(tmp_path):
    original = train_module.configured_train_step

    def make(*args, **options):
        step = original(*args, **options)

        def poisoned(state, batch):
            state, metrics = step(state, batch)
            factor = jax.numpy.where(state.step >= 6, jax.numpy.nan, 1.0)
            metrics["loss/dice"] *= factor
            return state.replace(params=jax.tree.map(lambda p: p * factor, state.params)), metrics

        return poisoned

    config = tiny_config()
    config.train.eval_every = 0
    with (
        mock.patch.object(train_module, "configured_train_step", make),
        pytest.raises(UserError, match=r"loss/dice not finite at step 6; last good checkpoint: step 4"),
    ):
        train(config, tmp_path)
    assert Checkpointer(tmp_path, read_only=True).latest_step() == 4
    assert not (tmp_path / "results.json").exists()


def test_divergence_is_seen_before_a_save_between_log_lines(tmp_path):
    config = tiny_config()
    config.optimizer.learning_rate = 1e30
    config.train.log_every = 100
    config.train.eval_every = 0
    config.checkpoint.every_steps = 3
    with pytest.raises(UserError, match=r"not finite at step \d; last good checkpoint: none"):
        train(config, tmp_path)
    assert Checkpointer(tmp_path, read_only=True).latest_step() is None


def test_other_configuration_is_refused_and_named(finished):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes()
    config = tiny_config()
    config.optimizer.learning_rate = 0.5
    config.data.batch_size = 2
    with pytest.raises(UserError) as error:
        train(config, workdir)
    message = str(error.value)
    assert "\n" not in message
    assert "data.batch_size is 4 there and 2 here" in message
    assert "optimizer.learning_rate is 0.001 there and 0.5 here" in message
    assert (workdir / "config.json").read_bytes() == before


def test_another_vocabulary_of_as_many_words_is_refused(finished, tmp_path):
    workdir, _ = finished
    words = (workdir / "tokenizer" / "vocab.txt").read_text().split("\n")
    words[10], words[11] = words[11], words[10]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = tiny_config()
    config.data.vocab = str(workdir / "tokenizer" / "vocab.txt")
    assert check_same_words(workdir, Tokenizer(config.data.vocab, 16)) is None
    with pytest.raises(UserError, match="is another vocabulary than"):
        check_same_words(workdir, Tokenizer(str(tmp_path / "vocab.txt"), 16))


def test_whether_absence_is_known_comes_from_the_run_whatever_configuration_is_given(tmp_path, finished):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    own = json.loads((workdir / "config.json").read_text())
    own["data"]["has_absent"] = True
    (workdir / "config.json").write_text(json.dumps(own))
    assert load_trained(workdir).knows_absence
    assert load_trained(workdir, tiny_config()).knows_absence


def test_fields_that_leave_training_alone_may_change(finished):
    workdir, _ = finished
    config = tiny_config()
    config.eval.protocols = ("squash",)
    config.eval.shuffled_text = False
    config.train.log_every = 3
    assert set(train(config, workdir)["val"]) == {"squash", "constant_mask"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.batch_size", 3, r"config.data.batch_size is 3; expected a multiple of the 2 devices"),
        ("eval.protocols", ("squish",), r"config.eval.protocols is .*squish.*expected some of"),
        ("optimizer.schedule", "exponential", r"config.optimizer.schedule is 'exponential'; expected"),
        ("optimizer.name", "sgd", r"config.optimizer.name is 'sgd'; expected 'adamw' or 'muon'"),
        (
            "checkpoint.best_metric",
            "squash/IoU",
            r"best_metric is 'squash/IoU'; expected one of squash/oIoU, squash/mIoU",
        ),
        ("seed", -1, r"config.seed is -1; expected 0 to 4294967295"),
        ("mesh", (("data", 0), ("fsdp", -1)), r"config.mesh is .*; expected sizes of 1 or more"),
        (
            "optimizer.lr_multipliers",
            (3,),
            r"config.optimizer.lr_multipliers is \(3,\); expected pairs of an expression and a number",
        ),
        (
            "optimizer.lr_multipliers",
            (("head", "fast"),),
            r"lr_multipliers is \(\('head', 'fast'\),\); expected pairs of an expression and a number",
        ),
        ("optimizer.no_decay", (3,), r"config.optimizer.no_decay has '3', which is no regular expression"),
        ("optimizer.no_decay", ("*",), r"config.optimizer.no_decay has '\*', which is no regular expression"),
        ("init.magnet", "nowhere", r"config.init.magnet is 'nowhere'.*convert weights with it first"),
        ("init.swin", "nowhere", r"config.init.swin is 'nowhere'.*convert weights with it first"),
        ("init.lavt", "nowhere", r"config.init.lavt does not fit config.model.name 'magnet'"),
        ("mesh", (("data", 3),), r"config.mesh is .* does not fit the 2 devices"),
        (
            "sharding",
            ((".*", "zero"),),
            r"tactic 'zero'; expected 'replicate', 'fsdp' or an axis of config.mesh",
        ),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_is_written(tmp_path, field, value, message):
    config = tiny_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_is_refused_before_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "build_network", build_network)
    monkeypatch.setattr(train_module.input_pipeline, "load_split", mock.Mock(side_effect=AssertionError))
    config = tiny_config()
    config.model.pixel_decoder.sampling = "window"
    with pytest.raises(
        UserError, match=r"config.model.pixel_decoder.sampling is 'window'; expected 'auto' or"
    ):
        train(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_steps_follow_from_epochs(tmp_path):
    config = tiny_config()
    config.train.steps, config.train.epochs = 0, 1
    config.data.options.scenes = 1
    config.data.batch_size = 2
    config.train.eval_every = 0
    config.eval.examples = 2
    train(config, tmp_path)
    words = json.loads((tmp_path / "results.json").read_text())["val"]["squash"]["count"]
    assert words == 2
    records = len(train_module.input_pipeline.load("shapes", "train", seed=0, **config.data.options))
    assert Checkpointer(tmp_path, read_only=True).latest_step() == records // 2


def test_no_thread_of_the_loader_is_left(tmp_path, finished):
    assert not [thread for thread in threading.enumerate() if thread.name == "loader" and thread.is_alive()]
