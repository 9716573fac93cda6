"""What is asked of the C library, and when. That steps are faster for it is no matter of a test."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import jax
import pytest

from magnet_jax import host_memory
from magnet_jax.host_memory import keep_freed_memory, start_with_huge_pages


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
    # Own memory for blocks of 1 GB only (-3), nothing given back (-1), and much asked for at a time (-2).
    asked = {-3: 2**30, -1: -1, -2: 2**28} if called else {}
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


@pytest.mark.parametrize(
    ("setting", "platform", "variable", "libc", "anew"),
    [
        ("always [madvise] never", "linux", None, "glibc 2.36", True),
        ("[always] madvise never", "linux", None, "glibc 2.36", False),
        ("always madvise [never]", "linux", None, "glibc 2.36", False),
        (None, "linux", None, "glibc 2.36", False),
        ("always [madvise] never", "darwin", None, "glibc 2.36", False),
        ("always [madvise] never", "linux", "glibc.malloc.check=0", "glibc 2.36", False),
        ("always [madvise] never", "linux", None, None, False),
    ],
)
def test_programs_start_anew_where_huge_pages_are_to_be_asked_for(
    tmp_path, monkeypatch, setting, platform, variable, libc, anew
):
    file = tmp_path / "enabled"
    if setting is not None:
        file.write_text(setting + "\n")
    monkeypatch.setattr(host_memory, "_HUGE_PAGES", file)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "confstr", lambda name: libc)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if variable is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", variable)
    started = mock.Mock()
    monkeypatch.setattr(os, "execve", started)
    start_with_huge_pages()
    assert started.call_count == anew
    if anew:
        program, arguments, environment = started.call_args.args
        assert program == sys.executable
        assert arguments == sys.orig_argv
        assert environment == {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def test_a_program_that_starts_anew_is_the_same(tmp_path):
    """Same process, arguments and words, once."""
    (tmp_path / "enabled").write_text("[madvise]")
    program = f"""
import os, pathlib, sys
print("start", os.getpid(), *sys.argv[1:], flush=True)
from magnet_jax import host_memory
host_memory._HUGE_PAGES = pathlib.Path({str(tmp_path / "enabled")!r})
host_memory.start_with_huge_pages()
print("end", os.environ.get("GLIBC_TUNABLES"), "jax" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", program, "--a=the red ring", "b"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = run.communicate()[0].splitlines()
    assert run.returncode == 0
    assert lines[:2] == [f"start {run.pid} --a=the red ring b"] * 2
    assert lines[2:] == ["end glibc.malloc.hugetlb=1 False"]
