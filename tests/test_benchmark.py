"""The benchmark of a tiny network: what it measures, prints and writes."""

import contextlib
import json
from unittest import mock

import jax
import pytest

from magnet_jax import programs
from magnet_jax.benchmark import benchmark, check_plugins
from magnet_jax.errors import UserError
from magnet_jax.network import Network
from tests.tiny import TinyModel, tiny_config


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("benchmark")
    with mock.patch.object(programs, "build_network", return_value=Network(TinyModel())):
        return workdir, benchmark(tiny_config(), workdir, ("eval", "train"), repetitions=3)


def test_report_is_written_and_consistent(report):
    workdir, result = report
    assert json.loads((workdir / "benchmark.json").read_text()) == json.loads(json.dumps(result))
    assert set(result["steps"]) == {"eval", "train"}
    for row in result["steps"].values():
        assert len(row["seconds"]) == 3
        low, middle, high = row["quartiles"]
        assert low <= middle == row["median_seconds"] <= high
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["median_seconds"])
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["median_seconds"])
        rate = result["devices"] * result["rates"]["matmul"]
        assert row["share_of_matmul_rate"] == pytest.approx(row["flops_per_second"] / rate)
        assert row["peak_bytes"] > 10**7
        assert row["parts"]


def test_train_steps_are_told_part_by_part(report):
    parts = report[1]["steps"]["train"]["parts"]
    assert parts["optimizer"]["forward"] > 0
    assert parts["losses"]["forward"] > 0
    assert parts["losses"]["backward"] > 0
    assert all(row["backward"] == 0 for row in report[1]["steps"]["eval"]["parts"].values())


def test_what_is_refused_writes_nothing(tmp_path):
    config = tiny_config()
    config.data.batch_size = 3
    with pytest.raises(UserError, match="config.data.batch_size is 3; this machine needs a multiple of 2"):
        benchmark(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_traces_are_kept(report):
    assert {path.name for path in (report[0] / "trace").iterdir()} == {"eval", "train"}


def test_plugins_of_absent_hardware_are_told_before_the_profiler_crashes(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "jax_cuda12_plugin")
    with (
        jax_platforms(None),
        pytest.raises(UserError, match="jax_cuda12_plugin is installed .* set JAX_PLATFORMS=cpu"),
    ):
        check_plugins()
    with jax_platforms("cpu"):
        check_plugins()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with jax_platforms(None):
        check_plugins()


@contextlib.contextmanager
def jax_platforms(value):
    former = jax.config.jax_platforms
    jax.config.update("jax_platforms", value)
    yield
    jax.config.update("jax_platforms", former)
