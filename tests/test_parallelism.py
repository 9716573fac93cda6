"""Every form of parallelism computes the same: losses and parameters after five steps, with all randomness on."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import debug
from magnet_jax.errors import UserError
from magnet_jax.parallelism import make_parallelism
from magnet_jax.sharding import make_mesh
from tests.parallel_forms import FORMS

ROOT = Path(__file__).parent.parent


def results(name, folder):
    out = folder / f"{name}.npz"
    environment = os.environ | {"XLA_FLAGS": ""}  # conftest adds its own again.
    command = [sys.executable, "-m", "tests.parallel_forms", name, str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    with np.load(out) as found:
        return dict(found)


def of_form(found, form, kind):
    prefix = f"{form}|{kind}|"
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def check(found, forms):
    metrics, arrays = (of_form(found, "one device", kind) for kind in ("metrics", "arrays"))
    assert np.ptp(metrics["loss"]) > 0
    assert metrics["left_out"].tolist() == [1] * 5
    for form in forms:
        others = of_form(found, form, "metrics")
        assert others.keys() == metrics.keys()
        for key, value in metrics.items():
            np.testing.assert_allclose(others[key], value, rtol=1e-5, atol=1e-7, err_msg=f"{form}: {key}")
        others = of_form(found, form, "arrays")
        assert others.keys() == arrays.keys()
        for key, value in arrays.items():
            np.testing.assert_allclose(others[key], value, atol=1e-5, err_msg=f"{form}: {key}")


def check_bytes(found):
    """The state is really divided: what one device of eight, and of two, holds of it."""
    held = {form: int(found[f"{form}|bytes"]) for form in FORMS if f"{form}|bytes" in found}
    whole = held["one device"]
    assert held["data"] == held["pmap"] == whole
    assert held["fsdp"] < 0.35 * whole  # Some arrays have no dimension that eight divides.
    assert 0.5 * whole <= held["data x fsdp"] < 0.7 * whole


def test_a_stand_in_in_every_form(tmp_path):
    found = results("stand_in", tmp_path)
    check(found, list(FORMS)[1:])
    check_bytes(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lavt", "magnet"])
def test_the_networks_in_every_form(tmp_path, name):
    found = results(name, tmp_path)
    check(found, [form for form in FORMS if f"{form}|bytes" in found][1:])
    check_bytes(found)


def test_forms_that_cannot_be():
    config = debug.get_config()
    config.parallelism = "pjit"
    mesh = make_mesh(config.mesh)
    with pytest.raises(UserError, match="config.parallelism is 'pjit'; expected 'jit' or 'pmap'"):
        make_parallelism(config, mesh)
    config.parallelism, config.sharding = "pmap", ((".*", "fsdp"),)
    with pytest.raises(UserError, match="config.parallelism is 'pmap', which only copies"):
        make_parallelism(config, mesh)
    config.sharding = ((".*", "replicate"),)
    with pytest.raises(UserError, match="config.mesh must be"):
        make_parallelism(config, make_mesh((("data", 1), ("fsdp", -1))))


def test_states_keep_every_bit_on_the_way_to_pmap_and_back():
    config = debug.get_config()
    config.parallelism = "pmap"
    ways = make_parallelism(config, make_mesh((("data", -1),)))
    state = {"a": np.arange(6.0).reshape(2, 3), "b": np.int32(4)}
    placed = jax.device_put(state, jax.sharding.NamedSharding(ways.mesh, jax.sharding.PartitionSpec()))
    own = ways.to_own(placed)
    assert own["a"].shape == (2, 2, 3)
    back = ways.to_global(own)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value)
        assert back[key].sharding.is_fully_replicated
