"""A run killed fifty times, at any moment and in the middle of saves, ends with the parameters of one that was not."""

import multiprocessing
import random
import signal
import time

import pytest

from magnet_jax.train import train
from tests.test_train import assert_same_run
from tests.tiny import tiny_config, tiny_network

KILLS, STEPS, LONGEST = 50, 2000, 0.8


def make_config():
    """Saves nearly all the time."""
    config = tiny_config()
    config.train.steps, config.train.eval_every, config.train.log_every = STEPS, 0, 1
    config.checkpoint.every_steps, config.checkpoint.keep = 3, 2
    return config


def run(workdir):
    """In a process of its own."""
    with tiny_network():
        train(make_config(), workdir)


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    with tiny_network():
        train(make_config(), undisturbed)
    # Everything is imported once; forked from there, a process starts in a second.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.conftest", "tests.test_kills"])
    rng = random.Random(0)
    torn = reached = kills = 0
    while kills < KILLS:
        process = processes.Process(target=run, args=(disturbed,))
        process.start()
        if kills:  # The first ones may hit the start of the run itself, later ones its steps.
            before = _last_line(disturbed)
            while process.is_alive() and _last_line(disturbed) == before:
                time.sleep(0.01)
        process.join(rng.uniform(0, LONGEST) if kills else 2.0)
        assert process.exitcode is None, "it ended by itself"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        steps = sorted(int(path.name) for path in disturbed.glob("checkpoints/*") if path.name.isdecimal())
        torn += bool(list(disturbed.glob("checkpoints/*tmp*")))
        if steps:
            assert steps[-1] >= reached - 3
            reached = max(reached, steps[-1])
    assert torn > 5, "kills in the middle of saves"
    assert 20 < reached < STEPS
    process = processes.Process(target=run, args=(disturbed,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_same_run(disturbed, undisturbed, STEPS)


def _last_line(workdir):
    """Number of lines of the history; None while there is none."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else None
