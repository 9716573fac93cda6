"""A run killed fifty times, at any moment and in the middle of saves, ends with the parameters of one that was not."""

import multiprocessing
import os
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
    torn = reached = 0
    for kill in range(KILLS):
        lines, begun, complete = _last_line(disturbed), _begun(disturbed), _complete(disturbed)
        process = processes.Process(target=run, args=(disturbed,))
        process.start()
        # The first kill may hit the start of the run itself, the others its steps: in turn one at a random moment, one in
        # the middle of a save, and one some time after a save, so that the run goes on however slow the machine is.
        if kill:
            _wait(process, lambda lines=lines: _last_line(disturbed) != lines)
        if kill % 3 == 1:
            _wait(process, lambda begun=begun: _begun(disturbed) - begun)
        elif kill % 3 == 2:
            _wait(process, lambda complete=complete: _complete(disturbed) > complete)
        if kill % 3 != 1:
            process.join(rng.uniform(0, LONGEST) if kill else 2.0)
        assert process.exitcode is None, "it ended by itself"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        torn += bool(_begun(disturbed))
        assert _complete(disturbed) >= reached - 3
        reached = max(reached, _complete(disturbed))
    assert torn > 5, "kills in the middle of saves"
    assert 20 < reached < STEPS
    process = processes.Process(target=run, args=(disturbed,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_same_run(disturbed, undisturbed, STEPS)


def _wait(process, happened):
    while process.is_alive() and not happened():
        time.sleep(0.01)


def _begun(workdir):
    """Saves that are not complete: their names, and the numbers of their folders in the file system."""
    return {(entry.name, entry.inode()) for entry in _checkpoints(workdir) if "tmp" in entry.name}


def _complete(workdir):
    """Step of the last complete checkpoint; 0 where there is none."""
    return max((int(entry.name) for entry in _checkpoints(workdir) if entry.name.isdecimal()), default=0)


def _checkpoints(workdir):
    folder = workdir / "checkpoints"
    return list(os.scandir(folder)) if folder.exists() else []


def _last_line(workdir):
    """Number of lines of the history; None while there is none."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else None
