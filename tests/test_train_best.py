"""Which checkpoint is the best one of a training."""

import signal
from unittest import mock

import pytest

from magnet_jax import train as train_module
from magnet_jax.checkpoint import Checkpointer
from magnet_jax.train import train
from magnet_jax.workdir import History
from tests.test_train import every_step, stop_at
from tests.tiny import tiny_config, tiny_network


@pytest.fixture(autouse=True)
def _tiny():
    with tiny_network():
        yield


def test_best_checkpoint_survives(tmp_path):
    config = tiny_config()
    config.train.eval_every = 2
    config.checkpoint.keep = 1
    config.checkpoint.every_steps = 100
    scores = iter([10.0, 30.0, 20.0, 25.0, 5.0, 7.0])
    with mock.patch.object(train_module, "best_score", side_effect=scores):
        train(config, tmp_path)
    checkpointer = Checkpointer(tmp_path, read_only=True)
    assert checkpointer._manager.best_step() == 4
    assert sorted(checkpointer._manager.all_steps()) == [4, 12]
    assert checkpointer.best_score() == 30.0


def test_the_last_step_may_be_the_best(tmp_path):
    config = tiny_config()
    config.train.eval_every = 5
    with mock.patch.object(train_module, "best_score", side_effect=iter([10.0, 20.0, 30.0])):
        train(config, tmp_path)
    assert Checkpointer(tmp_path, read_only=True)._manager.best_step() == 12
    logged = [row["step"] for row in History(tmp_path).read() if "val/squash/oIoU" in row]
    assert logged == [5, 10, 12]  # The last one once, of the whole split.


def test_best_score_is_remembered_over_a_restart(tmp_path):
    config = every_step(tiny_config())
    config.train.eval_every = 2
    config.checkpoint.every_steps = 1
    scores = iter([50.0, 40.0, 30.0, 60.0, 20.0, 10.0])
    with mock.patch.object(train_module, "best_score", side_effect=scores):
        with stop_at(5, lambda: signal.raise_signal(signal.SIGTERM)):
            train(config, tmp_path)
        assert Checkpointer(tmp_path, read_only=True).best_score() == 50.0
        train(config, tmp_path)
    assert Checkpointer(tmp_path, read_only=True).best_score() == 60.0
