"""Compiled programs are kept, found again, and never taken from others."""

import os

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from magnet_jax import compile_cache
from magnet_jax.compile_cache import keep_compiled


@pytest.fixture(autouse=True)
def _settings(monkeypatch, tmp_path):
    """As in a program that has just started, with every program worth keeping."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(compile_cache, "_ours", None)
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def compile_something():
    """The same program, compiled from nothing each time."""
    jax.jit(lambda x: x * 3 + 1).lower(np.ones(5, np.float32)).compile()


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.name.endswith("-cache"))


def test_programs_are_kept_in_the_run_and_found_again(tmp_path):
    keep_compiled(tmp_path / "run")
    compile_something()
    kept = files(tmp_path / "run" / "compiled")
    assert kept
    compile_something()
    assert files(tmp_path / "run" / "compiled") == kept
    keep_compiled(tmp_path / "other")
    compile_something()
    assert files(tmp_path / "run" / "compiled") == kept
    assert files(tmp_path / "other")


def test_nobody_else_can_know_the_folder(tmp_path, monkeypatch):
    keep_compiled(tmp_path / "run")
    mine = jax.config.jax_compilation_cache_dir
    keep_compiled(tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir == mine
    secret = tmp_path / "home" / "magnet-jax" / "secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_bytes()) == 32
    assert [path.name for path in secret.parent.iterdir()] == ["secret"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "somebody"))
    keep_compiled(tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir != mine


def test_a_place_that_jax_was_told_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    keep_compiled(tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "told")


def test_in_a_run_that_can_only_be_read_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    keep_compiled(tmp_path)
    assert jax.config.jax_compilation_cache_dir is None


def test_without_a_place_for_the_secret_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled(tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir is None
