"""What is asked of the C library, and when. That steps are faster for it is no matter of a test."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import jax
import pytest

from magnet_jax.host_memory import keep_freed_memory


@pytest.mark.parametrize(
    ("backend", "platform", "called"),
    [("cpu", "linux", True), ("tpu", "linux", False), ("cpu", "darwin", False)],
)
def test_memory_is_kept_where_the_host_computes(backend, platform, called):
    library = SimpleNamespace(mallopt=mock.Mock(return_value=1))
    with (
        mock.patch.object(jax, "default_backend", return_value=backend),
        mock.patch.object(sys, "platform", platform),
        mock.patch.object(ctypes, "CDLL", return_value=library),
    ):
        keep_freed_memory()
    # No memory of its own for large blocks (-4), nothing given back (-1), and much asked for at a time (-2).
    asked = {-4: 0, -1: -1, -2: 2**28} if called else {}
    assert dict(call.args for call in library.mallopt.call_args_list) == asked


def test_another_c_library_is_left_alone():
    with mock.patch.object(ctypes, "CDLL", return_value=SimpleNamespace()):
        keep_freed_memory()


def test_program_takes_the_setting():
    """In a process of its own, since it stays."""
    program = """
import jax
from magnet_jax.host_memory import compute_in_main_thread, keep_freed_memory

compute_in_main_thread()
keep_freed_memory()
assert jax.jit(lambda x: x + 1)(1) == 2
"""
    subprocess.run([sys.executable, "-c", program], check=True)
