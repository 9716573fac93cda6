"""One process of a run of the tiny network, by the command line: `python -m tests.one_process FLAGS`.

In the environment, STOP="7:SIGKILL" sends itself a signal after step 7, and REVERSED=1 makes meshes of the devices in
reversed order, so that the first process holds the last examples.
"""

import contextlib
import os
import signal
from unittest import mock

import jax
from absl import app

import main
import tests.conftest  # noqa: F401  # Fast compilation.
from magnet_jax import sharding, train, trained
from tests.test_train import stop_at
from tests.tiny import tiny_network


def reversed_mesh(axes, devices=None):
    """`sharding.make_mesh` of the devices from the last to the first."""
    return sharding.make_mesh(axes, (jax.devices() if devices is None else devices)[::-1])


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        stack.enter_context(tiny_network())
        if "STOP" in os.environ:
            step, _, name = os.environ["STOP"].partition(":")
            how = lambda: os.kill(os.getpid(), signal.Signals[name])  # noqa: E731
            stack.enter_context(stop_at(int(step), how))
        if "REVERSED" in os.environ:
            for module in (train, trained):
                stack.enter_context(mock.patch.object(module, "make_mesh", reversed_mesh))
        app.run(main.main, flags_parser=main.parse)
