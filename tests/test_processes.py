"""Several real processes of one run: they equal one process, stop together, and say which of them is missing or gone."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from magnet_jax.errors import UserError
from magnet_jax.processes import Place, _Listener, _report, find_place
from tests.test_train import final_state, losses

ROOT = Path(__file__).parents[1]
TINY = ("--config.loss.grounding=0", "--config.loss.alignment=0", "--config.train.log_every=1")
# Batches of eight over four devices, however many processes have them.
FLAGS = ("--config=configs/debug.py", *TINY, "--config.data.batch_size=8")
STEPS = 12
BACKWARDS = {0: {"REVERSED": "1"}, 1: {"REVERSED": "1"}}


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(workdir, count, devices, *flags, environment=None, absent=()):
    """Starts the processes of a run; `environment`: of some of them, by number."""
    command = [sys.executable, "-m", "tests.one_process", f"--workdir={workdir}", *flags]
    command.append(f"--config.cpu_devices={devices}")
    if count > 1:
        command += [f"--coordinator=localhost:{free_port()}", f"--process_count={count}"]
    return [
        subprocess.Popen(
            command + ([f"--process_index={index}"] if count > 1 else []),
            cwd=ROOT,
            env=os.environ
            | {"XLA_FLAGS": ""}
            | (environment or {}).get(index, {}),  # conftest adds its own again.
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
        if index not in absent
    ]


def finish(processes, timeout=240):
    """Exit codes and what was said, on stdout and stderr."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*said, strict=True)


def run(*args, **options):
    codes, out, err = finish(start(*args, **options))
    assert codes == [0] * len(codes), err
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone")
    run(workdir, 1, 4, *FLAGS)
    return workdir


def assert_equal(workdir, other):
    """The same run up to rounding: sums over devices may take another order between processes."""
    states = final_state(workdir), final_state(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *states)
    np.testing.assert_allclose(losses(workdir), losses(other), rtol=1e-5)
    assert [step for step, _ in losses(workdir)] == list(range(1, STEPS + 1))


def evaluated(workdir, count, devices, environment=None):
    """What `--mode=eval` finds in a run."""
    run(workdir, count, devices, *FLAGS, "--mode=eval", environment=environment)
    return json.loads((workdir / "results.json").read_text())


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_two_processes_equal_one_and_one_of_them_killed_stops_the_other(tmp_path, alone, killed):
    """Killed after step 9, when a first checkpoint is whole; then both go on."""
    codes, out, err = finish(start(tmp_path, 2, 2, *FLAGS, environment={killed: {"STOP": "9:SIGKILL"}}))
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1
    assert f"error: process {killed} (on " in err[1 - killed].splitlines()[-1]
    assert "is gone; see what it said last, and start all again" in err[1 - killed]
    assert not (tmp_path / "results.json").exists()
    out = run(tmp_path, 2, 2, *FLAGS)
    assert "going on from the checkpoint of step" in out[0]
    # One process speaks, beside a library of XLA's, whose threads break into each other's lines.
    gloo = r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+"
    assert re.sub(gloo, "", out[1]).split() == []
    assert_equal(tmp_path, alone)
    panels = [sorted(path.name for path in folder.glob("panels/step_12/*")) for folder in (tmp_path, alone)]
    assert panels[0] == panels[1] != []


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path, alone):
    run(tmp_path, 4, 1, *FLAGS)
    assert_equal(tmp_path, alone)


@pytest.mark.slow
def test_four_processes_stop_together_and_their_checkpoint_goes_on_with_one_device_and_with_eight(tmp_path):
    flags = (*FLAGS, "--config.train.steps=40")
    codes, out, err = finish(start(tmp_path / "1", 4, 1, *flags, environment={2: {"STOP": "3:SIGTERM"}}))
    assert codes == [0] * 4, err
    assert "and saved; the same command goes on from there" in out[0]
    shutil.copytree(tmp_path / "1", tmp_path / "8")
    run(tmp_path / "straight", 1, 4, *flags)
    for devices in ("1", "8"):
        assert "going on from the checkpoint of step" in run(tmp_path / devices, 1, devices, *flags)[0]
        states = (final_state(tmp_path / name, 40) for name in (devices, "straight"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *states)


@pytest.mark.slow
def test_metrics_are_those_of_one_process_to_the_digit(alone):
    """Also where the mesh goes through the processes backwards, and where devices of two processes hold the same rows."""
    expected = evaluated(alone, 1, 4)
    assert evaluated(alone, 2, 2) == expected
    assert evaluated(alone, 2, 2, BACKWARDS) == expected
    run(alone, 2, 2, *FLAGS, "--mode=eval", "--config.mesh=(('model',2),('data',2))")
    assert json.loads((alone / "results.json").read_text()) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [("--config.parallelism=pmap",), ("--config.mesh=(('data',2),('fsdp',2))",)]
)
def test_other_forms_of_parallelism_in_two_processes(tmp_path, alone, flags):
    run(tmp_path, 2, 2, *FLAGS, *flags)
    assert_equal(tmp_path, alone)


@pytest.mark.slow
def test_rows_follow_the_mesh_in_training(tmp_path, alone):
    run(tmp_path, 2, 2, *FLAGS, environment=BACKWARDS)
    assert_equal(tmp_path, alone)


def test_a_process_that_is_missing_is_named_and_nothing_is_written(tmp_path):
    workdir = tmp_path / "run"
    codes, _, err = finish(start(workdir, 3, 1, *FLAGS, "--patience=4", absent=(1,)))
    assert codes == [1, 1]
    for said in err:
        assert said.count("\n") == 1
        assert said.startswith("error: process 1 of 3 did not report to localhost:")
        assert "within 4 s" in said
    assert not workdir.exists()


# ------------------------------------------------------------------------------------- the roll call alone, in threads


def gather(count, port, patience=5.0):
    """Process 0 in a thread; returns where its answer or its error will be."""
    found = {}

    def listen():
        try:
            found["links"], found["port"] = _Listener(Place(f"localhost:{port}", count, 0), patience).gather()
        except UserError as error:
            found["error"] = str(error)

    thread = threading.Thread(target=listen)
    thread.start()
    found["thread"] = thread
    return found


def test_the_roll_call_hears_all_whoever_comes_first_and_strangers():
    port, answers = free_port(), {}

    def report(index):
        answers[index] = _report(Place(f"localhost:{port}", 3, index), 5.0)

    late = threading.Thread(target=report, args=(2,))
    late.start()  # Before anybody listens.
    time.sleep(0.5)
    found = gather(3, port)
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"[" * 4000 + b"\n", b'{"process": "1"}\n', b""):
        while True:
            with (
                contextlib.suppress(ConnectionRefusedError),
                socket.create_connection(("localhost", port)) as stranger,
            ):
                stranger.sendall(words)
                break
    report(1)
    late.join()
    found["thread"].join()
    assert {link.process for link in found["links"]} == {1, 2}
    assert {port for _, port in answers.values()} == {found["port"]}
    for link in (*found["links"], answers[1][0][0], answers[2][0][0]):
        link.connection.close()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((2, 1), "was started with --process_count=2, process 0 with 3; start all again"),
        ((5, 4), "was started with --process_count=5, process 0 with 3; start all again"),
    ],
)
def test_a_process_of_another_run_ends_both(place, message):
    port = free_port()
    found = gather(3, port)
    with pytest.raises(UserError, match=message.split(";")[0]):
        _report(Place(f"localhost:{port}", *place), 5.0)
    found["thread"].join()
    assert message in found["error"]


def test_two_processes_of_one_number_are_named():
    port = free_port()
    found = gather(3, port)
    errors = []

    def report():
        with pytest.raises(UserError) as raised:
            _report(Place(f"localhost:{port}", 3, 1), 5.0)
        errors.append(str(raised.value))

    threads = [threading.Thread(target=report) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in (*threads, found["thread"]):
        thread.join()
    assert "were both started with --process_index=1" in found["error"]
    assert all("were both started with --process_index=1" in error for error in errors)
    assert len(errors) == 2


def test_a_coordinator_that_is_not_there_and_a_port_that_is_taken():
    port = free_port()
    with pytest.raises(UserError, match=rf"process 0 did not answer at localhost:{port} within -4 s"):
        _report(Place(f"localhost:{port}", 2, 1), -4.0)
    taken = rf"process 0 cannot listen at localhost:{port} \(Address already in use\)"
    with socket.create_server(("localhost", port)), pytest.raises(UserError, match=taken):
        _Listener(Place(f"localhost:{port}", 2, 0), 5.0).gather()


def test_places_come_from_flags_environment_and_slurm(monkeypatch):
    with pytest.raises(
        UserError, match="--coordinator, --process_count, --process_index: not given, and no cluster"
    ):
        find_place()
    with pytest.raises(UserError, match="--process_count, --process_index: not given"):
        find_place("localhost:1000")
    assert find_place("localhost:1000", 4, 3) == Place("localhost:1000", 4, 3)
    for name, value in (("COORDINATOR_ADDRESS", "head:2000"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        monkeypatch.setenv(f"JAX_{name}", value)
    assert find_place() == Place("head:2000", 2, 0)
    assert find_place(index=1) == Place("head:2000", 2, 1)
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(UserError, match="JAX_PROCESS_ID is 'one'; expected a number"):
        find_place()
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}")
    slurm = {"JOB_ID": "4096", "STEP_NODELIST": "node[007-009]", "NTASKS": "24", "STEP_NUM_TASKS": "24"}
    for name, value in (slurm | {"PROCID": "9", "LOCALID": "1"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = find_place()
    assert place.coordinator.startswith("node007:")
    assert (place.count, place.index, place.devices) == (24, 9, (1,))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("localhost", 2, 0), "--coordinator is 'localhost'; expected the address of process 0 as host:port"),
        (("localhost:99999", 2, 0), "--coordinator is 'localhost:99999'"),
        (("localhost:1000", 2, 2), "--process_index is 2 of --process_count 2; expected 0 to count - 1"),
    ],
)
def test_places_that_cannot_be(place, message):
    with pytest.raises(UserError, match=message):
        Place(*place)
